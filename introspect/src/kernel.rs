//! A kernel that was found: identity, layout, symbols and types, owned, so that they can be used
//! inside a stop without touching guest memory again.

use crate::address::{Gva, GvaRange};
use crate::identity::Identity;
use crate::modules::Module;
use crate::paging::{AddressSpace, KernelMemory, ReadError};
use crate::symbols::Symbols;
use crate::target::PhysicalMemory;
use crate::tasks::Task;
use crate::types::Types;
use crate::vcpu::Vcpu;

/// Where the kernel lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `_stext` to `_etext`.
    pub text: GvaRange,
    /// `__init_begin` to `__init_end`, freed after boot.
    pub init: Option<GvaRange>,
    /// The kernel's own page tables (`init_top_pgt`).
    pub space: AddressSpace,
    /// `__per_cpu_offset`, one for each possible CPU.
    pub per_cpu_offset: Vec<u64>,
    /// Base of the direct map (`page_offset_base`).
    pub direct_map: Gva,
}

/// A found kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Which it is.
    pub identity: Identity,
    /// Where it lies.
    pub layout: Layout,
    /// Symbols of vmlinux, by kallsyms.
    pub symbols: Symbols,
    /// Types of vmlinux, by BTF or by profile.
    pub types: Types,
}

/// Why no kernel was found, or not enough of it.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No vCPU points into a kernel.
    #[error("no Linux kernel found: {0}")]
    NoKernel(String),
    /// A kernel, but not one this program can read.
    #[error("{what}: {why}")]
    Unsupported {
        /// The part: "kallsyms", "BTF", "page tables".
        what: &'static str,
        /// What was found and what was expected.
        why: String,
    },
    /// Guest memory could not be read where it should be.
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl Kernel {
    /// Finds the kernel that the vCPUs run.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(_memory: &dyn PhysicalMemory, _vcpus: &[Vcpu]) -> Result<Self, AttachError> {
        Err(AttachError::NoKernel("not looked for".to_owned()))
    }

    /// Kernel-virtual memory through the kernel's own page tables.
    #[must_use]
    pub fn memory<'a>(&self, physical: &'a dyn PhysicalMemory) -> KernelMemory<'a> {
        KernelMemory::new(physical, self.layout.space)
    }

    /// Every task that may own a kernel stack: the task list, threads, idle tasks and exiting tasks.
    ///
    /// # Errors
    /// A list that leads out of memory or never ends.
    pub fn tasks(&self, _physical: &dyn PhysicalMemory) -> Result<Vec<Task>, AttachError> {
        Ok(Vec::new())
    }

    /// Every loaded module.
    ///
    /// # Errors
    /// A list that leads out of memory or never ends.
    pub fn modules(&self, _physical: &dyn PhysicalMemory) -> Result<Vec<Module>, AttachError> {
        Ok(Vec::new())
    }
}
