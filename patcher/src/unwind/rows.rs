//! Rows of unwind data as bytes in the arena, where they lie among a patch's constants. Owns the layout and what of it is
//! believed: a guest can write there.
//!
//! ```text
//!  0  4  distance from the start of the window, little-endian as all numbers here
//!  4  2  offset of the stack pointer
//!  6  2  offset of the frame pointer
//!  8  1  what the stack pointer is counted from, by its place in BASES
//!  9  1  the same for the frame pointer
//! 10  1  0 nothing known from here on, 1 a call
//! 11  1  zero
//! ```

use serde::{Deserialize, Serialize};

use vmpatch_introspect::Gva;
use vmpatch_introspect::unwind::orc::{Base, Entry, Kind};

use super::is_of_function;
use crate::arena::window::{WINDOW_START, window};

/// Bytes of a row.
pub const ROW: usize = 12;
/// More rows than the whole arena could hold.
pub const MAX_ROWS: u32 = (4 << 20) / ROW as u32;

const BASES: [Base; 11] = [
    Base::Undefined,
    Base::PreviousSp,
    Base::Ax,
    Base::Dx,
    Base::Di,
    Base::Bp,
    Base::Sp,
    Base::R10,
    Base::R13,
    Base::BpIndirect,
    Base::SpIndirect,
];

/// What holds from an address on.
pub type Row = (Gva, Entry);

/// The rows of a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rows {
    /// Where the first of them lies.
    pub at: Gva,
    /// How many there are.
    pub count: u32,
    /// CRC-32 (IEEE) of their bytes.
    pub crc: u32,
}

impl Rows {
    /// What a manifest says of these bytes at that place.
    #[must_use]
    pub fn of(at: Gva, bytes: &[u8]) -> Self {
        Self {
            at,
            count: (bytes.len() / ROW) as u32,
            crc: crc32fast::hash(bytes),
        }
    }

    /// Their size in bytes; `None` for more than there can be.
    #[must_use]
    pub const fn size(&self) -> Option<usize> {
        if self.count > MAX_ROWS {
            return None;
        }
        Some(self.count as usize * ROW)
    }

    /// Reads them; `None` if these are not the bytes that were written, or cannot be rows.
    #[must_use]
    pub fn decode(&self, bytes: &[u8]) -> Option<Vec<Row>> {
        let whole = Some(bytes.len()) == self.size() && crc32fast::hash(bytes) == self.crc;
        let (stored, _) = bytes.as_chunks::<ROW>();
        whole.then(|| stored.iter().map(read).collect())?
    }
}

/// The bytes of rows; none of those that lie outside of the window or are of no kind that functions have.
#[must_use]
pub fn encode(rows: &[Row]) -> Vec<u8> {
    rows.iter().filter_map(write).flatten().collect()
}

fn write((at, entry): &Row) -> Option<[u8; ROW]> {
    let [a, b, c, d] = u32::try_from(at.0.checked_sub(WINDOW_START.0)?)
        .ok()?
        .to_le_bytes();
    let base = |wanted| BASES.iter().position(|it| *it == wanted);
    let (sp, bp) = (base(entry.sp)?, base(entry.bp)?);
    let [e, f] = entry.sp_offset.to_le_bytes();
    let [g, h] = entry.bp_offset.to_le_bytes();
    let kind = u8::from(entry.kind == Kind::Call);
    is_of_function(entry).then_some([a, b, c, d, e, f, g, h, sp as u8, bp as u8, kind, 0])
}

fn read(&[a, b, c, d, e, f, g, h, sp, bp, kind, zero]: &[u8; ROW]) -> Option<Row> {
    let at = WINDOW_START.checked_add(u64::from(u32::from_le_bytes([a, b, c, d])))?;
    let base = |number: u8| BASES.get(usize::from(number)).copied();
    let entry = Entry {
        sp_offset: i16::from_le_bytes([e, f]),
        bp_offset: i16::from_le_bytes([g, h]),
        sp: base(sp)?,
        bp: base(bp)?,
        kind: match kind {
            0 => Kind::Undefined,
            1 => Kind::Call,
            _ => return None,
        },
        signal: false,
    };
    let possible = zero == 0 && at <= window().end && is_of_function(&entry);
    possible.then_some((at, entry))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AT: Gva = Gva(0xffff_ffff_ff00_4010);

    fn rows() -> Vec<Row> {
        let pushed = Entry {
            sp_offset: 24,
            bp_offset: -16,
            bp: Base::PreviousSp,
            ..Entry::FUNCTION_START
        };
        vec![
            (AT, Entry::FUNCTION_START),
            (AT.wrapping_add(1), pushed),
            (window().end, Entry::UNDEFINED),
        ]
    }

    #[test]
    fn rows_come_back_as_they_were() {
        let bytes = encode(&rows());
        let place = Rows::of(AT, &bytes);
        assert_eq!((place.count, bytes.len()), (3, 36));
        assert_eq!(place.decode(&bytes), Some(rows()));
    }

    #[test]
    fn bytes_that_are_not_those_written_are_no_rows() {
        let bytes = encode(&rows());
        let place = Rows::of(AT, &bytes);
        let mut changed = bytes.clone();
        changed[4] ^= 1;
        assert_eq!(place.decode(&changed), None);
        assert_eq!(place.decode(&bytes[..24]), None);
        let endless = Rows {
            count: u32::MAX,
            ..place
        };
        assert_eq!(endless.decode(&bytes), None);
    }

    #[test]
    fn what_no_function_has_is_no_row_though_it_has_the_right_checksum() {
        for (at, value) in [(3, 0x7f), (8, 0), (8, 11), (9, 6), (10, 2), (11, 1)] {
            let mut bytes = encode(&rows());
            bytes[at] = value;
            assert_eq!(Rows::of(AT, &bytes).decode(&bytes), None, "{at}: {value}");
        }
        let end = Entry {
            kind: Kind::EndOfStack,
            ..Entry::UNDEFINED
        };
        assert!(encode(&[(AT, end)]).is_empty());
        assert!(encode(&[(Gva(0), Entry::UNDEFINED)]).is_empty());
    }

    proptest! {
        #[test]
        fn whatever_is_read_could_have_been_written(bytes in proptest::collection::vec(0_u8..2, 0..60)) {
            let place = Rows::of(AT, &bytes);
            if let Some(rows) = place.decode(&bytes) {
                prop_assert_eq!(encode(&rows), bytes);
            }
        }
    }
}
