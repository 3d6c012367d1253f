//! ORC entries as stored, in each format that x86-64 kernels have had. All are 6 bytes: two 16-bit
//! offsets and a word of flags, whose bits changed twice and whose register numbers changed once:
//!
//! | format | since | 0–3 | 4–7 | 8 | 9 | 10 | 11 |
//! |---|---|---|---|---|---|---|---|
//! | [`Format::V4_14`] | 4.14 | sp | bp | type | type | end | |
//! | [`Format::V6_3`] | 6.3 | sp | bp | type | type | signal | end |
//! | [`Format::V6_4`] | 6.4 | sp | bp | type | type | type | signal |
//! | [`Format::V7_1`] | 7.1 | the same, registers renumbered | | | | | |

use super::entry::{Base, Entry, Kind};

/// Bytes of one stored entry.
pub const ENTRY_SIZE: usize = 6;

/// Bytes of the hash in `.orc_header` that names the format (Linux v6.12 `scripts/orc_hash.sh`).
pub const HEADER_SIZE: usize = 20;

/// Hash of the 6.3 format (Linux v6.3.10 `arch/x86/include/asm/orc_types.h`, by `orc_hash.sh`).
const HASH_6_3: [u8; HEADER_SIZE] = [
    0xdb, 0x84, 0xae, 0xd4, 0x10, 0x3b, 0x31, 0xdd, 0x51, 0xe0, 0x17, 0xf8, 0xf7, 0x97, 0x83, 0xca,
    0x98, 0x5c, 0x2c, 0x51,
];
/// Hash of the 6.4 format (Linux v6.12 `arch/x86/include/asm/orc_types.h`, by `orc_hash.sh`).
const HASH_6_4: [u8; HEADER_SIZE] = [
    0xfe, 0x5d, 0x32, 0xbf, 0x58, 0x1b, 0xd6, 0x3b, 0x2c, 0xa9, 0xa5, 0xc6, 0x5b, 0xa5, 0xa6, 0x25,
    0xea, 0xb3, 0xfe, 0x24,
];
/// Hash of the 7.1 format (Linux commit 1735858caa4b ("objtool/x86: Reorder ORC register numbering")
/// (in v7.1), as drgn lists it).
const HASH_7_1: [u8; HEADER_SIZE] = [
    0x13, 0x7c, 0x36, 0xad, 0x76, 0x27, 0xc4, 0xdd, 0x55, 0x93, 0x21, 0x76, 0xbb, 0x0e, 0xcd, 0xbd,
    0x50, 0x41, 0xfc, 0x82,
];

/// Register numbers up to 7.0 (Linux v6.12 `arch/x86/include/asm/orc_types.h`).
const REGISTERS_4_14: [Base; 16] = [
    Base::Undefined,
    Base::PreviousSp,
    Base::Dx,
    Base::Di,
    Base::Bp,
    Base::Sp,
    Base::R10,
    Base::R13,
    Base::BpIndirect,
    Base::SpIndirect,
    Base::Unknown,
    Base::Unknown,
    Base::Unknown,
    Base::Unknown,
    Base::Unknown,
    Base::Unknown,
];
/// Register numbers since 7.1 (Linux commit 1735858caa4b).
const REGISTERS_7_1: [Base; 16] = [
    Base::Undefined,
    Base::Ax,
    Base::Dx,
    Base::Sp,
    Base::Bp,
    Base::Di,
    Base::R10,
    Base::R13,
    Base::PreviousSp,
    Base::SpIndirect,
    Base::BpIndirect,
    Base::Unknown,
    Base::Unknown,
    Base::Unknown,
    Base::Unknown,
    Base::Unknown,
];

