//! Up a stack by ORC entries. The rules are those of Linux v6.12 `arch/x86/kernel/unwind_orc.c`
//! (`__unwind_start`, `unwind_next_frame`), with one more: a trace is complete only if it ends where a stack
//! of a task ends, or in entry code that has no caller. (Before 6.4 the tables say "end" also of trampolines
//! whose callers are merely not known.)

use crate::address::{Gva, GvaRange};

use super::hidden::{Hidden, Hooks};
use super::memory::{StackKind, StackMemory};
use super::orc::{Base, Entry, Kind};
use super::{Frame, FrameKind, Trace, Unreliable, pt_regs};

/// Above the last frame of a stack there is at most a `struct pt_regs` and some padding (Linux v6.12
/// `arch/x86/include/asm/thread_info.h`, `TOP_OF_KERNEL_STACK_PADDING`).
pub(crate) const TOP_ROOM: u64 = 256;

/// What a walk needs to know of the kernel.
pub(crate) trait Code {
    /// The ORC entry that holds at `ip`, or, if `ip` is the return address of a call, at that call; `None`
    /// where no table covers it.
    fn entry(&self, ip: u64, called: bool) -> Option<Entry>;
    /// Trampolines that hide return addresses.
    fn hooks(&self) -> &Hooks;
    /// `.entry.text`.
    fn entry_text(&self) -> Option<GvaRange>;
}

/// Where a walk begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start<'a> {
    pub(crate) ip: u64,
    pub(crate) sp: u64,
    pub(crate) bp: u64,
    pub(crate) kind: FrameKind,
    /// All general registers, where the walk begins at a running vCPU, in the x86 order.
    pub(crate) live: Option<&'a [u64; 16]>,
}

/// Where the registers of the current frame are: in a vCPU, or in a `struct pt_regs` at an address.
#[derive(Clone, Copy, Debug)]
enum Source {
    Live,
    At(u64),
}

/// The registers known in the current frame.
#[derive(Clone, Copy, Debug)]
enum Regs {
    None,
    Full(Source),
    /// Only ip, cs, flags, sp and ss at `at` are this frame's own; the others are those of the last whole
    /// set before, if any.
    Partial {
        at: u64,
        whole: Option<Source>,
    },
}

enum Step {
    Frame,
    End,
}

/// One walk.
pub(crate) struct Walk<'a, 'm> {
    code: &'a dyn Code,
    memory: StackMemory<'m>,
    hidden: &'a Hidden,
    live: Option<&'a [u64; 16]>,
    ip: u64,
    sp: u64,
    bp: u64,
    kind: FrameKind,
    regs: Regs,
    doubt: Option<Unreliable>,
}

impl<'a, 'm> Walk<'a, 'm> {
    pub(crate) fn new(
        code: &'a dyn Code,
        memory: StackMemory<'m>,
        hidden: &'a Hidden,
        start: Start<'a>,
    ) -> Self {
        let regs = if start.live.is_some() {
            Regs::Full(Source::Live)
        } else {
            Regs::None
        };
        Self {
            code,
            memory,
            hidden,
            live: start.live,
            ip: start.ip,
            sp: start.sp,
            bp: start.bp,
            kind: start.kind,
            regs,
            doubt: None,
        }
    }

    /// All frames, innermost first.
    pub(crate) fn trace(mut self) -> Trace {
        let first = self.frame();
        Trace::collect(Some(first), || {
            Ok(match self.step()? {
                Step::Frame => Some(self.frame()),
                Step::End => None,
            })
        })
        .doubted(self.doubt)
    }

    const fn frame(&self) -> Frame {
        Frame {
            at: Gva(self.ip),
            kind: self.kind,
            sp: Gva(self.sp),
        }
    }

