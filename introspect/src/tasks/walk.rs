//! Walks every list that a task with a kernel stack may be on: the task list and its threads, idle and
//! current tasks of each CPU, run queues and the list of exiting tasks.
//!
//! A task leaves the task list before it has finished (Linux v6.12 kernel/exit.c, release_task called by
//! exit_notify), so the other places matter. Only in a stop is the result complete, and a list that cannot be
//! walked to its end an error. Lists of a running guest change under the walk: nodes taken off the task list lead
//! back to it, since readers in the kernel walk it under RCU too (`list_del_rcu`), but those of the other lists
//! point to themselves or are put on another one (`list_del_init`, `list_move`), which ends the walk of that list.

use std::collections::HashSet;

use foldhash::fast::RandomState;

use crate::address::{Gva, GvaRange};
use crate::deadline::Deadline;
use crate::kernel::AttachError;
use crate::paging::{KernelMemory, ReadError};
use crate::tasks::census::{Census, Missing};
use crate::tasks::fields::{Leaving, RealTime, TaskFields};
use crate::tasks::words::{Links, TaskWords, Words};
use crate::tasks::{Task, TaskKind};

/// `MAX_RT_PRIO` (Linux v6.12 include/linux/sched/prio.h) and the size of `struct list_head`.
const REAL_TIME_PRIORITIES: u64 = 100;
const LIST_HEAD: u64 = 16;
const PAGE: u64 = 4096;

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

/// Tasks that are known already.
pub(crate) trait Known {
    /// How many they are about.
    fn count(&self) -> usize;

    /// The task that has these words, as it is now, if it is known.
    fn take(&self, at: Gva, words: &Words) -> Option<Task>;
}

/// No task is known.
pub(crate) struct Nobody;

impl Known for Nobody {
    fn count(&self) -> usize {
        0
    }

    fn take(&self, _: Gva, _: &Words) -> Option<Task> {
        None
    }
}

/// A walk under way.
struct Walk<'a> {
    memory: &'a KernelMemory<'a>,
    fields: &'a TaskFields,
    words: TaskWords,
    /// By a fast hash, though the guest chooses the addresses: what it could cost us so is bounded by the deadline.
    seen: HashSet<Gva, RandomState>,
    found: Vec<Task>,
    /// What shows that there are tasks that were not found.
    missing: Option<Missing>,
    /// Nodes that may still be visited.
    budget: u64,
    deadline: &'a Deadline,
    known: &'a dyn Known,
    /// Lists may change meanwhile.
    guest_runs: bool,
}

/// Every task of a stopped guest that is on a list whose place is known.
///
/// # Errors
/// A list that leads out of memory or never ends, more than [`MOST_TASKS`], or no time left.
pub(crate) fn all(
    memory: &KernelMemory<'_>,
    fields: &TaskFields,
    heads: &Heads<'_>,
    deadline: &Deadline,
    known: &dyn Known,
) -> Result<Census, AttachError> {
    let mut walk = Walk::new(memory, fields, heads, deadline);
    walk.known = known;
    walk.found.reserve(known.count());
    walk.seen.reserve(known.count());
    walk.everywhere(heads)?;
    Ok(Census {
        tasks: walk.found,
        missing: walk.missing,
    })
}

/// The same of a guest that may run: what was found while its lists changed.
///
/// # Errors
/// As [`all`], but of the task list and its threads only.
pub(crate) fn running(
    memory: &KernelMemory<'_>,
    fields: &TaskFields,
    heads: &Heads<'_>,
) -> Result<Vec<Task>, AttachError> {
    let no_end = Deadline::none();
    let mut walk = Walk::new(memory, fields, heads, &no_end);
    walk.guest_runs = true;
    walk.everywhere(heads)?;
    Ok(walk.found)
}

/// Of a guest that may run, the task list and its threads alone, as far as they can be walked before `deadline`.
pub(crate) fn listed(
    memory: &KernelMemory<'_>,
    fields: &TaskFields,
    heads: &Heads<'_>,
    deadline: &Deadline,
) -> Vec<Task> {
    let mut walk = Walk::new(memory, fields, heads, deadline);
    walk.guest_runs = true;
    // An error ends the walk; what was found before it counts.
    let _ = walk.listed(heads.init_task);
    walk.found
}

