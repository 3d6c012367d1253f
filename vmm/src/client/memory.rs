//! Guest memory as a session maps it: read-only, shared with the running guest. Owns the mappings.
//!
//! The copies are vm-memory's volatile ones: the guest changes its memory under our hands, and what comes
//! out of a read may be torn between two of its writes.

use std::fs::File;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};
use vmpatch_introspect::address::{Gpa, GpaRange};
use vmpatch_introspect::target::{MemoryError, PhysicalMemory};

use crate::control::message::MappedRange;
use crate::hot::map::is_fixed;

/// RAM and arena of a machine.
#[derive(Debug)]
pub(super) struct MappedMemory {
    /// By address, without overlaps; the arena is the last.
    parts: Vec<Part>,
    ram: Vec<GpaRange>,
}

#[derive(Debug)]
struct Part {
    range: GpaRange,
    region: MmapRegion,
}

impl MappedMemory {
    /// Maps what the VMM offers.
    ///
    /// # Errors
    /// What makes no sense in the offer, or what the host kernel said, for people.
    pub(super) fn map(
        ram: &[MappedRange],
        arena: MappedRange,
        files: &[Arc<File>],
    ) -> Result<Self, String> {
        let mut parts = Vec::new();
        for offer in ram.iter().chain([&arena]) {
            let file = files.get(offer.fd).ok_or("a descriptor is missing")?;
            parts.push(Part::map(offer, file)?);
        }
        parts.sort_by_key(|part| part.range.start);
        let overlap = |pair: &[Part]| matches!(pair, [a, b] if a.range.overlaps(&b.range));
        if parts.windows(2).any(overlap) {
            return Err("two memory ranges overlap".into());
        }
        let mut ram: Vec<_> = ram.iter().map(|offer| offer.range).collect();
        ram.sort_unstable();
        Ok(Self { parts, ram })
    }
}

impl Part {
    fn map(offer: &MappedRange, file: &Arc<File>) -> Result<Self, String> {
        let range = offer.range;
        let end = offer.offset.checked_add(range.size());
        let len = file.metadata().map_err(|error| error.to_string())?.len();
        // A file that ends early, or could be cut later, would kill us at the first read (SIGBUS).
        if !is_fixed(file) || end.is_none_or(|end| end > len) || range.is_empty() {
            return Err(format!("the file of {range} is too short, or can be cut"));
        }
        let size = usize::try_from(range.size()).map_err(|error| error.to_string())?;
        let region = MmapRegionBuilder::new(size)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), offer.offset))
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| format!("mapping {range}: {error}"))?;
        Ok(Self { range, region })
    }
}

impl MappedMemory {
    /// The mapping that has `at`, if any, and where in it.
    fn part(&self, at: Gpa) -> Option<(&MmapRegion, usize)> {
        let part = self.parts.iter().rfind(|part| part.range.start <= at)?;
        let offset = usize::try_from(at.0 - part.range.start.0).ok()?;
        Some((&part.region, offset))
    }
}

