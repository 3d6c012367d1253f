//! What the gate asks of a stopped guest, as a trait, and its answer by a kernel that was found. Owns no
//! judgement: [`gate`](super::gate) has that.

use vmpatch_introspect::stacks::{self, Stack};
use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::{AttachError, Gva, Kernel, PhysicalMemory, ReadError, Vcpu};

/// Answers about one stopped guest, from its memory and registers as they are now.
pub trait Witness {
    /// Whether the guest is still in the boot that the change was made for.
    ///
    /// # Errors
    /// [`AttachError`]: nothing can then be said of the guest.
    fn same_boot(&self, memory: &dyn PhysicalMemory) -> Result<bool, AttachError>;

    /// Whether the vCPU's interrupt table is the one of that kernel.
    fn owns(&self, memory: &dyn PhysicalMemory, vcpu: &Vcpu) -> bool;

    /// What shows that the guest is rewriting its own text now; `None` where nothing does.
    ///
    /// # Errors
    /// [`AttachError`]: it cannot be told.
    fn text_patching(&self, memory: &dyn PhysicalMemory) -> Result<Option<String>, AttachError>;

    /// Every stack there is: of listed, idle and exiting tasks, and of vCPUs that match none of them.
    ///
    /// # Errors
    /// [`AttachError`]: some stacks are then not known.
    fn stacks(
        &self,
        memory: &dyn PhysicalMemory,
        vcpus: &[Vcpu],
    ) -> Result<Vec<Stack>, AttachError>;

    /// Reads kernel-virtual memory.
    ///
    /// # Errors
    /// [`ReadError`].
    fn read(&self, memory: &dyn PhysicalMemory, at: Gva, into: &mut [u8]) -> Result<(), ReadError>;
}

/// A kernel that was found, with its unwind tables.
#[derive(Clone, Copy, Debug)]
pub struct LiveKernel<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Its unwind tables and its modules'.
    pub unwinder: &'a Unwinder,
}

impl Witness for LiveKernel<'_> {
    fn same_boot(&self, _memory: &dyn PhysicalMemory) -> Result<bool, AttachError> {
        Err(AttachError::Unsupported {
            what: "boot identity",
            why: "not compared".to_owned(),
        })
    }

    fn owns(&self, _memory: &dyn PhysicalMemory, _vcpu: &Vcpu) -> bool {
        false
    }

    fn text_patching(&self, _memory: &dyn PhysicalMemory) -> Result<Option<String>, AttachError> {
        Err(AttachError::Unsupported {
            what: "text patching",
            why: "not looked at".to_owned(),
        })
    }

    fn stacks(
        &self,
        memory: &dyn PhysicalMemory,
        vcpus: &[Vcpu],
    ) -> Result<Vec<Stack>, AttachError> {
        stacks::all(self.kernel, self.unwinder, memory, vcpus)
    }

    fn read(&self, memory: &dyn PhysicalMemory, at: Gva, into: &mut [u8]) -> Result<(), ReadError> {
        self.kernel.memory(memory).read(at, into)
    }
}
