//! Where the instructions of a function are, and which of them lead elsewhere. Owns decoding; knows no
//! symbol.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction as Decoded, Mnemonic, OpKind, Register,
};

/// One instruction of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    /// Offset of its first byte.
    pub(super) start: u64,
    /// Offset after its last byte, which relative fields count from.
    pub(super) end: u64,
    /// What it does to the flow.
    pub(super) flow: Flow,
    /// The field of a relative operand and the offset it leads to, as the bytes have it.
    pub(super) relative: Option<RelativeField>,
    /// Offset of the field that alone says what it reads or writes: no register is added.
    pub(super) accessed: Option<u64>,
    /// It does nothing.
    pub(super) is_nop: bool,
}

/// The field of a relative operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RelativeField {
    /// Offset of the field.
    pub(super) offset: u64,
    /// Its size in bytes: 1 or 4.
    pub(super) size: u8,
    /// Where it leads, counted as all offsets here.
    pub(super) leads_to: i64,
}

/// What an instruction does to the flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// Direct call.
    Call,
    /// Direct jump.
    Jump,
    /// Conditional jump.
    Branch,
    /// Near return.
    Return,
    /// `endbr64`.
    Endbr,
    /// Anything else.
    Other,
}

/// The instructions of a function, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Instructions {
    list: Vec<Instruction>,
    /// Offset of the first byte that is no instruction.
    pub(super) undecodable_at: Option<u64>,
}

impl Instructions {
    /// Decodes bytes from their first on.
    pub(super) fn decode(bytes: &[u8]) -> Self {
        let mut decoder = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE);
        let mut instructions = Self::default();
        while decoder.can_decode() {
            let decoded = decoder.decode();
            if decoded.is_invalid() {
                instructions.undecodable_at = Some(decoded.ip());
                break;
            }
            let relative = relative_field(&decoder, &decoded);
            let (start, end) = (decoded.ip(), decoded.next_ip());
            let flow = flow_of(&decoded);
            instructions.list.push(Instruction {
                start,
                end,
                flow,
                relative,
                accessed: accessed_field(&decoder, &decoded),
                is_nop: decoded.mnemonic() == Mnemonic::Nop,
            });
        }
        instructions
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Instruction> {
        self.list.iter()
    }

    /// Whether the field at an offset is the address of memory that is read or written there.
    pub(super) fn accesses(&self, field: u64) -> bool {
        self.at(field).is_some_and(|it| it.accessed == Some(field))
    }

    /// The one that has an offset.
    pub(super) fn at(&self, offset: u64) -> Option<&Instruction> {
        let after = self.list.partition_point(|it| it.start <= offset);
        self.list
            .get(after.checked_sub(1)?)
            .filter(|it| offset < it.end)
    }
}

fn flow_of(decoded: &Decoded) -> Flow {
    let direct = decoded.op0_kind() == OpKind::NearBranch64;
    match decoded.flow_control() {
        FlowControl::Call if direct => Flow::Call,
        FlowControl::UnconditionalBranch if direct => Flow::Jump,
        FlowControl::ConditionalBranch if direct => Flow::Branch,
        FlowControl::Return if matches!(decoded.code(), Code::Retnq | Code::Retnq_imm16) => {
            Flow::Return
        }
        _ if decoded.code() == Code::Endbr64 => Flow::Endbr,
        _ => Flow::Other,
    }
}

fn accessed_field(decoder: &Decoder<'_>, decoded: &Decoded) -> Option<u64> {
    let places = decoder.get_constant_offsets(decoded);
    let kinds = (0..decoded.op_count()).map(|operand| decoded.op_kind(operand));
    let has_memory = kinds.into_iter().any(|kind| kind == OpKind::Memory);
    let is_alone = decoded.is_ip_rel_memory_operand()
        || decoded.memory_base() == Register::None && decoded.memory_index() == Register::None;
    let is_access = has_memory && is_alone && decoded.mnemonic() != Mnemonic::Lea;
    (is_access && places.has_displacement())
        .then(|| decoded.ip() + places.displacement_offset() as u64)
}

fn relative_field(decoder: &Decoder<'_>, decoded: &Decoded) -> Option<RelativeField> {
    let places = decoder.get_constant_offsets(decoded);
    if decoded.op0_kind() == OpKind::NearBranch64 && places.has_immediate() {
        let size = u8::try_from(places.immediate_size()).ok()?;
        let offset = decoded.ip() + places.immediate_offset() as u64;
        let leads_to = decoded.near_branch64().cast_signed();
        return Some(RelativeField {
            offset,
            size,
            leads_to,
        });
    }
    if decoded.is_ip_rel_memory_operand() && places.has_displacement() {
        let size = u8::try_from(places.displacement_size()).ok()?;
        let offset = decoded.ip() + places.displacement_offset() as u64;
        let leads_to = decoded.ip_rel_memory_address().cast_signed();
        return Some(RelativeField {
            offset,
            size,
            leads_to,
        });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_and_relative_fields_are_seen() {
        // endbr64; call +0; lea 0x10(%rip),%rax; je +2; jmp *%rax; ret
        let bytes = [
            0xf3, 0x0f, 0x1e, 0xfa, 0xe8, 0, 0, 0, 0, 0x48, 0x8d, 0x05, 0x10, 0, 0, 0, 0x74, 2,
            0xff, 0xe0, 0xc3,
        ];
        let instructions = Instructions::decode(&bytes);
        let flows: Vec<_> = instructions.iter().map(|it| it.flow).collect();
        let wanted = [
            Flow::Endbr,
            Flow::Call,
            Flow::Other,
            Flow::Branch,
            Flow::Other,
            Flow::Return,
        ];
        assert_eq!(flows, wanted);
        let fields: Vec<_> = instructions.iter().filter_map(|it| it.relative).collect();
        let field = |offset, size, leads_to| RelativeField {
            offset,
            size,
            leads_to,
        };
        assert_eq!(
            fields,
            [field(5, 4, 9), field(12, 4, 0x20), field(17, 1, 20)]
        );
        assert_eq!(
            instructions.at(13).map(|it| (it.start, it.end)),
            Some((9, 16))
        );
        assert_eq!(instructions.at(21), None);
        assert_eq!(instructions.undecodable_at, None);
    }

    #[test]
    fn bytes_that_are_no_instruction_end_the_decoding() {
        // nop, then push %es, which long mode does not have.
        let instructions = Instructions::decode(&[0x90, 0x06, 0x90]);
        assert_eq!(instructions.undecodable_at, Some(1));
        assert_eq!(instructions.iter().count(), 1);
    }
}
