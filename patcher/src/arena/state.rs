//! The arena of one boot as it is now: mapped or not yet, and what it holds. Hands out pages, and turns a
//! new patch into the bytes and edits that bring it in. Writes nothing itself.

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::target::{Edit, MemoryError};
use vmpatch_introspect::{Gpa, GpaRange, Gva, Kernel, PhysicalMemory};

use super::fixed::{self, Fixtures, Table};
use super::manifest::{Extent, Manifest, ManifestError, PatchRecord};
use super::window::{self, WINDOW_PAGES, WindowError};
use super::{ArenaWrite, MapEdits, codec};
use crate::patch::SectionKind;

/// The arena of one boot.
#[derive(Clone, Debug)]
pub struct Arena {
    slot: GpaRange,
    level2: Gpa,
    mapped: bool,
    manifest: Manifest,
}

/// Why the arena cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The place where it hooks into the guest's tables was not found.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// Its manifest cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The slot or the tables cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The slot is smaller than the window or reaches beyond what a page-table entry can name.
    #[error("the hypervisor's arena slot {0} does not fit the window")]
    Slot(GpaRange),
    /// Somebody else uses the window's level-2 entry.
    #[error("the guest already uses the arena's page-table entry at {at}: {found:#x}")]
    Occupied {
        /// The entry.
        at: Gpa,
        /// What it holds.
        found: u64,
    },
    /// The window is mapped, but the manifest is of another boot or missing.
    #[error("the guest maps the arena, but its manifest is {0}")]
    Stale(&'static str),
    /// No pages are left: text is never used again within one boot.
    #[error(
        "the arena has {left} of {WINDOW_PAGES} pages left, {wanted} are needed; a reboot frees it"
    )]
    Full {
        /// Pages needed.
        wanted: u64,
        /// Pages left.
        left: u32,
    },
}

/// What brings a patch into the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// While the guest runs, in this order.
    pub writes: Vec<ArenaWrite>,
    /// In the stop.
    pub map: MapEdits,
}

impl Arena {
    /// Reads the state of the arena. What an earlier boot left in the slot counts only as rubbish to be
    /// written over: nothing maps it.
    ///
    /// # Errors
    /// [`ArenaError`].
    pub fn open(
        kernel: &Kernel,
        memory: &dyn PhysicalMemory,
        slot: GpaRange,
    ) -> Result<Self, ArenaError> {
        if !window::fits(slot) {
            return Err(ArenaError::Slot(slot));
        }
        let level2 = window::find_level2(kernel.layout.space, memory)?;
        let found = memory.read_u64(level2)?;
        let mapped = found == window::level2_entry(slot);
        if !mapped && found != 0 {
            return Err(ArenaError::Occupied { at: level2, found });
        }
        let manifest = current_manifest(memory, slot, &kernel.identity.boot, mapped)?;
        Ok(Self {
            slot,
            level2,
            mapped,
            manifest,
        })
    }

    /// What the arena holds.
    #[must_use]
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Whether the guest maps the window already.
    #[must_use]
    pub const fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// Pages for so many bytes of each kind, in the order given. Nothing is taken until
    /// [`admit`](Self::admit).
    ///
    /// # Errors
    /// [`ArenaError::Full`].
    pub fn place(&self, wanted: &[(SectionKind, u64)]) -> Result<Vec<Extent>, ArenaError> {
        let mut next = u64::from(self.manifest.next_page);
        let mut extents = Vec::with_capacity(wanted.len());
        for &(kind, bytes) in wanted {
            let pages = bytes.div_ceil(PAGE_SIZE);
            let end = next.saturating_add(pages);
            let (Ok(page), Ok(count)) = (u32::try_from(next), u32::try_from(pages)) else {
                return Err(self.full(end));
            };
            if end > u64::from(WINDOW_PAGES) {
                return Err(self.full(end));
            }
            extents.push(Extent {
                page,
                pages: count,
                kind,
            });
            next = end;
        }
        Ok(extents)
    }

    fn full(&self, end: u64) -> ArenaError {
        let next = self.manifest.next_page;
        ArenaError::Full {
            wanted: end.saturating_sub(u64::from(next)),
            left: WINDOW_PAGES.saturating_sub(next),
        }
    }

    /// Takes in a patch: `contents` are the bytes of the record's extents, in the same order. The
    /// manifest is written first, so that no later patch is ever given the same pages; then the bytes and the
    /// fixtures, then the entries that map them, `global` only where the kernel's own text is.
    ///
    /// # Errors
    /// [`ManifestError`] where the manifest would grow beyond its pages.
    pub fn admit(
        &self,
        record: &PatchRecord,
        contents: &[Vec<u8>],
        fixtures: &Fixtures,
        global: bool,
    ) -> Result<Arrival, ArenaError> {
        let mut writes = Vec::new();
        if !self.manifest.patches.contains(record) {
            writes.push(self.manifest_with(record)?);
        }
        for (extent, bytes) in record.extents.iter().zip(contents) {
            let at = window::page_frame(self.slot, extent.page);
            writes.push(ArenaWrite {
                at,
                bytes: padded(bytes, *extent),
            });
        }
        writes.extend(fixed::writes(
            self.slot,
            self.mapped,
            &record.extents,
            fixtures,
        ));
        writes.extend(self.table_writes(&record.extents, global));
        Ok(Arrival {
            writes,
            map: self.map_edits(),
        })
    }

