//! The target traits: what everything above is written against. Reading and writing are apart, as
//! types: only a [`StoppedTarget`] can change the guest's own memory. Knows no hypervisor.
//!
//! ```text
//!             stop(deadline, lease, detail)
//!   Target ───────────────────────────▶ StoppedTarget ── resume(), switch(batch) ──▶ StopReport
//!     ▲   every vCPU out, or none           │   ▲
//!     │                                     │   └── write(batch): all or nothing
//!     └──────────── drop: undo, resume ─────┘
//! ```

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::address::{Gpa, GpaRange};
use crate::call::{Call, CallError, Called};
use crate::vcpu::Vcpu;

/// Guest-physical memory that can be read at any time. What is read is hostile, and while the guest
/// runs it may change between two reads. Implementations copy; none hands out a reference.
pub trait PhysicalMemory {
    /// Fills `into` with the bytes from `at` on.
    ///
    /// # Errors
    /// [`MemoryError::NotBacked`] where any byte of the range is not RAM; `into` is then unspecified.
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError>;

    /// The RAM there is, sorted, without overlaps. The arena slot is not part of it, though
    /// [`read`](Self::read) serves it.
    fn ram(&self) -> Vec<GpaRange>;

    /// One little-endian word. Memory of a running guest gives an aligned one as it was at one moment.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_u64(&self, at: Gpa) -> Result<u64, MemoryError> {
        let mut word = [0; 8];
        self.read(at, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Little-endian words at these offsets from `at`, one after the other in this order, into as many of `into`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_words(&self, at: Gpa, offsets: &[u64], into: &mut [u64]) -> Result<(), MemoryError> {
        for (offset, word) in offsets.iter().zip(into) {
            *word = self.read_u64(at.wrapping_add(*offset))?;
        }
        Ok(())
    }
}

/// Why guest-physical memory could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// Some byte of the range belongs to no RAM.
    #[error("guest-physical {at}, {len} bytes: not guest RAM")]
    NotBacked {
        /// Where the read began.
        at: Gpa,
        /// Its length in bytes.
        len: usize,
    },
    /// The backing could not be read (a dump file cut short, a process gone).
    #[error("guest-physical {at}: {what}")]
    Backing {
        /// Where the read began.
        at: Gpa,
        /// What the backing said.
        what: String,
    },
}

/// A machine that runs and can be stopped.
pub trait Target: PhysicalMemory {
    /// What the user calls it (`--vm`).
    fn name(&self) -> &str;

    /// How many vCPUs it has.
    fn vcpu_count(&self) -> usize;

    /// Takes every vCPU out of guest mode, or none.
    ///
    /// # Errors
    /// [`StopError`]; the guest then runs on as before.
    fn stop(&self, request: StopRequest) -> Result<Box<dyn StoppedTarget + '_>, StopError>;

    /// The memory slot of the hypervisor's own that holds the arena: high above guest RAM, within the
    /// guest's physical address width, known to no guest allocator.
    ///
    /// # Errors
    /// [`ArenaError::Unsupported`] where the hypervisor cannot have one.
    fn arena(&self) -> Result<GpaRange, ArenaError>;

    /// Writes into the arena slot while the guest runs: nothing executes it yet.
    ///
    /// # Errors
    /// [`ArenaError::Outside`] where any byte lies outside [`arena`](Self::arena).
    fn write_arena(&self, at: Gpa, bytes: &[u8]) -> Result<(), ArenaError>;

    /// Whether its stops can [`call`](StoppedTarget::call).
    fn can_call(&self) -> bool {
        false
    }
}

/// How long a stop may take to be reached, how long it may last, and what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopRequest {
    /// All vCPUs must be out of guest mode by then, or the stop is given up.
    pub deadline: Duration,
    /// After this the machine undoes what the stop wrote and resumes by itself.
    pub lease: Duration,
    /// What is read of each vCPU.
    pub detail: Detail,
}

/// How much is read of a vCPU in a stop: what is left out does not lengthen it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Detail {
    /// All that the machine can tell.
    #[default]
    All,
    /// What stacks are examined by. One that is halted may be called running.
    Stacks,
}

impl StopRequest {
    /// The usual stop for a change: the stacks are examined, bytes are written.
    #[must_use]
    pub fn for_change() -> Self {
        Self {
            detail: Detail::Stacks,
            ..Self::default()
        }
    }

    /// How much of the lease may go into looking at the guest. The last quarter is for writing, comparing
    /// and resuming, which must not begin too late to end in time.
    #[must_use]
    pub fn examination(&self) -> Duration {
        self.lease - self.lease / 4
    }
}

impl Default for StopRequest {
    fn default() -> Self {
        Self {
            deadline: Duration::from_millis(100),
            lease: Duration::from_millis(500),
            detail: Detail::All,
        }
    }
}

/// One place to change: compared with `old` first, then written with `new`, then read back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Edit {
    /// Where, within one 4 KiB page.
    pub at: Gpa,
    /// What must be there now. As long as `new`.
    pub old: Vec<u8>,
    /// What is to be there.
    pub new: Vec<u8>,
}

impl Edit {
    /// The edit that takes this one back.
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            at: self.at,
            old: self.new.clone(),
            new: self.old.clone(),
        }
    }
}

