//! Stacks of sleeping tasks equal the guest's own `/proc/*/task/*/stack`, and every stack of a stopped
//! guest is understood to its end.

#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{Changed, Guest, each_guest};
use vmpatch_introspect::modules::Module;
use vmpatch_introspect::stacks::{self, Sleepers, Stack};
use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::tasks::{Missing, TaskKind};
use vmpatch_introspect::unwind::{Frame, FrameKind, Trace, Unreliable, Unwinder};
use vmpatch_introspect::{AttachError, Deadline, Gpa, GpaRange, Gva, PhysicalMemory, Vcpu};

/// Its number among the general registers (Intel SDM vol. 2 table 3-1).
const RSP: usize = 4;

struct Seen<'a> {
    guest: &'a Guest,
    by_frame_pointers: bool,
    modules: Vec<Module>,
    stacks: Vec<Stack>,
}

impl<'a> Seen<'a> {
    fn new(guest: &'a Guest) -> Self {
        let modules = guest.kernel.modules(&guest.dump).unwrap();
        let places: Vec<_> = modules.iter().map(Module::place).collect();
        let unwinder = Unwinder::load(&guest.kernel, &guest.dump, &places).unwrap();
        let (dump, deadline) = (&guest.dump, Deadline::none());
        let stacks = stacks::all(&guest.kernel, &unwinder, dump, dump.vcpus(), &deadline).unwrap();
        Self {
            guest,
            by_frame_pointers: unwinder.by_frame_pointers(),
            modules,
            stacks,
        }
    }

    /// As the kernel prints it: `%pB`, without the size.
    fn name(&self, frame: &Frame) -> String {
        let own = self
            .modules
            .iter()
            .find(|module| module.text.contains(frame.lookup()));
        let symbols = own.map_or(&self.guest.kernel.symbols, |module| &module.symbols);
        let Some((symbol, _)) = symbols.containing(frame.lookup()) else {
            return format!("{}", frame.at);
        };
        format!("{}+{:#x}", symbol.name, frame.at.0 - symbol.at.0)
    }

    /// What `/proc` leaves out: everything in `.sched.text`.
    fn of_scheduler(&self, frame: &Frame) -> bool {
        let at = |name| self.guest.kernel.symbols.unique(name).unwrap();
        at("__sched_text_start") <= frame.at && frame.at < at("__sched_text_end")
    }

    fn shown(&self, stack: &Stack) -> Vec<String> {
        let frames = stack
            .trace
            .frames
            .iter()
            .filter(|frame| !self.of_scheduler(frame));
        frames.map(|frame| self.name(frame)).collect()
    }
}