    fn manifest_with(&self, record: &PatchRecord) -> Result<ArenaWrite, ArenaError> {
        let mut next = self.manifest.clone();
        next.generation = next.generation.saturating_add(1);
        next.patches.push(record.clone());
        let ends = record
            .extents
            .iter()
            .map(|extent| extent.page.saturating_add(extent.pages));
        next.next_page = ends.fold(next.next_page, u32::max);
        let at = codec::place(self.slot, next.generation);
        Ok(ArenaWrite {
            at,
            bytes: codec::encode(&next)?,
        })
    }

    /// The entries of the extents; before the window is mapped, the whole table.
    fn table_writes(&self, extents: &[Extent], global: bool) -> Vec<ArenaWrite> {
        let at = |page: u32| window::table_entry(self.slot, page);
        let run = |extent: &Extent| {
            let pages = extent.page..extent.page.saturating_add(extent.pages);
            let entry = |page| {
                let frame = window::page_frame(self.slot, page);
                window::page_entry(frame, extent.kind, global).to_le_bytes()
            };
            (at(extent.page), pages.flat_map(entry).collect::<Vec<u8>>())
        };
        let runs = extents.iter().map(run);
        if self.mapped {
            return runs.map(|(at, bytes)| ArenaWrite { at, bytes }).collect();
        }
        let mut tables = vec![0; WINDOW_PAGES as usize * 8];
        let fixed = fixed::extents();
        let placed = self.manifest.patches.iter().flat_map(|it| &it.extents);
        for (place, bytes) in fixed.iter().chain(placed).map(run).chain(runs) {
            let from = (place.0 - at(0).0) as usize;
            if let Some(into) = tables.get_mut(from..from + bytes.len()) {
                into.copy_from_slice(&bytes);
            }
        }
        vec![ArenaWrite {
            at: at(0),
            bytes: tables,
        }]
    }

    /// From not-present to present, or nothing.
    fn map_edits(&self) -> MapEdits {
        if self.mapped {
            return Vec::new();
        }
        let new = window::level2_entry(self.slot).to_le_bytes().to_vec();
        vec![Edit {
            at: self.level2,
            old: vec![0; new.len()],
            new,
        }]
    }

    /// Where the slot holds a stub.
    #[must_use]
    pub const fn stub(&self, table: Table) -> Gpa {
        fixed::stub_place(self.slot, table)
    }

    /// Guest-virtual address of an extent.
    #[must_use]
    pub const fn address(extent: Extent) -> Gva {
        window::page_address(extent.page)
    }
}

/// The manifest in force: the slot's, if it is of this boot; else a new one.
fn current_manifest(
    memory: &dyn PhysicalMemory,
    slot: GpaRange,
    boot: &str,
    mapped: bool,
) -> Result<Manifest, ArenaError> {
    match codec::read(memory, slot) {
        Ok(Some(manifest)) if manifest.boot == boot => Ok(manifest),
        Ok(Some(_)) if mapped => Err(ArenaError::Stale("of another boot")),
        Ok(None) if mapped => Err(ArenaError::Stale("missing")),
        Ok(Some(older)) => Ok(Manifest::fresh(boot, older.generation)),
        Ok(None) => Ok(Manifest::fresh(boot, 0)),
        // Nothing maps the slot, so nothing in it is in use.
        Err(ManifestError::Damaged { .. }) if !mapped => Ok(Manifest::fresh(boot, 0)),
        Err(error) => Err(error.into()),
    }
}

/// Whole pages: the rest of a text page is `int3`, of any other zero.
fn padded(bytes: &[u8], extent: Extent) -> Vec<u8> {
    let fill = if extent.kind == SectionKind::Text {
        0xcc
    } else {
        0
    };
    let mut whole = bytes.to_vec();
    whole.resize(extent.pages as usize * PAGE_SIZE as usize, fill);
    whole
}

#[cfg(test)]
mod tests {
    use vmpatch_introspect::AddressSpace;

    use super::super::fixed::FIXED_PAGES;
    use super::super::tests::{Slot, kernel, record};
    use super::*;

    fn arena_in(slot: &Slot) -> Result<Arena, ArenaError> {
        Arena::open(&kernel(), slot, slot.range)
    }

