//! What a kernel may do to a function after boot without making it another function. Each rule is the whole
//! of what is tolerated at that kind of place; all else must be equal byte for byte.

use vmpatch_introspect::Gva;

use crate::link::boot::nops::{NOP2, NOP5};
use crate::link::boot::retpolines::Indirect;
use crate::link::boot::{Facts, returns::Returns};
use crate::link::live::Live;
use crate::link::relocate::branch;

/// `endbr64`, and what it is sealed with (Linux v6.12 arch/x86/include/asm/ibt.h, `gen_endbr_poison`).
const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
const SEALED: [u8; 4] = [0x66, 0x0f, 0x1f, 0x00];
/// A call that returns 0 (Linux v6.12 arch/x86/kernel/static_call.c, `xor5rax`).
const CLEAR_RAX: [u8; 5] = [0x2e, 0x2e, 0x2e, 0x31, 0xc0];

/// ftrace leaves a nop, or a call to a trampoline while somebody traces the function.
#[must_use]
pub fn fentry(running: &[u8]) -> bool {
    running == NOP5 || matches!(running, [0xe8, _, _, _, _])
}

/// A landing mark, or its seal.
#[must_use]
pub fn landing_mark(running: &[u8]) -> bool {
    running == ENDBR || running == SEALED
}

/// On a machine with one CPU a lock prefix becomes a harmless segment prefix (Linux v6.12
/// arch/x86/kernel/alternative.c, `alternatives_smp_unlock`).
#[must_use]
pub fn lock_prefix(running: &[u8]) -> bool {
    matches!(running, [0xf0 | 0x3e])
}

/// A static-key branch: a nop of its length, or the jump to its one target (Linux v6.12
/// arch/x86/kernel/jump_label.c).
#[must_use]
pub fn jump_label(running: &[u8], at: Gva, target: Option<Gva>) -> bool {
    if running == NOP2 || running == NOP5 {
        return true;
    }
    let leads = match *running {
        [0xeb, distance] => at
            .wrapping_add(2)
            .wrapping_add(signed(distance.cast_signed().into())),
        [0xe9, a, b, c, d] => {
            let distance = i32::from_le_bytes([a, b, c, d]);
            at.wrapping_add(5).wrapping_add(signed(distance.into()))
        }
        _ => return false,
    };
    target == Some(leads)
}

const fn signed(distance: i64) -> u64 {
    distance.cast_unsigned()
}

/// A call that leads `padding` bytes before where the built one does.
#[must_use]
pub fn padded_call(built: &[u8; 5], running: &[u8; 5], padding: u64) -> bool {
    let distance = |&[opcode, a, b, c, d]: &[u8; 5]| {
        (opcode == 0xe8).then(|| i64::from(i32::from_le_bytes([a, b, c, d])))
    };
    match (distance(built), distance(running)) {
        (Some(built), Some(running)) => built.checked_sub_unsigned(padding) == Some(running),
        _ => false,
    }
}

/// A call that may be any of those its key allows now.
#[derive(Clone, Copy, Debug)]
pub struct StaticCall {
    /// Where.
    pub at: Gva,
    /// `__SCT__name`.
    pub trampoline: Gva,
    /// What `__SCK__name.func` holds; `None` where it cannot be read.
    pub function: Option<Gva>,
    /// `__static_call_return0`.
    pub return_zero: Option<Gva>,
}

impl StaticCall {
    /// A static call: to its function or still to its trampoline, or the nop, clearing of rax or return
    /// that stand for "nothing to call" (Linux v6.12 arch/x86/kernel/static_call.c,
    /// `__static_call_transform`).
    #[must_use]
    pub fn accepts(&self, running: &[u8], facts: &Facts) -> bool {
        match *running {
            [0xe8, ..] => self.calls(running, facts),
            [0xe9, ..] if self.function == Some(Gva(0)) => self.returns(running, facts.returns),
            [0xe9, ..] => self.jumps(running, 0xe9),
            [0xc3, ..] => self.function == Some(Gva(0)) && self.returns(running, facts.returns),
            [0x0f, condition @ 0x80..=0x8f, ref field @ ..] if field.len() == 4 => {
                self.jumps_if(condition, field, facts.returns)
            }
            _ if running == NOP5 => matches!(self.function, Some(Gva(0)) | None),
            _ => running == CLEAR_RAX && self.function == self.return_zero,
        }
    }

    fn targets(&self) -> impl Iterator<Item = Gva> {
        [Some(self.trampoline), self.function].into_iter().flatten()
    }

    fn calls(&self, running: &[u8], facts: &Facts) -> bool {
        self.targets().any(|target| {
            let padded = facts
                .call_padding
                .map(|padding| target.wrapping_sub(padding));
            let leads = |to| branch(0xe8, self.at, to).is_ok_and(|bytes| running == bytes);
            leads(target) || padded.is_some_and(leads)
        })
    }

    fn jumps(&self, running: &[u8], opcode: u8) -> bool {
        self.targets()
            .any(|to| branch(opcode, self.at, to).is_ok_and(|bytes| running == bytes))
    }

    fn jumps_if(&self, condition: u8, field: &[u8], returns: Returns) -> bool {
        let thunk = match returns {
            Returns::Thunk(at) | Returns::LowerHalf(at) => Some(at),
            Returns::Plain => None,
        };
        let at = self.at.wrapping_add(1);
        let leads = |to| branch(condition, at, to).is_ok_and(|bytes| bytes.ends_with(field));
        self.targets().chain(thunk).any(leads)
    }

