//! Whether every task was found that may own a stack: what the stack gate needs and a list for people does
//! not. Owns what must be known of a kernel for that, and the scheduler's own counts, which show tasks that
//! are on no list. Finding tasks is [`walk`]'s business.
//!
//! A task that left the task list (see [`Leaving`]) stands in one of these states, and for each there is
//! something that shows it:
//!
//! ```text
//!   on a CPU ──────────────── the vCPU's registers: one that matches no task makes its stack unreliable
//!   any other, Listed ─────── rtp_exit_list
//!   runnable, Counted ─────── cfs_tasks, the real-time queues, the list of a BPF scheduler
//!                             deadline tasks: the bandwidth reserved for them on their CPU
//!   asleep, Counted ───────── nr_uninterruptible: what they may wait for there are locks, inodes and
//!                             grace periods of RCU, never with an interruptible sleep
//!   being woken, Counted ──── nr_uninterruptible too, until it is on a run queue
//! ```
//!
//! One state is not seen, in kernels without the list: for a few instructions between the locks of two run
//! queues, a task that is moved from one to the other is on none (Linux v6.12 `kernel/sched/fair.c`,
//! `detach_tasks`).

use serde::{Deserialize, Serialize};

use crate::address::Gva;
use crate::deadline::Deadline;
use crate::kernel::AttachError;
use crate::paging::{KernelMemory, ReadError};
use crate::types::{Member, Types};

use super::Task;
use super::fields::{Blind, Leaving, TaskFields, first_of};
use super::walk::{self, Heads, Known};

/// Task states (Linux v6.12 `include/linux/sched.h`).
const UNINTERRUPTIBLE: u32 = 0x2;
/// `TASK_WAKING`, `TASK_NOLOAD`, `TASK_NEW`, `TASK_FROZEN`: those are, or may be, not counted.
const UNCOUNTED: u32 = 0x200 | 0x400 | 0x800 | 0x8000;

/// Every task, as far as known.
pub(crate) struct Census {
    pub(crate) tasks: Vec<Task>,
    /// What shows that there are more; it may pass.
    pub(crate) missing: Option<Missing>,
}

/// What shows that some task is on no list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Missing {
    /// More tasks sleep than were found.
    #[error("{counted} tasks are in uninterruptible sleep, and {found} of them were found")]
    Asleep {
        /// By the scheduler's count.
        counted: i64,
        /// Of the tasks found.
        found: i64,
    },
    /// More bandwidth is reserved on a CPU than the deadline tasks found there have.
    #[error("CPU {0} has a deadline task that was not found")]
    Deadline(usize),
    /// Who is on a run queue cannot be told while it is being changed.
    #[error("the run queue of CPU {0} is just being changed")]
    Queue(usize),
    /// The list of exiting tasks cannot be read while a place on it is kept by something that is no task.
    #[error("the list of exiting tasks of CPU {0} has a node that is no task")]
    Leaving(usize),
}

/// Where the scheduler's counts are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    /// `nr_uninterruptible`: only the sum over all CPUs means something (Linux v6.12
    /// `kernel/sched/loadavg.c`).
    pub(super) asleep: Member,
    /// The lock of a run queue, zero when free.
    pub(super) lock: u64,
    /// `dl.this_bw`: of all deadline tasks of this CPU, also those that wait for their next period.
    pub(super) reserved: u64,
    /// `dl_bw` of what newer kernels reserve on each queue for tasks of other classes.
    pub(super) servers: Vec<u64>,
    pub(super) on_queue: u64,
    /// `dl.dl_bw` of a task, zero but for deadline tasks.
    pub(super) bandwidth: u64,
}

impl Counts {
    /// Looks them up.
    ///
    /// # Errors
    /// One is missing, or they do not count all.
    pub(super) fn of(types: &Types) -> Result<Self, Blind> {
        if types.member("spinlock", "rlock").is_err() {
            return Err(Blind::SleepingLocks);
        }
        let queue = |path| types.offset_of("rq", path);
        let servers = ["fair_server.dl_bw", "ext_server.dl_bw"];
        Ok(Self {
            asleep: types.member("rq", "nr_uninterruptible")?,
            // Renamed by Linux commit 5cb9eaa3d274 ("sched: Wrap rq::lock access") (in v5.14).
            lock: first_of(types, "rq", &["__lock.raw_lock", "lock.raw_lock"])?.offset,
            reserved: queue("dl.this_bw")?,
            servers: servers.iter().filter_map(|path| queue(path).ok()).collect(),
            on_queue: types.offset_of("task_struct", "on_rq")?,
            bandwidth: types.offset_of("task_struct", "dl.dl_bw")?,
        })
    }
}

/// Every task, or why that cannot be told of this kernel.
///
/// # Errors
/// Something is not known without which tasks might be missed; or as [`walk::all`].
pub(crate) fn take(
    memory: &KernelMemory<'_>,
    fields: &TaskFields,
    heads: &Heads<'_>,
    deadline: &Deadline,
    known: &dyn Known,
) -> Result<Census, AttachError> {
    let queues = queues(fields, heads)?;
    let mut census = walk::all(memory, fields, heads, deadline, known)?;
    if let Ok(Leaving::Counted(counts)) = &fields.leaving {
        census.missing = counts.missing(memory, heads, queues, &census.tasks, deadline)?;
    }
    Ok(census)
}