/// Why a walk along a list was given up.
enum Lost {
    /// It leads out of memory, or into itself past its head.
    Astray(AttachError),
    /// No time, or too many.
    Enough(AttachError),
}

impl From<Lost> for AttachError {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Astray(why) | Lost::Enough(why) => why,
        }
    }
}

impl From<ReadError> for Lost {
    fn from(why: ReadError) -> Self {
        Self::Astray(why.into())
    }
}

/// A place on a list, and one before it: who comes by that again goes round in circles. It is moved up to here
/// whenever the steps have doubled, so that a circle of any length is noticed in a few rounds (Brent's algorithm).
struct Place {
    head: Gva,
    at: Gva,
    before: Gva,
    steps: u64,
}

impl Place {
    const fn first(head: Gva) -> Self {
        Self {
            head,
            at: head,
            before: head,
            steps: 0,
        }
    }
}

impl<'a> Walk<'a> {
    fn new(
        memory: &'a KernelMemory<'a>,
        fields: &'a TaskFields,
        heads: &Heads<'_>,
        deadline: &'a Deadline,
    ) -> Self {
        // A task takes more than 2 KiB on any 64-bit kernel, whatever the guest's own type information says.
        let most = (heads.ram / fields.size.max(2048) + 1).min(MOST_TASKS);
        Self {
            memory,
            fields,
            words: TaskWords::of(fields),
            seen: HashSet::default(),
            found: Vec::new(),
            missing: None,
            budget: most * 4,
            deadline,
            known: &Nobody,
            guest_runs: false,
        }
    }

