//! Instructions whose ORC entry does not say what the stack looks like there, found once by symbols and code.
//! The kernel itself can do without: it never stops another CPU at any instruction whatever, as we do.

use crate::address::{Gva, GvaRange};
use crate::paging::KernelMemory;
use crate::symbols::Symbols;

use super::orc::{Base, Entry, Kind};

/// More entry code than any kernel has, in bytes.
const MAX_ENTRY_TEXT: u64 = 1 << 20;

/// Opcode of a call with a 32-bit relative target, and its length.
const CALL: u8 = 0xe8;
const CALL_SIZE: usize = 5;

/// Registers that have a thunk of their own, which is all but rsp.
const THUNKS: [&str; 16] = [
    "array", "rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
    "r13", "r14", "r15",
];

/// A whole `struct pt_regs` at the stack pointer.
const REGISTERS: Entry = Entry {
    sp_offset: 0,
    bp_offset: 0,
    sp: Base::Sp,
    bp: Base::Undefined,
    kind: Kind::Regs,
    signal: true,
};

/// All such places, sorted.
#[derive(Debug, Default)]
pub(crate) struct Special {
    /// First instructions of the retpoline thunks, which are marked as undefined, or before 6.4 as an end
    /// (Linux v6.12 `arch/x86/lib/retpoline.S`): nothing is pushed before the first.
    thunks: Vec<u64>,
    /// Where `error_entry` returns to: it pushed the general registers below what the CPU pushed, but the
    /// entry there is still that of before the call (Linux v6.12 `arch/x86/entry/entry_64.S`,
    /// `idtentry_body`).
    after_error_entry: Vec<u64>,
}

impl Special {
    pub(crate) fn find(
        symbols: &Symbols,
        memory: &KernelMemory<'_>,
        entry_text: Option<GvaRange>,
    ) -> Self {
        let thunk = |register| {
            symbols
                .unique(&format!("__x86_indirect_thunk_{register}"))
                .ok()
        };
        let mut thunks: Vec<u64> = THUNKS
            .into_iter()
            .filter_map(thunk)
            .map(|at| at.0)
            .collect();
        thunks.sort_unstable();
        let error_entry = symbols.unique("error_entry").ok();
        let after = error_entry
            .zip(entry_text)
            .map(|(target, text)| calls_to(memory, text, target).unwrap_or_default());
        Self {
            thunks,
            after_error_entry: after.unwrap_or_default(),
        }
    }

    /// What holds at `ip` instead of an entry of this kind; `called` if `ip` is a return address.
    pub(crate) fn instead(&self, ip: u64, kind: Kind, called: bool) -> Option<Entry> {
        match kind {
            Kind::Undefined | Kind::EndOfStack if !called => self
                .thunks
                .binary_search(&ip)
                .ok()
                .map(|_| Entry::FUNCTION_START),
            Kind::RegsPartial => self
                .after_error_entry
                .binary_search(&ip)
                .ok()
                .map(|_| REGISTERS),
            _ => None,
        }
    }
}

/// The addresses that calls of `target` in `text` return to, ascending.
fn calls_to(memory: &KernelMemory<'_>, text: GvaRange, target: Gva) -> Option<Vec<u64>> {
    let mut code = vec![0; usize::try_from(text.size().min(MAX_ENTRY_TEXT)).ok()?];
    memory.read(text.start, &mut code).ok()?;
    Some(returns_of(&code, text.start, target))
}

fn returns_of(code: &[u8], start: Gva, target: Gva) -> Vec<u64> {
    let ends = (start.0..).skip(CALL_SIZE);
    let calls = code.windows(CALL_SIZE).zip(ends).filter(|(bytes, end)| {
        let [CALL, offset @ ..] = bytes else {
            return false;
        };
        let offset = offset.first_chunk().copied().map_or(0, i32::from_le_bytes);
        end.wrapping_add_signed(i64::from(offset)) == target.0
    });
    calls.map(|(_, end)| end).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_one_function_are_told_from_others() {
        let code = [
            0x90, 0xe8, 0x0a, 0, 0, 0, 0xe8, 0x05, 0, 0, 0, 0xe8, 1, 0, 0, 0, 0xe8,
        ];
        assert_eq!(
            returns_of(&code, Gva(0x1000), Gva(0x1010)),
            [0x1006, 0x100b]
        );
    }

    #[test]
    fn a_thunk_is_a_function_only_on_its_first_instruction() {
        let special = Special {
            thunks: vec![0x1000],
            after_error_entry: vec![0x2005],
        };
        assert_eq!(
            special.instead(0x1000, Kind::Undefined, false),
            Some(Entry::FUNCTION_START)
        );
        assert_eq!(special.instead(0x1000, Kind::Undefined, true), None);
        assert_eq!(special.instead(0x1002, Kind::Undefined, false), None);
        assert_eq!(special.instead(0x1000, Kind::Call, false), None);
        assert_eq!(
            special.instead(0x1000, Kind::EndOfStack, false),
            Some(Entry::FUNCTION_START)
        );
    }

    #[test]
    fn after_error_entry_all_registers_are_on_the_stack() {
        let special = Special {
            thunks: vec![],
            after_error_entry: vec![0x2005],
        };
        for called in [false, true] {
            assert_eq!(
                special.instead(0x2005, Kind::RegsPartial, called),
                Some(REGISTERS)
            );
        }
        assert_eq!(special.instead(0x2004, Kind::RegsPartial, false), None);
    }
}
