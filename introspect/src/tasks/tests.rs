//! A guest of a few hundred bytes with task lists by hand.

use std::time::Duration;

use super::census::{self, Counts, Missing};
use super::fields::{Blind, Leaving, RealTime, RunQueue, TaskFields, Threads};
use super::walk::{self, Heads, MOST_TASKS};
use super::{Task, TaskKind};
use crate::address::Gva;
use crate::deadline::Deadline;
use crate::flat::{BASE, Flat};
use crate::kernel::AttachError;
use crate::types::{Member, TypeError};

/// Within a task.
const TASKS: u64 = 0;
const SIGNAL: u64 = 16;
const STATE: u64 = 24;
const ON_CPU: u64 = 28;
const STACK: u64 = 32;
const EXIT: u64 = 40;
const FAIR: u64 = 56;
const ON_QUEUE: u64 = 72;
const BANDWIDTH: u64 = 80;
const COMM: u64 = 88;
/// Always zero.
const NOTHING: u64 = 104;

/// Within a run queue.
const IDLE: u64 = 0;
const CURRENT: u64 = 8;
const FAIR_HEAD: u64 = 16;
const LOCK: u64 = 32;
const ASLEEP: u64 = 40;
const RESERVED: u64 = 48;
const SERVER: u64 = 56;
const NO_REAL_TIME: u64 = 64;

/// Places of the guest.
const INIT: u64 = 0x100;
const SLEEPER: u64 = 0x200;
const LEAVING: u64 = 0x300;
const QUEUE: u64 = 0x400;
const EXIT_LIST: u64 = 0x500;
const PER_CPU: [u64; 1] = [BASE.0];

struct Guest {
    bytes: Vec<u8>,
    fields: TaskFields,
    queues: Option<Gva>,
    exit_lists: Option<Gva>,
    cpus: &'static [u64],
    deadline: Deadline,
}

fn counts() -> Counts {
    Counts {
        asleep: Member {
            offset: ASLEEP,
            size: 8,
        },
        lock: LOCK,
        reserved: RESERVED,
        servers: vec![SERVER],
        on_queue: ON_QUEUE,
        bandwidth: BANDWIDTH,
    }
}

pub(crate) fn fields(leaving: Leaving) -> TaskFields {
    TaskFields {
        size: 1,
        tasks: TASKS,
        pid: NOTHING,
        tgid: NOTHING,
        comm: COMM,
        state: STATE,
        flags: NOTHING,
        on_cpu: Ok(ON_CPU),
        cpu: NOTHING,
        stack: STACK,
        stack_refcount: None,
        saved_sp: NOTHING,
        stack_size: 0x4000,
        threads: Threads {
            signal: SIGNAL,
            head: 0,
            node: 0,
        },
        run_queue: Ok(RunQueue {
            idle: IDLE,
            current: CURRENT,
            fair: Ok((FAIR_HEAD, FAIR)),
            real_time: Ok(RealTime {
                bitmap: NO_REAL_TIME,
                queues: 0,
                node: 0,
            }),
            extensible: None,
        }),
        leaving: Ok(leaving),
        start_boottime: None,
        stack_canary: None,
        exec_id: None,
        switches: None,
    }
}

impl Guest {
    /// The first task, on the only CPU, and one that sleeps in a way that is not counted.
    fn new(leaving: Leaving) -> Self {
        let mut guest = Self {
            bytes: vec![0; 0x1000],
            fields: fields(leaving),
            queues: Some(Gva(QUEUE)),
            exit_lists: Some(Gva(EXIT_LIST)),
            cpus: &PER_CPU,
            deadline: Deadline::none(),
        };
        guest.ring(&[INIT + TASKS, SLEEPER + TASKS]);
        guest.ring(&[QUEUE + FAIR_HEAD]);
        guest.ring(&[EXIT_LIST]);
        for at in [QUEUE + IDLE, QUEUE + CURRENT] {
            guest.put(at, BASE.0 + INIT);
        }
        guest.put(SLEEPER + STATE, 1);
        guest
    }

    fn listed() -> Self {
        Self::new(Leaving::Listed {
            head: 0,
            node: EXIT,
        })
    }

    fn counted() -> Self {
        Self::new(Leaving::Counted(counts()))
    }

    fn put(&mut self, at: u64, word: u64) {
        let at = at as usize;
        self.bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }

