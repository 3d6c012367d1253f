//! Page walks: from a guest-virtual address and a page-table root to guest-physical memory.
//!
//! Tables are hostile: a walk reads at most five entries, whatever they hold, and a table may point to
//! itself or outside RAM without harm.

use std::cell::Cell;

use crate::address::{Gpa, Gva, PAGE_SIZE};
use crate::target::{MemoryError, PhysicalMemory};

/// Entry bits (Intel SDM vol. 3 section 4.5, tables 4-14 to 4-19).
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// Physical address bits of an entry. Bits 47 to 51 are left out: an AMD memory-encryption bit may
/// stand there (AMD APM vol. 2 section 7.10), and no machine of ours has RAM that high.
const FRAME: u64 = 0x0000_7fff_ffff_f000;

/// Bits of an address that one level of tables resolves.
const LEVEL_BITS: u32 = 9;
const ENTRY_SIZE: u64 = 8;

/// A page-table root and how deep it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// Guest-physical address of the top-level table.
    pub root: Gpa,
    /// Five levels instead of four (CR4.LA57).
    pub five_level: bool,
}

/// What one guest-virtual page maps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Where the address itself lies.
    pub at: Gpa,
    /// Bytes from there to the end of the page that maps it (4 KiB, 2 MiB or 1 GiB pages).
    pub left_in_page: u64,
    /// Size of that page in bytes.
    pub page_size: u64,
    /// Writable at every level.
    pub writable: bool,
    /// Executable at every level.
    pub executable: bool,
    /// Open to user mode at every level.
    pub user: bool,
}

impl AddressSpace {
    /// The tables that CR3 and CR4 name, without PCID and control bits.
    #[must_use]
    pub const fn of_registers(cr3: u64, cr4: u64) -> Self {
        Self {
            root: Gpa(cr3 & FRAME),
            five_level: cr4 & (1 << 12) != 0,
        }
    }

    /// Walks the tables for `at`. `Ok(None)` is "not mapped", also for non-canonical addresses and for
    /// entries with reserved bits that would fault.
    ///
    /// # Errors
    /// A table that lies outside guest RAM.
    pub fn translate(
        &self,
        memory: &dyn PhysicalMemory,
        at: Gva,
    ) -> Result<Option<Translation>, MemoryError> {
        if !self.canonical(at) {
            return Ok(None);
        }
        let mut table = self.root;
        let mut rights = PRESENT | WRITABLE | USER;
        let mut no_execute = 0;
        let mut level = if self.five_level { 5 } else { 4 };
        loop {
            let shift = 12 + LEVEL_BITS * (level - 1);
            let index = (at.0 >> shift) & ((1 << LEVEL_BITS) - 1);
            let entry = memory.read_u64(table.wrapping_add(index * ENTRY_SIZE))?;
            rights &= entry;
            no_execute |= entry & NO_EXECUTE;
            if rights & PRESENT == 0 {
                return Ok(None);
            }
            let leaf = level == 1 || entry & LARGE != 0;
            if leaf && level > 3 {
                return Ok(None);
            }
            if leaf {
                return Ok(Some(Translation::of_leaf(
                    entry, shift, at, rights, no_execute,
                )));
            }
            table = Gpa(entry & FRAME);
            level -= 1;
        }
    }

    /// Bytes from `at` to the next address that other entries of the top tables may map, where `at`
    /// itself is not mapped: how far a scan may skip. At least to the end of the 4 KiB page.
    ///
    /// # Errors
    /// A table that lies outside guest RAM.
    pub fn hole(&self, memory: &dyn PhysicalMemory, at: Gva) -> Result<u64, MemoryError> {
        let mut table = self.root;
        let mut level = if self.five_level { 5 } else { 4 };
        loop {
            let shift = 12 + LEVEL_BITS * (level - 1);
            let index = (at.0 >> shift) & ((1 << LEVEL_BITS) - 1);
            let entry = memory.read_u64(table.wrapping_add(index * ENTRY_SIZE))?;
            if level == 1 || entry & PRESENT == 0 || entry & LARGE != 0 {
                let size = 1_u64 << shift;
                return Ok(size - (at.0 & (size - 1)));
            }
            table = Gpa(entry & FRAME);
            level -= 1;
        }
    }

