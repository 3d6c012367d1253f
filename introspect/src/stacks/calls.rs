//! Whether a call stands before a return address: evidence for a trace that owes nothing to unwind tables.
//! Those hold where the kernel unwinds; a vCPU is stopped anywhere, also between instructions where the
//! kernel never looks (Linux v6.12 `arch/x86/include/asm/nospec-branch.h`, `FILL_RETURN_BUFFER`, pushes and
//! drops return addresses of its own). And what sleeps may have been followed by the table of a module that
//! is gone, over the code of another.
//!
//! Where a new task begins is no return address, and its frame is not of that kind
//! ([`Unwinder`](crate::unwind::Unwinder)). A call that the kernel took out while a task was in it (of
//! ftrace, or a static call) is missed here, and the trace said to be unreliable though it is not: that
//! costs a scan.

use crate::address::{Gva, GvaRange};
use crate::paging::KernelMemory;
use crate::unwind::{Frame, FrameKind, Trace, Unreliable};

/// Longest call: opcode, ModRM, SIB and a 32-bit displacement (Intel SDM vol. 2, CALL). Prefixes stand
/// before it.
const LONGEST: usize = 7;

/// Places for addresses already looked at, a power of two: most tasks sleep in the same few functions.
const PLACES: usize = 1024;

/// Looks at return addresses, at each but once.
#[derive(Debug)]
pub(super) struct Calls {
    /// Init text of vmlinux, freed after boot.
    init: Option<GvaRange>,
    /// Return addresses that follow a call, each at the place that its low bits say; zero is none.
    known: Vec<Gva>,
}

impl Calls {
    /// Nothing is known. It holds for one round of stacks, in a stop or before one: code changes in between. That a
    /// stop takes over what was found before it does no harm: the stack is the same since, so that a call that was
    /// seen then is evidence still, whatever has been written over it; and where modules have come or gone the stop
    /// does not go by stacks at all ([`is_current`](crate::unwind::Unwinder::is_current)).
    pub(super) fn new(init: Option<GvaRange>) -> Self {
        Self {
            init,
            known: vec![Gva(0); PLACES],
        }
    }

    /// The first return address of a complete trace that no call stands before. The outermost frame has no
    /// caller, and init text, to which nothing returns, is freed.
    pub(super) fn missing(
        &mut self,
        memory: &KernelMemory<'_>,
        trace: &Trace,
    ) -> Option<Unreliable> {
        let (_, callers) = trace.frames.split_last()?;
        let mut returns = callers.iter().filter(|frame| frame.kind == FrameKind::Call);
        let suspect =
            returns.find(|frame| !self.freed(frame) && !self.follows_call(memory, frame.at));
        suspect.map(|frame| Unreliable::NoCallBefore(frame.at))
    }

    fn freed(&self, frame: &Frame) -> bool {
        self.init.is_some_and(|init| init.contains(frame.lookup()))
    }

    fn follows_call(&mut self, memory: &KernelMemory<'_>, at: Gva) -> bool {
        let place = self.known.get_mut(at.0 as usize % PLACES);
        if place.as_deref() == Some(&at) {
            return true;
        }
        let follows = follows_call(memory, at);
        if let Some(place) = place.filter(|_| follows) {
            *place = at;
        }
        follows
    }
}

fn follows_call(memory: &KernelMemory<'_>, at: Gva) -> bool {
    let mut before = [0; LONGEST];
    let read = memory.read(at.wrapping_sub(LONGEST as u64), &mut before);
    read.is_ok() && ends_in_call(&before)
}

/// A direct call is 0xe8 and four bytes; an indirect one 0xff with 2 in the middle of its ModRM byte.
fn ends_in_call(code: &[u8; LONGEST]) -> bool {
    let [.., direct, _, _, _, _] = code;
    let indirect = |pair: &[u8]| matches!(pair, [0xff, mode] if mode & 0x38 == 0x10);
    *direct == 0xe8 || code.windows(2).any(indirect)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat::{BASE, Flat};

    /// Frames that lie at these offsets.
    fn trace(kinds: [FrameKind; 3], offsets: [u64; 3]) -> Trace {
        let frame = |(kind, offset)| Frame {
            at: BASE.wrapping_add(offset),
            kind,
            sp: Gva(0),
        };
        Trace {
            frames: kinds.into_iter().zip(offsets).map(frame).collect(),
            unreliable: None,
        }
    }

    #[test]
    fn each_return_but_the_outermost_follows_a_call() {
        use FrameKind::{Call, Interrupted, Running};
        let mut code = [0x90; 4096];
        code[16..21].copy_from_slice(&[0xe8, 0, 0, 0, 0]);
        let flat = Flat::new(&code);
        let (memory, mut calls) = (flat.memory(), Calls::new(None));
        let mut missing = |kinds, offsets| calls.missing(&memory, &trace(kinds, offsets));
        let bad = |offset| Some(Unreliable::NoCallBefore(BASE.wrapping_add(offset)));
        // Twice, so that what is known by then is asked too; 1045 has the place of 21.
        for _ in 0..2 {
            assert_eq!(missing([Call, Call, Call], [21, 21, 40]), None);
            assert_eq!(missing([Call, Call, Call], [21, 1045, 40]), bad(1045));
            assert_eq!(missing([Running, Call, Call], [40, 41, 40]), bad(41));
            // Where a new task begins is an address, not a return address.
            assert_eq!(missing([Interrupted, Call, Call], [40, 21, 40]), None);
        }
        let init = GvaRange {
            start: BASE.wrapping_add(32),
            end: BASE.wrapping_add(64),
        };
        let trace = trace([Call, Call, Call], [21, 40, 0]);
        assert_eq!(Calls::new(Some(init)).missing(&memory, &trace), None);
    }

    #[test]
    fn every_form_of_a_call_is_one() {
        for code in [
            [0x90, 0x90, 0xe8, 1, 2, 3, 4],
            [0x90, 0x90, 0x90, 0x90, 0x41, 0xff, 0xd4],
            [0x90, 0xff, 0x15, 1, 2, 3, 4],
            [0xff, 0x94, 0xc3, 1, 2, 3, 4],
            [0x90, 0x90, 0x90, 0x90, 0xff, 0x50, 0x18],
        ] {
            assert!(ends_in_call(&code), "{code:02x?}");
        }
    }

    #[test]
    fn a_jump_is_no_call() {
        for code in [
            [0x90, 0x90, 0xe9, 1, 2, 3, 4],
            [0x90, 0x90, 0x90, 0x90, 0x41, 0xff, 0xe4],
            [0xcc; LONGEST],
            [0xe8, 1, 2, 3, 4, 0x90, 0x90],
        ] {
            assert!(!ends_in_call(&code), "{code:02x?}");
        }
    }
}