/// The run queues, if all is known that the lists of [`walk`] need to be complete.
fn queues(fields: &TaskFields, heads: &Heads<'_>) -> Result<Gva, AttachError> {
    let blind = |why: String, instead: &str| AttachError::Unsupported {
        what: "tasks off the task list",
        why: format!("{why}; such a kernel cannot be patched{instead}"),
    };
    let address = |name: &str| {
        let why = format!("the address of `{name}` is not known");
        blind(why, ": build it with CONFIG_KALLSYMS_ALL")
    };
    let members = |why: Blind| blind(why.to_string(), why.instead());
    let on_cpu = fields.on_cpu.clone();
    on_cpu.map_err(|why| blind(why.to_string(), ": build it with CONFIG_SMP"))?;
    let queue = fields.run_queue.as_ref();
    let queue = queue.map_err(|why| members(why.clone().into()))?;
    match &fields.leaving {
        Ok(Leaving::Listed { .. }) if heads.exit_lists.is_none() => {
            return Err(address("rcu_tasks__percpu"));
        }
        Ok(Leaving::Listed { .. }) => {}
        Ok(Leaving::Counted(_)) => {
            queue.fair.clone().map_err(members)?;
            queue.real_time.clone().map_err(members)?;
        }
        Err(why) => return Err(members(why.clone())),
    }
    if heads.per_cpu_offset.is_empty() {
        return Err(address("__per_cpu_offset"));
    }
    heads.run_queues.ok_or_else(|| address("runqueues"))
}

impl Counts {
    fn missing(
        &self,
        memory: &KernelMemory<'_>,
        heads: &Heads<'_>,
        queues: Gva,
        tasks: &[Task],
        deadline: &Deadline,
    ) -> Result<Option<Missing>, AttachError> {
        let mut counted = 0_i64;
        let mut reserved = Vec::with_capacity(heads.per_cpu_offset.len());
        for (cpu, offset) in heads.per_cpu_offset.iter().enumerate() {
            let queue = queues.wrapping_add(*offset);
            if memory.read_u32(queue.wrapping_add(self.lock))? != 0 {
                return Ok(Some(Missing::Queue(cpu)));
            }
            reserved.push(self.reserved(memory, queue)?);
            counted = counted.wrapping_add(self.asleep(memory, queue)?);
        }
        // Of four bytes a kernel takes the sum as such.
        if self.asleep.size == 4 {
            counted = i64::from(counted as i32);
        }
        if let Some(cpu) = self.of_nobody(memory, reserved, tasks, deadline)? {
            return Ok(Some(Missing::Deadline(cpu)));
        }
        let found = self.sleepers(memory, tasks, deadline)?;
        Ok((counted > found).then_some(Missing::Asleep { counted, found }))
    }

    fn asleep(&self, memory: &KernelMemory<'_>, queue: Gva) -> Result<i64, ReadError> {
        let at = queue.wrapping_add(self.asleep.offset);
        match self.asleep.size {
            4 => memory.read_u32(at).map(i64::from),
            _ => memory.read_u64(at).map(u64::cast_signed),
        }
    }

    /// Bandwidth of deadline tasks on a queue, without what is reserved for others.
    fn reserved(&self, memory: &KernelMemory<'_>, queue: Gva) -> Result<u64, ReadError> {
        let mut reserved = memory.read_u64(queue.wrapping_add(self.reserved))?;
        for server in &self.servers {
            let own = memory.read_u64(queue.wrapping_add(*server))?;
            reserved = reserved.saturating_sub(own);
        }
        Ok(reserved)
    }

    /// The first CPU on which more is reserved, by their order, than the tasks there have.
    fn of_nobody(
        &self,
        memory: &KernelMemory<'_>,
        mut reserved: Vec<u64>,
        tasks: &[Task],
        deadline: &Deadline,
    ) -> Result<Option<usize>, AttachError> {
        if reserved.iter().all(|left| *left == 0) {
            return Ok(None);
        }
        for (done, task) in tasks.iter().enumerate() {
            deadline.allow("counts of tasks", done)?;
            let own = memory.read_u64(task.at.wrapping_add(self.bandwidth))?;
            let cpu = usize::try_from(task.cpu).ok();
            if let Some(left) = cpu.and_then(|cpu| reserved.get_mut(cpu)) {
                *left = left.saturating_sub(own);
            }
        }
        Ok(reserved.iter().position(|left| *left > 0))
    }

    /// Tasks that are in the count for certain: on no queue, not on their way to or from a CPU.
    fn sleepers(
        &self,
        memory: &KernelMemory<'_>,
        tasks: &[Task],
        deadline: &Deadline,
    ) -> Result<i64, AttachError> {
        let counted = |task: &&Task| {
            !task.on_cpu && task.state & UNINTERRUPTIBLE != 0 && task.state & UNCOUNTED == 0
        };
        let mut found = 0;
        for (done, task) in tasks.iter().filter(counted).enumerate() {
            deadline.allow("counts of tasks", done)?;
            let queued = memory.read_u32(task.at.wrapping_add(self.on_queue))?;
            found += i64::from(queued == 0);
        }
        Ok(found)
    }
}