    fn everywhere(&mut self, heads: &Heads<'_>) -> Result<(), AttachError> {
        self.idle(heads)?;
        self.listed(heads.init_task)?;
        self.run_queues(heads)?;
        self.exiting(heads)
    }

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
        let mut place = Place::first(head);
        let mut next = self.memory.read_pointer(head)?;
        while let Some(at) = self.step(&mut place, next)? {
            let task = at.wrapping_sub(self.fields.tasks);
            let links = self.visit(task)?;
            if links.signal.0 != 0 {
                self.threads(task, links)?;
            }
            next = links.tasks;
        }
        Ok(())
    }

    /// The threads of a process, of which the first, with these links, was visited before.
    fn threads(&mut self, first: Gva, links: Links) -> Result<(), Lost> {
        let members = self.fields.threads;
        let head = links.signal.wrapping_add(members.head);
        let mut place = Place::first(head);
        let mut next = self.memory.read_pointer(head)?;
        while let Some(at) = self.step(&mut place, next)?
            && at.0 != 0
        {
            let task = at.wrapping_sub(members.node);
            let of_task = if task == first {
                links
            } else {
                self.visit(task)?
            };
            next = of_task.thread;
        }
        Ok(())
    }

    /// A task on the task list or a list of threads, and where these go on.
    fn visit(&mut self, at: Gva) -> Result<Links, Lost> {
        let words = self.words.read(self.memory, at)?;
        if self.seen.insert(at) {
            self.push(at, TaskKind::Listed, &words)?;
        }
        Ok(self.words.links(&words))
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
                self.queue(queue.wrapping_add(*head), *node)?;
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
            self.queue(queue.wrapping_add(head), members.node)?;
        }
        Ok(())
    }

    /// One list of a run queue.
    fn queue(&mut self, head: Gva, node: u64) -> Result<(), AttachError> {
        if self.guest_runs {
            self.perhaps_bare(head, node)?;
            return Ok(());
        }
        Ok(self.list(head, node, TaskKind::Exiting)?)
    }

    /// Tasks in the last part of do_exit (Linux v6.12 kernel/rcu/tasks.h, exit_tasks_rcu_start).
    ///
    /// Between them may be a node that is no task: who walks the list keeps its place while it lets others run by a
    /// `list_head` on its own stack (there, line 1073, rcu_tasks_postscan). It passes, so that it is no error.
    fn exiting(&mut self, heads: &Heads<'_>) -> Result<(), AttachError> {
        let Ok(Leaving::Listed { head, node }) = &self.fields.leaving else {
            return Ok(());
        };
        let Some(base) = heads.exit_lists else {
            return Ok(());
        };
        for (cpu, offset) in heads.per_cpu_offset.iter().enumerate() {
            let head = base.wrapping_add(*offset).wrapping_add(*head);
            if !self.perhaps_bare(head, *node)? {
                self.missing = Some(Missing::Leaving(cpu));
            }
        }
        Ok(())
    }

    /// Adds the tasks of a list that may have other nodes too, or lead astray. Returns whether it had only tasks.
    fn perhaps_bare(&mut self, head: Gva, node: u64) -> Result<bool, AttachError> {
        let known = self.found.len();
        let ended = self.list(head, node, TaskKind::Exiting);
        let mut new = self.found.split_off(known);
        let nodes = new.len();
        new.retain(is_on_own_stack);
        let all_tasks = new.len() == nodes;
        self.found.append(&mut new);
        match ended {
            Ok(()) => Ok(all_tasks),
            // What is still on the list is not known.
            Err(Lost::Astray(AttachError::Read(_))) => Ok(false),
            Err(Lost::Astray(_)) if self.guest_runs => Ok(false),
            Err(why) => Err(why.into()),
        }
    }

    /// Adds every task of a list whose nodes lie `node` bytes into a task. A head of zero was never set
    /// up: an empty list of a CPU that never came online.
    fn list(&mut self, head: Gva, node: u64, kind: TaskKind) -> Result<(), Lost> {
        let mut place = Place::first(head);
        while let Some(at) = self.next(&mut place)?
            && at.0 != 0
        {
            self.add(at.wrapping_sub(node), kind)?;
        }
        Ok(())
    }

    /// The next node, `None` where the list is back at its head.
    fn next(&mut self, place: &mut Place) -> Result<Option<Gva>, Lost> {
        let next = self.memory.read_pointer(place.at)?;
        self.step(place, next)
    }

    /// Moves on to the next node, `None` where that is the head.
    fn step(&mut self, place: &mut Place, next: Gva) -> Result<Option<Gva>, Lost> {
        let endless = |at| unsupported(format!("a task list does not end; last node {at}"));
        let budget = self.budget.checked_sub(1);
        self.budget = budget.ok_or_else(|| Lost::Enough(endless(place.at)))?;
        if self.budget.is_multiple_of(BETWEEN_LOOKS) && self.deadline.is_over() {
            return Err(Lost::Enough(AttachError::Late {
                what: "tasks",
                done: self.found.len(),
                allowed: self.deadline.allowed(),
            }));
        }
        if next == place.head {
            return Ok(None);
        }
        if next == place.before {
            return Err(Lost::Astray(endless(place.at)));
        }
        place.at = next;
        place.steps += 1;
        if place.steps.is_power_of_two() {
            place.before = next;
        }
        Ok(Some(next))
    }

    fn add(&mut self, at: Gva, kind: TaskKind) -> Result<(), Lost> {
        if self.seen.insert(at) {
            let words = self.words.read(self.memory, at)?;
            self.push(at, kind, &words)?;
        }
        Ok(())
    }

    fn push(&mut self, at: Gva, kind: TaskKind, words: &Words) -> Result<(), Lost> {
        if self.found.len() as u64 >= MOST_TASKS {
            let why = format!(
                "there are more than {MOST_TASKS}, too many to look at in one stop: try again when there are fewer"
            );
            return Err(Lost::Enough(unsupported(why)));
        }
        self.found.push(match self.known.take(at, words) {
            Some(task) => Task { kind, ..task },
            None => self.words.task(self.memory, words, at, kind)?,
        });
        Ok(())
    }
}

/// Whether it can be a task that has yet to leave its stack: that lies in the kernel's half of addresses, is
/// aligned to pages (Linux v6.12 kernel/fork.c, `alloc_thread_stack_node`), and holds the stack pointer that was
/// saved when the task last left a CPU, or was made. Words that happen to lie around a bare node are hardly ever so.
fn is_on_own_stack(task: &Task) -> bool {
    let holds = |stack: GvaRange| {
        stack.start.0 >> 63 == 1
            && stack.start.0.is_multiple_of(PAGE)
            && stack.contains(task.saved_sp)
    };
    task.stack.is_some_and(holds)
}

const fn unsupported(why: String) -> AttachError {
    AttachError::Unsupported { what: "tasks", why }
}
