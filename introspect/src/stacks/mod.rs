//! Every stack of a stopped guest: of tasks that sleep, of vCPUs that run, idle or exiting, and the
//! places that hide return addresses. What the patcher's gate and `inspect stacks` both read. Owns which
//! stacks there are and who is on them; going up one is [`unwind`](crate::unwind)'s business.

mod calls;
pub(crate) mod cpu;
mod pairing;
mod sleepers;

use serde::{Deserialize, Serialize};

use crate::address::{Gva, GvaRange};
use crate::deadline::Deadline;
use crate::kernel::{AttachError, Kernel};
use crate::paging::KernelMemory;
use crate::target::PhysicalMemory;
use crate::tasks::census::Census;
use crate::tasks::{Missing, Task};
use crate::unwind::{Hidden, StackKind, StackPool, StackSpan, Trace, Unreliable, Unwinder};
use crate::vcpu::Vcpu;

use calls::Calls;
use cpu::Cpu;
use pairing::{Doing, Pairing};
pub use sleepers::Sleepers;

/// One stack and what stands on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stack {
    /// Whose it is. `None`: a vCPU stands in the kernel and no known task could be matched to it;
    /// `vcpu` then names it and the trace is unreliable. Without a `vcpu` too: there are tasks that were not
    /// found, and the reason in the trace says what shows that.
    pub task: Option<Task>,
    /// The vCPU that runs it now.
    pub vcpu: Option<u32>,
    /// The frames.
    pub trace: Trace,
    /// Return addresses kept elsewhere: fgraph's `ret_stack`, kretprobe and rethook instances. Where a
    /// running task's trace is unreliable also the general registers of its vCPU, since a return
    /// trampoline holds the real address in one of them for a few instructions.
    pub hidden_returns: Vec<Gva>,
    /// All memory that may hold return addresses of it: task stack, and the IRQ, IST and entry stacks
    /// of its CPU while it runs. What a conservative scan reads, in words of 8 bytes. Empty with an
    /// unreliable trace: it is not known where to look, and no scan can show that anything is not there.
    pub memory: Vec<GvaRange>,
}

/// Reads the stacks of all tasks and vCPUs. Bounded: never more tasks than
/// [`MOST_TASKS`](crate::tasks::MOST_TASKS) or than memory could hold, and no longer than `deadline`.
///
/// # Errors
/// The task list, or a place that hides return addresses, cannot be read; a place where tasks may be that
/// are on no task list is not known; or the time ran out. Nothing is then known.
pub fn all(
    kernel: &Kernel,
    unwinder: &Unwinder,
    physical: &dyn PhysicalMemory,
    vcpus: &[Vcpu],
    deadline: &Deadline,
) -> Result<Vec<Stack>, AttachError> {
    all_but(
        kernel,
        unwinder,
        physical,
        vcpus,
        deadline,
        &Sleepers::default(),
    )
}

/// The same, but those of tasks that `known` has and that have not run since are taken from there. What is not
/// taken of it is gone too: a second stop needs `known` read anew, and reads itself what it lacks.
///
/// # Errors
/// As [`all`].
pub fn all_but(
    kernel: &Kernel,
    unwinder: &Unwinder,
    physical: &dyn PhysicalMemory,
    vcpus: &[Vcpu],
    deadline: &Deadline,
    known: &Sleepers,
) -> Result<Vec<Stack>, AttachError> {
    let memory = kernel.memory(physical);
    let Census { tasks, missing } = kernel.every_task(&memory, deadline, known)?;
    let places = unwinder.places();
    let cpus: Vec<Cpu> = vcpus
        .iter()
        .map(|vcpu| Cpu::of(kernel, places, &memory, vcpu))
        .collect();
    let pairing = Pairing::new(&memory, &tasks, vcpus, &cpus);
    let mut reader = Reader::new(kernel.layout.init, unwinder, memory, vcpus, &cpus);
    let mut stacks = Vec::with_capacity(tasks.len() + pairing.unmatched.len() + 1);
    for (task, doing) in tasks.into_iter().zip(pairing.tasks) {
        deadline.allow("stacks", stacks.len())?;
        let slept = known.take_stack(task.at);
        stacks.push(match slept.filter(|_| doing == Doing::Sleeps) {
            Some(stack) => Stack {
                task: Some(task),
                ..stack
            },
            None => {
                deadline.check("stacks", stacks.len())?;
                reader.task(task, doing)?
            }
        });
    }
    stacks.extend(
        pairing
            .unmatched
            .iter()
            .filter_map(|&index| reader.unmatched(index)),
    );
    stacks.extend(missing.map(nowhere));
    Ok(stacks)
}

/// In place of the stacks of tasks that were not found.
fn nowhere(missing: Missing) -> Stack {
    Stack {
        task: None,
        vcpu: None,
        trace: lost(Unreliable::Unlisted(missing)),
        hidden_returns: Vec::new(),
        memory: Vec::new(),
    }
}

/// What reading one stack after another needs.
struct Reader<'a> {
    unwinder: &'a Unwinder,
    memory: KernelMemory<'a>,
    vcpus: &'a [Vcpu],
    cpus: &'a [Cpu],
    calls: Calls,
    pool: StackPool,
    hidden: Hidden,
}