    /// A list through these nodes.
    fn ring(&mut self, nodes: &[u64]) {
        for (index, node) in nodes.iter().enumerate() {
            self.put(*node, BASE.0 + nodes[(index + 1) % nodes.len()]);
        }
    }

    fn with<T>(&self, ask: impl FnOnce(&Flat, &Heads<'_>) -> T) -> T {
        let heads = Heads {
            init_task: Gva(BASE.0 + INIT),
            run_queues: self.queues,
            exit_lists: self.exit_lists,
            per_cpu_offset: self.cpus,
            ram: 1 << 40,
        };
        ask(&Flat::new(&self.bytes), &heads)
    }

    fn list(&self) -> Result<Vec<Task>, AttachError> {
        self.with(|flat, heads| {
            walk::all(
                &flat.memory(),
                &self.fields,
                heads,
                &self.deadline,
                &walk::nobody,
            )
        })
    }

    fn census(&self) -> Result<(Vec<Task>, Option<Missing>), AttachError> {
        self.with(|flat, heads| {
            let census = census::take(
                &flat.memory(),
                &self.fields,
                heads,
                &self.deadline,
                &walk::nobody,
            )?;
            Ok((census.tasks, census.missing))
        })
    }

    fn missing(&self) -> Option<Missing> {
        self.census().unwrap().1
    }

    /// That the gate is refused, and why, while the list for people is not.
    fn refusal(&self) -> String {
        assert_eq!(self.list().unwrap().len(), 2);
        self.census()
            .map(|(tasks, _)| tasks)
            .unwrap_err()
            .to_string()
    }
}

fn no_member(within: &str, member: &str) -> TypeError {
    TypeError::NoMember {
        within: within.to_owned(),
        member: member.to_owned(),
    }
}

#[test]
fn a_task_that_left_the_task_list_is_found_on_the_list_of_those() {
    let mut guest = Guest::listed();
    guest.ring(&[EXIT_LIST, LEAVING + EXIT]);
    let (tasks, missing) = guest.census().unwrap();
    let found = tasks.iter().find(|task| task.at == Gva(BASE.0 + LEAVING));
    assert_eq!(found.unwrap().kind, TaskKind::Exiting);
    assert_eq!(missing, None);
}

#[test]
fn the_gate_is_refused_where_the_list_of_leaving_tasks_is_not_found() {
    let mut guest = Guest::listed();
    guest.exit_lists = None;
    assert_eq!(
        guest.refusal(),
        "tasks off the task list: the address of `rcu_tasks__percpu` is not known"
    );
}

#[test]
fn the_gate_is_refused_where_run_queues_are_not_found() {
    for mut guest in [Guest::listed(), Guest::counted()] {
        guest.queues = None;
        let why = guest.refusal();
        assert!(
            why.ends_with("address of `runqueues` is not known"),
            "{why}"
        );
        guest.queues = Some(Gva(QUEUE));
        guest.cpus = &[];
        let why = guest.refusal();
        assert!(why.ends_with("`__per_cpu_offset` is not known"), "{why}");
        guest.fields.run_queue = Err(no_member("rq", "idle"));
        let why = guest.refusal();
        assert!(why.ends_with("`struct rq` has no member `idle`"), "{why}");
        guest.fields.on_cpu = Err(no_member("task_struct", "on_cpu"));
        let why = guest.refusal();
        assert!(why.ends_with("has no member `on_cpu`"), "{why}");
    }
}

#[test]
fn without_a_list_of_leaving_tasks_the_gate_needs_each_kind_of_queue() {
    let mut guest = Guest::counted();
    let queue = guest.fields.run_queue.as_mut().unwrap();
    queue.real_time = Err(Blind::Groups);
    let why = guest.refusal();
    assert!(why.contains("queued by group"), "{why}");
    let queue = guest.fields.run_queue.as_mut().unwrap();
    queue.fair = Err(no_member("rq", "cfs_tasks").into());
    let why = guest.refusal();
    assert!(why.contains("`cfs_tasks`"), "{why}");
    guest.fields.leaving = Err(Blind::SleepingLocks);
    let why = guest.refusal();
    assert!(why.contains("sleep on spinlocks"), "{why}");
}

#[test]
fn a_sleeper_on_no_list_shows_in_the_count_of_sleepers() {
    let mut guest = Guest::counted();
    assert_eq!(guest.missing(), None);
    guest.put(QUEUE + ASLEEP, 1);
    let asleep = |counted, found| Some(Missing::Asleep { counted, found });
    assert_eq!(guest.missing(), asleep(1, 0));
    guest.put(SLEEPER + STATE, 0x102);
    assert_eq!(guest.missing(), None);
    // Not yet, or no longer, in the count: woken, new, still on a queue or a CPU.
    for state in [0x202, 0x402, 0x802, 0x8002, 1 << 32 | 0x2] {
        guest.put(SLEEPER + STATE, state);
        assert_eq!(guest.missing(), asleep(1, 0), "{state:#x}");
    }
    guest.put(SLEEPER + STATE, 0x2);
    guest.put(SLEEPER + ON_QUEUE, 1);
    assert_eq!(guest.missing(), asleep(1, 0));
}

#[test]
fn only_the_sum_over_all_cpus_counts() {
    let mut guest = Guest::counted();
    guest.cpus = &[BASE.0, BASE.0 + 0x800];
    guest.ring(&[0x800 + QUEUE + FAIR_HEAD]);
    guest.put(QUEUE + ASLEEP, 3_u64.wrapping_neg());
    guest.put(0x800 + QUEUE + ASLEEP, 3);
    assert_eq!(guest.missing(), None);
    guest.put(0x800 + QUEUE + ASLEEP, 4);
    assert!(guest.missing().is_some());
    // Of four bytes each, the sum is of four bytes too.
    let mut narrow = counts();
    narrow.asleep.size = 4;
    guest.fields.leaving = Ok(Leaving::Counted(narrow));
    assert!(guest.missing().is_some());
    guest.put(0x800 + QUEUE + ASLEEP, 3);
    assert_eq!(guest.missing(), None);
}

#[test]
fn a_deadline_task_on_no_list_shows_in_what_is_reserved_for_it() {
    let mut guest = Guest::counted();
    guest.put(QUEUE + RESERVED, 50);
    assert_eq!(guest.missing(), Some(Missing::Deadline(0)));
    guest.put(QUEUE + SERVER, 50);
    assert_eq!(guest.missing(), None);
    guest.put(QUEUE + RESERVED, 80);
    assert_eq!(guest.missing(), Some(Missing::Deadline(0)));
    guest.put(SLEEPER + BANDWIDTH, 30);
    assert_eq!(guest.missing(), None);
}

#[test]
fn a_queue_that_is_being_changed_is_not_believed() {
    let mut guest = Guest::counted();
    guest.put(QUEUE + LOCK, 1);
    assert_eq!(guest.missing(), Some(Missing::Queue(0)));
}

/// A task list of `count` nodes of two words each, in a row; `last` leads to that node.
fn long(count: u64, last: u64) -> Guest {
    let mut guest = Guest::listed();
    guest.fields.stack = 8;
    guest.fields.threads.signal = 8;
    for at in [
        &mut guest.fields.pid,
        &mut guest.fields.tgid,
        &mut guest.fields.comm,
        &mut guest.fields.state,
        &mut guest.fields.flags,
        &mut guest.fields.cpu,
        &mut guest.fields.saved_sp,
    ] {
        *at = 8;
    }
    let first = guest.bytes.len() as u64;
    guest.bytes.resize((first + (count + 1) * 16) as usize, 0);
    let nodes: Vec<u64> = (0..count).map(|nth| first + nth * 16).collect();
    guest.ring(&nodes);
    guest.put(INIT, BASE.0 + first);
    guest.put(first + (count - 1) * 16, BASE.0 + last);
    guest
}

#[test]
fn more_tasks_than_a_stop_can_bear_are_refused() {
    let fits = long(MOST_TASKS - 1, INIT);
    assert_eq!(fits.list().unwrap().len() as u64, MOST_TASKS);
    let guest = long(MOST_TASKS, INIT);
    let why = "tasks: there are more than 262144, too many to look at in one stop";
    assert_eq!(guest.list().unwrap_err().to_string(), why);
}

#[test]
fn a_task_list_that_leads_into_itself_is_given_up() {
    let guest = long(100, 0x1000);
    let why = guest.list().unwrap_err().to_string();
    assert!(why.starts_with("tasks: a task list does not end"), "{why}");
}

#[test]
fn a_walk_ends_with_its_deadline() {
    let mut guest = long(1000, 0x1000);
    guest.deadline = Deadline::within(Duration::ZERO);
    let late = guest.list().unwrap_err();
    let AttachError::Late { what, done, .. } = late else {
        panic!("{late}");
    };
    assert!(what == "tasks" && done < 100, "{done} {what}");
}
