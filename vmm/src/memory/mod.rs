//! The memory of one machine: guest RAM and the arena slot, each a memfd that is mapped shared, so that
//! the control socket can pass it on. Owns the mappings, the bounds-checked copies in and out, and the
//! record of what the VMM itself wrote. Does not own what is placed where ([`crate::boot`]) nor the VM.
//!
//! Guest memory changes under our hands while vCPUs run: every access copies, none hands out a reference.

pub mod layout;
mod sys;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};
use vmpatch_introspect::address::{Gpa, GpaRange};
use vmpatch_introspect::target::{MemoryError, PhysicalMemory};

pub use layout::{Layout, LayoutError};

/// Guest RAM as rust-vmm crates take it. Every write through it is in its bitmap.
pub type Mapping = GuestMemoryMmap<AtomicBitmap>;

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// RAM that the guest's e820 map names.
    Ram,
    /// The arena: in no map, known to no guest allocator.
    Arena,
}

/// One KVM memory slot, with the file that backs it.
#[derive(Clone, Debug)]
pub struct Slot {
    /// KVM's number of it.
    pub number: u32,
    /// RAM or arena.
    pub kind: SlotKind,
    /// Where the guest sees it.
    pub range: GpaRange,
    /// The memfd behind it. Several slots can share one.
    pub file: Arc<File>,
    /// Where in the file the slot begins, in bytes.
    pub offset: u64,
    /// Where it is mapped in this process.
    host_address: u64,
}

/// RAM and arena of one machine, mapped. Cheap to clone: clones share the mappings.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    ram: Mapping,
    arena: Mapping,
    slots: Vec<Slot>,
    layout: Layout,
}

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The host gave no memory file.
    #[error("making a memory file of {size} bytes: {source}")]
    File {
        /// Bytes asked for.
        size: u64,
        /// What the host kernel said.
        source: io::Error,
    },
    /// A range could not be mapped.
    #[error("mapping guest memory {range}: {source}")]
    Map {
        /// The guest-physical range.
        range: GpaRange,
        /// What vm-memory said.
        source: vm_memory::mmap::FromRangesError,
    },
    /// KVM refused a slot.
    #[error("KVM does not take {range} as memory slot {number}: {source}")]
    Register {
        /// The slot's number.
        number: u32,
        /// The guest-physical range.
        range: GpaRange,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

impl GuestMemory {
    /// Makes and maps the memory files of `layout`, all zero.
    ///
    /// # Errors
    /// [`SetupError`] where the host has no memory or address space left.
    pub fn new(layout: Layout) -> Result<Self, SetupError> {
        let (ram, mut slots) = map(c"vmpatch-ram", SlotKind::Ram, layout.ram(), 0)?;
        let next = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        let (arena, arena_slots) = map(c"vmpatch-arena", SlotKind::Arena, &[layout.arena()], next)?;
        slots.extend(arena_slots);
        Ok(Self {
            ram,
            arena,
            slots,
            layout,
        })
    }

    /// Gives every slot to KVM. The caller keeps `self` (or a clone) alive as long as the VM: its
    /// mappings are the guest's memory.
    ///
    /// # Errors
    /// [`SetupError::Register`] names the slot KVM refused.
    pub fn register(&self, vm: &VmFd) -> Result<(), SetupError> {
        for slot in &self.slots {
            sys::register(vm, slot).map_err(|source| SetupError::Register {
                number: slot.number,
                range: slot.range,
                source,
            })?;
        }
        Ok(())
    }

    /// Guest RAM for loaders and devices; the arena is not in it.
    #[must_use]
    pub const fn mapping(&self) -> &Mapping {
        &self.ram
    }

    /// Every slot, RAM first, with what a peer needs to map it.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Where everything lies.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Copies `bytes` to `at`, in RAM or in the arena, and records the pages as dirty.
    ///
    /// # Errors
    /// [`MemoryError::NotBacked`] where any byte of the range is neither; nothing is written then.
    pub fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        let part = self.part(at, bytes.len())?;
        part.write_slice(bytes, GuestAddress(at.0))
            .map_err(|error| backing(at, &error))
    }

    /// Whether the VMM itself wrote to the page of `at` since the machine was made. KVM's dirty log sees
    /// the guest's writes only, and this record ours only: a snapshot needs both.
    #[must_use]
    pub fn written_by_vmm(&self, at: Gpa) -> bool {
        use vm_memory::bitmap::Bitmap;
        let part = if self.layout.arena().contains(at) {
            &self.arena
        } else {
            &self.ram
        };
        part.to_region_addr(GuestAddress(at.0))
            .is_some_and(|(region, offset)| {
                usize::try_from(offset.0).is_ok_and(|offset| region.bitmap().dirty_at(offset))
            })
    }

    /// The mapping that backs all of a range.
    fn part(&self, at: Gpa, len: usize) -> Result<&Mapping, MemoryError> {
        [&self.ram, &self.arena]
            .into_iter()
            .find(|part| {
                len == 0 || GuestMemoryBackend::check_range(*part, GuestAddress(at.0), len)
            })
            .ok_or(MemoryError::NotBacked { at, len })
    }
}

