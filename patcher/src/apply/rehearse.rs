//! A rehearsal: the gates of a stop without the write. Owns what `check` asks of a stopped guest; the gates
//! themselves are [`quiescence`](crate::quiescence)'s.

use vmpatch_introspect::target::{Edit, MemoryError, StopReport, StopRequest, WriteError};
use vmpatch_introspect::{Deadline, PhysicalMemory, Target};

use super::callback::CallbackError;
use super::change::Change;
use super::failure::Attempt;
use crate::quiescence::{self, Examined, Witness};

/// A stop in which the change could have been made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rehearsed {
    /// What the stop cost.
    pub report: StopReport,
    /// What was examined in it.
    pub examined: Examined,
}

/// Stops the guest, goes through every gate of `change`, compares what it would write over, and lets the
/// guest run on. Writes nothing and calls nothing.
///
/// # Errors
/// [`Attempt`], as an attempt to make the change would give it.
pub fn rehearse(
    change: &Change,
    vm: &dyn Target,
    witness: &dyn Witness,
    request: StopRequest,
) -> Result<Rehearsed, Attempt> {
    let stopped = vm.stop(request)?;
    let deadline = Deadline::within(request.examination());
    let (memory, vcpus) = (stopped.memory(), stopped.vcpus());
    let examined = quiescence::examine(witness, memory, vcpus, change.busy(), &deadline)?;
    for edit in change.map().iter().chain(change.edits()) {
        holds_old(stopped.memory(), edit)?;
    }
    if let Some(callback) = change.calls().iter().next() {
        let caller = change.calls().caller.as_ref();
        caller
            .ok_or_else(|| CallbackError::unprepared(callback))?
            .is_ready(stopped.vcpus(), callback)?;
    }
    let report = stopped.resume()?;
    Ok(Rehearsed { report, examined })
}

fn holds_old(memory: &dyn PhysicalMemory, edit: &Edit) -> Result<(), WriteError> {
    let mut found = vec![0; edit.old.len()];
    let unreadable = |why: MemoryError| WriteError::Malformed {
        at: edit.at,
        what: why.to_string(),
    };
    memory.read(edit.at, &mut found).map_err(unreadable)?;
    if found == edit.old {
        return Ok(());
    }
    Err(WriteError::Differs {
        at: edit.at,
        expected: edit.old.clone(),
        found,
    })
}
