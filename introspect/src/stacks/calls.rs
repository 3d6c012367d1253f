//! Whether a call stands before a return address: evidence for a running vCPU's trace that owes nothing to
//! unwind tables. Those hold where the kernel unwinds; a vCPU is stopped anywhere, also between instructions
//! where the kernel never looks (Linux v6.12 `arch/x86/include/asm/nospec-branch.h`, `FILL_RETURN_BUFFER`,
//! pushes and drops return addresses of its own).

use crate::address::{Gva, GvaRange};
use crate::paging::KernelMemory;
use crate::unwind::{Frame, FrameKind, Trace, Unreliable};

/// Longest call: opcode, ModRM, SIB and a 32-bit displacement (Intel SDM vol. 2, CALL). Prefixes stand
/// before it.
const LONGEST: usize = 7;

/// The first return address of a complete trace that no call stands before. The outermost frame has no
/// caller, and init text, to which nothing returns, is freed.
pub(super) fn without_call(
    memory: &KernelMemory<'_>,
    init: Option<GvaRange>,
    trace: &Trace,
) -> Option<Unreliable> {
    let (_, callers) = trace.frames.split_last()?;
    let returns = callers.iter().filter(|frame| frame.kind == FrameKind::Call);
    let freed = |frame: &Frame| init.is_some_and(|init| init.contains(frame.lookup()));
    let mut suspect = returns.filter(|frame| !freed(frame) && !follows_call(memory, frame.at));
    suspect
        .next()
        .map(|frame| Unreliable::NoCallBefore(frame.at))
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
