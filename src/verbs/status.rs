//! `vmpatch status`: which patches a VM has, and whether its memory agrees.

use serde::Serialize;
use vmpatch_introspect::KernelMemory;
use vmpatch_patcher::journal::{Ending, Operation};
use vmpatch_patcher::status::{
    self, Interrupted, PatchReport, Report, ShadowData, State, Verdict, shadow,
};

use crate::exit::Failure;
use crate::held::Waiting;
use crate::live::Live;
use crate::report::{Output, table};

#[derive(Serialize)]
struct Answer {
    vm: String,
    release: String,
    needs_attention: bool,
    /// Patches that wait for a module.
    pending: Vec<Waiting>,
    /// What patches keep beside live objects.
    shadow_data: Vec<ShadowData>,
    #[serde(flatten)]
    report: Report,
}

/// Asks the guest's text, its manifest and this host's journal.
pub(crate) fn run(vm: &str, output: &Output) -> Result<(), Failure> {
    let live = Live::attach(vm)?;
    let places = live.places()?;
    let loaded = live.loaded(&places);
    let report = status::report(&live.journal(), live.vm(), live.boot(), loaded);
    let (pending, notes) = live.held().all()?;
    notes.iter().for_each(|note| output.note(note));
    // Without a patch in its manifest the arena says nothing.
    let shadow_data = match report.patches.is_empty() {
        true => Vec::new(),
        false => shadow_data(&live),
    };
    let answer = Answer {
        vm: vm.to_owned(),
        pending,
        shadow_data,
        release: live.kernel.identity.release,
        needs_attention: report.needs_attention(),
        report,
    };
    output.answer(&answer, text);
    Ok(())
}

fn shadow_data(live: &Live) -> Vec<ShadowData> {
    let memory = KernelMemory::new(live.vm(), live.kernel.layout.space);
    shadow::count(&|at| memory.read_u64(at).ok())
}

fn text(answer: &Answer) -> String {
    let mut parts = vec![format!("VM {}, kernel {}", answer.vm, answer.release)];
    let report = &answer.report;
    if report.patches.is_empty() {
        parts.push("no patch was applied since this guest booted".to_owned());
    } else {
        let head = ["patch", "state", "functions", "digest"];
        parts.push(table::table(&head, report.patches.iter().map(row)));
    }
    let calling = report.patches.iter().filter(|it| !it.callbacks.is_empty());
    parts.extend(calling.map(|patch| {
        let callbacks = table::callbacks(&patch.callbacks);
        format!("patch {} has callbacks: {callbacks}", patch.name)
    }));
    parts.extend(answer.pending.iter().map(pending));
    parts.extend(answer.shadow_data.iter().map(beside));
    parts.extend(report.interrupted.iter().map(interrupted));
    parts.extend(report.patches.iter().flat_map(damage));
    parts.extend(report.stale.iter().map(|patch| {
        format!(
            "patch {} went with an earlier boot of this guest",
            patch.name
        )
    }));
    parts.extend(report.notes.iter().cloned());
    parts.join("\n")
}

fn row(patch: &PatchReport) -> [String; 4] {
    let digest: String = patch.digest.chars().take(12).collect();
    [
        patch.name.clone(),
        state(patch),
        patch.functions.join(", "),
        digest,
    ]
}

fn state(patch: &PatchReport) -> String {
    let rolled_back = || {
        patch
            .last
            .as_ref()
            .is_some_and(|last| last.operation == Operation::Rollback)
    };
    let replaced_by = || {
        let last = patch.last.as_ref()?;
        let is_done = matches!(last.ending, Some(Ending::Committed { .. }));
        last.replaced_by.as_ref().filter(|_| is_done)
    };
    match patch.state {
        State::Applied if patch.above.is_empty() && !patch.unloaded.is_empty() => {
            format!(
                "applied, but for {}, which was unloaded since",
                patch.unloaded.join(", ")
            )
        }
        State::Applied if patch.above.is_empty() => "applied".to_owned(),
        State::Applied => format!("applied, beneath {}", patch.above.join(", ")),
        State::NotApplied if !patch.unloaded.is_empty() => {
            format!("gone with module {}", patch.unloaded.join(", "))
        }
        State::NotApplied if rolled_back() => "rolled back".to_owned(),
        State::NotApplied if let Some(other) = replaced_by() => format!("replaced by {other}"),
        State::NotApplied => "not applied".to_owned(),
        State::Damaged => "damaged".to_owned(),
    }
}

fn pending(patch: &Waiting) -> String {
    format!(
        "patch {} waits for module {}: `vmpatch reconcile` applies it once that is loaded",
        patch.patch,
        patch.modules.join(", ")
    )
}

fn beside(data: &ShadowData) -> String {
    let objects = match data.objects {
        1 => "1 object has".to_owned(),
        many => format!("{many} objects have"),
    };
    format!("{objects} shadow data of id {:#x}", data.id)
}

fn interrupted(open: &Interrupted) -> String {
    let what = format!(
        "{} of patch {} was interrupted",
        open.operation.verb(),
        open.patch
    );
    let now = match open.verdict {
        Verdict::Stale => "the guest has booted anew since, so nothing is left of it",
        Verdict::NotWritten => "nothing of it was written; the guest runs as before",
        Verdict::InPlace => "all of it was written before that; it holds",
        Verdict::Damaged => {
            "the guest's text is neither as before nor as meant; look at it by hand"
        }
        Verdict::Unsettled => "the VM could not be stopped to look; ask again",
    };
    format!("{what}: {now}")
}

fn damage(patch: &PatchReport) -> Vec<String> {
    let name = &patch.name;
    let line = |it: &status::Damage| match it {
        // Of an applied patch only what it shares with others is told.
        status::Damage { found, old, .. } if found == old => format!(
            "{} at {} holds {old} as before any patch, not the jump {} that {name} needs there: its new code cannot warn or fault",
            it.function, it.at, it.new,
        ),
        _ => format!(
            "{} at {} holds {}, neither {} (before {name}) nor {} (its jump)",
            it.function, it.at, it.found, it.old, it.new,
        ),
    };
    patch.damage.iter().map(line).collect()
}