impl PhysicalMemory for GuestMemory {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let part = self.part(at, into.len())?;
        part.read_slice(into, GuestAddress(at.0))
            .map_err(|error| backing(at, &error))
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.layout.ram().to_vec()
    }
}

fn backing(at: Gpa, error: &vm_memory::GuestMemoryError) -> MemoryError {
    MemoryError::Backing {
        at,
        what: error.to_string(),
    }
}

/// One memfd that holds `ranges` one after the other, mapped; slots are numbered from `first`.
fn map(
    name: &CStr,
    kind: SlotKind,
    ranges: &[GpaRange],
    first: u32,
) -> Result<(Mapping, Vec<Slot>), SetupError> {
    let size = ranges.iter().map(GpaRange::size).sum();
    let file = sys::memfd(name, size).map_err(|source| SetupError::File { size, source })?;
    let file = Arc::new(file);
    let (mut regions, mut slots, mut offset) = (Vec::new(), Vec::new(), 0);
    for (number, &range) in (first..).zip(ranges) {
        let region = map_range(&file, offset, range)?;
        let host_address = region.as_ptr() as u64;
        slots.push(Slot {
            number,
            kind,
            range,
            file: Arc::clone(&file),
            offset,
            host_address,
        });
        regions.push(region);
        offset += range.size();
    }
    let mapping = Mapping::from_regions(regions).map_err(|error| SetupError::Map {
        range: GpaRange {
            start: Gpa(0),
            end: Gpa(size),
        },
        source: error.into(),
    })?;
    Ok((mapping, slots))
}

fn map_range(
    file: &Arc<File>,
    offset: u64,
    range: GpaRange,
) -> Result<GuestRegionMmap<AtomicBitmap>, SetupError> {
    let backing = FileOffset::from_arc(Arc::clone(file), offset);
    let too_long = vm_memory::mmap::FromRangesError::InvalidGuestRegion;
    usize::try_from(range.size())
        .map_err(|_| too_long)
        .and_then(|size| {
            GuestRegionMmap::from_range(GuestAddress(range.start.0), size, Some(backing))
        })
        .map_err(|source| SetupError::Map { range, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const GIB: u64 = 1 << 30;

    fn memory(bytes: u64) -> GuestMemory {
        GuestMemory::new(Layout::new(bytes, 40).unwrap()).unwrap()
    }

    #[test]
    fn what_is_written_is_in_the_file_that_the_slot_names() {
        // Sparse: nothing but the written pages is ever backed.
        let memory = memory(4 * GIB);
        let at = Gpa(4 * GIB + 0x123);
        memory.write(at, b"high").unwrap();
        let slot = memory
            .slots()
            .iter()
            .find(|slot| slot.range.contains(at))
            .unwrap();
        let mut found = [0; 4];
        slot.file
            .read_exact_at(&mut found, slot.offset + 0x123)
            .unwrap();
        assert_eq!((&found, slot.number), (b"high", 1));
    }

    #[test]
    fn a_range_that_reaches_into_the_hole_is_not_backed() {
        let memory = memory(4 * GIB);
        let at = Gpa(3 * GIB - 2);
        assert_eq!(
            memory.write(at, &[0; 3]),
            Err(MemoryError::NotBacked { at, len: 3 })
        );
        assert_eq!(
            memory.read(at, &mut [0; 3]),
            Err(MemoryError::NotBacked { at, len: 3 })
        );
        assert_eq!(memory.read(at, &mut [0; 2]), Ok(()));
    }

    #[test]
    fn the_last_address_does_not_wrap() {
        let memory = memory(2 << 20);
        assert!(memory.read(Gpa(u64::MAX), &mut [0; 8]).is_err());
    }

    #[test]
    fn the_arena_is_read_and_written_but_is_no_ram() {
        let memory = memory(2 << 20);
        let arena = memory.layout().arena();
        memory.write(Gpa(arena.end.0 - 1), b"x").unwrap();
        assert!(memory.write(Gpa(arena.end.0 - 1), b"xy").is_err());
        assert!(memory.ram().iter().all(|range| !range.overlaps(&arena)));
        assert_eq!(memory.slots().last().unwrap().kind, SlotKind::Arena);
    }

    #[test]
    fn only_written_pages_are_recorded() {
        let memory = memory(2 << 20);
        memory.write(Gpa(0x1fff), b"ab").unwrap();
        let dirty: Vec<u64> = (0..5)
            .filter(|page| memory.written_by_vmm(Gpa(page * 4096)))
            .collect();
        assert_eq!(dirty, [1, 2]);
        let arena = memory.layout().arena().start;
        assert!(!memory.written_by_vmm(arena));
        memory.write(arena, b"a").unwrap();
        assert!(memory.written_by_vmm(arena));
    }

    #[test]
    fn a_peer_cannot_shrink_the_memory_under_the_guest() {
        let memory = memory(2 << 20);
        assert!(memory.slots()[0].file.set_len(0).is_err());
    }
}