    fn returns(&self, running: &[u8], returns: Returns) -> bool {
        returns
            .site(self.at, running.len())
            .is_ok_and(|bytes| running == bytes)
    }
}

/// An indirect branch through a thunk without a name: the kernel makes such pages in module space where
/// indirect branches must not lie in the lower half of a cache line (Linux v6.12
/// arch/x86/kernel/alternative.c, `its_allocate_thunk`). What it leads to must be just that jump.
#[must_use]
pub fn nameless_thunk(
    running: &[u8],
    at: Gva,
    register: u8,
    call: bool,
    facts: &Facts,
    live: &dyn Live,
) -> bool {
    if !matches!(facts.indirect, Some(Indirect::Direct { its: Some(_), .. })) {
        return false;
    }
    let (prefix, rest) = match *running {
        [0x2e, ref rest @ ..] => (1, rest),
        ref rest => (0, rest),
    };
    let &[opcode, a, b, c, d] = rest else {
        return false;
    };
    let distance = signed(i32::from_le_bytes([a, b, c, d]).into());
    let thunk = at.wrapping_add(prefix + 5).wrapping_add(distance);
    let mut jump = if register < 8 { Vec::new() } else { vec![0x41] };
    jump.extend([0xff, 0xe0 | (register & 7), 0xcc]);
    let last_of_jump = thunk.wrapping_add(jump.len() as u64 - 2);
    opcode == if call { 0xe8 } else { 0xe9 }
        && last_of_jump.0 & 0x20 != 0
        && live
            .bytes(thunk, jump.len())
            .is_ok_and(|there| there == jump)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::tests::facts;

    const AT: Gva = Gva(0xffff_ffff_8100_0000);
    const TRAMPOLINE: Gva = Gva(0xffff_ffff_8100_1000);
    const FUNCTION: Gva = Gva(0xffff_ffff_8100_2000);

    fn call(function: Gva) -> StaticCall {
        let return_zero = Some(Gva(0x77));
        StaticCall {
            at: AT,
            trampoline: TRAMPOLINE,
            function: Some(function),
            return_zero,
        }
    }

    #[test]
    fn a_static_branch_is_a_nop_or_leads_to_its_target() {
        assert!(jump_label(&[0x66, 0x90], AT, None));
        assert!(jump_label(&NOP5, AT, None));
        assert!(jump_label(&[0xeb, 0x10], AT, Some(AT.wrapping_add(0x12))));
        assert!(!jump_label(&[0xeb, 0x11], AT, Some(AT.wrapping_add(0x12))));
        assert!(!jump_label(&[0x90, 0x90], AT, None));
        assert!(!jump_label(&[0xcc, 0x90], AT, None));
    }

    #[test]
    fn a_static_call_leads_to_its_function_and_nowhere_else() {
        let to = |target| branch(0xe8, AT, target).unwrap();
        assert!(call(FUNCTION).accepts(&to(FUNCTION), &facts()));
        assert!(call(FUNCTION).accepts(&to(TRAMPOLINE), &facts()));
        assert!(!call(FUNCTION).accepts(&to(Gva(FUNCTION.0 + 1)), &facts()));
        assert!(!call(FUNCTION).accepts(&NOP5, &facts()));
        assert!(call(Gva(0)).accepts(&NOP5, &facts()));
        assert!(call(Gva(0x77)).accepts(&CLEAR_RAX, &facts()));
        assert!(!call(FUNCTION).accepts(&CLEAR_RAX, &facts()));
        assert!(call(Gva(0)).accepts(&[0xc3, 0xcc, 0xcc, 0xcc, 0xcc], &facts()));
        assert!(!call(FUNCTION).accepts(&[0xc3, 0xcc, 0xcc, 0xcc, 0xcc], &facts()));
    }

    #[test]
    fn with_call_depth_tracking_a_call_may_lead_before_its_function() {
        let before = branch(0xe8, AT, Gva(FUNCTION.0 - 9)).unwrap();
        let tracked = Facts {
            call_padding: Some(9),
            ..facts()
        };
        assert!(call(FUNCTION).accepts(&before, &tracked));
        assert!(!call(FUNCTION).accepts(&before, &facts()));
    }

    #[test]
    fn a_padded_call_leads_before_its_function_by_just_the_padding() {
        let built = branch(0xe8, AT, FUNCTION).unwrap();
        let before = |bytes| branch(0xe8, AT, Gva(FUNCTION.0 - bytes)).unwrap();
        assert!(padded_call(&built, &before(9), 9));
        assert!(!padded_call(&built, &before(8), 9));
        assert!(!padded_call(&built, &built, 9));
        let jump = branch(0xe9, AT, Gva(FUNCTION.0 - 9)).unwrap();
        assert!(!padded_call(&built, &jump, 9));
    }

    #[test]
    fn a_traced_function_is_the_same_function_but_one_with_a_breakpoint_is_not() {
        assert!(fentry(&NOP5));
        assert!(fentry(&[0xe8, 1, 2, 3, 4]));
        assert!(!fentry(&[0xcc, 0x1f, 0x44, 0, 0]));
        assert!(!fentry(&[0xe9, 1, 2, 3, 4]));
    }
}
