//! Tasks as the scheduler knows them. What a task is stands here; [`walk`] finds them, and [`census`] tells
//! whether they are all.

pub(crate) mod census;
pub(crate) mod fields;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod walk;
pub(crate) mod words;

pub use census::Missing;
pub use walk::MOST_TASKS;

use serde::{Deserialize, Serialize};

use crate::address::{Gva, GvaRange};

/// How a task was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// A thread of a process, or a kernel thread, on the task list.
    Listed,
    /// The idle task of a CPU.
    Idle,
    /// Off the task list but not yet finished: on a CPU, a run queue or `rtp_exit_list`.
    Exiting,
}

/// One task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// `struct task_struct` itself.
    pub at: Gva,
    /// Thread id (`pid` in the kernel's words).
    pub pid: i32,
    /// Process id (`tgid` in the kernel's words).
    pub tgid: i32,
    /// Name, at most 15 bytes; bytes that are not UTF-8 are replaced.
    pub comm: String,
    /// How it was found.
    pub kind: TaskKind,
    /// `__state`: 0 runnable, 1 interruptible, 2 uninterruptible, …
    pub state: u32,
    /// On a CPU now (`on_cpu`), so its saved stack pointer is stale.
    pub on_cpu: bool,
    /// The CPU it is on or was last on.
    pub cpu: u32,
    /// A kernel thread (`PF_KTHREAD`).
    pub kernel_thread: bool,
    /// Its kernel stack; `None` once freed.
    pub stack: Option<GvaRange>,
    /// Saved stack pointer (`thread.sp`): an `inactive_task_frame` while it sleeps.
    pub saved_sp: Gva,
}
