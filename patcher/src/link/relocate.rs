//! Relocation arithmetic: a field from a symbol's value, and a symbol's value from a field that runs. Owns
//! no knowledge of what symbols are.

use vmpatch_introspect::Gva;

use crate::patch::RelocationKind;

/// The value does not fit the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{target} is out of reach of a {kind:?} field at {field}")]
pub struct OutOfReach {
    /// Where the field lies.
    pub field: Gva,
    /// What it is to name.
    pub target: Gva,
    /// How.
    pub kind: RelocationKind,
}

/// Length of a field in bytes.
#[must_use]
pub const fn field_size(kind: RelocationKind) -> usize {
    match kind {
        RelocationKind::Absolute64 => 8,
        RelocationKind::Relative32
        | RelocationKind::Absolute32
        | RelocationKind::Absolute32Signed => 4,
    }
}

/// The bytes of a field at `field` for a symbol of value `symbol`. Arithmetic is modulo 2^64, as the
/// CPU's is: a per-CPU symbol is a small number, and a field relative to kernel text still names it
/// (System V ABI, AMD64 supplement, section 4.4; Linux v6.12 arch/x86/kernel/module.c).
///
/// # Errors
/// [`OutOfReach`].
pub fn encode(
    kind: RelocationKind,
    symbol: Gva,
    addend: i64,
    field: Gva,
) -> Result<Vec<u8>, OutOfReach> {
    let target = symbol.wrapping_add(addend.cast_unsigned());
    let far = OutOfReach {
        field,
        target,
        kind,
    };
    let signed = |value: u64| {
        i32::try_from(value.cast_signed())
            .map(|it| it.to_le_bytes().to_vec())
            .map_err(|_| far)
    };
    match kind {
        RelocationKind::Relative32 => signed(target.0.wrapping_sub(field.0)),
        RelocationKind::Absolute64 => Ok(target.0.to_le_bytes().to_vec()),
        RelocationKind::Absolute32Signed => signed(target.0),
        RelocationKind::Absolute32 => u32::try_from(target.0)
            .map(|it| it.to_le_bytes().to_vec())
            .map_err(|_| far),
    }
}

/// The value of the symbol that the bytes of a field name; `None` if they are too few.
#[must_use]
pub fn decode(kind: RelocationKind, bytes: &[u8], addend: i64, field: Gva) -> Option<Gva> {
    let target = match kind {
        RelocationKind::Absolute64 => u64::from_le_bytes(*bytes.first_chunk()?),
        RelocationKind::Absolute32 => u64::from(u32::from_le_bytes(*bytes.first_chunk()?)),
        RelocationKind::Absolute32Signed => signed(bytes)?,
        RelocationKind::Relative32 => signed(bytes)?.wrapping_add(field.0),
    };
    Some(Gva(target).wrapping_sub(addend.cast_unsigned()))
}

fn signed(bytes: &[u8]) -> Option<u64> {
    Some(i64::from(i32::from_le_bytes(*bytes.first_chunk()?)).cast_unsigned())
}

/// A five-byte branch at `at`: `opcode` is `e8` for a call, `e9` for a jump.
///
/// # Errors
/// [`OutOfReach`].
pub fn branch(opcode: u8, at: Gva, to: Gva) -> Result<[u8; 5], OutOfReach> {
    let field = encode(RelocationKind::Relative32, to, -4, at.wrapping_add(1))?;
    let mut bytes = [opcode; 5];
    for (into, byte) in bytes.iter_mut().skip(1).zip(field) {
        *into = byte;
    }
    Ok(bytes)
}

/// A two-byte jump at `at`.
///
/// # Errors
/// [`OutOfReach`]: more than 127 bytes on or 128 back.
pub fn short_jump(at: Gva, to: Gva) -> Result<[u8; 2], OutOfReach> {
    let distance = to.0.wrapping_sub(at.0).wrapping_sub(2).cast_signed();
    let distance = i8::try_from(distance).map_err(|_| OutOfReach {
        field: at.wrapping_add(1),
        target: to,
        kind: RelocationKind::Relative32,
    })?;
    Ok([0xeb, distance.cast_unsigned()])
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};
    use proptest::prelude::*;

    use super::*;

    const KINDS: [RelocationKind; 4] = [
        RelocationKind::Relative32,
        RelocationKind::Absolute64,
        RelocationKind::Absolute32,
        RelocationKind::Absolute32Signed,
    ];

    #[test]
    fn a_per_cpu_symbol_is_named_from_the_arena_by_its_small_value() {
        let at = Gva(0xffff_ffff_ff02_2000);
        let bytes = encode(RelocationKind::Relative32, Gva(0x34d00), -4, at).unwrap();
        let next = at.0.wrapping_add(4);
        let disp = i32::from_le_bytes(bytes.try_into().unwrap());
        assert_eq!(next.wrapping_add(i64::from(disp) as u64), 0x34d00);
    }

    #[test]
    fn a_target_out_of_reach_is_refused_and_not_cut() {
        let far = encode(
            RelocationKind::Relative32,
            Gva(0),
            -4,
            Gva(0x8000_0000_0000),
        );
        assert!(far.is_err());
        assert!(encode(RelocationKind::Absolute32, Gva(1 << 32), 0, Gva(0)).is_err());
        assert!(encode(RelocationKind::Absolute32Signed, Gva(1 << 31), 0, Gva(0)).is_err());
        assert!(encode(RelocationKind::Absolute32Signed, Gva(u64::MAX), 0, Gva(0)).is_ok());
    }

    proptest! {
        #[test]
        fn a_field_that_can_be_written_is_read_back(
            kind in 0..4_usize, symbol: u64, addend in -4096..4096_i64, near: i32,
        ) {
            let kind = KINDS[kind];
            let field = Gva(symbol.wrapping_add(i64::from(near) as u64));
            if let Ok(bytes) = encode(kind, Gva(symbol), addend, field) {
                prop_assert_eq!(bytes.len(), field_size(kind));
                prop_assert_eq!(decode(kind, &bytes, addend, field), Some(Gva(symbol)));
            }
        }

        #[test]
        fn a_branch_leads_where_a_disassembler_says(at: u64, near: i32) {
            let to = at.wrapping_add(5).wrapping_add(i64::from(near) as u64);
            let bytes = branch(0xe9, Gva(at), Gva(to)).unwrap();
            let decoded = Decoder::with_ip(64, &bytes, at, DecoderOptions::NONE).decode();
            prop_assert_eq!(decoded.near_branch_target(), to);
        }
    }
}
