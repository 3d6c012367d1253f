//! A stop for a patch, inside the VMM: the guard that holds every vCPU, writes batches and lets go. Owns
//! the undo list and the measuring; does not own the lease ([`crate::hot`]) nor the kick
//! ([`super::gate`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmpatch_introspect::call::{Call, CallError, Called};
use vmpatch_introspect::target::{Edit, StopReport, WriteError};
use vmpatch_introspect::vcpu::Vcpu;

use super::batch::Undo;
use super::call::Order;
use super::running::Running;
use super::state::Holder;

/// Every vCPU of a machine stands. Dropping it undoes what it wrote and resumes.
#[derive(Debug)]
#[must_use = "dropping it resumes the guest at once"]
pub struct Stopped {
    machine: Arc<Running>,
    vcpus: Vec<Vcpu>,
    undo: Undo,
    begin: Instant,
    report: StopReport,
    held: Held,
}

/// What the guard still has to do when it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// Undo and resume.
    Yes,
    /// Nothing: resumed.
    Resumed,
    /// Nothing: an undo failed, the machine stays stopped.
    Stuck,
}

impl Stopped {
    pub(super) fn new(
        machine: Arc<Running>,
        vcpus: Vec<Vcpu>,
        begin: Instant,
        kick: Duration,
        registers: Duration,
    ) -> Self {
        let report = StopReport {
            kick,
            registers,
            ..StopReport::default()
        };
        Self {
            machine,
            vcpus,
            undo: Undo::default(),
            begin,
            report,
            held: Held::Yes,
        }
    }

    /// Registers of every vCPU, by index.
    #[must_use]
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// What the stop has cost so far.
    #[must_use]
    pub const fn report(&self) -> StopReport {
        self.report
    }

    /// Compares, writes and reads back a batch as one.
    ///
    /// # Errors
    /// [`WriteError`]. After [`WriteError::UndoFailed`] the machine stays stopped.
    pub fn write(&mut self, batch: &[Edit]) -> Result<(), WriteError> {
        let begin = Instant::now();
        let result = match self.machine.outcome() {
            Some(outcome) => Err(WriteError::Unreachable(outcome.to_string())),
            None => self.undo.write(self.machine.memory(), batch),
        };
        self.report.write += begin.elapsed();
        if let Err(WriteError::UndoFailed { .. }) = &result {
            self.get_stuck();
        }
        result
    }

    /// Lets a vCPU make a call, until then at most.
    ///
    /// # Errors
    /// [`CallError`]. After [`CallError::NotRestored`] the machine stays stopped.
    pub fn call(&mut self, call: &Call, until: Instant) -> Result<Called, CallError> {
        if let Some(outcome) = self.machine.outcome() {
            return Err(CallError::Unreachable(outcome.to_string()));
        }
        let result = self.machine.call(Order { call: *call, until });
        if let Err(CallError::NotRestored { .. }) = &result {
            self.get_stuck();
        }
        result
    }

    /// Lets the guest run and keeps what was written.
    #[must_use = "it says what the stop cost"]
    pub fn resume(mut self) -> StopReport {
        self.let_go()
    }

    /// Undoes what was written and lets the guest run.
    ///
    /// # Errors
    /// [`WriteError::UndoFailed`]: the machine stays stopped.
    pub fn abandon(mut self) -> Result<StopReport, WriteError> {
        self.undo_and_let_go()
    }

    fn undo_and_let_go(&mut self) -> Result<StopReport, WriteError> {
        match self.undo.all(self.machine.memory()) {
            Ok(()) => Ok(self.let_go()),
            Err(error) => {
                self.get_stuck();
                Err(error)
            }
        }
    }

    fn let_go(&mut self) -> StopReport {
        if self.held != Held::Yes {
            return self.report;
        }
        self.held = Held::Resumed;
        let wish = Instant::now();
        let gone = self.machine.let_go(Holder::Patch).unwrap_or(wish);
        self.report.resume = gone.saturating_duration_since(wish);
        self.report.window = gone.saturating_duration_since(self.begin);
        self.report
    }

    fn get_stuck(&mut self) {
        if self.held == Held::Yes {
            self.held = Held::Stuck;
            self.machine.stay_stopped();
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if self.held == Held::Yes
            && let Err(error) = self.undo_and_let_go()
        {
            tracing::error!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::State;
    use crate::vm::testing::spinning;

    const DEADLINE: Duration = Duration::from_secs(2);

    #[test]
    fn after_an_undo_that_failed_the_machine_stays_stopped_and_can_be_ended() {
        let Some(machine) = spinning() else { return };
        let mut stopped = machine.stop(DEADLINE).unwrap();
        stopped.get_stuck();
        drop(stopped);
        assert_eq!(machine.state(), State::Stuck);
        let error = machine.stop(DEADLINE).unwrap_err().to_string();
        assert!(error.contains("could not be undone"), "{error}");
        assert!(machine.unpause().is_err());
        machine.terminate();
        machine.wait();
    }

    #[test]
    fn a_dropped_stop_is_undone_and_a_resumed_one_kept() {
        let Some(machine) = spinning() else { return };
        let at = vmpatch_introspect::address::Gpa(0x8000);
        let edit = Edit {
            at,
            old: vec![0; 3],
            new: b"new".to_vec(),
        };
        for keep in [false, true] {
            let mut stopped = machine.stop(DEADLINE).unwrap();
            stopped.write(std::slice::from_ref(&edit)).unwrap();
            if keep {
                let _ = stopped.resume();
            } else {
                drop(stopped);
            }
            let mut found = [0; 3];
            vmpatch_introspect::PhysicalMemory::read(machine.memory(), at, &mut found).unwrap();
            assert_eq!(&found == b"new", keep);
            assert_eq!(machine.state(), State::Running);
        }
    }
}