    /// Whether the upper bits repeat the sign bit (Intel SDM vol. 1 section 3.3.7.1).
    const fn canonical(&self, at: Gva) -> bool {
        let bits = if self.five_level { 57 } else { 48 };
        let spare = 64 - bits;
        ((at.0 << spare).cast_signed() >> spare).cast_unsigned() == at.0
    }
}

impl Translation {
    const fn of_leaf(entry: u64, shift: u32, at: Gva, rights: u64, no_execute: u64) -> Self {
        let page_size = 1_u64 << shift;
        let within = at.0 & (page_size - 1);
        Self {
            at: Gpa((entry & FRAME & !(page_size - 1)) | within),
            left_in_page: page_size - within,
            page_size,
            writable: rights & WRITABLE != 0,
            executable: no_execute == 0,
            user: rights & USER != 0,
        }
    }
}

/// Remembered translations of small and large pages: enough that a list walk over slab pages and a
/// stack does not walk the tables for each word.
const SMALL_SLOTS: usize = 64;
const LARGE_SLOTS: usize = 16;
const LARGE_PAGE: u64 = 2 << 20;
const NEVER: u64 = u64::MAX;

/// One remembered page: its virtual and its physical start.
#[derive(Clone, Copy)]
struct Remembered {
    page: u64,
    frame: u64,
}

/// Kernel-virtual memory: physical memory seen through the kernel's own page tables.
///
/// Translations are remembered for the life of the value, so make a new one for each stop and for
/// each look at a running guest.
#[derive(Clone)]
pub struct KernelMemory<'a> {
    /// What the walk reads.
    pub physical: &'a dyn PhysicalMemory,
    /// The kernel's tables.
    pub space: AddressSpace,
    small: [Cell<Remembered>; SMALL_SLOTS],
    large: [Cell<Remembered>; LARGE_SLOTS],
}

