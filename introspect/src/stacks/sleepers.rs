//! Stacks of tasks that slept, read while the guest ran, so that a stop reads only the stacks of those that have
//! run since. Owns the proof that one has not; reading a stack is [`super`]'s business.
//!
//! The scheduler counts every switch away from a task in the task itself, before its stack pointer is saved
//! (Linux v6.12 kernel/sched/core.c, `__schedule`, `++*switch_count`). `on_cpu` is set before a task is switched
//! to and cleared when it is wholly switched away from (`prepare_task`, `finish_task`). Hence a task
//!
//! ```text
//!   who it is ──▶ counts ──▶ off its CPU ──▶ stack read ── … guest runs … ── stop: off its CPU, all the same
//! ```
//!
//! has not run since the third of these: it would have been counted on its way out. The counts must be read
//! before `on_cpu`: after it, a task on its way out could have been counted already and not yet be out.
//!
//! Another task may have taken the place of the first in memory, by chance with the same counts. It was started
//! later, or has called `execve` since: a thread that does takes over the start of the first one of its process
//! (Linux v6.12 fs/exec.c, `de_thread`), and each call is counted in the task and handed down to its children
//! (`self_exec_id`, in `begin_new_exec`). A guest's clock may be coarse: where the kernel has stack canaries, random
//! for each task (kernel/fork.c, `dup_task_struct`), another task has another one. Who the task is must be read
//! before the rest: then, if that is the same in the stop, all the rest was read of it.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::address::Gva;
use crate::deadline::Deadline;
use crate::kernel::Kernel;
use crate::paging::KernelMemory;
use crate::target::PhysicalMemory;
use crate::tasks::fields::TaskFields;
use crate::tasks::{Task, walk};
use crate::unwind::Unwinder;

use super::pairing::Doing;
use super::{Reader, Stack};

#[cfg(test)]
mod tests;

/// The tasks and their stacks, by `struct task_struct`. For one stop: a task that a stop has asked for is known no
/// more, whatever the answer was, so that a second stop reads its stack anew.
#[derive(Debug, Default)]
pub struct Sleepers {
    known: RefCell<HashMap<Gva, Sleeper>>,
}

#[derive(Debug)]
struct Sleeper {
    mark: Mark,
    task: Task,
    stack: Stack,
}

/// What is another once the task has run, or is another task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    /// Of kernels that have them.
    canary: Option<u64>,
    /// Start since boot in nanoseconds.
    started: u64,
    /// Calls of `execve`, of its forefathers too.
    executions: u64,
    stack: Gva,
    /// `nvcsw` and `nivcsw`: switches away, wanted and unwanted.
    switches: [u64; 2],
}

impl Mark {
    /// `None` where the kernel does not tell, or its memory cannot be read.
    fn of(memory: &KernelMemory<'_>, fields: &TaskFields, task: Gva) -> Option<Self> {
        let word = |offset| memory.read_u64(task.wrapping_add(offset)).ok();
        let [wanted, unwanted] = fields.switches?;
        // Read in this order: see above.
        Some(Self {
            canary: match fields.stack_canary {
                Some(canary) => Some(word(canary)?),
                None => None,
            },
            started: word(fields.start_boottime?)?,
            executions: word(fields.exec_id?)?,
            stack: Gva(word(fields.stack)?),
            switches: [word(wanted)?, word(unwanted)?],
        })
    }
}

impl Sleepers {
    /// Reads those on the task list, as many as can be read before `deadline`. What changes meanwhile or cannot be read is left to
    /// the stop.
    #[must_use]
    pub fn read(
        kernel: &Kernel,
        unwinder: &Unwinder,
        physical: &dyn PhysicalMemory,
        deadline: &Deadline,
    ) -> Self {
        let Some(fields) = kernel.task_fields() else {
            return Self::default();
        };
        let tasks = kernel.listed_tasks(physical, deadline);
        let memory = kernel.memory(physical);
        let mut reader = Reader::new(kernel.layout.init, unwinder, memory, &[], &[]);
        Self::of(&mut reader, fields, &tasks, deadline)
    }

    fn of(
        reader: &mut Reader<'_>,
        fields: &TaskFields,
        tasks: &[Task],
        deadline: &Deadline,
    ) -> Self {
        let mut known = HashMap::new();
        for task in tasks.iter().take_while(|_| !deadline.is_over()) {
            let sleeper = Sleeper::read(reader, fields, task);
            known.extend(sleeper.map(|sleeper| (task.at, sleeper)));
        }
        Self {
            known: RefCell::new(known),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.known.borrow().len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The task, as it is now in a stopped guest, and its stack, if it is known and has not run since.
    pub(super) fn take(
        &self,
        memory: &KernelMemory<'_>,
        fields: &TaskFields,
        at: Gva,
    ) -> Option<(Task, Stack)> {
        let sleeper = self.known.borrow_mut().remove(&at)?;
        let task = now(memory, fields, sleeper.task, sleeper.mark)?;
        Some((task, sleeper.stack))
    }
}

impl Sleeper {
    /// `None` for a task that runs, has no stack, or cannot be read.
    fn read(reader: &mut Reader<'_>, fields: &TaskFields, listed: &Task) -> Option<Self> {
        // Where `on_cpu` is not known, nothing tells that a task runs.
        fields.on_cpu.as_ref().ok()?;
        let mark = Mark::of(&reader.memory, fields, listed.at)?;
        let task = walk::read(&reader.memory, fields, listed.at, listed.kind).ok()?;
        if task.on_cpu || task.stack.is_none() {
            return None;
        }
        let stack = reader.task(task.clone(), Doing::Sleeps).ok()?;
        Some(Self { mark, task, stack })
    }
}

/// The task as it is now, if it has not run since its mark was read. Others may have woken it, moved it to another CPU, or
/// freed its stack, if it is dead.
fn now(memory: &KernelMemory<'_>, fields: &TaskFields, task: Task, mark: Mark) -> Option<Task> {
    let word = |offset| memory.read_u32(task.at.wrapping_add(offset)).ok();
    let runs = word(*fields.on_cpu.as_ref().ok()?)? != 0;
    let freed = fields.stack_refcount.map_or(Some(1), word)? == 0;
    let saved_sp = memory.read_pointer(task.at.wrapping_add(fields.saved_sp));
    let same = saved_sp == Ok(task.saved_sp) && Mark::of(memory, fields, task.at) == Some(mark);
    (same && !runs && !freed).then_some(Task {
        state: word(fields.state)?,
        cpu: word(fields.cpu)?,
        ..task
    })
}
