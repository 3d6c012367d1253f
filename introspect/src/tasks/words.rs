//! The words of a task that are looked at, read all together: a stop has so little time that finding each
//! member's page anew would be most of it. Owns the order in which they are read, and how members come out of
//! them.

use crate::address::{Gva, GvaRange};
use crate::paging::{KernelMemory, ReadError};

use super::fields::TaskFields;
use super::{Task, TaskKind};

/// `PF_KTHREAD` (Linux v6.12 include/linux/sched.h).
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Length of `comm` (the same, `TASK_COMM_LEN`).
const COMM: usize = 16;

/// At least as many as there are members below.
const MOST: usize = 24;

/// One task's words, as they were read. Those not in use are zero.
pub(crate) type Words = [u64; MOST];

/// Which words are read of a task.
#[derive(Clone, Debug)]
pub(crate) struct TaskWords {
    /// From the start of the task, in the order in which they are read.
    offsets: Vec<u64>,
    /// Bits that stay the same from when a task went to sleep until it runs again.
    asleep: Words,
    /// They are enough to tell.
    tells_sleep: bool,
    stack_size: u64,
    on_cpu: Option<Place>,
    stack_refcount: Option<Place>,
    stack: Place,
    saved_sp: Place,
    state: Place,
    cpu: Place,
    flags: Place,
    pid: Place,
    tgid: Place,
    comm: u64,
    tasks: Place,
    signal: Place,
    thread: Place,
}

/// A member's place among the words.
#[derive(Clone, Copy, Debug)]
struct Place {
    index: usize,
    shift: u32,
    mask: u64,
}

/// Where the lists that a task is on go on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Links {
    /// The next node of the task list.
    pub(crate) tasks: Gva,
    /// `signal_struct`, which has the head of the list of threads.
    pub(crate) signal: Gva,
    /// The next node of the list of threads.
    pub(crate) thread: Gva,
}

/// What shows that a task has not run, in the order in which it must be read: who the task is; how often it was
/// switched away from; whether it is on a CPU. [`Sleepers`](crate::stacks::Sleepers) rests on it.
struct Proof {
    canary: Option<Place>,
    started: Option<Place>,
    executions: Option<Place>,
    switches: [Option<Place>; 2],
    on_cpu: Option<Place>,
}

impl Proof {
    fn of(fields: &TaskFields, order: &mut Order) -> Self {
        Self {
            canary: fields.stack_canary.map(|at| order.place(at, 8)),
            started: fields.start_boottime.map(|at| order.place(at, 8)),
            executions: fields.exec_id.map(|at| order.place(at, 8)),
            switches: match fields.switches {
                Some(pair) => pair.map(|at| Some(order.place(at, 8))),
                None => [None; 2],
            },
            on_cpu: fields.on_cpu.as_ref().ok().map(|at| order.place(*at, 4)),
        }
    }

    /// All but the canary, which not every kernel has.
    const fn needed(&self) -> [Option<Place>; 5] {
        let [wanted, unwanted] = self.switches;
        [self.started, self.executions, wanted, unwanted, self.on_cpu]
    }

    /// Whether nothing is missing, and all will be read in this order.
    fn holds(&self) -> bool {
        let before = |pair: &[Option<Place>]| matches!(pair, [Some(one), Some(next)] if one.index < next.index);
        self.needed().windows(2).all(before)
    }
}

impl TaskWords {
    /// Those of the proof first.
    pub(crate) fn of(fields: &TaskFields) -> Self {
        let (mut order, threads) = (Order::default(), fields.threads);
        let proof = Proof::of(fields, &mut order);
        let (stack, saved_sp) = (
            order.place(fields.stack, 8),
            order.place(fields.saved_sp, 8),
        );
        let mut asleep = [0; MOST];
        let fixed = proof.needed().into_iter().chain([proof.canary]).flatten();
        for place in fixed.chain([stack, saved_sp]) {
            if let Some(bits) = asleep.get_mut(place.index) {
                *bits |= place.mask << place.shift;
            }
        }
        Self {
            asleep,
            stack_size: fields.stack_size,
            on_cpu: proof.on_cpu,
            stack_refcount: fields.stack_refcount.map(|at| order.place(at, 4)),
            stack,
            saved_sp,
            state: order.place(fields.state, 4),
            cpu: order.place(fields.cpu, 4),
            flags: order.place(fields.flags, 4),
            pid: order.place(fields.pid, 4),
            tgid: order.place(fields.tgid, 4),
            comm: fields.comm,
            tasks: order.place(fields.tasks, 8),
            signal: order.place(threads.signal, 8),
            thread: order.place(threads.node, 8),
            tells_sleep: proof.holds() && order.offsets.len() <= MOST,
            offsets: order.offsets,
        }
    }

