//! What the page tables map around a kernel address: the pieces of the kernel image, by their rights.
//! Knows nothing of symbols.

use crate::address::{Gva, GvaRange, PAGE_SIZE};
use crate::paging::{KernelMemory, ReadError};

/// The kernel image lies between these (Linux v6.12 arch/x86/include/asm/page_64_types.h:
/// __START_KERNEL_map, KERNEL_IMAGE_SIZE with KASLR).
const WINDOW: GvaRange = GvaRange {
    start: Gva(0xffff_ffff_8000_0000),
    end: Gva(0xffff_ffff_c000_0000),
};
/// A hole this wide ends the image: freed init memory may be unmapped inside it.
const WIDEST_HOLE: u64 = 32 << 20;

/// Pages in a row with the same rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) range: GvaRange,
    pub(crate) writable: bool,
    pub(crate) executable: bool,
}

/// The pieces of the image that `anchor`, an address of kernel text, belongs to: sorted, the first one
/// is text and begins where the image begins.
///
/// # Errors
/// `anchor` is not mapped, or a table lies outside RAM.
pub(crate) fn regions(memory: &KernelMemory<'_>, anchor: Gva) -> Result<Vec<Region>, ReadError> {
    let mut at = text_start(memory, anchor)?;
    let mut regions: Vec<Region> = Vec::new();
    let mut hole = 0;
    while WINDOW.contains(at) && hole < WIDEST_HOLE {
        let Some(page) = memory.space.translate(memory.physical, at)? else {
            let skip = memory.space.hole(memory.physical, at)?;
            hole += skip;
            at = at.wrapping_add(skip);
            continue;
        };
        hole = 0;
        let end = at.wrapping_add(page.left_in_page);
        match regions.last_mut() {
            Some(last)
                if last.range.end == at
                    && last.writable == page.writable
                    && last.executable == page.executable =>
            {
                last.range.end = end;
            }
            _ => regions.push(Region {
                range: GvaRange { start: at, end },
                writable: page.writable,
                executable: page.executable,
            }),
        }
        at = end;
    }
    Ok(regions)
}

/// Goes down from `anchor` as long as executable pages follow on each other.
fn text_start(memory: &KernelMemory<'_>, anchor: Gva) -> Result<Gva, ReadError> {
    if !WINDOW.contains(anchor) {
        return Err(ReadError::NotMapped(anchor));
    }
    let mut start = None;
    let mut at = anchor;
    while WINDOW.contains(at) {
        match memory.space.translate(memory.physical, at)? {
            Some(page) if page.executable => {
                let page_start = at.0 & !(page.page_size - 1);
                start = Some(Gva(page_start));
                at = Gva(page_start.wrapping_sub(PAGE_SIZE));
            }
            _ => break,
        }
    }
    start.ok_or(ReadError::NotMapped(anchor))
}
