//! Variables by the functions that use them: their code is decoded, and the operand that all of several
//! functions share is taken.

use std::collections::BTreeMap;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};

use super::Given;
use crate::address::Gva;

/// Most bytes of one function that are decoded.
const LONGEST: u64 = 4096;
/// Mapped image addresses, as sign-extended 32-bit operands have them.
const IMAGE: std::ops::Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;

/// Functions that read `__per_cpu_offset[cpu]` (cpu_rq; Linux v6.12 kernel/sched/core.c, syscalls.c).
const PER_CPU_USERS: [&str; 6] = [
    "idle_cpu",
    "available_idle_cpu",
    "idle_task",
    "resched_cpu",
    "wake_up_if_idle",
    "sched_idle_cpu",
];
/// Functions whose first lock is `text_mutex` (Linux v6.12 arch/x86/kernel/{alternative,jump_label,
/// static_call}.c).
const TEXT_MUTEX_USERS: [&str; 4] = [
    "alternatives_smp_module_del",
    "arch_static_call_transform",
    "arch_jump_label_transform_apply",
    "arch_jump_label_transform_queue",
];
/// Functions whose first lock is `ftrace_lock` (Linux v6.12 kernel/trace/ftrace.c).
const FTRACE_LOCK_USERS: [&str; 2] = ["unregister_ftrace_function", "ftrace_kill_all"];

/// Finds what code shows.
pub(super) fn find(given: &Given<'_>, found: &mut BTreeMap<&'static str, Option<Gva>>) {
    let mut put = |name, at: Option<u64>| {
        if let Some(at) = at {
            found.insert(name, Some(Gva(at)));
        }
    };
    put(
        "__per_cpu_offset",
        agreed(given, &PER_CPU_USERS, scaled_by_eight),
    );
    let locks = ["mutex_lock", "mutex_lock_nested"];
    let targets: Vec<u64> = locks
        .iter()
        .filter_map(|name| Some(given.symbols.unique(name).ok()?.0))
        .collect();
    let first_lock = |code: &[Instruction]| argument_of_call(code, &targets);
    put("text_mutex", agreed(given, &TEXT_MUTEX_USERS, first_lock));
    put("ftrace_lock", agreed(given, &FTRACE_LOCK_USERS, first_lock));
    // The queue is emptied by storing zero (text_poke_flush, inlined into one or both).
    put(
        "tp_vec_nr",
        agreed(given, &["text_poke_finish", "text_poke_queue"], |code| {
            stored(code, 0)
        }),
    );
    let references = agreed(given, &["text_poke_bp_batch"], |code| stored(code, 1));
    let member = given.types.offset_of("bp_patching_desc", "refs").ok();
    put(
        "bp_desc",
        references
            .zip(member)
            .map(|(at, member)| at.wrapping_sub(member)),
    );
}

/// What `look` finds in those of the functions that exist, if it is the same in all where it finds any.
fn agreed(
    given: &Given<'_>,
    functions: &[&str],
    look: impl Fn(&[Instruction]) -> Option<u64>,
) -> Option<u64> {
    let mut found = functions
        .iter()
        .filter_map(|name| look(&decode(given, name)?));
    let first = found.next()?;
    found.all(|other| other == first).then_some(first)
}

/// The instructions of a function, up to the next symbol.
fn decode(given: &Given<'_>, name: &str) -> Option<Vec<Instruction>> {
    let at = given.symbols.unique(name).ok()?;
    let (_, end) = given.symbols.containing(at)?;
    let len = end.0.saturating_sub(at.0).min(LONGEST);
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    given.memory.read(at, &mut bytes).ok()?;
    let decoder = Decoder::with_ip(64, &bytes, at.0, DecoderOptions::NONE);
    Some(
        decoder
            .into_iter()
            .take_while(|found| !found.is_invalid())
            .collect(),
    )
}

/// The image address in an operand `address(,index,8)`: an array of pointers.
fn scaled_by_eight(code: &[Instruction]) -> Option<u64> {
    let operand = |found: &Instruction| {
        let scaled = found.memory_index() != Register::None && found.memory_index_scale() == 8;
        let at = found.memory_displacement64();
        (scaled && found.memory_base() == Register::None && IMAGE.contains(&at)).then_some(at)
    };
    code.iter().find_map(operand)
}

/// The immediate last loaded into the first argument's register before the first call of a target.
fn argument_of_call(code: &[Instruction], targets: &[u64]) -> Option<u64> {
    let mut argument = None;
    for found in code {
        let to_argument = found.op_count() == 2
            && found.op0_kind() == OpKind::Register
            && found.op0_register().full_register() == Register::RDI;
        if to_argument {
            argument = immediate(found);
        }
        let call = found.flow_control() == FlowControl::Call;
        if call && targets.contains(&found.near_branch_target()) {
            return argument;
        }
    }
    None
}

/// An image address that an instruction loads as such.
fn immediate(found: &Instruction) -> Option<u64> {
    let value = match found.code() {
        Code::Mov_rm64_imm32 => found.immediate32to64().cast_unsigned(),
        Code::Lea_r64_m if found.is_ip_rel_memory_operand() => found.ip_rel_memory_address(),
        _ => return None,
    };
    IMAGE.contains(&value).then_some(value)
}

/// The only variable that a 32-bit `value` is stored to, with nothing but an address to reach it.
fn stored(code: &[Instruction], value: u32) -> Option<u64> {
    let mut found = code.iter().filter_map(|found| {
        let stores = found.code() == Code::Mov_rm32_imm32
            && found.op0_kind() == OpKind::Memory
            && found.immediate32() == value;
        let direct = found.memory_index() == Register::None
            && matches!(found.memory_base(), Register::None | Register::RIP);
        let at = found.memory_displacement64();
        (stores && direct && IMAGE.contains(&at)).then_some(at)
    });
    let first = found.next()?;
    found.all(|other| other == first).then_some(first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn instructions(bytes: &[u8]) -> Vec<Instruction> {
        Decoder::with_ip(64, bytes, 0xffff_ffff_8100_0000, DecoderOptions::NONE)
            .into_iter()
            .collect()
    }

    #[test]
    fn an_array_of_pointers_is_seen_in_its_operand() {
        // mov -0x7e000000(,%rdi,8),%rax
        let code = instructions(b"\x48\x8b\x04\xfd\x00\x00\x00\x82");
        assert_eq!(scaled_by_eight(&code), Some(0xffff_ffff_8200_0000));
    }

    #[test]
    fn the_argument_is_that_of_the_call_and_not_an_earlier_one() {
        // mov $-0x7e000000,%rdi; mov $-0x7d000000,%rdi; call .+0
        let code = instructions(
            b"\x48\xc7\xc7\x00\x00\x00\x82\x48\xc7\xc7\x00\x00\x00\x83\xe8\x00\x00\x00\x00",
        );
        let target = 0xffff_ffff_8100_0013;
        assert_eq!(
            argument_of_call(&code, &[target]),
            Some(0xffff_ffff_8300_0000)
        );
        assert_eq!(argument_of_call(&code, &[target + 1]), None);
    }

    #[test]
    fn a_stored_word_names_its_variable() {
        // movl $1,0x100(%rip)
        let code = instructions(b"\xc7\x05\x00\x01\x00\x00\x01\x00\x00\x00");
        assert_eq!(stored(&code, 1), Some(0xffff_ffff_8100_010a));
        assert_eq!(stored(&code, 0), None);
    }

    proptest! {
        #[test]
        fn hostile_code_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let code = instructions(&bytes);
            let _ = (scaled_by_eight(&code), argument_of_call(&code, &[0]), stored(&code, 0));
        }
    }
}
