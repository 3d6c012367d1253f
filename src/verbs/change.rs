//! `vmpatch check`, `apply` and `rollback`: one shape of answer for all three.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};
use vmpatch_introspect::target::StopReport;
use vmpatch_introspect::{Gva, GvaRange};
use vmpatch_patcher::arena::{CallbackRecord, PatchRecord, SiteRole};
use vmpatch_patcher::link::layers::Stacking;
use vmpatch_patcher::patch;
use vmpatch_patcher::quiescence::Examined;
use vmpatch_patcher::verify::FunctionReport;

use crate::cli::{Apply, Change, Rollback};
use crate::exit::Failure;
use crate::flow::{self, Candidate};
use crate::report::{Output, table};
use crate::watch::Watch;

#[derive(Serialize)]
struct Answer {
    result: &'static str,
    vm: String,
    patch: String,
    digest: String,
    functions: Vec<Function>,
    /// Patches that were rolled back before it, because they lay upon it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cascaded: Vec<String>,
    /// Patches that were undone for it in the same stop.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    replaced: Vec<String>,
    /// Patches that waited for a module, and no longer do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    withdrawn: Vec<String>,
    /// Callbacks: of a check all that the patch has, else those that were called.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    callbacks: Vec<CallbackRecord>,
    attempts: u32,
    stop_window_us: f64,
    stop_us: StopTimes,
    stacks: usize,
    scanned_stacks: usize,
    phases_us: Map<String, Value>,
}

/// A patch that waits for modules.
#[derive(Serialize)]
struct HeldAnswer {
    result: &'static str,
    vm: String,
    patch: String,
    digest: String,
    absent: Vec<String>,
}

/// A patch that no longer waits.
#[derive(Serialize)]
struct Withdrawn {
    result: &'static str,
    vm: String,
    patch: String,
}

#[derive(Serialize)]
struct Function {
    name: String,
    site: Gva,
    replaced: Option<GvaRange>,
    /// The patch whose version of it is no longer in effect while this one is applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    over: Option<String>,
}

/// Parts of the stop, as the machine measured them. Microseconds.
#[derive(Serialize)]
struct StopTimes {
    kick: f64,
    registers: f64,
    write: f64,
    resume: f64,
}

impl From<StopReport> for StopTimes {
    fn from(report: StopReport) -> Self {
        Self {
            kick: microseconds(report.kick),
            registers: microseconds(report.registers),
            write: microseconds(report.write),
            resume: microseconds(report.resume),
        }
    }
}

/// To three places after the point, which is as fine as it is measured.
fn microseconds(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}

/// Goes through every gate and writes nothing.
pub(crate) fn check(asked: &Change, output: &Output) -> Result<(), Failure> {
    let watch = Watch::new(output.progress("checking"))?;
    let candidate = flow::meet(&asked.vm.vm, &asked.patch, &watch)?;
    let checked = candidate.check(stacking(asked), asked.limits, &watch)?;
    let (attempts, seen) = (checked.attempted.attempts, checked.attempted.applied);
    let stop = Stop {
        attempts,
        examined: seen.examined,
        report: seen.report,
    };
    let verified = &checked.verified;
    let undone = verified.switch.undone.iter();
    let answer = Answer {
        replaced: undone.map(|it| it.record.name.clone()).collect(),
        callbacks: verified.record.callbacks.clone(),
        ..answer(
            "checked",
            &asked.vm.vm,
            (&verified.record, &verified.functions),
            stop,
            &watch,
        )
    };
    watch.finish();
    output.answer(&answer, |answer| {
        format!(
            "patch {} fits; nothing was written\n{}",
            answer.patch,
            text(answer)
        )
    });
    Ok(())
}

