//! The window as numbers: which guest-virtual page lies on which page of the slot, and the page-table
//! entries that say so. Reads the guest's upper tables to find where they hook in; writes nothing.

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::{AddressSpace, Gpa, GpaRange, Gva, GvaRange, PhysicalMemory};

use crate::patch::SectionKind;

/// First address of the window: what entry 504 of `level2_fixmap_pgt` maps. It lies between the modules
/// and the fixmap and belongs to no allocator (Linux v6.12 Documentation/arch/x86/x86_64/mm.rst).
pub const WINDOW_START: Gva = Gva(0xffff_ffff_ff00_0000);
/// Pages of the window: two level-2 entries of 512 each.
pub const WINDOW_PAGES: u32 = 1024;
/// Pages that one copy of the manifest may take.
pub const MANIFEST_PAGES: u32 = 16;
/// First of the two pages that hold the window's own page tables.
pub const TABLE_PAGE: u32 = 2 * MANIFEST_PAGES;
/// First page that extents may take.
pub const FIRST_PAGE: u32 = TABLE_PAGE + 2;

// Bits of a page-table entry: Intel SDM vol. 3 section 5.5.4, table 5-20.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Index of the window's first entry in the level-2 table.
const FIRST_ENTRY: u64 = 504;

/// The whole window.
#[must_use]
pub const fn window() -> GvaRange {
    GvaRange {
        start: WINDOW_START,
        end: WINDOW_START.wrapping_add(WINDOW_PAGES as u64 * PAGE_SIZE),
    }
}

/// Where a page of the window lies for the guest.
#[must_use]
pub const fn page_address(page: u32) -> Gva {
    WINDOW_START.wrapping_add(page as u64 * PAGE_SIZE)
}

/// Where a page of the slot lies in guest-physical memory.
#[must_use]
pub const fn page_frame(slot: GpaRange, page: u32) -> Gpa {
    slot.start.wrapping_add(page as u64 * PAGE_SIZE)
}

/// The page-table entry of one page. Accessed and dirty are set, so that the CPU never writes to the
/// table; the user bit never is. `global` only where the kernel's own text is global.
#[must_use]
pub const fn page_entry(frame: Gpa, kind: SectionKind, global: bool) -> u64 {
    let rights = match kind {
        SectionKind::Text => 0,
        SectionKind::ReadOnly => NO_EXECUTE,
        SectionKind::Data => NO_EXECUTE | WRITABLE,
    };
    let global = if global { GLOBAL } else { 0 };
    (frame.0 & ADDRESS) | PRESENT | ACCESSED | DIRTY | rights | global
}

/// What the two level-2 entries are to hold: the window's two page tables, as the kernel's own
/// `_KERNPG_TABLE` has it (Linux v6.12 arch/x86/include/asm/pgtable_types.h).
#[must_use]
pub fn level2_entries(slot: GpaRange) -> [u8; 16] {
    let entry = |page| (page_frame(slot, page).0 & ADDRESS) | PRESENT | WRITABLE | ACCESSED | DIRTY;
    let both = u128::from(entry(TABLE_PAGE)) | u128::from(entry(TABLE_PAGE + 1)) << 64;
    both.to_le_bytes()
}

/// Why the place for the window's tables was not found.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// The tables cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A level on the way is not a table.
    #[error("the guest's level-{level} page-table entry at {at} is {entry:#x}, which is no table")]
    NoTable {
        /// 5 to 3.
        level: u8,
        /// The entry.
        at: Gpa,
        /// What it holds.
        entry: u64,
    },
}

/// Where the two level-2 entries of the window lie, found from the kernel's top-level table: entry 511 at
/// every level above (`init_top_pgt`, `level4_kernel_pgt` with five levels, `level3_kernel_pgt`; Linux
/// v6.12 arch/x86/kernel/head_64.S).
///
/// # Errors
/// [`WindowError`].
pub fn find_level2(space: AddressSpace, memory: &dyn PhysicalMemory) -> Result<Gpa, WindowError> {
    let top = if space.five_level { 5 } else { 4 };
    let mut table = Gpa(space.root.0 & ADDRESS);
    for level in (3..=top).rev() {
        let at = table.wrapping_add(511 * 8);
        let entry = memory.read_u64(at)?;
        if entry & PRESENT == 0 || entry & LARGE != 0 {
            return Err(WindowError::NoTable { level, at, entry });
        }
        table = Gpa(entry & ADDRESS);
    }
    Ok(table.wrapping_add(FIRST_ENTRY * 8))
}

/// Whether the page that maps `at` is marked global, so that it survives a switch of address spaces.
///
/// # Errors
/// [`WindowError`].
pub fn is_global(
    space: AddressSpace,
    memory: &dyn PhysicalMemory,
    at: Gva,
) -> Result<bool, WindowError> {
    let top = if space.five_level { 5 } else { 4 };
    let mut table = Gpa(space.root.0 & ADDRESS);
    for level in (1..=top).rev() {
        let index = (at.0 >> (12 + 9 * (level - 1))) & 511;
        let place = table.wrapping_add(index * 8);
        let entry = memory.read_u64(place)?;
        if entry & PRESENT == 0 {
            return Err(WindowError::NoTable {
                level: level as u8,
                at: place,
                entry,
            });
        }
        if level == 1 || entry & LARGE != 0 {
            return Ok(entry & GLOBAL != 0);
        }
        table = Gpa(entry & ADDRESS);
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: GpaRange = GpaRange {
        start: Gpa(1 << 36),
        end: Gpa((1 << 36) + (4 << 20)),
    };

    #[test]
    fn the_window_is_what_level_two_entries_504_and_505_map() {
        // Level 2 maps 2 MiB an entry from ffffffffc0000000, where its table begins.
        let start = 0xffff_ffff_c000_0000_u64 + FIRST_ENTRY * (2 << 20);
        assert_eq!(window().start, Gva(start));
        assert_eq!(window().end, Gva(0xffff_ffff_ff40_0000));
    }

    #[test]
    fn text_is_not_writable_and_all_else_is_not_executable() {
        let frame = page_frame(SLOT, FIRST_PAGE);
        assert_eq!(
            page_entry(frame, SectionKind::Text, false),
            (1 << 36) + 0x22_061
        );
        assert_eq!(
            page_entry(frame, SectionKind::ReadOnly, true),
            (1 << 63) + (1 << 36) + 0x22_161
        );
        assert_eq!(
            page_entry(frame, SectionKind::Data, false),
            (1 << 63) + (1 << 36) + 0x22_063
        );
    }

    #[test]
    fn both_level_two_entries_are_kernel_tables_side_by_side() {
        let bytes = level2_entries(SLOT);
        assert_eq!(bytes[..8], ((1_u64 << 36) + 0x20_063).to_le_bytes());
        assert_eq!(bytes[8..], ((1_u64 << 36) + 0x21_063).to_le_bytes());
    }
}
