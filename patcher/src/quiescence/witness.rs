//! What the gate asks of a stopped guest, as a trait, and its answer by a kernel that was found. Owns no
//! judgement: [`gate`](super::gate) has that.

use vmpatch_introspect::stacks::{self, Sleepers, Stack};
use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::{AttachError, Deadline, ForeignVcpu, Kernel, PhysicalMemory, Vcpu};

use super::busy::Elsewhere;
use super::gate::ReadStack;
use crate::arena::{Loaded, ModuleClaim};

/// Answers about one stopped guest, from its memory and registers as they are now.
pub trait Witness {
    /// Whether the guest is still in the boot that the change was made for.
    fn same_boot(&self, memory: &dyn PhysicalMemory) -> bool;

    /// What a vCPU runs instead of that kernel, where it does; `None` for one that runs it or nothing.
    fn elsewhere(&self, vcpu: &Vcpu) -> Option<Elsewhere>;

    /// What shows that the guest is rewriting its own text now; `None` where nothing does.
    ///
    /// # Errors
    /// [`AttachError`]: it cannot be told.
    fn text_patching(&self, memory: &dyn PhysicalMemory) -> Result<Option<String>, AttachError>;

    /// Whether the unwind tables are still those of the modules that are loaded: by the table of a module that is
    /// gone, a frame of the one in its place would be followed wrongly and yet called reliable.
    ///
    /// # Errors
    /// [`AttachError`]: it cannot be told, or not before `deadline`.
    fn same_modules(
        &self,
        memory: &dyn PhysicalMemory,
        deadline: &Deadline,
    ) -> Result<bool, AttachError>;

    /// Whether a module is live where it was, by the list that [`same_modules`](Self::same_modules) compares with.
    fn is_live(&self, module: &ModuleClaim, memory: &dyn PhysicalMemory) -> bool;

    /// Every stack there is: of listed, idle and exiting tasks, and of vCPUs that match none of them. Read
    /// before `deadline`, or not at all.
    ///
    /// # Errors
    /// [`AttachError`]: some stacks are then not known.
    fn stacks(
        &self,
        memory: &dyn PhysicalMemory,
        vcpus: &[Vcpu],
        deadline: &Deadline,
    ) -> Result<Vec<Stack>, AttachError>;

    /// What reads kernel-virtual memory.
    fn reader<'a>(&'a self, memory: &'a dyn PhysicalMemory) -> Box<ReadStack<'a>>;
}

/// A kernel that was found, with its unwind tables.
#[derive(Clone, Copy, Debug)]
pub struct LiveKernel<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Its unwind tables and its modules'.
    pub unwinder: &'a Unwinder,
    /// Stacks of sleeping tasks, read by these tables before the stop.
    pub sleepers: Option<&'a Sleepers>,
}

impl Witness for LiveKernel<'_> {
    fn same_boot(&self, memory: &dyn PhysicalMemory) -> bool {
        self.kernel.same_boot(memory)
    }

    fn elsewhere(&self, vcpu: &Vcpu) -> Option<Elsewhere> {
        let foreign = self.kernel.check_vcpu(vcpu).err()?;
        Some(match foreign {
            ForeignVcpu::ManagementMode => Elsewhere::Smm,
            ForeignVcpu::NestedGuest => Elsewhere::NestedGuest,
            other => Elsewhere::NotThatKernel(other.to_string()),
        })
    }

    fn text_patching(&self, memory: &dyn PhysicalMemory) -> Result<Option<String>, AttachError> {
        self.kernel.text_patching(memory)
    }

    fn same_modules(
        &self,
        memory: &dyn PhysicalMemory,
        deadline: &Deadline,
    ) -> Result<bool, AttachError> {
        self.unwinder.is_current(self.kernel, memory, deadline)
    }

    fn is_live(&self, module: &ModuleClaim, memory: &dyn PhysicalMemory) -> bool {
        let loaded = Loaded {
            places: self.unwinder.modules(),
            space: Some(self.kernel.layout.space),
        };
        module.is_live(loaded, memory)
    }

    fn stacks(
        &self,
        memory: &dyn PhysicalMemory,
        vcpus: &[Vcpu],
        deadline: &Deadline,
    ) -> Result<Vec<Stack>, AttachError> {
        let (kernel, unwinder, none) = (self.kernel, self.unwinder, Sleepers::default());
        let known = self.sleepers.unwrap_or(&none);
        stacks::all_but(kernel, unwinder, memory, vcpus, deadline, known)
    }

    fn reader<'a>(&'a self, memory: &'a dyn PhysicalMemory) -> Box<ReadStack<'a>> {
        let memory = self.kernel.memory(memory);
        Box::new(move |at, into| memory.read(at, into))
    }
}