/// Puts the patch in.
pub(crate) fn apply(asked: &Apply, output: &Output) -> Result<(), Failure> {
    let Apply {
        change: asked,
        strict,
    } = asked;
    let watch = Watch::new(output.progress("applying"))?;
    let candidate = flow::meet(&asked.vm.vm, &asked.patch, &watch)?;
    let absent = candidate.absent_modules();
    if !absent.is_empty() && !strict && !asked.replace {
        watch.finish();
        return hold(&candidate, &asked.vm.vm, absent, output);
    }
    let changed = candidate.apply(stacking(asked), asked.limits, &watch)?;
    let withdrawn = match asked.replace {
        true => withdraw_all(&asked.vm.vm, output)?,
        false => Vec::new(),
    };
    let aside = Aside {
        withdrawn,
        ..Aside::default()
    };
    report("applied", &asked.vm.vm, (&changed, aside), &watch, output);
    Ok(())
}

const fn stacking(asked: &Change) -> Stacking {
    match asked.replace {
        true => Stacking::Replace,
        false => Stacking::Upon,
    }
}

/// Keeps a patch until its modules are loaded.
fn hold(
    candidate: &Candidate,
    vm: &str,
    absent: Vec<String>,
    output: &Output,
) -> Result<(), Failure> {
    let file = candidate.hold()?;
    let answer = HeldAnswer {
        result: "pending",
        vm: vm.to_owned(),
        patch: file.patch().name.clone(),
        digest: file.digest().to_string(),
        absent,
    };
    output.answer(&answer, |answer| {
        format!(
            "patch {} waits for module {}, which is not loaded; `vmpatch reconcile --vm {}` applies it then",
            answer.patch,
            answer.absent.join(", "),
            answer.vm
        )
    });
    Ok(())
}

/// Lets go of all that wait; their names.
fn withdraw_all(vm: &str, output: &Output) -> Result<Vec<String>, Failure> {
    let held = flow::held(vm)?;
    let (waiting, notes) = held.all()?;
    notes.iter().for_each(|note| output.note(note));
    let mut names = Vec::new();
    for patch in waiting {
        if held.release(&patch.patch)? {
            names.push(patch.patch);
        }
    }
    Ok(names)
}

/// Lets go of a patch that only waits: nothing of it is in the guest.
fn withdraw(asked: &Rollback, output: &Output) -> Result<bool, Failure> {
    let vm = &asked.vm.vm;
    if !flow::held(vm)?.release(&asked.patch)? {
        return Ok(false);
    }
    let answer = Withdrawn {
        result: "withdrawn",
        vm: vm.clone(),
        patch: asked.patch.clone(),
    };
    output.answer(&answer, |answer| {
        format!(
            "patch {} no longer waits; nothing of it was in the guest",
            answer.patch
        )
    });
    Ok(true)
}

/// What is to be rolled back before the patch, the uppermost first.
fn above(asked: &Rollback, output: &Output) -> Result<Vec<String>, Failure> {
    if !asked.cascade {
        return Ok(Vec::new());
    }
    let watch = Watch::new(output.progress("looking"))?;
    let mut all = flow::cascade(&asked.vm.vm, &asked.patch, &watch)?;
    watch.finish();
    all.pop();
    Ok(all)
}

/// Takes the patch out.
pub(crate) fn roll_back(asked: &Rollback, output: &Output) -> Result<(), Failure> {
    if patch::check::patch_name(&asked.patch).is_ok() && withdraw(asked, output)? {
        return Ok(());
    }
    let vm = &asked.vm.vm;
    let cascaded = above(asked, output)?;
    for upper in &cascaded {
        let watch = Watch::new(output.progress(&format!("rolling back {upper}")))?;
        flow::roll_back(vm, upper, asked.skip_callbacks, asked.limits, &watch)?;
        watch.finish();
        output.note(&format!(
            "patch {upper} rolled back, which lay upon {}",
            asked.patch
        ));
    }
    let watch = Watch::new(output.progress("rolling back"))?;
    let changed = flow::roll_back(vm, &asked.patch, asked.skip_callbacks, asked.limits, &watch)?;
    let aside = Aside {
        cascaded,
        ..Aside::default()
    };
    report("rolled-back", vm, (&changed, aside), &watch, output);
    Ok(())
}

