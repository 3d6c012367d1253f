//! A machine whose vCPU threads are under way. Owns the threads and how the machine ended.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::{Cap, VmFd};
use vmpatch_introspect::call::{CallError, Called};
use vmpatch_introspect::target::{Detail, StopError};

use super::call::Order;
use super::gate::{CloseError, Closed, Gate};
use super::outcome::Outcome;
use super::state::{Holder, State};
use super::stop::Stopped;
use super::vcpu::Runner;
use super::{Options, Vm, VmError, kick};
use crate::bus::Bus;
use crate::memory::GuestMemory;

/// What all threads of a machine share.
pub(super) struct Shared {
    pub(super) gate: Gate,
    pub(super) bus: Arc<Bus>,
    pub(super) memory: GuestMemory,
    pub(super) options: Options,
    outcome: Mutex<Option<Outcome>>,
    finished: Condvar,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// The machine ends; only the first outcome counts.
    pub(super) fn finish(&self, outcome: Outcome) {
        let mut slot = self.lock();
        if slot.is_none() {
            *slot = Some(outcome);
        }
        drop(slot);
        self.gate.end();
        self.finished.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Outcome>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module. Dropping it ends the machine and waits for its threads.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    vcpus: usize,
    state: Mutex<State>,
    /// Last: the VM outlives its vCPU threads.
    _fd: Arc<VmFd>,
}

impl Running {
    pub(super) fn start(vm: Vm, bus: Arc<Bus>) -> Result<Arc<Self>, VmError> {
        kick::install_handler().map_err(VmError::Threads)?;
        let vcpus = vm.vcpus.len();
        let sync = vm.fd.check_extension_int(Cap::SyncRegs);
        let shared = Arc::new(Shared {
            gate: Gate::new(vcpus),
            bus,
            memory: vm.memory,
            options: vm.options,
            outcome: Mutex::new(None),
            finished: Condvar::new(),
        });
        let running = Arc::new(Self {
            shared: Arc::clone(&shared),
            threads: Mutex::default(),
            vcpus,
            state: Mutex::new(State::Running),
            _fd: vm.fd,
        });
        for (index, fd) in (0..).zip(vm.vcpus) {
            let runner = Runner::new(index, fd, Arc::clone(&shared), sync);
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(|| runner.run())
                .map_err(VmError::Threads)?;
            running.threads().push(thread);
        }
        Ok(running)
    }

    /// Number of vCPUs.
    #[must_use]
    pub const fn vcpu_count(&self) -> usize {
        self.vcpus
    }

    /// Guest RAM and arena.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.shared.memory
    }

    /// How the machine ended, or `None` while it lives.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.shared.lock().clone()
    }

    /// Sleeps until the machine has ended and all its threads are gone.
    pub fn wait(&self) -> Outcome {
        let mut slot = self.shared.lock();
        let outcome = loop {
            match slot.as_ref() {
                Some(outcome) => break outcome.clone(),
                None => {
                    slot = self
                        .shared
                        .finished
                        .wait(slot)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        drop(slot);
        self.join();
        outcome
    }

    /// Who holds it. Meaningless once there is an [`outcome`](Self::outcome).
    #[must_use]
    pub fn state(&self) -> State {
        *self.state_slot()
    }

    /// Takes every vCPU out of guest mode for a patch, or none.
    ///
    /// # Errors
    /// [`StopError`]; the guest then runs on as before.
    pub fn stop(self: &Arc<Self>, deadline: Duration) -> Result<Stopped, StopError> {
        self.stop_for(deadline, Detail::All)
    }

    /// The same, where less of each vCPU will do.
    ///
    /// # Errors
    /// As [`stop`](Self::stop).
    pub(crate) fn stop_for(
        self: &Arc<Self>,
        deadline: Duration,
        detail: Detail,
    ) -> Result<Stopped, StopError> {
        let begin = Instant::now();
        let closed = self.hold(Holder::Patch, deadline, detail)?;
        let (kick, registers) = (closed.kick, closed.reading);
        Ok(Stopped::new(
            Arc::clone(self),
            closed.registers,
            begin,
            kick,
            registers,
        ))
    }

    /// Stops the guest for its owner.
    ///
    /// # Errors
    /// [`StopError`]; the guest then runs on as before.
    pub fn pause(&self, deadline: Duration) -> Result<(), StopError> {
        self.hold(Holder::Owner, deadline, Detail::Stacks).map(drop)
    }

    /// Ends the owner's pause.
    ///
    /// # Errors
    /// [`StopError::NotRunning`] where the owner does not hold it.
    pub fn unpause(&self) -> Result<(), StopError> {
        self.let_go(Holder::Owner).map(drop)
    }

    fn hold(
        &self,
        holder: Holder,
        deadline: Duration,
        detail: Detail,
    ) -> Result<Closed, StopError> {
        if let Some(outcome) = self.outcome() {
            return Err(StopError::NotRunning(outcome.to_string()));
        }
        {
            let mut state = self.state_slot();
            *state = state.begin(holder).map_err(StopError::NotRunning)?;
        }
        let closed = self.shared.gate.close(deadline, detail);
        *self.state_slot() = match closed {
            Ok(_) => State::Stopped(holder),
            Err(_) => State::Running,
        };
        closed.map_err(|error| match error {
            CloseError::Late(vcpu) => StopError::Deadline { vcpu, deadline },
            CloseError::Ended => StopError::NotRunning(self.how_it_ended()),
        })
    }

    fn how_it_ended(&self) -> String {
        let outcome = self.outcome();
        outcome.map_or_else(|| "it ends".into(), |outcome| outcome.to_string())
    }

    /// Lets every vCPU run again. When the last one went.
    pub(super) fn let_go(&self, holder: Holder) -> Result<Instant, StopError> {
        let mut state = self.state_slot();
        let next = state.let_go(holder).map_err(StopError::NotRunning)?;
        let gone = self.shared.gate.open();
        *state = next;
        Ok(gone)
    }

    /// Lets a vCPU that stands make a call.
    pub(super) fn call(&self, order: Order) -> Result<Called, CallError> {
        self.shared.gate.call(order)
    }

    /// A write could not be undone: the guest must not run on.
    pub(super) fn stay_stopped(&self) {
        *self.state_slot() = State::Stuck;
    }

    fn state_slot(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the machine from this side, as pulling the plug does. Returns at once.
    pub fn terminate(&self) {
        self.shared.finish(Outcome::Terminated);
    }

    fn join(&self) {
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            // A vCPU thread that panicked has nothing more to say than that it is gone.
            let _ = thread.join();
        }
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.terminate();
        self.join();
    }
}
