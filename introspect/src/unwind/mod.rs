//! From one frame to the next: ORC where the kernel has it, frame pointers where not. Owns what a trace is
//! and whether it can be trusted; which stacks there are is [`stacks`](crate::stacks)' business.
//!
//! ```text
//!   Unwinder::load ─── orc: tables, copied once ──┐
//!                  └── hidden: where tracing keeps return addresses
//!                                                 ▼
//!   a stack ── memory: one plain copy ──▶ walk (by ORC) or chain (by frame pointers) ──▶ Trace
//! ```
//!
//! Code that a patch put into the arena lies in no text of the kernel's. Where the patch brought unwind data
//! along ([`Unwinder::cover`]) it is followed like any other; where it did not, a stack with a frame there keeps
//! the frames up to it, goes on by guess, and is unreliable ([`NoUnwindData`](Unreliable::NoUnwindData)): whoever
//! must know what stands on it reads every word of its memory.

mod chain;
mod hidden;
pub mod memory;
pub mod orc;
mod pt_regs;
mod special;
#[cfg(test)]
mod tests;
mod unwinder;
mod walk;

pub use hidden::Hidden;
pub use memory::{StackKind, StackPool, StackSource, StackSpan};
pub use unwinder::Unwinder;

use serde::{Deserialize, Serialize};

use crate::address::Gva;
use crate::tasks::Missing;

/// No trace is longer: the kernel's own livepatch gives up beyond 100 frames (Linux v6.12
/// `kernel/livepatch/transition.c`, `MAX_STACK_ENTRIES`).
pub const MAX_FRAMES: usize = 256;

/// How a frame came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrameKind {
    /// The innermost frame of a running vCPU: `at` is its RIP.
    Running,
    /// A return address: the call ended at `at`, so it lies in the function that holds `at - 1`.
    Call,
    /// Where an interrupt or exception struck: `at` is the interrupted RIP itself.
    Interrupted,
}

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// Instruction pointer.
    pub at: Gva,
    /// What kind of pointer `at` is.
    pub kind: FrameKind,
    /// Stack pointer of that frame.
    pub sp: Gva,
}

impl Frame {
    /// The address to look up: within the call instruction for a return address.
    #[must_use]
    pub const fn lookup(&self) -> Gva {
        match self.kind {
            FrameKind::Call => self.at.wrapping_sub(1),
            FrameKind::Running | FrameKind::Interrupted => self.at,
        }
    }
}

/// Why a trace may miss frames.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Unreliable {
    /// No unwind table covers the address.
    #[error("no unwind data for {0}")]
    NoUnwindData(Gva),
    /// The stack pointer left every known stack, or did not go up.
    #[error("stack pointer {0} leads nowhere")]
    StrayStackPointer(Gva),
    /// An unwind entry of a kind that names no frame.
    #[error("unwind entry at {0} is of no use there")]
    UndefinedEntry(Gva),
    /// The trace ends where no stack of a task ends: what lies above is not known.
    #[error("the trace ends at {0}, which is no end of a stack")]
    EndsEarly(Gva),
    /// A return address was replaced by a trampoline, and where the kernel keeps the real one it is not.
    #[error("the return address behind trampoline {0} was not found")]
    HiddenReturn(Gva),
    /// No call stands before a return address.
    #[error("no call stands before return address {0}")]
    NoCallBefore(Gva),
    /// More frames than any real stack has.
    #[error("more than {0} frames")]
    TooDeep(usize),
    /// An exception frame that may lie in a function that had not set up its own frame.
    #[error("interrupted at {0} with frame pointers only")]
    Preempted(Gva),
    /// Memory of the stack could not be read.
    #[error("stack memory at {0} cannot be read")]
    Unreadable(Gva),
    /// It runs on a CPU that was not found among the vCPUs.
    #[error("it runs on CPU {0}, which no stopped vCPU was matched to")]
    NoVcpu(u32),
    /// A vCPU stands in the kernel and no known task could be matched to it.
    #[error("vCPU {0} stands in the kernel on the stack of no known task")]
    NoTask(u32),
    /// The registers of the vCPU are those of system-management mode or of a nested guest.
    #[error("vCPU {0} is in system-management mode or runs a nested guest")]
    ForeignRegisters(u32),
    /// A stack that is somewhere, of a task that was not found.
    #[error("not every task was found: {0}")]
    Unlisted(Missing),
}

/// The frames of one stack, innermost first, and whether they are all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// The frames found.
    pub frames: Vec<Frame>,
    /// `None`: complete to the entry from user mode or the first function of the thread.
    pub unreliable: Option<Unreliable>,
}

impl Trace {
    /// The frames from `first` on that `next` gives one after another, `None` after the outermost.
    fn collect(
        first: Option<Frame>,
        mut next: impl FnMut() -> Result<Option<Frame>, Unreliable>,
    ) -> Self {
        let mut frames = Vec::with_capacity(16);
        frames.extend(first);
        let unreliable = loop {
            match next() {
                Ok(Some(frame)) if frames.len() < MAX_FRAMES => frames.push(frame),
                Ok(Some(_)) => break Some(Unreliable::TooDeep(MAX_FRAMES)),
                Ok(None) => break None,
                Err(reason) => break Some(reason),
            }
        };
        Self { frames, unreliable }
    }

    /// A doubt that arose on the way comes before what ended it.
    fn doubted(mut self, doubt: Option<Unreliable>) -> Self {
        self.unreliable = doubt.or(self.unreliable);
        self
    }
}