    fn step(&mut self) -> Result<Step, Unreliable> {
        let entry = self.entry();
        match entry.kind {
            Kind::Undefined | Kind::Unknown => {
                return Err(Unreliable::UndefinedEntry(Gva(self.ip)));
            }
            Kind::EndOfStack => return self.end(),
            Kind::Call | Kind::Regs | Kind::RegsPartial => {}
        }
        self.check_on_stack()?;
        let (stack, before) = (self.memory.current_index(), self.sp);
        let caller_sp = self.caller_sp(entry)?;
        self.cross(entry.kind, caller_sp)?;
        self.restore_bp(entry, caller_sp)?;
        self.kind = if entry.signal {
            FrameKind::Interrupted
        } else {
            FrameKind::Call
        };
        self.check_direction(stack, before)?;
        if self.in_user_mode()? {
            self.end_in_user_mode()
        } else {
            Ok(Step::Frame)
        }
    }

    /// The entry for the current frame. Code without one may keep a frame pointer; what follows is then a
    /// guess and the trace unreliable.
    fn entry(&mut self) -> Entry {
        let called = self.kind == FrameKind::Call;
        self.code.entry(self.ip, called).unwrap_or_else(|| {
            self.doubt(Unreliable::NoUnwindData(Gva(self.ip)));
            Entry::FRAME_POINTER_GUESS
        })
    }

    fn doubt(&mut self, reason: Unreliable) {
        self.doubt.get_or_insert(reason);
    }

    /// The stack pointer before the call or interrupt.
    fn caller_sp(&mut self, entry: Entry) -> Result<u64, Unreliable> {
        let offset = i64::from(entry.sp_offset);
        match entry.sp {
            Base::Sp => Ok(self.sp.wrapping_add_signed(offset)),
            Base::Bp => Ok(self.bp.wrapping_add_signed(offset)),
            Base::SpIndirect => Ok(self.memory.word(self.sp)?.wrapping_add_signed(offset)),
            Base::BpIndirect => self.memory.word(self.bp.wrapping_add_signed(offset)),
            Base::Ax => self.register(0, pt_regs::AX),
            Base::Dx => self.register(2, pt_regs::DX),
            Base::Di => self.register(7, pt_regs::DI),
            Base::R10 => self.register(10, pt_regs::R10),
            Base::R13 => self.register(13, pt_regs::R13),
            Base::Undefined | Base::PreviousSp | Base::Unknown => {
                Err(Unreliable::UndefinedEntry(Gva(self.ip)))
            }
        }
    }

    /// A register other than sp and bp: known only right after an interrupt frame.
    fn register(&mut self, number: usize, offset: u64) -> Result<u64, Unreliable> {
        let missing = Unreliable::UndefinedEntry(Gva(self.ip));
        match self.whole().ok_or(missing.clone())? {
            Source::Live => self
                .live
                .and_then(|all| all.get(number))
                .copied()
                .ok_or(missing),
            Source::At(at) => self.memory.word(at.wrapping_add(offset)),
        }
    }

    const fn whole(&self) -> Option<Source> {
        match self.regs {
            Regs::None => None,
            Regs::Full(source) => Some(source),
            Regs::Partial { whole, .. } => whole,
        }
    }

    /// Moves ip, sp and the known registers to the caller.
    fn cross(&mut self, kind: Kind, caller_sp: u64) -> Result<(), Unreliable> {
        if kind == Kind::Call {
            let slot = caller_sp.wrapping_sub(8);
            let found = self.memory.word(slot)?;
            let real = self.code.hooks().recover(self.hidden, found, slot);
            self.ip = real.ok_or(Unreliable::HiddenReturn(Gva(found)))?;
            self.sp = caller_sp;
            self.regs = Regs::None;
            return Ok(());
        }
        let (base, size) = if kind == Kind::Regs {
            (caller_sp, pt_regs::SIZE)
        } else {
            (caller_sp.wrapping_sub(pt_regs::IP), pt_regs::HARDWARE_SIZE)
        };
        self.memory.enter(caller_sp, size)?;
        let found = self.memory.word(base.wrapping_add(pt_regs::IP))?;
        self.sp = self.memory.word(base.wrapping_add(pt_regs::SP))?;
        let slot = self.sp.wrapping_sub(8);
        let real = self.code.hooks().recover_rethook(self.hidden, found, slot);
        self.ip = real.ok_or(Unreliable::HiddenReturn(Gva(found)))?;
        self.regs = match kind {
            Kind::Regs => Regs::Full(Source::At(base)),
            _ => Regs::Partial {
                at: base,
                whole: self.whole(),
            },
        };
        Ok(())
    }

