//! The first pages of the window, which belong to no patch: code through which the guest's own look-ups reach
//! what patches bring, and directories of what that is. Owns where everything lies there and which bytes bring a
//! patch in; what the code does is the linker's.
//!
//! ```text
//!   page 0   stubs, one slot for each kind of table      r-x
//!   page 1   directory of bug tables                     r--
//!   page 2   directory of exception tables               r--
//!   page 3   root of all shadow data                     rw-
//!   4 to 11  the stage of a call (super::stage)
//! ```
//!
//! A directory has a word for each page of the window: the address of the table of the patch whose text lies on
//! that page, or 0. A table is a row of entries in the kernel's own format and ends with an entry of zeroes. What
//! is entered stays: code of a patch that was rolled back may still run. The root of the shadow data is for new code alone
//! (`include/vmpatch/shadow.h` says what it holds): zeroes when the window is mapped, not written since from here.

use serde::{Deserialize, Serialize};

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::{Gpa, GpaRange, Gva};

use super::manifest::Extent;
use super::window::{WINDOW_PAGES, page_address, page_frame};
use super::{ArenaWrite, stage};
use crate::patch::SectionKind;

/// How many pages are fixed.
pub const FIXED_PAGES: u32 = stage::END_PAGE;
/// Most bytes of a stub.
pub const STUB: usize = 256;
/// Bytes of an entry of either table, and of the zeroes at its end.
pub const ENTRY: usize = 12;
/// The page of all stubs.
const STUBS: u32 = 0;
/// The page of the root of the shadow data.
const ROOT: u32 = 3;
/// Where that lies.
pub const SHADOW_ROOT: Gva = page_address(ROOT);

/// A table that the kernel looks up when a CPU traps, and that patches extend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Table {
    /// `__bug_table`: WARN and BUG.
    Bugs,
    /// `__ex_table`: accesses that may fault.
    Faults,
}

impl Table {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Bugs, Self::Faults];

    const fn index(self) -> u32 {
        match self {
            Self::Bugs => 0,
            Self::Faults => 1,
        }
    }

    const fn directory_page(self) -> u32 {
        1 + self.index()
    }

    const fn stub_offset(self) -> u64 {
        self.index() as u64 * STUB as u64
    }

    /// Where its stub lies.
    #[must_use]
    pub const fn stub(self) -> Gva {
        page_address(STUBS).wrapping_add(self.stub_offset())
    }

    /// Where its directory lies.
    #[must_use]
    pub const fn directory(self) -> Gva {
        page_address(self.directory_page())
    }
}

/// What a patch brings into the fixed pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fixtures {
    /// Stubs that are not there yet.
    pub stubs: Vec<(Table, Vec<u8>)>,
    /// Where its tables lie.
    pub tables: Vec<(Table, Gva)>,
}

/// The fixed pages as extents, so that they are mapped like all others.
#[must_use]
pub const fn extents() -> [Extent; 7] {
    let text = Extent {
        page: STUBS,
        pages: 1,
        kind: SectionKind::Text,
    };
    let directories = Extent {
        page: 1,
        pages: Table::ALL.len() as u32,
        kind: SectionKind::ReadOnly,
    };
    let root = Extent {
        page: ROOT,
        pages: 1,
        kind: SectionKind::Data,
    };
    let [gates, idt, tables, stack] = stage::EXTENTS;
    [text, directories, root, gates, idt, tables, stack]
}

/// Where the slot holds a stub.
#[must_use]
pub const fn stub_place(slot: GpaRange, table: Table) -> Gpa {
    page_frame(slot, STUBS).wrapping_add(table.stub_offset())
}

/// What brings a patch with these extents in. Before the window is mapped the pages are written whole, over what
/// an earlier boot may have left.
#[must_use]
pub fn writes(
    slot: GpaRange,
    mapped: bool,
    extents: &[Extent],
    fixtures: &Fixtures,
) -> Vec<ArenaWrite> {
    if mapped {
        let stubs = fixtures.stubs.iter().map(|it| stub_write(slot, it));
        let rows = fixtures.tables.iter().flat_map(|table| {
            let text = extents
                .iter()
                .filter(|extent| extent.kind == SectionKind::Text);
            text.map(|extent| directory_rows(slot, *table, *extent))
        });
        return stubs.chain(rows).collect();
    }
    let mut pages = vec![ArenaWrite {
        at: page_frame(slot, STUBS),
        bytes: stub_page(&fixtures.stubs),
    }];
    pages.extend(Table::ALL.map(|table| ArenaWrite {
        at: page_frame(slot, table.directory_page()),
        bytes: directory_page(table, extents, fixtures),
    }));
    pages.push(ArenaWrite {
        at: page_frame(slot, ROOT),
        bytes: vec![0; PAGE_SIZE as usize],
    });
    pages.extend(stage::writes(slot));
    pages
}

