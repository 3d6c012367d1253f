//! The kernel's way of filling gaps with nops, in its two generations. Pure.

use iced_x86::{Code, Decoder, DecoderOptions};

use super::Rules;

/// The nops of 1 to 8 bytes that both generations use (Linux v6.12 arch/x86/include/asm/nops.h).
const NOPS: [&[u8]; 8] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];
/// Prefixes that make the eight-byte nop one of 9 to 11 bytes, last one first.
const PREFIXES: [u8; 3] = [0x66, 0x66, 0x2e];

/// A nop of five bytes: what ftrace, jump labels and static calls leave.
pub const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
/// A nop of two bytes.
pub const NOP2: [u8; 2] = [0x66, 0x90];

/// Fills `gap` as one effective instruction where it can (6.12 `add_nop`: one nop up to 11 bytes, else a
/// jump over `int3`), or as a row of nops of at most 8 bytes (6.1 `add_nops`).
pub fn fill(rules: Rules, gap: &mut [u8]) {
    match rules {
        Rules::Rows => gap.chunks_mut(NOPS.len()).for_each(one_nop),
        Rules::Single if gap.len() <= NOPS.len() + PREFIXES.len() => one_nop(gap),
        Rules::Single => jump_over(gap),
    }
}

fn one_nop(gap: &mut [u8]) {
    let prefixes = gap.len().saturating_sub(NOPS.len());
    let (head, tail) = gap.split_at_mut(prefixes);
    let used = PREFIXES
        .iter()
        .skip(PREFIXES.len().saturating_sub(prefixes));
    head.iter_mut()
        .zip(used)
        .for_each(|(into, byte)| *into = *byte);
    let nop = tail.len().checked_sub(1).and_then(|index| NOPS.get(index));
    tail.copy_from_slice(nop.copied().unwrap_or_default());
}

fn jump_over(gap: &mut [u8]) {
    let length = gap.len();
    gap.fill(0xcc);
    let jump = if length < 128 {
        vec![0xeb, (length - 2) as u8]
    } else {
        let distance = (length as u32).saturating_sub(5).to_le_bytes();
        [&[0xe9], &distance[..]].concat()
    };
    gap.iter_mut()
        .zip(jump)
        .for_each(|(into, byte)| *into = byte);
}

/// Joins neighbouring nops as the kernel does after it has patched `code`. What does not decode stays, as
/// there.
pub fn optimise(rules: Rules, code: &mut [u8]) {
    let mut at = 0;
    while at < code.len() {
        let Some((length, nop)) = instruction(rules, code, at) else {
            return;
        };
        let mut next = at + length;
        if nop {
            if rules == Rules::Single && next == code.len() {
                return;
            }
            while let Some((length, true)) = instruction(rules, code, next) {
                next += length;
            }
            if rules == Rules::Single || next - at > 1 {
                fill(rules, code.get_mut(at..next).unwrap_or_default());
            }
        }
        at = next;
    }
}

/// Length of the instruction at `at`, and whether it is a nop that counts: `90` and, in the newer
/// generation, `0f 1f` without prefix.
fn instruction(rules: Rules, code: &[u8], at: usize) -> Option<(usize, bool)> {
    let rest = code.get(at..).filter(|rest| !rest.is_empty())?;
    let decoded = Decoder::new(64, rest, DecoderOptions::NONE).decode();
    if decoded.is_invalid() {
        return None;
    }
    let nop = match rules {
        Rules::Rows => rest.first() == Some(&0x90),
        Rules::Single => matches!(
            decoded.code(),
            Code::Nopd | Code::Nopw | Code::Nopq | Code::Nop_rm16 | Code::Nop_rm32 | Code::Nop_rm64
        ),
    };
    Some((decoded.len(), nop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_gap_decodes_to_what_its_generation_writes() {
        for length in 1..300_usize {
            for rules in [Rules::Rows, Rules::Single] {
                let mut gap = vec![0; length];
                fill(rules, &mut gap);
                let mut decoder = Decoder::new(64, &gap, DecoderOptions::NONE);
                let first = decoder.decode();
                match rules {
                    Rules::Single if length > 11 => {
                        assert_eq!(first.near_branch_target(), length as u64);
                    }
                    Rules::Single => assert_eq!(first.len(), length),
                    Rules::Rows => assert_eq!(first.len(), length.min(8)),
                }
            }
        }
    }

    #[test]
    fn eleven_bytes_take_all_three_prefixes() {
        let mut gap = [0; 11];
        fill(Rules::Single, &mut gap);
        assert_eq!(gap[..5], [0x66, 0x66, 0x2e, 0x0f, 0x1f]);
        let mut gap = [0; 9];
        fill(Rules::Single, &mut gap);
        assert_eq!(gap[..3], [0x2e, 0x0f, 0x1f]);
    }

    #[test]
    fn nops_after_an_instruction_become_one() {
        let mut code = [0xfa, 0x90, 0x90, 0x90, 0x90, 0x90];
        optimise(Rules::Single, &mut code);
        assert_eq!(code, [0xfa, 0x0f, 0x1f, 0x44, 0x00, 0x00]);
        let mut code = [0xfa, 0x90];
        optimise(Rules::Single, &mut code);
        assert_eq!(code, [0xfa, 0x90]);
    }
}
