//! Which task each vCPU runs, and so what each task is doing. By the stack that holds RSP: the kernel's own
//! `current` is wrong for some instructions of each task switch, and GS is the user's for some of each entry
//! (Linux v6.12 `arch/x86/entry/entry_64.S` `__switch_to_asm`, `entry_SYSCALL_64`).

use crate::address::Gva;
use crate::tasks::{Task, TaskKind};
use crate::unwind::{StackKind, StackSource, StackSpan};
use crate::vcpu::{Activity, Vcpu};

use super::cpu::Cpu;

/// A CPU has its stacks in use one over another, each at most once; no chain of them is longer.
const MAX_NESTED: usize = 8;

/// Bytes from the top of an exception stack down to where the CPU saved the stack pointer (Intel SDM vol. 3
/// section 6.14.2: ss, then rsp).
const SAVED_RSP: u64 = 16;

/// What a task is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    /// Its saved stack pointer holds.
    Sleeps,
    /// The vCPU of that index runs it, in the kernel.
    Runs(usize),
    /// The vCPU of that index runs it, in user mode.
    InUserMode(usize),
    /// The idle task of a CPU that no vCPU is.
    NoCpu,
    /// It runs somewhere, but not where it was looked for.
    Lost,
}

/// All tasks and vCPUs, paired.
#[derive(Debug)]
pub(crate) struct Pairing {
    /// What each task is doing, in their order.
    pub(crate) tasks: Vec<Doing>,
    /// vCPUs in the kernel that no task could be matched to.
    pub(crate) unmatched: Vec<usize>,
}

/// How a vCPU was matched.
enum Match {
    /// Nothing to match: it has no stack, or none of the kernel's.
    Quiet,
    /// To the task whose stack it is on, or came from.
    ByStack(usize),
    /// To the task that the scheduler has on its CPU.
    ByCpu(usize),
    UserMode(usize),
    None,
}

impl Pairing {
    pub(crate) fn new(
        memory: &dyn StackSource,
        tasks: &[Task],
        vcpus: &[Vcpu],
        cpus: &[Cpu],
    ) -> Self {
        let mut pairing = Self {
            tasks: vec![Doing::Sleeps; tasks.len()],
            unmatched: Vec::new(),
        };
        let mut by_stack = Vec::with_capacity(cpus.len());
        for (index, (vcpu, cpu)) in vcpus.iter().zip(cpus).enumerate() {
            match find(memory, tasks, vcpu, cpu) {
                Match::Quiet => {}
                Match::ByStack(task) => {
                    by_stack.extend(cpu.number);
                    pairing.set(task, Doing::Runs(index));
                }
                Match::ByCpu(task) => pairing.set(task, Doing::Runs(index)),
                Match::UserMode(task) => pairing.set(task, Doing::InUserMode(index)),
                Match::None => pairing.unmatched.push(index),
            }
        }
        let all_known = vcpus
            .iter()
            .zip(cpus)
            .all(|(vcpu, cpu)| cpu.number.is_some() || vcpu.activity == Activity::WaitingForSipi);
        for (task, doing) in tasks.iter().zip(&mut pairing.tasks) {
            if task.on_cpu && *doing == Doing::Sleeps && !by_stack.contains(&task.cpu) {
                let taken = cpus.iter().any(|cpu| cpu.number == Some(task.cpu));
                let parked = task.kind == TaskKind::Idle && all_known && !taken;
                *doing = if parked { Doing::NoCpu } else { Doing::Lost };
            }
        }
        pairing
    }

    /// Two vCPUs on one stack: neither can be believed.
    fn set(&mut self, task: usize, doing: Doing) {
        if let Some(known) = self.tasks.get_mut(task) {
            *known = if *known == Doing::Sleeps {
                doing
            } else {
                Doing::Lost
            };
        }
    }
}

fn find(memory: &dyn StackSource, tasks: &[Task], vcpu: &Vcpu, cpu: &Cpu) -> Match {
    if vcpu.activity == Activity::WaitingForSipi {
        return Match::Quiet;
    }
    if vcpu.smm || vcpu.nested_guest {
        return Match::None;
    }
    let scheduled = || {
        let number = cpu.number?;
        tasks
            .iter()
            .position(|task| task.on_cpu && task.cpu == number)
    };
    if in_user_mode(vcpu) {
        return scheduled().map_or(Match::Quiet, Match::UserMode);
    }
    match origin(memory, &cpu.spans, vcpu.rsp()) {
        Some(sp) if let Some(task) = holding(tasks, sp) => Match::ByStack(task),
        _ => scheduled().map_or(Match::None, Match::ByCpu),
    }
}

/// At privilege level 3 and in the lower half of the address space.
pub(super) const fn in_user_mode(vcpu: &Vcpu) -> bool {
    vcpu.cpl == 3 && vcpu.rip.0 >> 63 == 0
}

/// The stack pointer that the CPU's own stacks, one over another, were entered with. `None` where they are
/// nested beyond reason.
fn origin(memory: &dyn StackSource, spans: &[StackSpan], sp: Gva) -> Option<Gva> {
    let mut sp = sp;
    for _ in 0..MAX_NESTED {
        let Some(span) = spans.iter().find(|span| span.holds(sp.0, 8)) else {
            return Some(sp);
        };
        let below_top = match span.kind {
            StackKind::Irq => 8,
            StackKind::Exception => SAVED_RSP,
            // Entered from user mode alone.
            StackKind::Entry | StackKind::Task => return Some(sp),
        };
        let mut word = [0; 8];
        memory.copy(span.range.end.wrapping_sub(below_top), &mut word)?;
        sp = Gva(u64::from_le_bytes(word));
    }
    None
}