/// Frames by thread id.
fn answers(text: &str) -> BTreeMap<i32, Vec<String>> {
    let mut answers = BTreeMap::new();
    for block in text.split("== ").skip(1) {
        let mut lines = block.lines();
        let pid = lines
            .next()
            .unwrap()
            .split(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        let frame = |line: &str| {
            let name = line.strip_prefix("[<0>] ").unwrap();
            name.split_once('/')
                .map_or(name, |(name, _)| name)
                .to_owned()
        };
        answers.insert(pid, lines.map(frame).collect());
    }
    answers
}

#[test]
fn stacks_of_sleeping_tasks_equal_what_proc_shows() {
    each_guest(|guest| {
        let seen = Seen::new(guest);
        let expected = answers(&guest.answer("stacks.txt").unwrap());
        let (mut equal, mut moved) = (0, 0);
        for stack in seen.stacks.iter().filter(|stack| stack.vcpu.is_none()) {
            let task = stack.task.as_ref().unwrap();
            let Some(answer) = expected.get(&task.pid) else {
                continue;
            };
            let shown = seen.shown(stack);
            if *answer == shown {
                equal += 1;
                continue;
            }
            // It ran between its answer and the stop; where it began does not change by that.
            moved += 1;
            eprintln!(
                "{} {}: {answer:#?} then, {shown:#?} now",
                task.pid, task.comm
            );
            let begin = |frames: &[String]| frames[frames.len() - 2..].to_vec();
            assert_eq!(begin(answer), begin(&shown));
        }
        eprintln!("{}: {equal} stacks equal, {moved} moved on", guest.name);
        // Every task that has an answer was compared, but for those that a vCPU runs.
        let running = guest.dump.vcpus().len();
        assert!(moved <= 3, "{}: {moved} moved", guest.name);
        assert!(
            equal + moved + running >= expected.len(),
            "{}: {equal} equal of {}",
            guest.name,
            expected.len()
        );
    });
}

#[test]
fn every_stack_is_understood_to_its_end() {
    each_guest(|guest| {
        let seen = Seen::new(guest);
        for stack in &seen.stacks {
            let frames = &stack.trace.frames;
            let names: Vec<_> = frames.iter().map(|frame| seen.name(frame)).collect();
            // A frame pointer does not tell whether the running function has set up its frame yet.
            let unsure = seen.by_frame_pointers && stack.vcpu.is_some();
            match &stack.trace.unreliable {
                None => {}
                Some(Unreliable::Preempted(_)) if unsure => {}
                Some(why) => panic!("{:?}: {why}: {names:#?}", stack.task),
            }
            assert!(stack.task.is_some());
            let running = frames
                .first()
                .is_some_and(|frame| frame.kind == FrameKind::Running);
            assert_eq!(running, stack.vcpu.is_some() && !frames.is_empty());
        }
        let running = seen.stacks.iter().filter(|stack| stack.vcpu.is_some());
        assert_eq!(running.count(), guest.dump.vcpus().len());
        for stack in &seen.stacks {
            let (sleeps, frames) = (stack.vcpu.is_none(), stack.trace.frames.len());
            assert!(!sleeps || frames > 2, "{:?}", stack.task);
        }
    });
}

/// A guest that traced its functions when it was stopped says so in `trace.txt`. What `/proc` shows of its
/// stacks are the real callers, so that they equal ours only where trampolines were seen through.
#[test]
fn only_a_guest_that_traces_hides_return_addresses() {
    each_guest(|guest| {
        let seen = Seen::new(guest);
        let hidden = |stack: &&Stack| stack.hidden_returns.len();
        // With an unreliable trace, registers are among them.
        let reliable = seen
            .stacks
            .iter()
            .filter(|stack| stack.trace.unreliable.is_none());
        let most = reliable.clone().map(|stack| hidden(&stack)).max().unwrap();
        let traced = guest.answer("trace.txt").is_some();
        assert!(if traced { most >= 3 } else { most == 0 }, "{most}");
        for stack in reliable {
            for &at in &stack.hidden_returns {
                let frame = Frame {
                    at,
                    kind: FrameKind::Call,
                    sp: at,
                };
                assert!(seen.name(&frame).contains('+'), "{at} is in no function");
            }
        }
    });
}

/// The idle task of the first CPU began in `start_kernel`, those of the others in `start_secondary`.
#[test]
fn idle_tasks_are_traced_to_where_their_cpu_started() {
    each_guest(|guest| {
        let seen = Seen::new(guest);
        for (number, begin) in [(0, "start_kernel+"), (1, "start_secondary+")] {
            let name = format!("swapper/{number}");
            let is = |stack: &&Stack| stack.task.as_ref().is_some_and(|task| task.comm == name);
            let stack = seen.stacks.iter().find(is).unwrap();
            let names: Vec<_> = stack
                .trace
                .frames
                .iter()
                .map(|frame| seen.name(frame))
                .collect();
            assert!(
                names.iter().any(|name| name.starts_with(begin)),
                "{names:#?}"
            );
            assert!(
                names
                    .iter()
                    .any(|name| name.starts_with("cpu_startup_entry+")),
                "{names:#?}"
            );
        }
    });
}

#[test]
fn a_stop_that_has_no_time_left_reads_no_stacks() {
    each_guest(|guest| {
        let unwinder = Unwinder::load(&guest.kernel, &guest.dump, &[]).unwrap();
        let (dump, deadline) = (&guest.dump, Deadline::within(Duration::ZERO));
        let late = stacks::all(&guest.kernel, &unwinder, dump, dump.vcpus(), &deadline);
        assert!(matches!(late, Err(AttachError::Late { .. })), "{late:?}");
    });
}

/// A kernel that does not list the tasks that leave still counts those that sleep.
#[test]
fn a_task_that_sleeps_on_no_list_makes_the_stacks_incomplete() {
    each_guest(|guest| {
        let (kernel, dump) = (&guest.kernel, &guest.dump);
        let lists = kernel.types.offset_of("task_struct", "rcu_tasks_exit_list");
        let member = kernel.types.member("rq", "nr_uninterruptible").unwrap();
        let queue = kernel.place("runqueues").unwrap();
        let queue = queue.wrapping_add(kernel.layout.per_cpu_offset[0]);
        let memory = kernel.memory(dump);
        let at = queue.wrapping_add(member.offset);
        let count = memory.read_u32(at).unwrap().wrapping_add(1);
        let one_more = Changed {
            dump,
            at: memory.physical_of(at).unwrap(),
            bytes: count.to_le_bytes().to_vec(),
        };
        let unwinder = Unwinder::load(kernel, dump, &[]).unwrap();
        let none = Deadline::none();
        let stacks = stacks::all(kernel, &unwinder, &one_more, dump.vcpus(), &none).unwrap();
        let is_short = |stack: &Stack| {
            let why = stack.trace.unreliable.as_ref();
            matches!(why, Some(Unreliable::Unlisted(Missing::Asleep { .. })))
        };
        eprintln!("{}: lists them: {}", guest.name, lists.is_ok());
        assert_eq!(
            stacks.iter().any(is_short),
            lists.is_err(),
            "{}",
            guest.name
        );
    });
}

/// Every stack, those of sleepers read before.
fn all_after(guest: &Guest, memory: &dyn PhysicalMemory, before: &Sleepers) -> Vec<Stack> {
    all_seen_by(guest, guest.dump.vcpus(), memory, before)
}

fn all_seen_by(
    guest: &Guest,
    vcpus: &[Vcpu],
    memory: &dyn PhysicalMemory,
    before: &Sleepers,
) -> Vec<Stack> {
    let (kernel, none) = (&guest.kernel, Deadline::none());
    let modules = kernel
        .module_places(&guest.dump, &Deadline::none())
        .unwrap();
    let unwinder = Unwinder::load(kernel, &guest.dump, &modules).unwrap();
    stacks::all_but(kernel, &unwinder, memory, vcpus, &none, before).unwrap()
}

fn sleepers(guest: &Guest) -> Sleepers {
    let modules = guest
        .kernel
        .module_places(&guest.dump, &Deadline::none())
        .unwrap();
    let unwinder = Unwinder::load(&guest.kernel, &guest.dump, &modules).unwrap();
    Sleepers::read(&guest.kernel, &unwinder, &guest.dump, &Deadline::none())
}

#[test]
fn stacks_read_before_the_stop_are_those_of_the_stop() {
    each_guest(|guest| {
        let plain = Seen::new(guest).stacks;
        let before = sleepers(guest);
        let asleep = plain.iter().filter(|stack| stack.vcpu.is_none()).count();
        assert!(
            before.len() * 10 > asleep * 9,
            "{}: {} of {asleep}",
            guest.name,
            before.len()
        );
        assert_eq!(all_after(guest, &guest.dump, &before), plain);
        let left = before.len();
        assert!(left * 10 < asleep, "{left} of them were not taken");
    });
}

/// Where the saved stack pointer of the task leads: the return address of its innermost frame.
fn innermost(guest: &Guest, stack: &Stack) -> (Gpa, Gva) {
    let frame = stack.trace.frames.first().unwrap();
    let sp = stack.task.as_ref().unwrap().saved_sp;
    let memory = guest.kernel.memory(&guest.dump);
    let words = (0..16).map(|word| sp.wrapping_add(word * 8));
    let at = words
        .into_iter()
        .find(|at| memory.read_pointer(*at).unwrap() == frame.at)
        .unwrap();
    (memory.physical_of(at).unwrap(), at)
}

/// On the task list, which alone is read before a stop.
fn deep_sleeper(stacks: &[Stack]) -> &Stack {
    let deep = |stack: &&Stack| {
        let task = stack.task.as_ref();
        let listed = task.is_some_and(|task| task.kind == TaskKind::Listed);
        listed && stack.vcpu.is_none() && stack.trace.frames.len() > 3
    };
    stacks.iter().find(deep).unwrap()
}

fn trace_of(stacks: &[Stack], task: Gva) -> Trace {
    let same = |stack: &&Stack| stack.task.as_ref().is_some_and(|own| own.at == task);
    stacks.iter().find(same).unwrap().trace.clone()
}

/// The word of a task, increased by one.
fn one_more<'a>(guest: &'a Guest, task: Gva, member: &str) -> Changed<'a> {
    let offset = guest.kernel.types.offset_of("task_struct", member).unwrap();
    let (at, memory) = (task.wrapping_add(offset), guest.kernel.memory(&guest.dump));
    let word = memory.read_u64(at).unwrap() + 1;
    Changed {
        dump: &guest.dump,
        at: memory.physical_of(at).unwrap(),
        bytes: word.to_le_bytes().to_vec(),
    }
}

