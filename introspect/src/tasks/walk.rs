//! Walks every list that a task with a kernel stack may be on: the task list and its threads, idle and
//! current tasks of each CPU, run queues and the list of exiting tasks.
//!
//! A task leaves the task list before it has finished (Linux v6.12 kernel/exit.c, release_task called by
//! exit_notify), so the other places matter. Lists of a running guest change under the walk; only in a
//! stop is the result complete.

use std::collections::HashSet;

use crate::address::{Gva, GvaRange};
use crate::deadline::Deadline;
use crate::kernel::AttachError;
use crate::paging::{KernelMemory, ReadError};
use crate::tasks::fields::{COMM, Leaving, RealTime, TaskFields};
use crate::tasks::{Task, TaskKind};

/// `PF_KTHREAD` (Linux v6.12 include/linux/sched.h).
const KERNEL_THREAD: u32 = 0x0020_0000;

/// `MAX_RT_PRIO` (Linux v6.12 include/linux/sched/prio.h) and the size of `struct list_head`.
const REAL_TIME_PRIORITIES: u64 = 100;
const LIST_HEAD: u64 = 16;

/// More tasks are refused. Linux itself would bear 4 Mi (v6.12 include/linux/threads.h, PID_MAX_LIMIT), but a
/// stop would not: each task costs about a microsecond to look at and a kibibyte to keep, so that these take
/// a quarter of a second and of a gibibyte. A kernel's own default is 32 Ki (PID_MAX_DEFAULT), or 1 Ki a CPU.
pub const MOST_TASKS: u64 = 256 << 10;
/// The clock is looked at once for so many nodes.
const BETWEEN_LOOKS: u64 = 64;

/// Where the lists begin.
#[derive(Clone, Debug)]
pub(crate) struct Heads<'a> {
    /// `init_task`.
    pub(crate) init_task: Gva,
    /// `runqueues` as a per-CPU offset.
    pub(crate) run_queues: Option<Gva>,
    /// `rcu_tasks__percpu` as a per-CPU offset.
    pub(crate) exit_lists: Option<Gva>,
    pub(crate) per_cpu_offset: &'a [u64],
    /// Bytes of guest RAM: no list can hold more tasks than fit in there.
    pub(crate) ram: u64,
}

/// Tasks that are known already, as they are now: these are not read.
pub(crate) type Known<'a> = &'a dyn Fn(Gva) -> Option<Task>;

/// No task is known.
pub(crate) const fn nobody(_: Gva) -> Option<Task> {
    None
}

/// A walk under way.
pub(crate) struct Walk<'a> {
    memory: &'a KernelMemory<'a>,
    fields: &'a TaskFields,
    seen: HashSet<Gva>,
    found: Vec<Task>,
    /// Nodes that may still be visited.
    budget: u64,
    deadline: &'a Deadline,
    known: Known<'a>,
}

/// Every task on a list whose place is known.
///
/// # Errors
/// A list that leads out of memory or never ends, more than [`MOST_TASKS`], or no time left.
pub(crate) fn all(
    memory: &KernelMemory<'_>,
    fields: &TaskFields,
    heads: &Heads<'_>,
    deadline: &Deadline,
    known: Known<'_>,
) -> Result<Vec<Task>, AttachError> {
    // A task takes more than 2 KiB on any 64-bit kernel, whatever the guest's own type information says.
    let most = (heads.ram / fields.size.max(2048) + 1).min(MOST_TASKS);
    let mut walk = Walk {
        memory,
        fields,
        seen: HashSet::new(),
        found: Vec::new(),
        budget: most * 4,
        deadline,
        known,
    };
    walk.idle(heads)?;
    walk.listed(heads.init_task)?;
    walk.run_queues(heads)?;
    walk.exiting(heads)?;
    Ok(walk.found)
}