/// What became of other patches beside the stop of this one.
#[derive(Default)]
struct Aside {
    cascaded: Vec<String>,
    withdrawn: Vec<String>,
}

fn report(
    result: &'static str,
    vm: &str,
    (changed, aside): (&flow::Changed, Aside),
    watch: &Watch,
    output: &Output,
) {
    let (attempts, applied) = (changed.attempted.attempts, changed.attempted.applied);
    let stop = Stop {
        attempts,
        examined: applied.examined,
        report: applied.report,
    };
    let answer = Answer {
        cascaded: aside.cascaded,
        withdrawn: aside.withdrawn,
        replaced: changed.replaced.clone(),
        callbacks: changed.called.clone(),
        ..answer(
            result,
            vm,
            (&changed.record, &changed.functions),
            stop,
            watch,
        )
    };
    watch.finish();
    output.answer(&answer, |answer| {
        format!(
            "patch {} {}\n{}",
            answer.patch,
            answer.result.replace('-', " "),
            text(answer)
        )
    });
}

/// What came of the attempts: of the last one, what it saw and how long it took.
#[derive(Clone, Copy)]
struct Stop {
    attempts: u32,
    examined: Examined,
    report: StopReport,
}

fn answer(
    result: &'static str,
    vm: &str,
    (record, verified): (&PatchRecord, &[FunctionReport]),
    stop: Stop,
    watch: &Watch,
) -> Answer {
    Answer {
        result,
        vm: vm.to_owned(),
        patch: record.name.clone(),
        digest: record.digest.clone(),
        functions: functions(record, verified),
        cascaded: Vec::new(),
        replaced: Vec::new(),
        withdrawn: Vec::new(),
        callbacks: Vec::new(),
        attempts: stop.attempts,
        stop_window_us: microseconds(stop.report.window),
        stop_us: stop.report.into(),
        stacks: stop.examined.stacks,
        scanned_stacks: stop.examined.scanned,
        phases_us: watch.phases_us(),
    }
}

fn functions(record: &PatchRecord, verified: &[FunctionReport]) -> Vec<Function> {
    let over = |at: Gva| {
        let same = verified.iter().find(|function| function.site == at);
        same.and_then(|function| function.over.clone())
    };
    let range = |name: &str| {
        let of_function = |busy: &&vmpatch_patcher::arena::BusyRange| busy.function == name;
        record
            .busy_for_apply()
            .find(of_function)
            .map(|busy| busy.range)
    };
    let sites = record
        .sites
        .iter()
        .filter(|site| site.role == SiteRole::Entry);
    sites
        .map(|site| Function {
            name: site.function.clone(),
            site: site.at,
            replaced: range(&site.function),
            over: over(site.at),
        })
        .collect()
}

fn named(function: &Function) -> String {
    match &function.over {
        Some(patch) => format!("{} (instead of {patch}'s)", function.name),
        None => function.name.clone(),
    }
}

fn text(answer: &Answer) -> String {
    let names: Vec<_> = answer.functions.iter().map(named).collect();
    let stacks = format!(
        "{} ({} searched word by word)",
        answer.stacks, answer.scanned_stacks
    );
    let mut pairs = vec![
        ("functions", names.join(", ")),
        ("stop window", format!("{:.0} µs", answer.stop_window_us)),
        ("attempts", answer.attempts.to_string()),
        ("stacks examined", stacks),
    ];
    for (title, others) in [
        ("replaced", &answer.replaced),
        ("no longer waiting", &answer.withdrawn),
    ] {
        if !others.is_empty() {
            pairs.push((title, others.join(", ")));
        }
    }
    if !answer.callbacks.is_empty() {
        let title = if answer.result == "checked" {
            "has callbacks"
        } else {
            "called"
        };
        pairs.push((title, table::callbacks(&answer.callbacks)));
    }
    table::pairs(&pairs)
}