impl<'a> Reader<'a> {
    fn new(
        init: Option<GvaRange>,
        unwinder: &'a Unwinder,
        memory: KernelMemory<'a>,
        vcpus: &'a [Vcpu],
        cpus: &'a [Cpu],
    ) -> Self {
        Self {
            unwinder,
            memory,
            vcpus,
            cpus,
            calls: Calls::new(init),
            pool: StackPool::default(),
            hidden: Hidden::default(),
        }
    }

    fn task(&mut self, task: Task, doing: Doing) -> Result<Stack, AttachError> {
        self.unwinder
            .hooks()
            .collect(&self.memory, task.at, &mut self.hidden)?;
        let mut hidden_returns = self.hidden.returns();
        let (trace, memory) = match doing {
            Doing::Sleeps => self.sleeping(&task),
            Doing::Runs(index) => self.running(&task, index, &mut hidden_returns),
            Doing::InUserMode(_) | Doing::NoCpu => (Trace::default(), Vec::new()),
            Doing::Lost => (lost(Unreliable::NoVcpu(task.cpu)), Vec::new()),
        };
        let vcpu = match doing {
            Doing::Runs(index) | Doing::InUserMode(index) => self.vcpus.get(index),
            Doing::Sleeps | Doing::NoCpu | Doing::Lost => None,
        };
        let vcpu = vcpu.map(|vcpu| vcpu.index);
        Ok(Stack {
            task: Some(task),
            vcpu,
            trace,
            hidden_returns,
            memory,
        })
    }

    /// Below the saved stack pointer nothing is left that is returned to.
    fn sleeping(&mut self, task: &Task) -> (Trace, Vec<GvaRange>) {
        let Some(stack) = task.stack else {
            return (Trace::default(), Vec::new());
        };
        let place = (stack, task.saved_sp);
        let mut trace = self
            .unwinder
            .sleeping(&self.memory, &mut self.pool, place, &self.hidden);
        self.check_calls(&mut trace);
        (trace, vec![used(stack, task.saved_sp)])
    }

    fn running(
        &mut self,
        task: &Task,
        index: usize,
        hidden_returns: &mut Vec<Gva>,
    ) -> (Trace, Vec<GvaRange>) {
        let (Some(vcpu), Some(cpu)) = (self.vcpus.get(index), self.cpus.get(index)) else {
            return (lost(Unreliable::NoVcpu(task.cpu)), Vec::new());
        };
        let mut spans = cpu.spans.clone();
        spans.extend(task.stack.map(|range| StackSpan {
            kind: StackKind::Task,
            range,
        }));
        let place = (spans.as_slice(), vcpu);
        let mut trace = self
            .unwinder
            .running(&self.memory, &mut self.pool, place, &self.hidden);
        self.check_calls(&mut trace);
        if trace.unreliable.is_some() {
            hidden_returns.extend(vcpu.general.iter().map(|&word| Gva(word)));
        }
        (trace, self.in_use(&spans, vcpu))
    }

    /// What leads to a place that no call left did not come from there.
    fn check_calls(&mut self, trace: &mut Trace) {
        if trace.unreliable.is_none() {
            trace.unreliable = self.calls.missing(&self.memory, trace);
        }
    }

    /// On a task's own stack nothing of the CPU's stacks is in use; on one of those, any may be. Stacks
    /// that are not mapped (those for #VC, outside SEV-ES) are not.
    fn in_use(&self, spans: &[StackSpan], vcpu: &Vcpu) -> Vec<GvaRange> {
        let rsp = vcpu.rsp();
        let now = spans.iter().find(|span| span.range.contains(rsp));
        let mut memory: Vec<GvaRange> = now.map(|span| used(span.range, rsp)).into_iter().collect();
        if now.is_none_or(|span| span.kind != StackKind::Task) {
            let others = spans.iter().filter(|span| Some(*span) != now);
            let mapped = others.filter(|span| self.memory.read_u64(span.range.start).is_ok());
            memory.extend(mapped.map(|span| span.range));
        }
        memory
    }

    fn unmatched(&mut self, index: usize) -> Option<Stack> {
        let (vcpu, cpu) = (self.vcpus.get(index)?, self.cpus.get(index)?);
        let foreign = vcpu.smm || vcpu.nested_guest;
        let mut trace = Trace::default();
        if !foreign {
            self.hidden.clear();
            let place = (cpu.spans.as_slice(), vcpu);
            trace = self
                .unwinder
                .running(&self.memory, &mut self.pool, place, &self.hidden);
        }
        trace.unreliable = Some(match foreign {
            true => Unreliable::ForeignRegisters(vcpu.index),
            false => Unreliable::NoTask(vcpu.index),
        });
        let (hidden_returns, memory) = (Vec::new(), Vec::new());
        Some(Stack {
            task: None,
            vcpu: Some(vcpu.index),
            trace,
            hidden_returns,
            memory,
        })
    }
}

fn lost(reason: Unreliable) -> Trace {
    Trace {
        frames: Vec::new(),
        unreliable: Some(reason),
    }
}

fn used(stack: GvaRange, from: Gva) -> GvaRange {
    let start = if stack.contains(from) {
        Gva(from.0 & !7)
    } else {
        stack.start
    };
    GvaRange {
        start,
        end: stack.end,
    }
}
