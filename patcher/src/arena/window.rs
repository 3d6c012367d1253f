//! The window as numbers: which guest-virtual page lies on which page of the slot, and the page-table
//! entries that say so. Reads the guest's upper tables to find where they hook in; writes nothing.

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::{AddressSpace, Gpa, GpaRange, Gva, GvaRange, PhysicalMemory};

use crate::patch::SectionKind;

/// First address of the window: what entry 504 of `level2_fixmap_pgt` maps. It lies between the modules
/// (`MODULES_END`, Linux v6.12 arch/x86/include/asm/pgtable_64_types.h) and the fixmap, whose early
/// mappings reach down into entry 505 on stock kernels, and belongs to no allocator.
pub const WINDOW_START: Gva = Gva(0xffff_ffff_ff00_0000);
/// Pages of the window: one level-2 entry of 512.
pub const WINDOW_PAGES: u32 = 512;
/// Pages that one copy of the manifest may take.
pub const MANIFEST_PAGES: u32 = 16;
/// The page of the slot that holds the window's page table.
const TABLE_PAGE: u32 = 2 * MANIFEST_PAGES;
/// The page of the slot that the window's first page lies on.
const FIRST_FRAME: u32 = 64;
/// Pages of the slot that are used.
const SLOT_PAGES: u32 = FIRST_FRAME + WINDOW_PAGES;

// Bits of a page-table entry: Intel SDM vol. 3 section 5.5.4, table 5-20.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Index of the window's entry in the level-2 table.
const LEVEL2_INDEX: u64 = 504;

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

/// Where a page of the window lies in guest-physical memory.
#[must_use]
pub const fn page_frame(slot: GpaRange, page: u32) -> Gpa {
    slot_page(slot, FIRST_FRAME + page)
}

/// Where a copy of the manifest lies: 0 or 1.
#[must_use]
pub const fn manifest_copy(slot: GpaRange, copy: u32) -> Gpa {
    slot_page(slot, copy * MANIFEST_PAGES)
}

/// Where the entry of a page lies in the window's own page table.
#[must_use]
pub const fn table_entry(slot: GpaRange, page: u32) -> Gpa {
    slot_page(slot, TABLE_PAGE).wrapping_add(page as u64 * 8)
}

const fn slot_page(slot: GpaRange, page: u32) -> Gpa {
    slot.start.wrapping_add(page as u64 * PAGE_SIZE)
}

/// Whether a slot can hold the arena: large enough, and within what a page-table entry can name.
#[must_use]
pub const fn fits(slot: GpaRange) -> bool {
    slot.size() >= SLOT_PAGES as u64 * PAGE_SIZE
        && slot.start.page_offset() == 0
        && slot.end.0 <= ADDRESS
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

/// What the level-2 entry is to hold: the window's own page table, as the kernel's `_KERNPG_TABLE` has it
/// (Linux v6.12 arch/x86/include/asm/pgtable_types.h).
#[must_use]
pub const fn level2_entry(slot: GpaRange) -> u64 {
    (slot_page(slot, TABLE_PAGE).0 & ADDRESS) | PRESENT | WRITABLE | ACCESSED | DIRTY
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

/// Where the level-2 entry of the window lies, found from the kernel's top-level table: entry 511 at
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
    Ok(table.wrapping_add(LEVEL2_INDEX * 8))
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
    fn the_window_is_what_level_two_entry_504_maps() {
        // Level 2 maps 2 MiB an entry from ffffffffc0000000, where its table begins.
        let start = 0xffff_ffff_c000_0000_u64 + LEVEL2_INDEX * (2 << 20);
        assert_eq!(window().start, Gva(start));
        assert_eq!(window().end, Gva(0xffff_ffff_ff20_0000));
    }

    #[test]
    fn text_is_not_writable_and_all_else_is_not_executable() {
        let frame = page_frame(SLOT, 2);
        assert_eq!(
            page_entry(frame, SectionKind::Text, false),
            (1 << 36) + 0x42_061
        );
        assert_eq!(
            page_entry(frame, SectionKind::ReadOnly, true),
            (1 << 63) + (1 << 36) + 0x42_161
        );
        assert_eq!(
            page_entry(frame, SectionKind::Data, false),
            (1 << 63) + (1 << 36) + 0x42_063
        );
    }

    #[test]
    fn the_level_two_entry_is_a_kernel_table_that_no_window_page_overlaps() {
        assert_eq!(level2_entry(SLOT), (1 << 36) + 0x20_063);
        assert!(table_entry(SLOT, WINDOW_PAGES) <= page_frame(SLOT, 0));
        assert!(page_frame(SLOT, WINDOW_PAGES) <= SLOT.end);
    }

    #[test]
    fn a_slot_that_is_too_small_or_out_of_reach_does_not_fit() {
        assert!(fits(SLOT));
        let small = GpaRange {
            start: SLOT.start,
            end: Gpa(SLOT.start.0 + (2 << 20)),
        };
        assert!(!fits(small));
        let far = GpaRange {
            start: Gpa(1 << 52),
            end: Gpa((1 << 52) + (4 << 20)),
        };
        assert!(!fits(far));
    }
}
