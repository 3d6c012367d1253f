//! What stands in the way of a change, in words that name it. Owns the findings and how they read; finding
//! them is [`gate`](super::gate)'s business.

use std::fmt;

use serde::{Deserialize, Serialize};
use vmpatch_introspect::Gva;
use vmpatch_introspect::stacks::Stack;
use vmpatch_introspect::tasks::Task;
use vmpatch_introspect::unwind::{FrameKind, Unreliable};

/// Findings beyond this many are only counted.
pub const MAX_FINDINGS: usize = 32;

/// All that stood in the way at one stop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Busy {
    /// The first of them, at most [`MAX_FINDINGS`].
    pub findings: Vec<Finding>,
    /// How many more there were.
    pub more: usize,
}

/// Whose stack it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// The task; `None` for a vCPU on a stack that no known task owns.
    pub task: Option<TaskName>,
    /// The vCPU that runs it now.
    pub vcpu: Option<u32>,
}

/// A task as people know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskName {
    /// Its name.
    pub comm: String,
    /// Thread id.
    pub pid: i32,
    /// Process id.
    pub tgid: i32,
}

/// One thing in the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Finding {
    /// A task stands in a function that is to change.
    InFunction {
        /// Whose stack.
        #[serde(flatten)]
        who: Who,
        /// The function.
        function: String,
        /// Bytes from the start of the function, or of the part of it that was hit.
        offset: u64,
        /// The address found.
        at: Gva,
        /// What shows it.
        evidence: Evidence,
        /// Why the stack could not be followed to its end, where that is so.
        unreliable: Option<Unreliable>,
    },
    /// A stack that could neither be followed nor searched.
    Opaque {
        /// Whose stack.
        #[serde(flatten)]
        who: Who,
        /// Why it could not be followed.
        unreliable: Unreliable,
        /// Why it could not be searched.
        scan: String,
    },
    /// A vCPU stands in the kernel on a stack that no task and no CPU owns.
    NoStack {
        /// The vCPU.
        vcpu: u32,
        /// Where it stands.
        at: Gva,
    },
    /// A vCPU stands in a function that is to change.
    VcpuInFunction {
        /// The vCPU.
        vcpu: u32,
        /// The function.
        function: String,
        /// Bytes from its start.
        offset: u64,
        /// Where it stands.
        at: Gva,
    },
    /// A vCPU does not run the guest's kernel now, so its registers say nothing of it.
    Elsewhere {
        /// The vCPU.
        vcpu: u32,
        /// What it runs instead.
        what: Elsewhere,
    },
    /// The guest is rewriting its own text.
    TextPatching {
        /// What shows it.
        what: String,
    },
    /// A module has been loaded or unloaded since the unwind tables were copied.
    ModulesChanged,
    /// A module that is to be changed is no longer there, or just being unloaded.
    ModuleLeaves {
        /// The module.
        module: String,
    },
}

/// How a task was found to stand in a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evidence {
    /// A frame of its stack.
    Frame {
        /// 0 is the innermost.
        depth: usize,
        /// What kind of frame.
        kind: FrameKind,
    },
    /// A return address that a tracer keeps for it.
    HiddenReturn,
    /// A word on a stack that could not be followed: it may be a stale one.
    Scan {
        /// Where the word lies.
        word_at: Gva,
    },
}

/// What a vCPU runs when it does not run the guest's kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Elsewhere {
    /// Firmware in system-management mode.
    Smm,
    /// A guest of the guest.
    NestedGuest,
    /// Something else: a kernel's early start or late end, or another kernel.
    NotThatKernel(String),
}

impl Busy {
    /// Notes one more finding.
    pub fn add(&mut self, finding: Finding) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        } else {
            self.more = self.more.saturating_add(1);
        }
    }

    /// Whether nothing stands in the way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.findings.is_empty()
    }
}

impl Who {
    /// The owner of a stack.
    #[must_use]
    pub fn owns(stack: &Stack) -> Self {
        let name = |task: &Task| TaskName {
            comm: task.comm.clone(),
            pid: task.pid,
            tgid: task.tgid,
        };
        Self {
            task: stack.task.as_ref().map(name),
            vcpu: stack.vcpu,
        }
    }
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, finding) in self.findings.iter().enumerate() {
            let between = if index == 0 { "" } else { "; " };
            write!(f, "{between}{finding}")?;
        }
        match self.more {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl std::error::Error for Busy {}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.task {
            // A task names itself: control characters must not reach the terminal.
            Some(task) => write!(f, "{} (pid {})", task.comm.escape_debug(), task.pid)?,
            None => write!(f, "an unknown task")?,
        }
        match self.vcpu {
            Some(vcpu) => write!(f, " on vCPU {vcpu}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InFunction {
                who,
                function,
                offset,
                evidence,
                unreliable,
                ..
            } => {
                write!(f, "{who} is in {function}+{offset:#x} ({evidence})")?;
                match unreliable {
                    Some(why) => write!(f, ", its stack cannot be followed: {why}"),
                    None => Ok(()),
                }
            }
            Self::Opaque {
                who,
                unreliable,
                scan,
            } => {
                write!(
                    f,
                    "the stack of {who} can neither be followed ({unreliable}) nor searched ({scan})"
                )
            }
            Self::NoStack { vcpu, at } => {
                write!(
                    f,
                    "vCPU {vcpu} is in the kernel at {at}, on a stack that no task owns"
                )
            }
            Self::VcpuInFunction {
                vcpu,
                function,
                offset,
                ..
            } => {
                write!(f, "vCPU {vcpu} is in {function}+{offset:#x}")
            }
            Self::Elsewhere { vcpu, what } => write!(f, "vCPU {vcpu} {what}"),
            Self::TextPatching { what } => {
                write!(f, "the guest is rewriting its own text: {what}")
            }
            Self::ModulesChanged => {
                write!(f, "the guest has just loaded or unloaded a module")
            }
            Self::ModuleLeaves { module } => {
                write!(f, "module {module} has been or is being unloaded")
            }
        }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frame { depth, .. } => write!(f, "frame {depth}"),
            Self::HiddenReturn => write!(f, "a return address that a tracer keeps"),
            Self::Scan { word_at } => write!(f, "a word at {word_at} that may be stale"),
        }
    }
}

impl fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Smm => write!(f, "runs firmware in system-management mode"),
            Self::NestedGuest => write!(f, "runs a guest of its own"),
            Self::NotThatKernel(why) => write!(f, "does not run the kernel that was found: {why}"),
        }
    }
}