/// Memory in which a stack has other frames, and the task has been counted as switched away from once more, or has not.
struct Moved<'a> {
    frame: Changed<'a>,
    count: Option<Changed<'a>>,
}

impl PhysicalMemory for Moved<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.frame.read(at, into)?;
        if let Some(count) = &self.count {
            let end = at.0 + into.len() as u64;
            if at <= count.at && count.at.0 + 8 <= end {
                let from = usize::try_from(count.at.0 - at.0).unwrap();
                into[from..from + 8].copy_from_slice(&count.bytes);
            }
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.frame.ram()
    }
}

#[test]
fn a_task_that_has_run_since_is_read_anew_whichever_way_it_was_switched_away_from() {
    each_guest(|guest| {
        let plain = Seen::new(guest).stacks;
        let asleep = deep_sleeper(&plain);
        let task = asleep.task.as_ref().unwrap().at;
        let (frame_at, _) = innermost(guest, asleep);
        let frame = || Changed {
            dump: &guest.dump,
            at: frame_at,
            bytes: vec![0; 8],
        };
        let after = |memory: &Moved<'_>| {
            let stacks = all_after(guest, memory, &sleepers(guest));
            trace_of(&stacks, task)
        };
        // Not counted: the scheduler says that it cannot have run, so its stack is not looked at again.
        let still = Moved {
            frame: frame(),
            count: None,
        };
        assert_eq!(after(&still), asleep.trace, "{}", guest.name);
        let types = &guest.kernel.types;
        let canary = ["stack_canary"].into_iter();
        let canary = canary.filter(|name| types.offset_of("task_struct", name).is_ok());
        let always = ["nvcsw", "nivcsw", "start_boottime", "self_exec_id"];
        for member in always.into_iter().chain(canary) {
            let moved = Moved {
                frame: frame(),
                count: Some(one_more(guest, task, member)),
            };
            assert_ne!(after(&moved), asleep.trace, "{}: {member}", guest.name);
        }
    });
}

