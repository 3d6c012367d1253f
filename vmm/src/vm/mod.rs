//! A virtual machine: the KVM VM, its vCPU threads and how they are stopped. Owns the life of the
//! machine from "made" to "finished"; does not own its memory ([`crate::memory`]), its devices ([`crate::bus`]) nor what the guest boots.
//!
//! ```text
//!   Vm::new ──▶ made ──start──▶ running ◀──▶ stopped (by its owner, or for a patch)
//!                                  │             │
//!                                  └──────┬──────┘   power-off, reset, terminate, crash
//!                                         ▼
//!                                     finished (with an Outcome)
//! ```

mod assist;
pub(crate) mod batch;
mod call;
mod exit;
pub(crate) mod futex;
mod gate;
mod kick;
mod outcome;
mod registers;
mod running;
mod state;
mod stop;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing;
mod vcpu;

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::bus::Bus;
use crate::config::MAX_VCPUS;
use crate::memory::{GuestMemory, SetupError};

pub use batch::{MAX_BATCH_BYTES, MAX_EDITS};
pub use outcome::{Crash, Fault, Outcome};
pub use running::Running;
use running::Shared;
pub use state::{Holder, State};
pub use stop::Stopped;

/// Where KVM keeps three pages of its own for real mode on Intel hosts: below the top of the 32-bit
/// space, in no memory map (Linux Documentation/virt/kvm/api.rst, KVM_SET_TSS_ADDR).
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What a machine may be given beyond the plain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Raise #BP where KVM cannot emulate `int3`: needed to boot a kernel on a KVM of the PVM kind.
    pub assist_int3: bool,
}

/// A machine that has been made but does not run: memory and interrupt controllers are there, vCPUs are
/// being added.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    memory: GuestMemory,
    vcpus: Vec<VcpuFd>,
    options: Options,
}

/// Why a machine could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM lacks something this VMM cannot do without.
    #[error("this host's KVM has no {0}")]
    Missing(&'static str),
    /// KVM refused an operation.
    #[error("{operation}: {source}")]
    Kvm {
        /// Which.
        operation: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// KVM refused the memory.
    #[error(transparent)]
    Memory(#[from] SetupError),
    /// There can be no more vCPUs.
    #[error("a machine has 1 to {MAX_VCPUS} vCPUs")]
    VcpuCount,
    /// The host gave no thread or signal.
    #[error("starting the vCPU threads: {0}")]
    Threads(io::Error),
}

impl Vm {
    /// Makes a VM with `memory`, PIC, IOAPIC, PIT and local APICs.
    ///
    /// # Errors
    /// [`VmError`] where KVM lacks something or refuses.
    pub fn new(kvm: &Kvm, memory: GuestMemory, options: Options) -> Result<Self, VmError> {
        if !kvm.check_extension(Cap::ImmediateExit) {
            return Err(VmError::Missing("KVM_CAP_IMMEDIATE_EXIT"));
        }
        let fd = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(refused("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip()
            .map_err(refused("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(refused("KVM_CREATE_PIT2"))?;
        memory.register(&fd)?;
        Ok(Self {
            fd: Arc::new(fd),
            memory,
            vcpus: Vec::new(),
            options,
        })
    }

    /// The VM's descriptor, for interrupt lines.
    #[must_use]
    pub const fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// The memory it was made with.
    #[must_use]
    pub const fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Adds the next vCPU and returns it, for its registers to be set.
    ///
    /// # Errors
    /// [`VmError`] where there are enough, or KVM refuses.
    pub fn add_vcpu(&mut self) -> Result<&mut VcpuFd, VmError> {
        let index = self.vcpus.len();
        let id = u64::try_from(index).map_err(|_| VmError::VcpuCount)?;
        if id >= u64::from(MAX_VCPUS) {
            return Err(VmError::VcpuCount);
        }
        let vcpu = self
            .fd
            .create_vcpu(id)
            .map_err(refused("KVM_CREATE_VCPU"))?;
        self.vcpus.push(vcpu);
        self.vcpus.last_mut().ok_or(VmError::VcpuCount)
    }

    /// The vCPUs added so far.
    #[must_use]
    pub fn vcpus(&mut self) -> &mut [VcpuFd] {
        &mut self.vcpus
    }

    /// Lets the guest run: one thread a vCPU.
    ///
    /// # Errors
    /// [`VmError`] where there is no vCPU or no thread.
    pub fn start(self, bus: Arc<Bus>) -> Result<Arc<Running>, VmError> {
        if self.vcpus.is_empty() {
            return Err(VmError::VcpuCount);
        }
        Running::start(self, bus)
    }
}

fn refused(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { operation, source }
}
