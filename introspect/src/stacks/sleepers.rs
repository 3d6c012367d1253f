//! Stacks of tasks that slept, read while the guest ran, so that a stop reads only the stacks of those that have
//! run since. Owns the proof that one has not; reading a stack is [`super`]'s business.
//!
//! The scheduler counts every switch away from a task in the task itself, before its stack pointer is saved
//! (Linux v6.12 kernel/sched/core.c, `__schedule`, `++*switch_count`). `on_cpu` is set before a task is switched
//! to and cleared when it is wholly switched away from (`prepare_task`, `finish_task`). Hence a task
//!
//! ```text
//!   counts read ──▶ off its CPU ──▶ stack read ── … guest runs … ── stop: off its CPU, same counts
//! ```
//!
//! has not run since the second of these: it would have been counted on its way out. The counts must be read
//! before `on_cpu`: after it, a task on its way out could have been counted already and not yet be out. A task
//! that took the place of another in memory was started later.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::address::{Gva, GvaRange};
use crate::deadline::Deadline;
use crate::kernel::Kernel;
use crate::paging::{KernelMemory, ReadError};
use crate::target::PhysicalMemory;
use crate::tasks::fields::TaskFields;
use crate::tasks::{Task, walk};
use crate::unwind::Unwinder;

use super::pairing::Doing;
use super::{Reader, Stack};

/// The stacks, by `struct task_struct`. Each is given out once.
#[derive(Debug, Default)]
pub struct Sleepers {
    known: RefCell<HashMap<Gva, Sleeper>>,
}

#[derive(Debug)]
struct Sleeper {
    mark: Mark,
    stack: Stack,
}

/// What is another once the task has run, or is another task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    /// `nvcsw` and `nivcsw`: switches away, wanted and unwanted.
    switches: [u64; 2],
    /// Start since boot in nanoseconds.
    started: u64,
}

impl Mark {
    /// `None` where the kernel does not tell, or its memory cannot be read.
    fn of(memory: &KernelMemory<'_>, fields: &TaskFields, task: Gva) -> Option<Self> {
        // Without it nothing tells that a task runs.
        fields.on_cpu.as_ref().ok()?;
        let word = |offset| memory.read_u64(task.wrapping_add(offset)).ok();
        let [wanted, unwanted] = fields.switches?;
        Some(Self {
            switches: [word(wanted)?, word(unwanted)?],
            started: word(fields.start_boottime?)?,
        })
    }
}

impl Sleepers {
    /// Reads them, as many as can be read before `deadline`. What changes meanwhile or cannot be read is left to
    /// the stop.
    #[must_use]
    pub fn read(
        kernel: &Kernel,
        unwinder: &Unwinder,
        physical: &dyn PhysicalMemory,
        deadline: &Deadline,
    ) -> Self {
        let sleepers = Self::default();
        let memory = kernel.memory(physical);
        let mut reader = Reader::new(kernel, unwinder, memory, &[], &[]);
        let tasks = kernel.tasks(physical).unwrap_or_default();
        for task in tasks.into_iter().take_while(|_| !deadline.is_over()) {
            if let Some(sleeper) = kernel
                .task_fields()
                .and_then(|fields| Sleeper::read(&mut reader, fields, &task))
            {
                sleepers.known.borrow_mut().insert(sleeper.at(), sleeper);
            }
        }
        sleepers
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

    /// The stack of a task that is off its CPU in a stopped guest, if it is known and the task has not run since.
    pub(super) fn take(
        &self,
        memory: &KernelMemory<'_>,
        fields: &TaskFields,
        task: &Task,
    ) -> Option<Stack> {
        let known = self.known.borrow_mut().remove(&task.at)?;
        let slept = !task.on_cpu
            && known.place() == place(task)
            && Mark::of(memory, fields, task.at) == Some(known.mark);
        slept.then_some(known.stack)
    }
}

impl Sleeper {
    /// `None` for a task that runs, or cannot be read.
    fn read(reader: &mut Reader<'_>, fields: &TaskFields, task: &Task) -> Option<Self> {
        let mark = Mark::of(&reader.memory, fields, task.at)?;
        let now: Result<Task, ReadError> = walk::read(&reader.memory, fields, task.at, task.kind);
        let task = now.ok().filter(|task| !task.on_cpu)?;
        let stack = reader.task(task, Doing::Sleeps).ok()?;
        Some(Self { mark, stack })
    }

    fn at(&self) -> Gva {
        self.stack.task.as_ref().map_or(Gva(0), |task| task.at)
    }

    fn place(&self) -> Option<(GvaRange, Gva)> {
        self.stack.task.as_ref().and_then(place)
    }
}

/// Where its frames begin and end; `None` without a stack.
fn place(task: &Task) -> Option<(GvaRange, Gva)> {
    Some((task.stack?, task.saved_sp))
}
