//! `vmpatch check`, `apply` and `rollback`: one shape of answer for all three.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};
use vmpatch_introspect::target::StopReport;
use vmpatch_introspect::{Gva, GvaRange};
use vmpatch_patcher::arena::{PatchRecord, SiteRole};
use vmpatch_patcher::patch::{self, file::PatchFile};
use vmpatch_patcher::quiescence::Examined;
use vmpatch_patcher::verify::FunctionReport;

use crate::cli::{Apply, Change, Rollback};
use crate::exit::Failure;
use crate::flow;
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
    let checked = flow::check(&asked.vm.vm, &asked.patch, asked.timeout, &watch)?;
    let (attempts, seen) = (checked.attempted.attempts, checked.attempted.applied);
    let stop = Stop {
        attempts,
        examined: seen.examined,
        report: seen.report,
    };
    let answer = answer(
        "checked",
        &asked.vm.vm,
        (&checked.verified.record, &checked.verified.functions),
        stop,
        &watch,
    );
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
    if !strict {
        let absent = flow::absent_modules(&asked.vm.vm, &asked.patch, &watch)?;
        if !absent.is_empty() {
            watch.finish();
            return hold(asked, absent, output);
        }
    }
    let changed = flow::apply(&asked.vm.vm, &asked.patch, asked.timeout, &watch)?;
    report(
        "applied",
        &asked.vm.vm,
        (&changed, Vec::new()),
        &watch,
        output,
    );
    Ok(())
}

/// Keeps a patch until its modules are loaded.
fn hold(asked: &Change, absent: Vec<String>, output: &Output) -> Result<(), Failure> {
    let vm = &asked.vm.vm;
    let file = PatchFile::open(&asked.patch)?;
    flow::held(vm)?.keep(&file)?;
    let answer = HeldAnswer {
        result: "pending",
        vm: vm.clone(),
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
        flow::roll_back(vm, upper, asked.timeout, &watch)?;
        watch.finish();
        output.note(&format!(
            "patch {upper} rolled back, which lay upon {}",
            asked.patch
        ));
    }
    let watch = Watch::new(output.progress("rolling back"))?;
    let changed = flow::roll_back(vm, &asked.patch, asked.timeout, &watch)?;
    report("rolled-back", vm, (&changed, cascaded), &watch, output);
    Ok(())
}

fn report(
    result: &'static str,
    vm: &str,
    (changed, cascaded): (&flow::Changed, Vec<String>),
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
        cascaded,
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
    table::pairs(&[
        ("functions", names.join(", ")),
        ("stop window", format!("{:.0} µs", answer.stop_window_us)),
        ("attempts", answer.attempts.to_string()),
        ("stacks examined", stacks),
    ])
}