fn stub_write(slot: GpaRange, (table, code): &(Table, Vec<u8>)) -> ArenaWrite {
    let mut bytes = code.clone();
    bytes.resize(STUB, 0xcc);
    let at = stub_place(slot, *table);
    ArenaWrite { at, bytes }
}

fn directory_rows(slot: GpaRange, (table, place): (Table, Gva), extent: Extent) -> ArenaWrite {
    let directory = page_frame(slot, table.directory_page());
    ArenaWrite {
        at: directory.wrapping_add(u64::from(extent.page) * 8),
        bytes: place.0.to_le_bytes().repeat(extent.pages as usize),
    }
}

fn stub_page(stubs: &[(Table, Vec<u8>)]) -> Vec<u8> {
    let mut page = vec![0xcc; PAGE_SIZE as usize];
    for (table, code) in stubs {
        put(&mut page, table.stub_offset() as usize, code);
    }
    page
}

fn directory_page(table: Table, extents: &[Extent], fixtures: &Fixtures) -> Vec<u8> {
    let mut page = vec![0; WINDOW_PAGES as usize * 8];
    let places = fixtures.tables.iter().filter(|(it, _)| *it == table);
    for (_, place) in places {
        for extent in extents.iter().filter(|it| it.kind == SectionKind::Text) {
            let row = place.0.to_le_bytes().repeat(extent.pages as usize);
            put(&mut page, extent.page as usize * 8, &row);
        }
    }
    page
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(into) = page.get_mut(at..at + bytes.len()) {
        into.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: GpaRange = GpaRange {
        start: Gpa(1 << 36),
        end: Gpa((1 << 36) + (4 << 20)),
    };
    const PLACE: Gva = Gva(0xffff_ffff_ff00_7010);

    fn fixtures() -> Fixtures {
        Fixtures {
            stubs: vec![(Table::Faults, vec![0x90; 3])],
            tables: vec![(Table::Faults, PLACE)],
        }
    }

    fn text(page: u32, pages: u32) -> [Extent; 2] {
        let extent = |page, pages, kind| Extent { page, pages, kind };
        [
            extent(page, pages, SectionKind::Text),
            extent(page + pages, 1, SectionKind::Data),
        ]
    }

    #[test]
    fn before_the_window_is_mapped_stubs_and_directories_are_written_whole_and_the_stage_is_set() {
        let written = writes(SLOT, false, &text(5, 2), &fixtures());
        let (whole, staged) = written.split_at(4);
        assert_eq!(staged, stage::writes(SLOT));
        for (page, write) in (0..).zip(whole) {
            assert_eq!(write.at, page_frame(SLOT, page));
            assert_eq!(write.bytes.len(), 4096);
        }
        let stub = (Table::Faults.stub().0 - page_address(0).0) as usize;
        assert_eq!(
            written[0].bytes[stub - 1..stub + 4],
            [0xcc, 0x90, 0x90, 0x90, 0xcc]
        );
        assert!(written[1].bytes.iter().all(|byte| *byte == 0));
        let words = written[2].bytes.as_chunks::<8>().0;
        for (page, word) in words.iter().enumerate() {
            let is_text = (5..7).contains(&page);
            let wanted = if is_text { PLACE.0 } else { 0 };
            assert_eq!(u64::from_le_bytes(*word), wanted, "page {page}");
        }
    }

    #[test]
    fn the_root_of_shadow_data_is_zeroed_for_a_new_boot_and_writable() {
        let written = writes(SLOT, false, &text(5, 2), &fixtures());
        let root = &written[3];
        assert_eq!(root.bytes, [0; 4096]);
        let extent = extents()[2];
        assert_eq!(root.at, page_frame(SLOT, extent.page));
        assert_eq!(page_address(extent.page), SHADOW_ROOT);
        assert_eq!((extent.kind, extent.pages), (SectionKind::Data, 1));
    }

    #[test]
    fn once_it_is_mapped_only_what_is_new_is_written() {
        let written = writes(SLOT, true, &text(5, 2), &fixtures());
        let whole = writes(SLOT, false, &text(5, 2), &fixtures());
        assert_eq!(written.len(), 2);
        assert_eq!((written[0].bytes.len(), written[1].bytes.len()), (STUB, 16));
        for write in &written {
            let page = whole.iter().rev().find(|page| page.at <= write.at).unwrap();
            let from = (write.at.0 - page.at.0) as usize;
            assert_eq!(page.bytes[from..from + write.bytes.len()], write.bytes);
        }
        assert!(writes(SLOT, true, &text(5, 2), &Fixtures::default()).is_empty());
    }
}