/// How entries are stored, by the first release that stored them so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Linux commit ee9f8fce9964 ("x86/unwind: Add the ORC unwinder") (in v4.14).
    V4_14,
    /// Linux commit ffb1b4a41016 ("x86/unwind/orc: Add 'signal' field to ORC metadata") (in v6.3).
    V6_3,
    /// Linux commit fb799447ae29 ("x86,objtool: Split UNWIND_HINT_EMPTY in two") (in v6.4).
    V6_4,
    /// Linux commit 1735858caa4b ("objtool/x86: Reorder ORC register numbering") (in v7.1).
    V7_1,
}

impl Format {
    /// The format that a `.orc_header` hash names; `None` for one that is not known.
    #[must_use]
    pub fn from_header(hash: &[u8; HEADER_SIZE]) -> Option<Self> {
        match *hash {
            HASH_6_3 => Some(Self::V6_3),
            HASH_6_4 => Some(Self::V6_4),
            HASH_7_1 => Some(Self::V7_1),
            _ => None,
        }
    }

    /// The format of a table without a header, which kernels up to 6.4 (and distributions that took
    /// over the newer format without it) have, and objects of every version. Read off the entries, nearly all of
    /// which are calls: stored as type 0 before 6.4, as type 2 since; and only 6.3 marks interrupt frames in
    /// bit 10. Nearly all count from rsp, which is register 5 up to 7.0, 3 since.
    #[must_use]
    pub fn from_entries(stored: &[u8]) -> Self {
        let (mut older, mut newer, mut marked) = (0_usize, 0_usize, 0_usize);
        let (mut five, mut three) = (0_usize, 0_usize);
        for entry in stored.as_chunks::<ENTRY_SIZE>().0 {
            let flags = u16::from_le_bytes([entry[4], entry[5]]);
            older += usize::from((flags >> 8) & 3 == 0 && flags & 0xf != 0);
            newer += usize::from((flags >> 8) & 7 == 2 && flags & 0xf != 0);
            marked += usize::from((flags >> 8) & 3 != 0 && flags & (1 << 10) != 0);
            five += usize::from(flags & 0xf == 5);
            three += usize::from(flags & 0xf == 3);
        }
        if newer > older && three > five {
            Self::V7_1
        } else if newer > older {
            Self::V6_4
        } else if marked > 0 {
            Self::V6_3
        } else {
            Self::V4_14
        }
    }

    /// One stored entry in the normal form.
    #[must_use]
    pub fn decode(self, stored: [u8; ENTRY_SIZE]) -> Entry {
        let [sp_low, sp_high, bp_low, bp_high, flags_low, flags_high] = stored;
        let flags = u16::from_le_bytes([flags_low, flags_high]);
        let sp = self.base(flags);
        let (kind, signal) = self.kind(flags, sp);
        Entry {
            sp_offset: i16::from_le_bytes([sp_low, sp_high]),
            bp_offset: i16::from_le_bytes([bp_low, bp_high]),
            sp,
            bp: self.base(flags >> 4),
            kind,
            signal,
        }
    }

    fn base(self, number: u16) -> Base {
        let registers = if self == Self::V7_1 {
            &REGISTERS_7_1
        } else {
            &REGISTERS_4_14
        };
        registers
            .get(usize::from(number & 0xf))
            .copied()
            .unwrap_or(Base::Unknown)
    }

    fn kind(self, flags: u16, sp: Base) -> (Kind, bool) {
        match self {
            Self::V4_14 => {
                let kind = old_kind(flags, sp, 10);
                (kind, matches!(kind, Kind::Regs | Kind::RegsPartial))
            }
            Self::V6_3 => (old_kind(flags, sp, 11), flags & (1 << 10) != 0),
            Self::V6_4 | Self::V7_1 => (new_kind(flags), flags & (1 << 11) != 0),
        }
    }
}

/// Before 6.4 an undefined stack pointer said "nothing known", or with the end bit "the end".
fn old_kind(flags: u16, sp: Base, end_bit: u16) -> Kind {
    if sp == Base::Undefined {
        return if flags & (1 << end_bit) != 0 {
            Kind::EndOfStack
        } else {
            Kind::Undefined
        };
    }
    match (flags >> 8) & 3 {
        0 => Kind::Call,
        1 => Kind::Regs,
        2 => Kind::RegsPartial,
        _ => Kind::Unknown,
    }
}