/// Why kernel-virtual memory could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No page maps the address.
    #[error("kernel address {0} is not mapped")]
    NotMapped(Gva),
    /// The page tables or the page lie outside RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl<'a> KernelMemory<'a> {
    /// `physical` seen through `space`, nothing remembered yet.
    #[must_use]
    pub fn new(physical: &'a dyn PhysicalMemory, space: AddressSpace) -> Self {
        let none = Remembered {
            page: NEVER,
            frame: 0,
        };
        Self {
            physical,
            space,
            small: std::array::from_fn(|_| Cell::new(none)),
            large: std::array::from_fn(|_| Cell::new(none)),
        }
    }

    /// Fills `into` from `at` on, page by page.
    ///
    /// # Errors
    /// [`ReadError`]; `into` is then unspecified.
    pub fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), ReadError> {
        let mut at = at;
        let mut rest = into;
        while !rest.is_empty() {
            let (frame, left) = self.locate(at)?;
            let now = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
            let (head, tail) = rest.split_at_mut(now);
            self.physical.read(frame, head)?;
            at = at.wrapping_add(now as u64);
            rest = tail;
        }
        Ok(())
    }

    /// Where `at` lies in guest-physical memory.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn physical_of(&self, at: Gva) -> Result<Gpa, ReadError> {
        self.locate(at).map(|(frame, _)| frame)
    }

    /// Guest-physical address of `at` and the bytes left in its page (or its 2 MiB piece of one).
    fn locate(&self, at: Gva) -> Result<(Gpa, u64), ReadError> {
        for (slots, size) in [(&self.large[..], LARGE_PAGE), (&self.small[..], PAGE_SIZE)] {
            let within = at.0 & (size - 1);
            let known = slot(slots, at, size).get();
            if known.page == at.0 - within {
                return Ok((Gpa(known.frame + within), size - within));
            }
        }
        let found = self
            .space
            .translate(self.physical, at)?
            .ok_or(ReadError::NotMapped(at))?;
        let (slots, size) = if found.page_size >= LARGE_PAGE {
            (&self.large[..], LARGE_PAGE)
        } else {
            (&self.small[..], PAGE_SIZE)
        };
        let within = at.0 & (size - 1);
        slot(slots, at, size).set(Remembered {
            page: at.0 - within,
            frame: found.at.0 - within,
        });
        Ok((found.at, size - within))
    }

    /// One byte.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_u8(&self, at: Gva) -> Result<u8, ReadError> {
        self.read_array(at).map(u8::from_le_bytes)
    }

    /// One little-endian 16-bit word.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_u16(&self, at: Gva) -> Result<u16, ReadError> {
        self.read_array(at).map(u16::from_le_bytes)
    }

    /// One little-endian 32-bit word.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_u32(&self, at: Gva) -> Result<u32, ReadError> {
        self.read_array(at).map(u32::from_le_bytes)
    }

    /// One little-endian 64-bit word.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_u64(&self, at: Gva) -> Result<u64, ReadError> {
        self.read_array(at).map(u64::from_le_bytes)
    }

    /// A pointer.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_pointer(&self, at: Gva) -> Result<Gva, ReadError> {
        self.read_u64(at).map(Gva)
    }

    /// `N` bytes.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_array<const N: usize>(&self, at: Gva) -> Result<[u8; N], ReadError> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// The bytes before the first zero, at most `limit` of them; what is not UTF-8 is replaced.
    ///
    /// # Errors
    /// As [`read`](Self::read), for a byte before the zero.
    pub fn read_string(&self, at: Gva, limit: usize) -> Result<String, ReadError> {
        let mut bytes = Vec::new();
        let mut at = at;
        while bytes.len() < limit {
            let left = usize::try_from(PAGE_SIZE - at.page_offset()).unwrap_or(1);
            let mut piece = vec![0; left.min(limit - bytes.len()).min(256)];
            self.read(at, &mut piece)?;
            let text = piece.split(|&byte| byte == 0).next().unwrap_or_default();
            bytes.extend_from_slice(text);
            if text.len() < piece.len() {
                break;
            }
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// The slot that may hold the page of `at`.
fn slot(slots: &[Cell<Remembered>], at: Gva, page_size: u64) -> &Cell<Remembered> {
    let index = usize::try_from(at.0 / page_size).unwrap_or(0) % slots.len();
    #[expect(
        clippy::indexing_slicing,
        reason = "index is taken modulo the length, never zero"
    )]
    &slots[index]
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::address::GpaRange;

    /// Tables written by hand: one word an entry, everything else zero, RAM to `top`.
    struct Words {
        words: HashMap<u64, u64>,
        top: u64,
    }

    impl PhysicalMemory for Words {
        fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
            if at
                .0
                .checked_add(into.len() as u64)
                .is_none_or(|end| end > self.top)
            {
                return Err(MemoryError::NotBacked {
                    at,
                    len: into.len(),
                });
            }
            for (offset, byte) in into.iter_mut().enumerate() {
                let place = at.0 + offset as u64;
                let word = self.words.get(&(place & !7)).copied().unwrap_or(0);
                *byte = word.to_le_bytes()[(place % 8) as usize];
            }
            Ok(())
        }

        fn ram(&self) -> Vec<GpaRange> {
            vec![GpaRange {
                start: Gpa(0),
                end: Gpa(self.top),
            }]
        }
    }

    fn words(entries: &[(u64, u64)]) -> Words {
        Words {
            words: entries.iter().copied().collect(),
            top: 0x10_0000,
        }
    }

    const FOUR: AddressSpace = AddressSpace {
        root: Gpa(0x1000),
        five_level: false,
    };
    /// Last entry of each level: the address ffff_ffff_ffff_f000.
    const LAST: u64 = 511 * 8;

    #[test]
    fn rights_are_those_of_the_strictest_level() {
        let memory = words(&[
            (0x1000 + LAST, 0x2007),
            (0x2000 + LAST, 0x3003),
            (0x3000 + LAST, NO_EXECUTE | 0x4007),
            (0x4000 + LAST, 0x5005),
        ]);
        let found = FOUR
            .translate(&memory, Gva(0xffff_ffff_ffff_f123))
            .unwrap()
            .unwrap();
        assert_eq!(
            (found.at, found.left_in_page),
            (Gpa(0x5123), 0x1000 - 0x123)
        );
        assert_eq!(
            (found.writable, found.executable, found.user),
            (false, false, false)
        );
    }

    #[test]
    fn a_large_page_keeps_the_low_21_bits() {
        let memory = words(&[
            (0x1000 + LAST, 0x2003),
            (0x2000 + 510 * 8, 0x3003),
            (0x3000 + 64 * 8, (1 << 12) | 0x80_0000 | LARGE | PRESENT),
        ]);
        let found = FOUR
            .translate(&memory, Gva(0xffff_ffff_8812_3456))
            .unwrap()
            .unwrap();
        assert_eq!(found.at, Gpa(0x92_3456));
        assert_eq!(found.page_size, LARGE_PAGE);
        assert!(found.executable && !found.writable);
    }

    #[test]
    fn five_levels_take_one_more_table() {
        let space = AddressSpace {
            root: Gpa(0x6000),
            five_level: true,
        };
        let mut entries = vec![(0x6000 + LAST, 0x1003)];
        entries.extend([
            (0x1000 + LAST, 0x2003),
            (0x2000 + LAST, (1 << 30) | LARGE | 1),
        ]);
        let found = space
            .translate(&words(&entries), Gva(u64::MAX))
            .unwrap()
            .unwrap();
        assert_eq!(found.at, Gpa(0x7fff_ffff));
        assert_eq!(found.page_size, 1 << 30);
    }

    #[test]
    fn an_encryption_bit_is_no_part_of_the_address() {
        let bit = 1 << 51;
        let memory = words(&[
            (0x1000 + LAST, bit | 0x2003),
            (0x2000 + LAST, bit | 0x3003),
            (0x3000 + LAST, bit | 0x4003),
            (0x4000 + LAST, bit | 0x5003),
        ]);
        let found = FOUR.translate(&memory, Gva(u64::MAX)).unwrap().unwrap();
        assert_eq!(found.at, Gpa(0x5fff));
    }

    #[test]
    fn a_table_that_holds_itself_ends_the_walk_after_four_levels() {
        let memory = words(&[(0x1000 + LAST, 0x1003)]);
        let found = FOUR.translate(&memory, Gva(u64::MAX)).unwrap().unwrap();
        assert_eq!(found.at, Gpa(0x1fff));
    }

    #[test]
    fn a_table_outside_ram_is_an_error_and_not_a_hole() {
        let memory = words(&[(0x1000 + LAST, 0x7fff_f003)]);
        assert!(FOUR.translate(&memory, Gva(u64::MAX)).is_err());
    }

    #[test]
    fn a_non_canonical_address_is_not_mapped() {
        let memory = words(&[(0x1000, 0x2003), (0x2000, LARGE | PRESENT)]);
        assert!(FOUR.translate(&memory, Gva(0x1000)).unwrap().is_some());
        assert!(
            FOUR.translate(&memory, Gva(1 << 48 | 0x1000))
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_read_over_two_pages_that_are_not_neighbours_joins_them() {
        let memory = words(&[
            (0x1000 + LAST, 0x2003),
            (0x2000 + LAST, 0x3003),
            (0x3000 + LAST, 0x4003),
            (0x4000 + LAST - 8, 0x9003),
            (0x4000 + LAST, 0x5003),
            (0x9ff8, 0x1122_3344_5566_7788),
            (0x5000, 0x99aa_bbcc_ddee_ff00),
        ]);
        let kernel = KernelMemory::new(&memory, FOUR);
        for _ in 0..2 {
            let word = kernel.read_u64(Gva(0xffff_ffff_ffff_effc)).unwrap();
            assert_eq!(word, 0xddee_ff00_1122_3344);
        }
        assert_eq!(
            kernel.read_u64(Gva(0xffff_ffff_ffff_dffc)),
            Err(ReadError::NotMapped(Gva(0xffff_ffff_ffff_dffc)))
        );
    }

    proptest! {
        #[test]
        fn hostile_tables_never_panic(
            entries in proptest::collection::vec((0_u64..0x2000, any::<u64>()), 0..64),
            at: u64,
            five_level: bool,
        ) {
            let entries: Vec<_> =
                entries.into_iter().map(|(place, word)| (place * 8, word & 0x8000_0000_000f_ffff)).collect();
            let memory = words(&entries);
            let space = AddressSpace { root: Gpa(0x1000), five_level };
            let _ = space.translate(&memory, Gva(at));
            let _ = space.hole(&memory, Gva(at));
            let _ = KernelMemory::new(&memory, space).read(Gva(at), &mut [0; 9000]);
        }
    }
}