impl Walk<'_> {
    /// Idle tasks: `init_task` first, which is also the head of the task list.
    fn idle(&mut self, heads: &Heads<'_>) -> Result<(), AttachError> {
        self.add(heads.init_task, TaskKind::Idle)?;
        let (Some(base), Ok(members)) = (heads.run_queues, &self.fields.run_queue) else {
            return Ok(());
        };
        for offset in heads.per_cpu_offset {
            let queue = base.wrapping_add(*offset);
            let idle = self.memory.read_pointer(queue.wrapping_add(members.idle))?;
            if idle.0 != 0 {
                self.add(idle, TaskKind::Idle)?;
            }
        }
        Ok(())
    }

    /// Processes, and the threads of each. A process whose first thread is gone keeps its place with a
    /// dead one.
    fn listed(&mut self, init_task: Gva) -> Result<(), AttachError> {
        let head = init_task.wrapping_add(self.fields.tasks);
        let threads = self.fields.threads;
        let mut at = self.next(head)?;
        while at != head {
            let task = at.wrapping_sub(self.fields.tasks);
            self.add(task, TaskKind::Listed)?;
            let signal = self
                .memory
                .read_pointer(task.wrapping_add(threads.signal))?;
            if signal.0 != 0 {
                let head = signal.wrapping_add(threads.head);
                self.list(head, threads.node, TaskKind::Listed)?;
            }
            at = self.next(at)?;
        }
        Ok(())
    }

    /// What runs or is runnable and was on no list so far: exiting tasks that were preempted. Of deadline
    /// tasks only the one that runs.
    fn run_queues(&mut self, heads: &Heads<'_>) -> Result<(), AttachError> {
        let (Some(base), Ok(members)) = (heads.run_queues, &self.fields.run_queue) else {
            return Ok(());
        };
        for offset in heads.per_cpu_offset {
            let queue = base.wrapping_add(*offset);
            let current = self
                .memory
                .read_pointer(queue.wrapping_add(members.current))?;
            if current.0 != 0 {
                self.add(current, TaskKind::Exiting)?;
            }
            for (head, node) in members.fair.iter().chain(&members.extensible) {
                self.list(queue.wrapping_add(*head), *node, TaskKind::Exiting)?;
            }
            if let Ok(members) = &members.real_time {
                self.real_time(queue, *members)?;
            }
        }
        Ok(())
    }

    /// The lists of the priorities whose bit is set; the last bit is a delimiter.
    fn real_time(&mut self, queue: Gva, members: RealTime) -> Result<(), AttachError> {
        let bitmap = self
            .memory
            .read_array::<16>(queue.wrapping_add(members.bitmap))?;
        let bitmap = u128::from_le_bytes(bitmap);
        for priority in (0..REAL_TIME_PRIORITIES).filter(|bit| bitmap >> bit & 1 != 0) {
            let head = members.queues + priority * LIST_HEAD;
            self.list(queue.wrapping_add(head), members.node, TaskKind::Exiting)?;
        }
        Ok(())
    }

    /// Tasks in the last part of do_exit (Linux v6.12 kernel/rcu/tasks.h, exit_tasks_rcu_start).
    fn exiting(&mut self, heads: &Heads<'_>) -> Result<(), AttachError> {
        let Ok(Leaving::Listed { head, node }) = &self.fields.leaving else {
            return Ok(());
        };
        let Some(base) = heads.exit_lists else {
            return Ok(());
        };
        for offset in heads.per_cpu_offset {
            let head = base.wrapping_add(*offset).wrapping_add(*head);
            self.list(head, *node, TaskKind::Exiting)?;
        }
        Ok(())
    }

    /// Adds every task of a list whose nodes lie `node` bytes into a task. A head of zero was never set
    /// up: an empty list of a CPU that never came online.
    fn list(&mut self, head: Gva, node: u64, kind: TaskKind) -> Result<(), AttachError> {
        let mut at = self.next(head)?;
        while at != head && at.0 != 0 {
            self.add(at.wrapping_sub(node), kind)?;
            at = self.next(at)?;
        }
        Ok(())
    }

    fn next(&mut self, node: Gva) -> Result<Gva, AttachError> {
        let endless = || unsupported(format!("a task list does not end; last node {node}"));
        self.budget = self.budget.checked_sub(1).ok_or_else(endless)?;
        if self.budget.is_multiple_of(BETWEEN_LOOKS) && self.deadline.is_over() {
            return Err(AttachError::Late {
                what: "tasks",
                done: self.found.len(),
                allowed: self.deadline.allowed(),
            });
        }
        Ok(self.memory.read_pointer(node)?)
    }

    fn add(&mut self, at: Gva, kind: TaskKind) -> Result<(), AttachError> {
        if self.seen.insert(at) {
            if self.found.len() as u64 >= MOST_TASKS {
                let why =
                    format!("there are more than {MOST_TASKS}, too many to look at in one stop");
                return Err(unsupported(why));
            }
            self.found.push(match (self.known)(at) {
                Some(task) => Task { kind, ..task },
                None => read(self.memory, self.fields, at, kind)?,
            });
        }
        Ok(())
    }
}

const fn unsupported(why: String) -> AttachError {
    AttachError::Unsupported { what: "tasks", why }
}

/// One task.
pub(crate) fn read(
    memory: &KernelMemory<'_>,
    fields: &TaskFields,
    at: Gva,
    kind: TaskKind,
) -> Result<Task, ReadError> {
    let word = |offset| memory.read_u32(at.wrapping_add(offset));
    let stack = memory.read_pointer(at.wrapping_add(fields.stack))?;
    let held = fields.stack_refcount.map_or(Ok(1), word)?;
    let on_cpu = fields.on_cpu.as_ref().map_or(Ok(0), |at| word(*at))?;
    Ok(Task {
        at,
        pid: word(fields.pid)?.cast_signed(),
        tgid: word(fields.tgid)?.cast_signed(),
        comm: comm(memory.read_array(at.wrapping_add(fields.comm))?),
        kind,
        state: word(fields.state)?,
        on_cpu: on_cpu != 0,
        cpu: word(fields.cpu)?,
        kernel_thread: word(fields.flags)? & KERNEL_THREAD != 0,
        stack: GvaRange::sized(stack, fields.stack_size).filter(|_| stack.0 != 0 && held != 0),
        saved_sp: memory.read_pointer(at.wrapping_add(fields.saved_sp))?,
    })
}

/// A name as the kernel keeps it, up to the first zero.
fn comm(bytes: [u8; COMM]) -> String {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}