/// Every vCPU of a target, out of guest mode. Dropping it undoes what it wrote and resumes the guest;
/// only [`resume`](Self::resume) and [`switch`](Self::switch) keep what was written.
pub trait StoppedTarget {
    /// The guest's memory, which no vCPU changes now (devices still may).
    fn memory(&self) -> &dyn PhysicalMemory;

    /// Registers of every vCPU, by index.
    fn vcpus(&self) -> &[Vcpu];

    /// Compares every edit's `old`, then writes every `new`, then reads all back; all or nothing.
    ///
    /// # Errors
    /// [`WriteError`]; but for [`WriteError::UndoFailed`] no guest byte differs from before.
    fn write(&mut self, batch: &[Edit]) -> Result<(), WriteError>;

    /// Lets one vCPU execute a function of the guest while all others stand, and sets it back as it was. What the function
    /// wrote is not undone with the stop's own writes.
    ///
    /// # Errors
    /// [`CallError`]; but for [`CallError::NotRestored`] every register is as before.
    fn call(&mut self, _call: &Call) -> Result<Called, CallError> {
        Err(CallError::Unsupported("its machine has no such operation"))
    }

    /// Lets every vCPU run again and keeps what was written.
    ///
    /// # Errors
    /// [`ResumeError`] says whether the writes were kept.
    fn resume(self: Box<Self>) -> Result<StopReport, ResumeError>;

    /// Writes the batch and, if that went well, resumes. A machine that takes both as one order saves the guest the
    /// time between, and cannot be left with bytes written and nobody there to let it run.
    ///
    /// # Errors
    /// [`SwitchError`], as [`write`](Self::write) or [`resume`](Self::resume) would fail. After the first the guest is
    /// let go, but for [`WriteError::UndoFailed`].
    fn switch(mut self: Box<Self>, batch: &[Edit]) -> Result<StopReport, SwitchError> {
        self.write(batch)?;
        Ok(self.resume()?)
    }
}

/// What a stop cost, as the machine itself measured it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopReport {
    /// From the first kick to the last vCPU out of guest mode.
    pub kick: Duration,
    /// Reading all registers after that.
    pub registers: Duration,
    /// Writing, comparing and reading back all batches.
    pub write: Duration,
    /// From the wish to resume to the last vCPU let go.
    pub resume: Duration,
    /// The whole stop window: from the first kick to the last vCPU let go.
    pub window: Duration,
}

/// Why a machine was not stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// A vCPU did not leave guest mode in time; the others were let go.
    #[error(
        "vCPU {vcpu} did not leave guest mode within {deadline:?}; the guest runs on unchanged"
    )]
    Deadline {
        /// The one that was late.
        vcpu: u32,
        /// The deadline asked for.
        deadline: Duration,
    },
    /// The machine is not running: paused by its owner, finished, or already stopped by somebody else.
    #[error("the VM cannot be stopped for patching: {0}")]
    NotRunning(String),
    /// The machine cannot be reached.
    #[error("the VM does not answer: {0}")]
    Unreachable(String),
}

/// Why a batch was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A place does not hold what it should; nothing was written.
    #[error(
        "guest-physical {at} holds {found:02x?}, expected {expected:02x?}; nothing was written"
    )]
    Differs {
        /// Where.
        at: Gpa,
        /// What the edit expected.
        expected: Vec<u8>,
        /// What is there.
        found: Vec<u8>,
    },
    /// An edit names memory that is not there, crosses a page, or its two sides differ in length.
    #[error("edit at guest-physical {at}: {what}")]
    Malformed {
        /// Where.
        at: Gpa,
        /// What is wrong with it.
        what: String,
    },
    /// What was read back is not what was written, and the undo worked.
    #[error("guest-physical {at} did not read back as written; everything was undone")]
    ReadBack {
        /// Where.
        at: Gpa,
    },
    /// The undo failed too: the machine stays stopped.
    #[error("guest-physical {at} could neither be written nor restored; the VM stays stopped")]
    UndoFailed {
        /// Where.
        at: Gpa,
    },
    /// The machine is a dump: it cannot be written at all.
    #[error("guest-physical {at}: a dump cannot be written")]
    ReadOnly {
        /// Where the first edit was to go.
        at: Gpa,
    },
    /// The lease ran out: the machine undid everything and runs again.
    #[error("the stop's lease ran out; the machine undid everything and runs again")]
    LeaseExpired,
    /// The machine cannot be reached.
    #[error("the VM does not answer: {0}")]
    Unreachable(String),
}

/// Why a resume did not go as asked.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The lease had run out before: what was written is undone and the guest runs.
    #[error(
        "the stop's lease ran out before resume; what was written is undone and the guest runs"
    )]
    LeaseExpired,
    /// The machine cannot be reached: it is not known whether the writes were kept.
    #[error("the VM does not answer: {0}; run `vmpatch status` to see what holds")]
    Unreachable(String),
}

/// Why a batch was not written, or the guest not resumed with it as asked.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// It was not written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// It was, or may have been.
    #[error(transparent)]
    Resume(#[from] ResumeError),
}

/// Why there is no arena, or it was not written.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// This hypervisor has no slot of its own to give.
    #[error("this VM has no arena slot: {0}")]
    Unsupported(String),
    /// The write reaches outside the slot.
    #[error("arena write at {at}, {len} bytes, reaches outside the slot")]
    Outside {
        /// Where.
        at: Gpa,
        /// Length in bytes.
        len: usize,
    },
    /// The machine cannot be reached.
    #[error("the VM does not answer: {0}")]
    Unreachable(String),
}