fn new_kind(flags: u16) -> Kind {
    match (flags >> 8) & 7 {
        0 => Kind::Undefined,
        1 => Kind::EndOfStack,
        2 => Kind::Call,
        3 => Kind::Regs,
        4 => Kind::RegsPartial,
        _ => Kind::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(sp_offset: i16, bp_offset: i16, flags: u16) -> [u8; ENTRY_SIZE] {
        let [a, b] = sp_offset.to_le_bytes();
        let [c, d] = bp_offset.to_le_bytes();
        let [e, f] = flags.to_le_bytes();
        [a, b, c, d, e, f]
    }

    #[test]
    fn a_call_frame_reads_the_same_in_every_format() {
        let call = Entry {
            sp_offset: 48,
            bp_offset: -48,
            sp: Base::Sp,
            bp: Base::PreviousSp,
            kind: Kind::Call,
            signal: false,
        };
        assert_eq!(Format::V4_14.decode(stored(48, -48, 0x0015)), call);
        assert_eq!(Format::V6_3.decode(stored(48, -48, 0x0015)), call);
        assert_eq!(Format::V6_4.decode(stored(48, -48, 0x0215)), call);
        assert_eq!(Format::V7_1.decode(stored(48, -48, 0x0283)), call);
    }

    #[test]
    fn an_interrupt_frame_is_marked_by_its_type_before_6_3_and_by_a_bit_since() {
        for (format, flags) in [
            (Format::V4_14, 0x0105),
            (Format::V6_3, 0x0505),
            (Format::V6_4, 0x0b05),
        ] {
            let entry = format.decode(stored(0, 0, flags));
            assert_eq!((entry.kind, entry.signal), (Kind::Regs, true), "{format:?}");
        }
        assert!(!Format::V6_4.decode(stored(0, 0, 0x0305)).signal);
    }

    #[test]
    fn the_end_and_the_unknown_are_told_apart_in_every_format() {
        assert_eq!(Format::V4_14.decode(stored(0, 0, 0)).kind, Kind::Undefined);
        assert_eq!(
            Format::V4_14.decode(stored(0, 0, 1 << 10)).kind,
            Kind::EndOfStack
        );
        assert_eq!(
            Format::V6_3.decode(stored(0, 0, 1 << 11)).kind,
            Kind::EndOfStack
        );
        assert_eq!(Format::V6_4.decode(stored(0, 0, 0)).kind, Kind::Undefined);
        assert_eq!(
            Format::V6_4.decode(stored(0, 0, 1 << 8)).kind,
            Kind::EndOfStack
        );
    }

    #[test]
    fn an_unknown_header_names_no_format() {
        assert_eq!(Format::from_header(&HASH_6_4), Some(Format::V6_4));
        assert_eq!(Format::from_header(&[0; HEADER_SIZE]), None);
    }

    #[test]
    fn a_table_without_header_tells_its_format_by_its_entries() {
        let table = |entries: &[u16]| {
            entries
                .iter()
                .flat_map(|&flags| stored(8, 0, flags))
                .collect::<Vec<u8>>()
        };
        assert_eq!(
            Format::from_entries(&table(&[0x05, 0x05, 0x105, 0x400])),
            Format::V4_14
        );
        assert_eq!(
            Format::from_entries(&table(&[0x05, 0x05, 0x505, 0x800])),
            Format::V6_3
        );
        assert_eq!(
            Format::from_entries(&table(&[0x205, 0x205, 0xb05, 0x100])),
            Format::V6_4
        );
        assert_eq!(
            Format::from_entries(&table(&[0x203, 0x203, 0x204, 0x100])),
            Format::V7_1
        );
    }
}