fn holding(tasks: &[Task], sp: Gva) -> Option<usize> {
    tasks
        .iter()
        .position(|task| task.stack.is_some_and(|stack| stack.contains(sp)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::GvaRange;

    const TASK: u64 = 0xffff_c900_0000_0000;
    const IRQ: u64 = 0xffff_c900_0100_0000;
    const NMI: u64 = 0xffff_fe00_0000_0000;

    /// One word that every read gives.
    struct Always(u64);

    impl StackSource for Always {
        fn copy(&self, _: Gva, into: &mut [u8]) -> Option<()> {
            into.copy_from_slice(&self.0.to_le_bytes());
            Some(())
        }
    }

    fn task(number: u64, on_cpu: bool, cpu: u32, kind: TaskKind) -> Task {
        let start = Gva(TASK + number * 0x8000);
        Task {
            at: Gva(number),
            pid: 1,
            tgid: 1,
            comm: String::new(),
            kind,
            state: 0,
            on_cpu,
            cpu,
            kernel_thread: true,
            stack: GvaRange::sized(start, 0x4000),
            saved_sp: start,
        }
    }

    fn cpu(number: u32) -> Cpu {
        let span = |kind, start| StackSpan {
            kind,
            range: GvaRange {
                start,
                end: Gva(start.0 + 0x2000),
            },
        };
        let spans = vec![
            span(StackKind::Irq, Gva(IRQ)),
            span(StackKind::Exception, Gva(NMI)),
        ];
        Cpu {
            number: Some(number),
            spans,
        }
    }

    fn vcpu(cpl: u8, rip: u64, rsp: u64) -> Vcpu {
        let mut vcpu = crate::vcpu::test_vcpu(rip, rsp, 0);
        vcpu.cpl = cpl;
        vcpu
    }

    const LISTED: TaskKind = TaskKind::Listed;
    const TEXT: u64 = 0xffff_ffff_8100_0000;

    #[test]
    fn in_a_task_switch_the_stack_says_who_runs_and_the_other_one_sleeps() {
        let tasks = [task(0, true, 0, LISTED), task(1, true, 0, LISTED)];
        let on_second = [vcpu(0, TEXT, TASK + 0x8800)];
        let pairing = Pairing::new(&Always(0), &tasks, &on_second, &[cpu(0)]);
        assert_eq!(pairing.tasks, [Doing::Sleeps, Doing::Runs(0)]);
    }

    #[test]
    fn a_cpu_on_its_irq_stack_runs_the_task_it_interrupted() {
        let tasks = [task(0, false, 0, LISTED), task(1, true, 0, LISTED)];
        let in_irq = [vcpu(0, TEXT, IRQ + 0x1000)];
        let pairing = Pairing::new(&Always(TASK + 0x9000), &tasks, &in_irq, &[cpu(0)]);
        assert_eq!(pairing.tasks, [Doing::Sleeps, Doing::Runs(0)]);
    }

    #[test]
    fn with_the_stack_pointer_of_the_user_the_scheduler_says_who_runs() {
        let tasks = [task(0, false, 0, LISTED), task(1, true, 0, LISTED)];
        let entering = [vcpu(0, TEXT, 0x7fff_0000)];
        let pairing = Pairing::new(&Always(0), &tasks, &entering, &[cpu(0)]);
        assert_eq!(pairing.tasks, [Doing::Sleeps, Doing::Runs(0)]);
        let pairing = Pairing::new(
            &Always(0),
            &tasks,
            &[vcpu(3, 0x40_0000, 0x7fff_0000)],
            &[cpu(0)],
        );
        assert_eq!(pairing.tasks, [Doing::Sleeps, Doing::InUserMode(0)]);
    }

    #[test]
    fn a_task_on_a_cpu_that_no_vcpu_is_was_not_looked_at() {
        let tasks = [task(0, true, 1, LISTED), task(1, true, 1, TaskKind::Idle)];
        let elsewhere = [vcpu(3, 0x40_0000, 0)];
        let pairing = Pairing::new(&Always(0), &tasks, &elsewhere, &[cpu(0)]);
        assert_eq!(pairing.tasks, [Doing::Lost, Doing::NoCpu]);
        let unknown = Cpu {
            number: None,
            spans: Vec::new(),
        };
        let pairing = Pairing::new(&Always(0), &tasks, &elsewhere, &[unknown]);
        assert_eq!(pairing.tasks, [Doing::Lost, Doing::Lost]);
    }

    #[test]
    fn a_vcpu_in_the_kernel_without_a_task_is_told() {
        let pairing = Pairing::new(&Always(0), &[], &[vcpu(0, TEXT, TASK)], &[cpu(0)]);
        assert_eq!(pairing.unmatched, [0]);
        let mut foreign = vcpu(0, TEXT, TASK);
        foreign.nested_guest = true;
        let tasks = [task(0, true, 0, LISTED)];
        let pairing = Pairing::new(&Always(0), &tasks, &[foreign], &[cpu(0)]);
        assert_eq!(
            (pairing.tasks, pairing.unmatched),
            (vec![Doing::Lost], vec![0])
        );
    }

    #[test]
    fn stacks_that_lead_to_each_other_are_not_followed_for_ever() {
        let pairing = Pairing::new(&Always(IRQ + 8), &[], &[vcpu(0, TEXT, IRQ)], &[cpu(0)]);
        assert_eq!(pairing.unmatched, [0]);
    }
}
