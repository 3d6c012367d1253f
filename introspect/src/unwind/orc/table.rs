//! One ORC table, sorted by address, with an index like the kernel's own `orc_lookup` so that a look-up
//! inside a stop costs a few memory accesses.

use super::entry::Entry;
use super::raw::{ENTRY_SIZE, Format};

/// Bytes of text that one index block covers (Linux v6.12 `arch/x86/include/asm/orc_lookup.h`).
const BLOCK_ORDER: u32 = 8;

/// More entries than any kernel has (Debian's 6.12 has 422,000): bounds what a hostile guest makes us
/// hold.
pub const MAX_ENTRIES: usize = 1 << 22;

/// Addresses of one table must lie this close together, in bytes. Bounds the index.
const MAX_SPAN: u64 = 1 << 28;

/// Why a table is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// No entry at all.
    #[error("the table is empty")]
    Empty,
    /// More entries than any kernel has.
    #[error("{0} entries are more than any kernel has")]
    TooLarge(usize),
    /// The two tables differ in length.
    #[error("{ips} addresses but {entries} entries")]
    Uneven {
        /// Addresses.
        ips: usize,
        /// Entries.
        entries: usize,
    },
    /// Addresses go down.
    #[error("not sorted at entry {0}")]
    Unsorted(usize),
    /// Addresses lie further apart than any text is long.
    #[error("the addresses span {0:#x} bytes")]
    TooWide(u64),
}

/// Entries by address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    start: u64,
    /// Offsets from `start`, ascending.
    offsets: Vec<u32>,
    entries: Vec<Entry>,
    /// For each block of text the last entry that begins at or before the block does.
    blocks: Vec<u32>,
}

impl Table {
    /// Decodes a table. `ips` are addresses, ascending; `stored` holds 6 bytes for each.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn new(format: Format, ips: &[u64], stored: &[u8]) -> Result<Self, TableError> {
        let stored = stored.as_chunks::<ENTRY_SIZE>().0;
        if stored.len() > MAX_ENTRIES {
            return Err(TableError::TooLarge(stored.len()));
        }
        let entries = stored.iter().map(|&bytes| format.decode(bytes)).collect();
        Self::of(ips, entries)
    }

    /// A table of entries that are decoded already. `ips` are addresses, ascending, one for each.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn of(ips: &[u64], entries: Vec<Entry>) -> Result<Self, TableError> {
        let (ips_len, len) = (ips.len(), entries.len());
        if ips_len > MAX_ENTRIES {
            return Err(TableError::TooLarge(ips_len));
        }
        if ips_len != len {
            return Err(TableError::Uneven {
                ips: ips_len,
                entries: len,
            });
        }
        let start = *ips.first().ok_or(TableError::Empty)?;
        let offsets = offsets(start, ips)?;
        let blocks = index(&offsets);
        Ok(Self {
            start,
            offsets,
            entries,
            blocks,
        })
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none. Never so: such a table cannot be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entry that holds at `ip`: the last of those that begin at or before it. `None` below the first.
    #[must_use]
    pub fn find(&self, ip: u64) -> Option<Entry> {
        let offset = u32::try_from(ip.checked_sub(self.start)?).unwrap_or(u32::MAX);
        let block = (offset >> BLOCK_ORDER) as usize;
        let last = self.offsets.len() - 1;
        let low = self.blocks.get(block).map_or(last, |&at| at as usize);
        let high = self.blocks.get(block + 1).map_or(last, |&at| at as usize);
        let within = self
            .offsets
            .get(low..=high)?
            .partition_point(|&begin| begin <= offset);
        self.entries.get(low + within.checked_sub(1)?).copied()
    }
}

fn offsets(start: u64, ips: &[u64]) -> Result<Vec<u32>, TableError> {
    let mut offsets = Vec::with_capacity(ips.len());
    let mut before = start;
    for (at, &ip) in ips.iter().enumerate() {
        if ip < before {
            return Err(TableError::Unsorted(at));
        }
        before = ip;
        let offset = ip - start;
        match u32::try_from(offset) {
            Ok(small) if offset < MAX_SPAN => offsets.push(small),
            _ => return Err(TableError::TooWide(offset)),
        }
    }
    Ok(offsets)
}

/// For each block from the first entry on: the last entry at or before the block's first byte.
fn index(offsets: &[u32]) -> Vec<u32> {
    let count = offsets
        .last()
        .map_or(0, |&end| (end >> BLOCK_ORDER) as usize + 1);
    let mut blocks = Vec::with_capacity(count);
    let mut entry = 0_u32;
    for block in 0..count {
        let begin = (block << BLOCK_ORDER) as u64;
        while offsets
            .get(entry as usize + 1)
            .is_some_and(|&next| u64::from(next) <= begin)
        {
            entry += 1;
        }
        blocks.push(entry);
    }
    blocks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: u64 = 0xffff_ffff_8100_0000;

    /// Entries that tell themselves apart by their offset.
    fn numbered(count: usize) -> Vec<u8> {
        (0..count)
            .flat_map(|i| [(i & 0xff) as u8, (i >> 8) as u8, 0, 0, 0x05, 0x02])
            .collect()
    }

    fn naive(ips: &[u64], ip: u64) -> Option<i16> {
        ips.iter()
            .rposition(|&begin| begin <= ip)
            .map(|at| at as i16)
    }

    #[test]
    fn of_two_entries_at_one_address_the_later_one_holds() {
        let table = Table::new(
            Format::V6_4,
            &[TEXT, TEXT + 16, TEXT + 16, TEXT + 32],
            &numbered(4),
        );
        let found = table.unwrap().find(TEXT + 20).unwrap();
        assert_eq!(found.sp_offset, 2);
    }

    #[test]
    fn an_address_below_the_table_has_no_entry() {
        let table = Table::new(Format::V6_4, &[TEXT], &numbered(1)).unwrap();
        assert_eq!(table.find(TEXT - 1), None);
        assert!(table.find(u64::MAX).is_some());
    }

    #[test]
    fn what_is_not_a_table_is_refused() {
        let new = |ips: &[u64], count| Table::new(Format::V6_4, ips, &numbered(count)).unwrap_err();
        assert_eq!(new(&[], 0), TableError::Empty);
        assert_eq!(new(&[TEXT], 2), TableError::Uneven { ips: 1, entries: 2 });
        assert_eq!(new(&[TEXT, TEXT - 1], 2), TableError::Unsorted(1));
        assert_eq!(new(&[0, TEXT], 2), TableError::TooWide(TEXT));
    }

    proptest! {
        #[test]
        fn the_index_finds_what_a_plain_search_finds(
            gaps in proptest::collection::vec(0_u64..700, 1..200),
            probes in proptest::collection::vec(0_u64..100_000, 1..50),
        ) {
            let mut at = TEXT;
            let ips: Vec<u64> = gaps.iter().map(|gap| { at += gap; at }).collect();
            let table = Table::new(Format::V6_4, &ips, &numbered(ips.len())).unwrap();
            for probe in probes {
                let found = table.find(TEXT + probe).map(|entry| entry.sp_offset);
                prop_assert_eq!(found, naive(&ips, TEXT + probe));
            }
        }
    }
}