impl PhysicalMemory for MappedMemory {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let len = into.len();
        let part = self.part(at);
        let slice = part.and_then(|(region, offset)| region.get_slice(offset, len).ok());
        let slice = slice.ok_or(MemoryError::NotBacked { at, len })?;
        slice.copy_to(into);
        Ok(())
    }

    /// As one load, without the choices that copying makes for any length.
    fn read_u64(&self, at: Gpa) -> Result<u64, MemoryError> {
        let part = self.part(at);
        let word = part.and_then(|(region, offset)| region.get_ref::<u64>(offset).ok());
        let word = word.ok_or(MemoryError::NotBacked { at, len: 8 })?;
        Ok(u64::from_le(word.load()))
    }

    fn read_words(&self, at: Gpa, offsets: &[u64], into: &mut [u64]) -> Result<(), MemoryError> {
        let error = MemoryError::NotBacked { at, len: 8 };
        let Some((region, start)) = self.part(at) else {
            return Err(error);
        };
        for (offset, into) in offsets.iter().zip(into) {
            let offset = usize::try_from(*offset).ok();
            let word = offset
                .and_then(|offset| start.checked_add(offset))
                .and_then(|at| region.get_ref::<u64>(at).ok());
            let Some(word) = word else {
                return Err(error);
            };
            *into = u64::from_le(word.load());
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.ram.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestMemory, Layout, SlotKind};

    fn mapped(guest: &GuestMemory) -> MappedMemory {
        let files: Vec<_> = guest
            .slots()
            .iter()
            .map(|slot| Arc::clone(&slot.file))
            .collect();
        let offers: Vec<_> = (0..)
            .zip(guest.slots())
            .map(|(fd, slot)| MappedRange {
                range: slot.range,
                fd,
                offset: slot.offset,
            })
            .collect();
        assert_eq!(guest.slots().last().unwrap().kind, SlotKind::Arena);
        let (arena, ram) = offers.split_last().unwrap();
        MappedMemory::map(ram, *arena, &files).unwrap()
    }

    #[test]
    fn both_sides_of_the_hole_and_the_arena_are_read() {
        let guest = GuestMemory::new(Layout::new(4 << 30, 40).unwrap()).unwrap();
        let arena = guest.layout().arena();
        let places = [Gpa(0x1ffe), Gpa(4 << 30), arena.start, Gpa(arena.end.0 - 4)];
        for at in places {
            guest.write(at, b"here").unwrap();
        }
        let memory = mapped(&guest);
        for at in places {
            let mut found = [0; 4];
            memory.read(at, &mut found).unwrap();
            assert_eq!(&found, b"here", "{at}");
        }
        assert_eq!(memory.ram(), guest.layout().ram());
    }

    #[test]
    fn words_are_those_of_the_bytes() {
        let guest = GuestMemory::new(Layout::new(4 << 30, 40).unwrap()).unwrap();
        let arena = guest.layout().arena();
        for at in [Gpa(0x1ff9), Gpa(4 << 30), arena.start] {
            guest.write(at, b"two words in all").unwrap();
            let expected = [b"two word", b"s in all"].map(|word| u64::from_le_bytes(*word));
            let memory = mapped(&guest);
            let mut found = [0; 2];
            memory.read_words(at, &[8, 0], &mut found).unwrap();
            assert_eq!([found[1], found[0]], expected, "{at}");
            assert_eq!(memory.read_u64(at), Ok(expected[0]), "{at}");
        }
    }

    #[test]
    fn what_is_no_memory_is_not_read() {
        let guest = GuestMemory::new(Layout::new(4 << 30, 40).unwrap()).unwrap();
        let memory = mapped(&guest);
        let arena = guest.layout().arena();
        for at in [
            0xc000_0000 - 3,
            0xd000_0000,
            arena.start.0 - 1,
            arena.end.0 - 3,
            u64::MAX - 1,
        ] {
            let at = Gpa(at);
            let error = memory.read(at, &mut [0; 4]);
            assert_eq!(error, Err(MemoryError::NotBacked { at, len: 4 }));
            assert!(memory.read_u64(at).is_err());
            assert!(memory.read_words(at, &[0], &mut [0]).is_err());
            let beyond = at.0.wrapping_sub(0x100_0000);
            let offsets = [0x100_0000, u64::MAX];
            let read = |offset| memory.read_words(Gpa(beyond), &[offset], &mut [0]);
            assert!(offsets.into_iter().all(|offset| read(offset).is_err()));
        }
    }

    #[test]
    fn an_offer_that_reaches_past_its_file_is_refused() {
        let guest = GuestMemory::new(Layout::new(2 << 20, 40).unwrap()).unwrap();
        let slot = &guest.slots()[0];
        let files = [Arc::clone(&slot.file)];
        let good = MappedRange {
            range: slot.range,
            fd: 0,
            offset: 0,
        };
        for bad in [
            MappedRange {
                offset: 4096,
                ..good
            },
            MappedRange {
                offset: u64::MAX,
                ..good
            },
            MappedRange { fd: 1, ..good },
        ] {
            assert!(MappedMemory::map(&[], bad, &files).is_err(), "{bad:?}");
        }
        assert!(MappedMemory::map(&[good], good, &files).is_err(), "overlap");
    }
}