    fn restore_bp(&mut self, entry: Entry, caller_sp: u64) -> Result<(), Unreliable> {
        let offset = i64::from(entry.bp_offset);
        match entry.bp {
            Base::Undefined => {
                if self.whole().is_some() {
                    self.bp = self.register(5, pt_regs::BP)?;
                }
            }
            Base::PreviousSp => {
                self.bp = self.memory.word(caller_sp.wrapping_add_signed(offset))?;
            }
            Base::Bp => self.bp = self.memory.word(self.bp.wrapping_add_signed(offset))?,
            _ => return Err(Unreliable::UndefinedEntry(Gva(self.ip))),
        }
        Ok(())
    }

    /// Interrupted entry code may have left the user's stack pointer, but such code has no caller; whatever
    /// has one stands on a stack.
    fn check_on_stack(&mut self) -> Result<(), Unreliable> {
        if self.memory.current_index().is_none() {
            self.memory.enter(self.sp, 8)?;
        }
        let stray = Unreliable::StrayStackPointer(Gva(self.sp));
        self.memory.holding(self.sp, 8).map(|_| ()).ok_or(stray)
    }

    /// On one stack, callers lie above callees.
    fn check_direction(&self, stack: Option<usize>, before: u64) -> Result<(), Unreliable> {
        let same = stack.is_some() && self.memory.current_index() == stack;
        let within = self
            .memory
            .current()
            .is_some_and(|span| span.holds(self.sp, 8));
        if same && within && self.sp <= before {
            return Err(Unreliable::StrayStackPointer(Gva(self.sp)));
        }
        Ok(())
    }

    fn in_user_mode(&mut self) -> Result<bool, Unreliable> {
        let at = match self.regs {
            Regs::Full(Source::At(at)) | Regs::Partial { at, .. } => at,
            Regs::None | Regs::Full(Source::Live) => return Ok(false),
        };
        Ok(self.memory.word(at.wrapping_add(pt_regs::CS))? & 3 != 0)
    }

    /// Registers of user mode lie at the very top of the stack that the CPU or the entry code put them on.
    fn end_in_user_mode(&self) -> Result<Step, Unreliable> {
        let at = match self.regs {
            Regs::Full(Source::At(at)) | Regs::Partial { at, .. } => at,
            Regs::None | Regs::Full(Source::Live) => self.sp,
        };
        let end = at.wrapping_add(pt_regs::SIZE);
        let top = self.memory.current().map(|span| span.range.end.0);
        let near = top
            .and_then(|top| top.checked_sub(end))
            .is_some_and(|room| room < TOP_ROOM);
        if near {
            Ok(Step::End)
        } else {
            Err(Unreliable::EndsEarly(Gva(at)))
        }
    }

    /// "End of stack" is believed near the top of a task's stack, and in entry code, which begins with
    /// nothing on a stack and leaves it with nothing of use.
    fn end(&mut self) -> Result<Step, Unreliable> {
        let in_entry = self
            .code
            .entry_text()
            .is_some_and(|text| text.contains(Gva(self.ip)));
        let at_top = self
            .memory
            .holding(self.sp.wrapping_sub(1), 1)
            .is_some_and(|span| {
                span.kind == StackKind::Task
                    && span.range.end.0 - self.sp.min(span.range.end.0) < TOP_ROOM
            });
        if self.code.hooks().is_trampoline(self.ip) || !(in_entry || at_top) {
            return Err(Unreliable::EndsEarly(Gva(self.sp)));
        }
        Ok(Step::End)
    }
}
