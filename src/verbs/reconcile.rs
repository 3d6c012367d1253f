//! `vmpatch reconcile`: puts in the patches that waited for a module which is loaded now.

use serde::Serialize;
use vmpatch_patcher::link::layers::Stacking;

use crate::cli::Reconcile;
use crate::exit::Failure;
use crate::flow;
use crate::held::Waiting;
use crate::report::Output;
use crate::watch::Watch;

#[derive(Serialize)]
struct Answer {
    result: &'static str,
    vm: String,
    applied: Vec<String>,
    /// Modules still not loaded.
    pending: Vec<Pending>,
    failed: Vec<Failed>,
}

#[derive(Serialize)]
struct Pending {
    patch: String,
    absent: Vec<String>,
}

#[derive(Serialize)]
struct Failed {
    patch: String,
    reason: String,
}

/// Tries each patch that waits once; one that fails goes on waiting, and hinders no other.
pub(crate) fn run(asked: &Reconcile, output: &Output) -> Result<(), Failure> {
    let vm = &asked.vm.vm;
    let held = flow::held(vm)?;
    let (waiting, notes) = held.all()?;
    notes.iter().for_each(|note| output.note(note));
    let mut answer = Answer {
        result: "reconciled",
        vm: vm.clone(),
        applied: Vec::new(),
        pending: Vec::new(),
        failed: Vec::new(),
    };
    for Waiting { patch, file, .. } in waiting {
        let watch = Watch::new(output.progress(&format!("applying {patch}")))?;
        let candidate = flow::meet(vm, &file, &watch)?;
        let absent = candidate.absent_modules();
        if !absent.is_empty() {
            watch.finish();
            answer.pending.push(Pending { patch, absent });
            continue;
        }
        let applied = candidate.apply(Stacking::Upon, asked.limits, &watch);
        watch.finish();
        match applied {
            Ok(_) => {
                held.release(&patch)?;
                answer.applied.push(patch);
            }
            Err(why) => answer.failed.push(Failed {
                patch,
                reason: why.reason(),
            }),
        }
    }
    let failed = answer.failed.len();
    output.answer(&answer, text);
    match failed {
        0 => Ok(()),
        _ => Err(Failure::refused(format!(
            "{failed} held patches could not be applied, and are still held"
        ))),
    }
}

fn text(answer: &Answer) -> String {
    let applied = answer.applied.iter().map(|it| format!("{it}: applied"));
    let pending = answer
        .pending
        .iter()
        .map(|it| format!("{}: waits for module {}", it.patch, it.absent.join(", ")));
    let failed = answer
        .failed
        .iter()
        .map(|it| format!("{}: {}", it.patch, it.reason));
    let lines: Vec<_> = applied.chain(pending).chain(failed).collect();
    match lines.is_empty() {
        true => "no patch waits".to_owned(),
        false => lines.join("\n"),
    }
}
