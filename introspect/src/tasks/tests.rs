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
const SAVED_SP: u64 = 112;
const CPU: u64 = 120;

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
const BARE: u64 = 0x600;
const QUEUE: u64 = 0x400;
const EXIT_LIST: u64 = 0x500;
const STACK_AT: u64 = 0x1000;
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
        saved_sp: SAVED_SP,
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

    /// For people, as while it runs.
    fn list(&self) -> Result<Vec<Task>, AttachError> {
        self.with(|flat, heads| walk::running(&flat.memory(), &self.fields, heads))
    }

    /// The task list alone, as while it runs.
    fn task_list(&self) -> Vec<Task> {
        self.with(|flat, heads| walk::listed(&flat.memory(), &self.fields, heads, &self.deadline))
    }

    /// Gives a task a stack, which holds its saved stack pointer.
    fn stand(&mut self, task: u64) {
        self.put(task + STACK, BASE.0 + STACK_AT);
        self.put(task + SAVED_SP, BASE.0 + STACK_AT + 0x100);
    }

    /// Why a stop knows nothing.
    fn failure(&self) -> AttachError {
        self.census().map(|(tasks, _)| tasks).unwrap_err()
    }

    fn census(&self) -> Result<(Vec<Task>, Option<Missing>), AttachError> {
        self.with(|flat, heads| {
            let census = census::take(
                &flat.memory(),
                &self.fields,
                heads,
                &self.deadline,
                &walk::Nobody,
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
        self.failure().to_string()
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
    guest.stand(LEAVING);
    let (tasks, missing) = guest.census().unwrap();
    let found = tasks.iter().find(|task| task.at == Gva(BASE.0 + LEAVING));
    assert_eq!(found.unwrap().kind, TaskKind::Exiting);
    assert_eq!(missing, None);
}

fn has(tasks: &[Task], at: u64) -> bool {
    tasks.iter().any(|task| task.at == Gva(BASE.0 + at))
}

#[test]
fn a_node_of_the_list_of_leaving_tasks_that_is_no_task_makes_it_incomplete_for_now() {
    for (stack, saved_sp) in [
        (0, 0),
        (BASE.0 + STACK_AT, 0),
        (BASE.0 + STACK_AT, BASE.0 + STACK_AT + 0x4000),
        (BASE.0 + STACK_AT + 8, BASE.0 + STACK_AT + 0x100),
        (0x7000, 0x7100),
    ] {
        let mut guest = Guest::listed();
        // The real one stands behind it.
        guest.ring(&[EXIT_LIST, BARE + EXIT, LEAVING + EXIT]);
        guest.stand(LEAVING);
        guest.put(BARE + STACK, stack);
        guest.put(BARE + SAVED_SP, saved_sp);
        let (tasks, missing) = guest.census().unwrap();
        assert_eq!(
            missing,
            Some(Missing::Leaving(0)),
            "{stack:#x} {saved_sp:#x}"
        );
        assert!(has(&tasks, LEAVING) && !has(&tasks, BARE));
        let shown = guest.list().unwrap();
        assert!(has(&shown, LEAVING) && !has(&shown, BARE));
    }
}

#[test]
fn a_node_of_the_list_of_leaving_tasks_that_cannot_be_read_makes_it_incomplete_for_now() {
    let mut guest = Guest::listed();
    guest.put(EXIT_LIST, 0xffff_8880_0000_0000);
    assert_eq!(guest.missing(), Some(Missing::Leaving(0)));
    assert_eq!(guest.list().unwrap().len(), 2);
    // That one leads into itself does not pass.
    guest.ring(&[LEAVING + EXIT]);
    guest.put(EXIT_LIST, BASE.0 + LEAVING + EXIT);
    let why = guest.failure().to_string();
    assert!(why.starts_with("tasks: a task list does not end"), "{why}");
}

/// A node taken off a run queue while the guest runs points to itself; one that was put on the queue of another
/// CPU leads to its head and round it.
#[test]
fn a_run_queue_that_changes_under_the_walk_ends_for_people_and_not_in_a_stop() {
    let mut guest = Guest::counted();
    for next in [&[LEAVING + FAIR][..], &[LEAVING + FAIR, 0x800 + FAIR_HEAD]] {
        guest.put(QUEUE + FAIR_HEAD, BASE.0 + LEAVING + FAIR);
        guest.ring(next);
        guest.stand(LEAVING);
        let shown = guest.list().unwrap();
        assert!(shown.len() == 3 && has(&shown, LEAVING));
        let why = guest.failure().to_string();
        assert!(why.starts_with("tasks: a task list does not end"), "{why}");
    }
    guest.put(QUEUE + FAIR_HEAD, 0xffff_8880_0000_0000);
    assert_eq!(guest.list().unwrap().len(), 2);
    assert!(matches!(guest.failure(), AttachError::Read(_)));
    // Whatever is on it is a task, in a stop.
    guest.ring(&[QUEUE + FAIR_HEAD, BARE + FAIR]);
    assert_eq!(guest.list().unwrap().len(), 2);
    assert!(has(&guest.census().unwrap().0, BARE));
}

#[test]
fn of_a_guest_that_runs_the_task_list_is_had_as_far_as_it_leads() {
    let mut guest = Guest::listed();
    // Run queues and their like are not looked at.
    guest.put(QUEUE + FAIR_HEAD, BASE.0 + LEAVING + FAIR);
    guest.put(EXIT_LIST, BASE.0 + LEAVING + EXIT);
    guest.stand(LEAVING);
    let found = guest.task_list();
    assert!(found.len() == 1 && has(&found, SLEEPER));
    for astray in [0xffff_8880_0000_0000, BASE.0 + SLEEPER + TASKS] {
        guest.put(SLEEPER + TASKS, astray);
        assert_eq!(guest.task_list(), found);
        assert!(guest.list().is_err());
    }
}

#[test]
fn the_gate_is_refused_where_the_list_of_leaving_tasks_is_not_found() {
    let mut guest = Guest::listed();
    guest.exit_lists = None;
    assert_eq!(
        guest.refusal(),
        "tasks off the task list: the address of `rcu_tasks__percpu` is not known; such a kernel cannot be patched: \
         build it with CONFIG_KALLSYMS_ALL"
    );
}

#[test]
fn the_gate_is_refused_where_run_queues_are_not_found() {
    for mut guest in [Guest::listed(), Guest::counted()] {
        guest.queues = None;
        let why = guest.refusal();
        assert!(why.contains("address of `runqueues` is not known"), "{why}");
        guest.queues = Some(Gva(QUEUE));
        guest.cpus = &[];
        let why = guest.refusal();
        assert!(why.contains("`__per_cpu_offset` is not known"), "{why}");
        guest.fields.run_queue = Err(no_member("rq", "idle"));
        let why = guest.refusal();
        assert!(
            why.contains("`struct rq` has no member `idle`; such"),
            "{why}"
        );
        guest.fields.on_cpu = Err(no_member("task_struct", "on_cpu"));
        let why = guest.refusal();
        let remedy =
            "has no member `on_cpu`; such a kernel cannot be patched: build it with CONFIG_SMP";
        assert!(why.ends_with(remedy), "{why}");
    }
}

#[test]
fn without_a_list_of_leaving_tasks_the_gate_needs_each_kind_of_queue() {
    let mut guest = Guest::counted();
    let queue = guest.fields.run_queue.as_mut().unwrap();
    queue.real_time = Err(Blind::Groups);
    let why = guest.refusal();
    assert!(
        why.ends_with("build it without CONFIG_RT_GROUP_SCHED"),
        "{why}"
    );
    let queue = guest.fields.run_queue.as_mut().unwrap();
    queue.fair = Err(no_member("rq", "cfs_tasks").into());
    let why = guest.refusal();
    assert!(why.contains("`cfs_tasks`"), "{why}");
    guest.fields.leaving = Err(Blind::SleepingLocks);
    let why = guest.refusal();
    assert!(why.ends_with("build it without CONFIG_PREEMPT_RT"), "{why}");
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
    // Only what tasks of that CPU have counts, and that of all of them.
    guest.fields.cpu = CPU;
    guest.put(SLEEPER + CPU, 1);
    assert_eq!(guest.missing(), Some(Missing::Deadline(0)));
    guest.cpus = &[BASE.0, BASE.0 + 0x800];
    guest.ring(&[0x800 + QUEUE + FAIR_HEAD]);
    guest.put(0x800 + QUEUE + RESERVED, 30);
    guest.put(INIT + BANDWIDTH, 30);
    assert_eq!(guest.missing(), None);
    guest.put(0x800 + QUEUE + RESERVED, 31);
    assert_eq!(guest.missing(), Some(Missing::Deadline(1)));
}

/// The walk is over before it looks at the clock.
#[test]
fn the_counts_are_compared_within_the_deadline() {
    for (at, word) in [(QUEUE + RESERVED, 1), (SLEEPER + STATE, 2)] {
        let mut guest = Guest::counted();
        guest.put(at, word);
        guest.deadline = Deadline::within(Duration::ZERO);
        let late = guest.failure();
        assert!(
            matches!(
                late,
                AttachError::Late {
                    what: "counts of tasks",
                    ..
                }
            ),
            "{late}"
        );
        assert!(late.to_string().contains("try again"), "{late}");
    }
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
    let why = "tasks: there are more than 262144, too many to look at in one stop: try again when there are fewer";
    assert_eq!(guest.failure().to_string(), why);
}

#[test]
fn a_task_list_that_leads_into_itself_is_given_up() {
    for back in [0x1000, 0x1000 + 50 * 16, 0x1000 + 99 * 16] {
        let guest = long(100, back);
        for why in [guest.failure(), guest.list().unwrap_err()] {
            let why = why.to_string();
            assert!(why.starts_with("tasks: a task list does not end"), "{why}");
        }
    }
}

#[test]
fn a_walk_ends_with_its_deadline() {
    let mut guest = long(1000, INIT);
    guest.deadline = Deadline::within(Duration::ZERO);
    let late = guest.failure();
    let AttachError::Late { what, done, .. } = late else {
        panic!("{late}");
    };
    assert!(what == "tasks" && done < 100, "{done} {what}");
    assert!(guest.task_list().len() < 100);
}