/// A first stop asked for the task and then had no use for its stack, since a vCPU was on it. A second one must not
/// be given that stack once the task has run.
#[test]
fn sleepers_used_for_a_second_stop_give_it_no_stack_of_the_first() {
    each_guest(|guest| {
        let plain = Seen::new(guest).stacks;
        let asleep = deep_sleeper(&plain);
        let task = asleep.task.as_ref().unwrap();
        let before = sleepers(guest);
        let mut vcpus = guest.dump.vcpus().to_vec();
        vcpus[0].general[RSP] = task.saved_sp.0;
        (vcpus[0].rip, vcpus[0].cpl) = (asleep.trace.frames[0].at, 0);
        let first = all_seen_by(guest, &vcpus, &guest.dump, &before);
        let same = |stack: &&Stack| stack.task.as_ref().is_some_and(|own| own.at == task.at);
        assert_eq!(first.iter().find(same).unwrap().vcpu, Some(vcpus[0].index));
        let moved = Moved {
            frame: Changed {
                dump: &guest.dump,
                at: innermost(guest, asleep).0,
                bytes: vec![0; 8],
            },
            count: Some(one_more(guest, task.at, "nvcsw")),
        };
        let again = trace_of(&all_after(guest, &moved, &before), task.at);
        assert_ne!(again, asleep.trace, "{}", guest.name);
    });
}
