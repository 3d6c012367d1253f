//! Up a stack by frame pointers, for kernels without ORC. The rules are those of Linux v6.12
//! `arch/x86/kernel/unwind_frame.c`. Interrupt frames are found by the bit that entry code sets in the
//! pointer to them (`ENCODE_FRAME_POINTER`); from there on the trace is a guess, since the interrupted
//! function may not have set up its own frame yet.

use crate::address::Gva;

use super::hidden::Hidden;
use super::memory::{StackKind, StackMemory, StackSpan};
use super::{Frame, FrameKind, Trace, Unreliable, Unwinder, pt_regs};

/// Bytes of a frame: the saved frame pointer and the return address.
const HEADER: u64 = 16;

/// Unused bytes at the top of a task's stack, without and with FRED (Linux v6.12
/// `arch/x86/include/asm/thread_info.h`, `TOP_OF_KERNEL_STACK_PADDING`).
const PADDINGS: [u64; 2] = [0, 16];

/// One walk.
pub(crate) struct Chain<'a, 'm> {
    memory: StackMemory<'m>,
    unwinder: &'a Unwinder,
    hidden: &'a Hidden,
    /// End of the frame before: the next one may not overlap it.
    floor: u64,
    place: Place,
    doubt: Option<Unreliable>,
}

/// The frame that the walk stands on.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// Nothing read yet; the pointer to the first frame.
    Before(u64),
    /// A saved frame pointer and a return address, at that address.
    Header(u64),
    /// A `struct pt_regs`, at that address.
    Regs(u64),
}

impl<'a, 'm> Chain<'a, 'm> {
    /// `first` is a frame pointer, `floor` the stack pointer that it must not lie below.
    pub(crate) fn new(
        mut memory: StackMemory<'m>,
        unwinder: &'a Unwinder,
        hidden: &'a Hidden,
        (first, floor): (u64, u64),
    ) -> Self {
        // Where this fails the first frame is looked for on all stacks.
        memory.enter(floor, 8).ok();
        Self {
            memory,
            unwinder,
            hidden,
            floor,
            place: Place::Before(first),
            doubt: None,
        }
    }

    /// All frames, innermost first. `running` is the RIP and RSP of a vCPU, whose function may not have
    /// set up its frame.
    pub(crate) fn trace(mut self, running: Option<Frame>) -> Trace {
        self.doubt = running
            .as_ref()
            .map(|frame| Unreliable::Preempted(frame.at));
        Trace::collect(running, || self.next()).doubted(self.doubt)
    }

    fn next(&mut self) -> Result<Option<Frame>, Unreliable> {
        let place = self.place;
        let pointer = match place {
            Place::Before(first) => first,
            Place::Header(at) if self.is_last(at)? => return Ok(None),
            Place::Header(at) => self.memory.word(at)?,
            Place::Regs(at) => self.memory.word(at.wrapping_add(pt_regs::BP))?,
        };
        let (at, size) = if pointer & 1 == 1 {
            (pointer & !1, pt_regs::SIZE)
        } else {
            (pointer, HEADER)
        };
        let before = self.memory.current_index();
        let stack = self.memory.enter(at, size)?;
        if before.is_none_or(|before| before == stack) && at < self.floor {
            return Err(Unreliable::StrayStackPointer(Gva(at)));
        }
        self.floor = at.wrapping_add(size);
        if pointer & 1 == 1 {
            self.regs(at)
        } else {
            self.header(at)
        }
    }

    fn regs(&mut self, at: u64) -> Result<Option<Frame>, Unreliable> {
        self.place = Place::Regs(at);
        if self.memory.word(at.wrapping_add(pt_regs::CS))? & 3 != 0 {
            return Ok(None);
        }
        let ip = self.memory.word(at.wrapping_add(pt_regs::IP))?;
        let sp = self.memory.word(at.wrapping_add(pt_regs::SP))?;
        self.doubt.get_or_insert(Unreliable::Preempted(Gva(ip)));
        Ok(Some(Frame {
            at: Gva(ip),
            kind: FrameKind::Interrupted,
            sp: Gva(sp),
        }))
    }

    fn header(&mut self, at: u64) -> Result<Option<Frame>, Unreliable> {
        self.place = Place::Header(at);
        let slot = at.wrapping_add(8);
        let found = self.memory.word(slot)?;
        let real = self.unwinder.hooks().recover(self.hidden, found, slot);
        let at = Gva(real.ok_or(Unreliable::HiddenReturn(Gva(found)))?);
        let frame = Frame {
            at,
            kind: self.unwinder.saved_kind(at.0),
            sp: Gva(slot.wrapping_add(8)),
        };
        if !self.unwinder.keeps_frame(frame.lookup()) {
            self.doubt.get_or_insert(Unreliable::NoUnwindData(at));
        }
        Ok(Some(frame))
    }

    /// The last frame lies right below the `struct pt_regs` at the top of a task's stack, or a little lower
    /// where the compiler realigned the stack or an ftrace handler stands between (`is_last_task_frame`).
    fn is_last(&mut self, at: u64) -> Result<bool, Unreliable> {
        let Some(StackSpan {
            kind: StackKind::Task,
            range,
        }) = self.memory.holding(at, HEADER).copied()
        else {
            return Ok(false);
        };
        for padding in PADDINGS {
            let last = range.end.0.wrapping_sub(padding + pt_regs::SIZE + HEADER);
            if at == last
                || at == last.wrapping_sub(8) && self.same(at + 8, last + 8)?
                || at == last.wrapping_sub(24)
                    && self.same(at, at + 16)?
                    && self.same(at + 8, at + 32)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn same(&mut self, one: u64, other: u64) -> Result<bool, Unreliable> {
        Ok(self.memory.word(one)? == self.memory.word(other)?)
    }
}