    fn arrive(slot: &Slot, name: &str, contents: &[u8]) -> Arrival {
        let arena = arena_in(slot).unwrap();
        let mut record = record(name);
        record.extents = arena
            .place(&[(SectionKind::Text, contents.len() as u64)])
            .unwrap();
        let arrival = arena
            .admit(&record, &[contents.to_vec()], &Fixtures::default(), false)
            .unwrap();
        for write in &arrival.writes {
            slot.write(write.at, &write.bytes);
        }
        for edit in &arrival.map {
            slot.write(edit.at, &edit.new);
        }
        arrival
    }

    /// Walks the tables as a CPU would: an oracle apart from the code that wrote them.
    fn walk(slot: &Slot, space: AddressSpace, at: Gva) -> Option<u64> {
        let mut table = space.root.0;
        for shift in [39, 30, 21, 12] {
            let entry = slot
                .read_u64(Gpa(table + ((at.0 >> shift) & 511) * 8))
                .unwrap();
            if entry & 1 == 0 {
                return None;
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        Some(table)
    }

    #[test]
    fn the_first_patch_maps_the_window_and_the_second_does_not_again() {
        let slot = Slot::new();
        assert_eq!(arrive(&slot, "one", &[0x90; 100]).map.len(), 1);
        assert!(arena_in(&slot).unwrap().is_mapped());
        assert!(arrive(&slot, "two", &[0x91; 5000]).map.is_empty());
        let manifest = arena_in(&slot).unwrap().manifest().clone();
        assert_eq!(manifest.patches.len(), 2);
        assert_eq!(manifest.next_page, FIXED_PAGES + 1 + 2);
    }

    #[test]
    fn a_page_walk_finds_what_was_placed() {
        let slot = Slot::new();
        arrive(&slot, "one", &[0x90; 100]);
        arrive(&slot, "two", &[0x91; 5000]);
        let space = kernel().layout.space;
        for (page, first, last) in [
            (0, 0xcc, 0xcc),
            (2, 0, 0),
            (3, 0, 0),
            (FIXED_PAGES, 0x90, 0xcc),
            (FIXED_PAGES + 1, 0x91, 0x91),
            (FIXED_PAGES + 2, 0x91, 0xcc),
        ] {
            let frame = walk(&slot, space, window::page_address(page)).unwrap();
            let mut bytes = [0; 4096];
            slot.read(Gpa(frame), &mut bytes).unwrap();
            assert_eq!((bytes[0], bytes[4095]), (first, last), "page {page}");
        }
        // Below the stack of callbacks, and after all else.
        for page in [7, FIXED_PAGES + 3] {
            assert_eq!(walk(&slot, space, window::page_address(page)), None);
        }
    }

    #[test]
    fn pages_are_not_given_twice_even_when_the_writer_died_after_the_manifest() {
        let slot = Slot::new();
        let arena = arena_in(&slot).unwrap();
        let mut lost = record("lost");
        lost.extents = arena.place(&[(SectionKind::Text, 1)]).unwrap();
        let first = arena
            .admit(&lost, &[vec![1]], &Fixtures::default(), false)
            .unwrap()
            .writes
            .remove(0);
        slot.write(first.at, &first.bytes);
        let next = arena_in(&slot)
            .unwrap()
            .place(&[(SectionKind::Data, 1)])
            .unwrap();
        assert_eq!(next[0].page, FIXED_PAGES + 1);
    }

    #[test]
    fn entries_that_somebody_else_uses_are_refused() {
        let slot = Slot::new();
        let level2 = window::find_level2(kernel().layout.space, &slot).unwrap();
        slot.write(level2, &[1]);
        assert!(matches!(arena_in(&slot), Err(ArenaError::Occupied { .. })));
    }

    #[test]
    fn a_manifest_of_another_boot_is_rubbish_unless_it_is_mapped() {
        let slot = Slot::new();
        arrive(&slot, "one", &[0x90; 100]);
        let mut other = kernel();
        other.identity.boot = "another".into();
        let opened = Arena::open(&other, &slot, slot.range);
        assert!(matches!(opened, Err(ArenaError::Stale(_))));
        let level2 = window::find_level2(other.layout.space, &slot).unwrap();
        slot.write(level2, &[0; 8]);
        let fresh = Arena::open(&other, &slot, slot.range).unwrap();
        assert!(fresh.manifest().patches.is_empty());
        assert_eq!(fresh.manifest().generation, 1, "newer than what is there");
    }

    #[test]
    fn a_full_arena_says_so() {
        let slot = Slot::new();
        let arena = arena_in(&slot).unwrap();
        let most = u64::from(WINDOW_PAGES - FIXED_PAGES) * PAGE_SIZE;
        assert!(arena.place(&[(SectionKind::Text, most)]).is_ok());
        for wanted in [most + 1, u64::MAX] {
            let placed = arena.place(&[(SectionKind::Text, wanted)]);
            assert!(matches!(placed, Err(ArenaError::Full { .. })), "{wanted}");
        }
    }
}
