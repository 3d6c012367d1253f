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
//! before `on_cpu`: after it, a task on its way out could have been counted already and not yet be out. In that
//! order its words are read ([`TaskWords`]).
//!
//! Another task may have taken the place of the first in memory, by chance with the same counts. It was started
//! later, or has called `execve` since: a thread that does takes over the start of the first one of its process
//! (Linux v6.12 fs/exec.c, `de_thread`), and each call is counted in the task and handed down to its children
//! (`self_exec_id`, in `begin_new_exec`). A guest's clock may be coarse: where the kernel has stack canaries, random
//! for each task (kernel/fork.c, `dup_task_struct`), another task has another one. Who the task is must be read
//! before the rest: then, if that is the same in the stop, all the rest was read of it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

use foldhash::fast::RandomState;

use crate::address::Gva;
use crate::deadline::Deadline;
use crate::kernel::Kernel;
use crate::target::PhysicalMemory;
use crate::tasks::Task;
use crate::tasks::fields::TaskFields;
use crate::tasks::walk::Known;
use crate::tasks::words::{TaskWords, Words};
use crate::unwind::Unwinder;

use super::pairing::Doing;
use super::{Reader, Stack};

#[cfg(test)]
mod tests;

/// The tasks and their stacks, by `struct task_struct`. For one stop: what it did not take is dropped with them.
#[derive(Debug, Default)]
pub struct Sleepers {
    /// `None` where nothing is known.
    words: Option<TaskWords>,
    known: RefCell<HashMap<Gva, Sleeper, RandomState>>,
}

#[derive(Debug)]
struct Sleeper {
    words: Words,
    stack: Stack,
    /// A stop has taken its task from the stack.
    taken: bool,
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
        let words = TaskWords::of(fields);
        let mut known = HashMap::default();
        if words.tells_sleep() {
            for task in tasks.iter().take_while(|_| !deadline.is_over()) {
                let sleeper = Sleeper::read(reader, &words, task);
                known.extend(sleeper.map(|sleeper| (task.at, sleeper)));
            }
        }
        Self {
            words: Some(words),
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

    /// The stack, without its task, of a task that was taken.
    pub(super) fn take_stack(&self, at: Gva) -> Option<Stack> {
        let sleeper = self.known.borrow_mut().remove(&at)?;
        sleeper.taken.then_some(sleeper.stack)
    }
}

impl Known for Sleepers {
    fn count(&self) -> usize {
        self.len()
    }

    /// If it has not run since; others may have woken it or moved it to another CPU. A task is given once; its stack
    /// is then kept for [`take_stack`](Self::take_stack).
    fn take(&self, at: Gva, now: &Words) -> Option<Task> {
        let words = self.words.as_ref()?;
        let mut known = self.known.borrow_mut();
        let Entry::Occupied(mut entry) = known.entry(at) else {
            return None;
        };
        let sleeper = entry.get_mut();
        if sleeper.taken || !words.sleeps_on(&sleeper.words, now) {
            entry.remove();
            return None;
        }
        sleeper.taken = true;
        Some(Task {
            state: words.state(now),
            cpu: words.cpu(now),
            ..sleeper.stack.task.take()?
        })
    }
}

impl Sleeper {
    /// `None` for a task that runs, has no stack, or cannot be read.
    fn read(reader: &mut Reader<'_>, members: &TaskWords, listed: &Task) -> Option<Self> {
        let words = members.read(&reader.memory, listed.at).ok()?;
        let task = members.task(&reader.memory, &words, listed.at, listed.kind);
        let task = task.ok()?;
        if task.on_cpu || task.stack.is_none() {
            return None;
        }
        let stack = reader.task(task, Doing::Sleeps).ok()?;
        Some(Self {
            words,
            stack,
            taken: false,
        })
    }
}
