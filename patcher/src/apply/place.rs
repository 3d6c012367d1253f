//! New code into the arena, while the guest runs. Owns the arena writes and their read-back; what is
//! written is the linker's.

use vmpatch_introspect::target::{ArenaError, MemoryError, StopError, StopRequest};
use vmpatch_introspect::{Deadline, Gpa, PhysicalMemory, Target};

use super::Stopped;
use super::observer::Boundary;
use crate::journal::{ArenaEdit, Intent};

/// A change whose arena bytes are in place, so that it can be switched on in a stop.
pub struct Placed<'a> {
    pub(super) intent: &'a Intent<'a>,
    pub(super) vm: &'a dyn Target,
}

/// Why the arena was not filled.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// It was not written.
    #[error(transparent)]
    Write(#[from] ArenaError),
    /// It cannot be read.
    #[error("arena: {0}")]
    Read(#[from] MemoryError),
    /// It does not hold what the intent says.
    #[error("arena at {at} changed since it was looked at")]
    Changed {
        /// Where the write was to begin.
        at: Gpa,
    },
    /// It does not hold what was written.
    #[error("arena at {at} did not read back as written")]
    ReadBack {
        /// Where the write began.
        at: Gpa,
    },
}

impl<'a> Placed<'a> {
    pub(crate) fn new(intent: &'a Intent<'a>, vm: &'a dyn Target) -> Result<Self, PlaceError> {
        let edits = intent.change().arena();
        for edit in edits {
            if !holds(vm, edit.at, &edit.old)? {
                return Err(PlaceError::Changed { at: edit.at });
            }
        }
        for (index, edit) in edits.iter().enumerate() {
            if let Err(why) = put(vm, edit) {
                put_back(vm, edits.get(..=index).unwrap_or_default());
                return Err(why);
            }
        }
        intent.observer().boundary(Boundary::Placed);
        Ok(Self { intent, vm })
    }

    /// Takes every vCPU out of guest mode, or none.
    ///
    /// # Errors
    /// [`StopError`]; the guest runs on.
    pub fn stop(&self, request: StopRequest) -> Result<Stopped<'_>, StopError> {
        let change = self.intent.change();
        let looking = request.examination();
        let lease = request.lease.saturating_add(change.calls().time());
        let target = self.vm.stop(StopRequest { lease, ..request })?;
        let deadline = Deadline::within(looking);
        let observer = self.intent.observer();
        observer.boundary(Boundary::Stopped);
        Ok(Stopped {
            target,
            change,
            observer,
            deadline,
        })
    }
}

/// Puts back what the arena held before, where it holds what was written. Only for a change that never ran:
/// nothing in the guest has learned of these addresses.
pub(crate) fn take_back(vm: &dyn Target, edits: &[ArenaEdit]) {
    let written = |edit: &&ArenaEdit| matches!(holds(vm, edit.at, &edit.new), Ok(true));
    let written: Vec<_> = edits.iter().filter(written).cloned().collect();
    put_back(vm, &written);
}

/// Last write first. What cannot be put back stays: nothing points there.
fn put_back(vm: &dyn Target, edits: &[ArenaEdit]) {
    for edit in edits.iter().rev() {
        if let Err(why) = vm.write_arena(edit.at, &edit.old) {
            tracing::warn!(at = %edit.at, %why, "arena bytes of an abandoned change stay");
        }
    }
}

fn put(vm: &dyn Target, edit: &ArenaEdit) -> Result<(), PlaceError> {
    vm.write_arena(edit.at, &edit.new)?;
    match holds(vm, edit.at, &edit.new)? {
        true => Ok(()),
        false => Err(PlaceError::ReadBack { at: edit.at }),
    }
}

fn holds(vm: &dyn Target, at: Gpa, bytes: &[u8]) -> Result<bool, MemoryError> {
    let mut now = vec![0; bytes.len()];
    PhysicalMemory::read(vm, at, &mut now)?;
    Ok(now == bytes)
}