    /// Reads the words of the task at `at`, in their order.
    ///
    /// # Errors
    /// One is not mapped.
    pub(crate) fn read(&self, memory: &KernelMemory<'_>, at: Gva) -> Result<Words, ReadError> {
        let mut words = [0; MOST];
        memory.read_words(at, &self.offsets, &mut words)?;
        Ok(words)
    }

    /// The task of these words; its name, for which a stop has no use, is read now.
    ///
    /// # Errors
    /// The name is not mapped.
    pub(crate) fn task(
        &self,
        memory: &KernelMemory<'_>,
        words: &Words,
        at: Gva,
        kind: TaskKind,
    ) -> Result<Task, ReadError> {
        let number = |place: Place| place.number(words);
        let stack = Gva(self.stack.of(words));
        let has_stack = stack.0 != 0 && self.holds_stack(words);
        Ok(Task {
            at,
            pid: number(self.pid).cast_signed(),
            tgid: number(self.tgid).cast_signed(),
            comm: comm(memory.read_array(at.wrapping_add(self.comm))?),
            kind,
            state: self.state(words),
            on_cpu: self.on_cpu.is_some_and(|place| place.of(words) != 0),
            cpu: self.cpu(words),
            kernel_thread: self.flags.of(words) & KERNEL_THREAD != 0,
            stack: GvaRange::sized(stack, self.stack_size).filter(|_| has_stack),
            saved_sp: Gva(self.saved_sp.of(words)),
        })
    }

    /// `__state`.
    pub(crate) fn state(&self, words: &Words) -> u32 {
        self.state.number(words)
    }

    /// The CPU it is or was on.
    pub(crate) fn cpu(&self, words: &Words) -> u32 {
        self.cpu.number(words)
    }

    /// Where its lists go on.
    pub(crate) fn links(&self, words: &Words) -> Links {
        let [tasks, signal, thread] =
            [self.tasks, self.signal, self.thread].map(|place| Gva(place.of(words)));
        Links {
            tasks,
            signal,
            thread,
        }
    }

    /// Whether this kernel's words show that a task has not run.
    pub(crate) const fn tells_sleep(&self) -> bool {
        self.tells_sleep
    }

    /// Whether a task that slept, off its CPU, when it had the words `then`, has slept on and has its stack.
    pub(crate) fn sleeps_on(&self, then: &Words, now: &Words) -> bool {
        let mut differs = 0;
        for ((then, now), bits) in then.iter().zip(now).zip(&self.asleep) {
            differs |= (then ^ now) & bits;
        }
        differs == 0 && self.holds_stack(now)
    }

    fn holds_stack(&self, words: &Words) -> bool {
        self.stack_refcount.is_none_or(|place| place.of(words) != 0)
    }
}

/// Which words are read, one after the other.
#[derive(Default)]
struct Order {
    offsets: Vec<u64>,
}

impl Order {
    /// The word that has a member of `size` bytes, at most 8: the aligned one around it, so that one word serves
    /// several; at its own address if it does not lie within one. Read after all that were asked for before, unless
    /// it is one of them.
    fn place(&mut self, offset: u64, size: u32) -> Place {
        let aligned = offset & !7;
        let within = offset - aligned;
        let (at, shift) = match within + u64::from(size) <= 8 {
            true => (aligned, 8 * u32::try_from(within).unwrap_or(0)),
            false => (offset, 0),
        };
        let known = self.offsets.iter().position(|known| *known == at);
        let index = known.unwrap_or_else(|| {
            self.offsets.push(at);
            self.offsets.len() - 1
        });
        Place {
            index,
            shift,
            mask: u64::MAX >> (64 - 8 * size),
        }
    }
}

impl Place {
    fn of(self, words: &Words) -> u64 {
        words.get(self.index).map_or(0, |word| word >> self.shift) & self.mask
    }

    /// Of a member of four bytes.
    fn number(self, words: &Words) -> u32 {
        u32::try_from(self.of(words)).unwrap_or(0)
    }
}

/// A name as the kernel keeps it, up to the first zero.
fn comm(bytes: [u8; COMM]) -> String {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_share_a_word_and_one_across_two_has_its_own() {
        let mut order = Order::default();
        let places = [(0x10, 4), (0x14, 4), (0x16, 4), (0x10, 8)];
        let [low, high, across, whole] = places.map(|(at, size)| order.place(at, size));
        assert_eq!(order.offsets, [0x10, 0x16]);
        let mut words = [0; MOST];
        (words[0], words[1]) = (0x1111_2222_3333_4444, 0x5555_6666);
        assert_eq!(low.of(&words), 0x3333_4444);
        assert_eq!(high.of(&words), 0x1111_2222);
        assert_eq!(across.of(&words), 0x5555_6666);
        assert_eq!(whole.of(&words), words[0]);
    }
}
