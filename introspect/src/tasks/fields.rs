//! Where the members of `task_struct` and of the run queue lie that this crate reads: looked up once,
//! so that a stop does not resolve names. Probes for members, not for versions: distributions backport.

use crate::types::{Member, TypeError, Types};

use super::census::Counts;

/// Kernel stack size where the kernel's types do not tell (Linux v6.12
/// arch/x86/include/asm/page_64_types.h, THREAD_SIZE without KASAN).
const USUAL_STACK: u64 = 16 << 10;

/// Offsets within `task_struct`, `signal_struct` and the run queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TaskFields {
    /// Size of a task: bounds how many there can be.
    pub(crate) size: u64,
    pub(crate) tasks: u64,
    pub(crate) pid: u64,
    pub(crate) tgid: u64,
    pub(crate) comm: u64,
    pub(crate) state: u64,
    pub(crate) flags: u64,
    /// Kernels for one CPU have none.
    pub(crate) on_cpu: Result<u64, TypeError>,
    pub(crate) cpu: u64,
    pub(crate) stack: u64,
    /// Zero once the stack is freed.
    pub(crate) stack_refcount: Option<u64>,
    pub(crate) saved_sp: u64,
    pub(crate) stack_size: u64,
    pub(crate) threads: Threads,
    pub(crate) run_queue: Result<RunQueue, TypeError>,
    pub(crate) leaving: Result<Leaving, Blind>,
    /// When the task was started since boot, in nanoseconds.
    pub(crate) start_boottime: Option<u64>,
    /// Kernels without CONFIG_STACKPROTECTOR have none.
    pub(crate) stack_canary: Option<u64>,
    /// `self_exec_id`.
    pub(crate) exec_id: Option<u64>,
    /// `nvcsw`, `nivcsw`: how often it was switched away from, of its own will and not.
    pub(crate) switches: Option<[u64; 2]>,
}

/// How the threads of a process hang together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Threads {
    pub(crate) signal: u64,
    pub(crate) head: u64,
    pub(crate) node: u64,
}

/// Members of `struct rq` and of a task on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunQueue {
    pub(crate) idle: u64,
    pub(crate) current: u64,
    /// Head in the queue and node in the task: `cfs_tasks`, `se.group_node`.
    pub(crate) fair: Result<(u64, u64), Blind>,
    pub(crate) real_time: Result<RealTime, Blind>,
    /// The same for tasks that a BPF scheduler has, where the kernel can have one: `scx.runnable_list`,
    /// `scx.runnable_node`.
    pub(crate) extensible: Option<(u64, u64)>,
}

/// How those tasks are found that have left the task list and still stand on their stacks. A task runs on for
/// a while after its parent, or itself, took it off that list, and can sleep there (Linux v6.12
/// `kernel/exit.c`, `exit_notify`, `release_task`; `fs/proc/inode.c`, `proc_invalidate_siblings_dcache`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// All of them are on a list of their own: head in a CPU's `rcu_tasks_percpu`, node in a task. They are
    /// on it from before `exit_notify` until after the last preemption or sleep; from then on they are on a
    /// CPU, and what a vCPU runs is looked at by its registers (Linux commit bfe93930ea1e ("rcu-tasks: Add
    /// data to eliminate RCU-tasks/do_exit() deadlocks") (in v6.9)).
    Listed { head: u64, node: u64 },
    /// Older kernels, and those that do not preempt themselves (no CONFIG_TASKS_RCU), have no such list. The
    /// runnable are on run queues; of the others the scheduler has counts.
    Counted(Counts),
}

/// Why tasks that left the task list cannot all be found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Blind {
    #[error(transparent)]
    Type(#[from] TypeError),
    /// CONFIG_RT_GROUP_SCHED: real-time queues hold queues.
    #[error("its real-time tasks are queued by group, which is not known here")]
    Groups,
    /// CONFIG_PREEMPT_RT: who waits for a lock sleeps, and is in no count (Linux v6.12
    /// `kernel/sched/core.c`, `TASK_RTLOCK_WAIT` in `try_to_block_task`).
    #[error("its tasks sleep on spinlocks, which nothing counts")]
    SleepingLocks,
}

impl Blind {
    /// How a kernel would have to be built instead, as the end of a sentence; empty where that is not known.
    pub(super) const fn instead(&self) -> &'static str {
        match self {
            Self::Type(_) => "",
            Self::Groups => ": build it without CONFIG_RT_GROUP_SCHED",
            Self::SleepingLocks => ": build it without CONFIG_PREEMPT_RT",
        }
    }
}

/// The real-time part of a run queue: one list for each priority, and a bit for each that is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RealTime {
    pub(crate) bitmap: u64,
    pub(crate) queues: u64,
    /// `rt.run_list` in a task.
    pub(crate) node: u64,
}

impl RealTime {
    fn of(types: &Types) -> Result<Self, Blind> {
        if types.member("sched_rt_entity", "my_q").is_ok() {
            return Err(Blind::Groups);
        }
        Ok(Self {
            bitmap: types.offset_of("rq", "rt.active.bitmap")?,
            queues: types.offset_of("rq", "rt.active.queue")?,
            node: types.offset_of("task_struct", "rt.run_list")?,
        })
    }
}

impl TaskFields {
    /// Looks all members up.
    ///
    /// # Errors
    /// One without which tasks cannot be read.
    pub(crate) fn of(types: &Types) -> Result<Self, TypeError> {
        let task = |path| types.offset_of("task_struct", path);
        let any = |paths: &[&str]| first_of(types, "task_struct", paths);
        Ok(Self {
            size: types.size_of("task_struct")?,
            tasks: task("tasks")?,
            pid: task("pid")?,
            tgid: task("tgid")?,
            comm: task("comm")?,
            // Renamed by Linux commit 2f064a59a11f ("sched: Change task_struct::state") (in v5.14).
            state: any(&["__state", "state"])?.offset,
            flags: task("flags")?,
            on_cpu: task("on_cpu"),
            cpu: any(&["thread_info.cpu", "cpu"])?.offset,
            stack: task("stack")?,
            stack_refcount: task("stack_refcount").ok(),
            saved_sp: task("thread.sp")?,
            stack_size: types.size_of("thread_union").unwrap_or(USUAL_STACK),
            threads: Threads {
                signal: task("signal")?,
                head: types.offset_of("signal_struct", "thread_head")?,
                node: task("thread_node")?,
            },
            run_queue: RunQueue::of(types),
            leaving: Leaving::of(types),
            start_boottime: any(&["start_boottime", "real_start_time"])
                .ok()
                .map(|m| m.offset),
            stack_canary: task("stack_canary").ok(),
            exec_id: task("self_exec_id").ok(),
            switches: task("nvcsw")
                .ok()
                .zip(task("nivcsw").ok())
                .map(<[u64; 2]>::from),
        })
    }
}

impl RunQueue {
    fn of(types: &Types) -> Result<Self, TypeError> {
        let list = |head, node| {
            let head = types.offset_of("rq", head)?;
            Ok::<_, TypeError>((head, types.offset_of("task_struct", node)?))
        };
        Ok(Self {
            idle: types.offset_of("rq", "idle")?,
            current: types.offset_of("rq", "curr")?,
            fair: list("cfs_tasks", "se.group_node").map_err(Blind::from),
            real_time: RealTime::of(types),
            extensible: list("scx.runnable_list", "scx.runnable_node").ok(),
        })
    }
}

impl Leaving {
    /// Probes for the member: a kernel that has it has the list.
    fn of(types: &Types) -> Result<Self, Blind> {
        match types.offset_of("task_struct", "rcu_tasks_exit_list") {
            Ok(node) => Ok(Self::Listed {
                head: types.offset_of("rcu_tasks_percpu", "rtp_exit_list")?,
                node,
            }),
            Err(TypeError::NoMember { .. }) => Ok(Self::Counted(Counts::of(types)?)),
            Err(why) => Err(why.into()),
        }
    }
}

pub(super) fn first_of(types: &Types, within: &str, paths: &[&str]) -> Result<Member, TypeError> {
    let mut missing = TypeError::NoStruct(within.to_owned());
    for path in paths {
        match types.member(within, path) {
            Ok(found) => return Ok(found),
            Err(why) => missing = why,
        }
    }
    Err(missing)
}
