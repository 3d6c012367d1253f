//! Bytes of the kernel image as a tiny guest: page tables by hand and one mapping of 2 MiB pages. For
//! tests and fuzz targets, which want memory and not a machine.

use crate::address::{Gpa, GpaRange, Gva, GvaRange};
use crate::paging::{AddressSpace, KernelMemory};
use crate::target::{MemoryError, PhysicalMemory};

/// Where the bytes are mapped.
pub(crate) const BASE: Gva = Gva(0xffff_ffff_8100_0000);
/// Where they lie in guest-physical memory.
pub(crate) const DATA: u64 = 2 << 20;
const PAGE: usize = 2 << 20;
/// The tables come first: root, third and second level.
const TABLES: u64 = 0x1000;
/// The tables as a space, also for memory that is this guest's and something else.
pub(crate) const SPACE: AddressSpace = AddressSpace {
    root: Gpa(TABLES),
    five_level: false,
};
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;

/// The tiny guest.
#[derive(Debug)]
pub(crate) struct Flat {
    ram: Vec<u8>,
    len: u64,
}

impl Flat {
    /// A guest that has `bytes` at [`BASE`], zeros to the end of the page after them, and no more than
    /// 512 such pages.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let start = DATA as usize;
        let mut ram = vec![0; start + bytes.len().next_multiple_of(PAGE)];
        for (to, from) in ram.iter_mut().skip(start).zip(bytes) {
            *to = *from;
        }
        let mut flat = Self {
            ram,
            len: bytes.len() as u64,
        };
        let pages = (bytes.len().div_ceil(PAGE) as u64).min(504);
        flat.set(TABLES + 511 * 8, (TABLES + 0x1000) | PRESENT);
        flat.set(TABLES + 0x1000 + 510 * 8, (TABLES + 0x2000) | PRESENT);
        for page in 0..pages {
            let entry = (DATA + page * PAGE as u64) | PRESENT | LARGE;
            flat.set(TABLES + 0x2000 + (8 + page) * 8, entry);
        }
        flat
    }

    fn set(&mut self, at: u64, word: u64) {
        for (to, from) in self
            .ram
            .iter_mut()
            .skip(at as usize)
            .zip(word.to_le_bytes())
        {
            *to = from;
        }
    }

    /// The bytes, as a range of addresses.
    pub(crate) fn range(&self) -> GvaRange {
        GvaRange {
            start: BASE,
            end: BASE.wrapping_add(self.len),
        }
    }

    /// Changes a word of the bytes.
    #[cfg(test)]
    pub(crate) fn put(&mut self, offset: u64, word: u64) {
        self.set(DATA + offset, word);
    }

    /// The guest's memory through its tables.
    pub(crate) fn memory(&self) -> KernelMemory<'_> {
        KernelMemory::new(self, SPACE)
    }
}

impl PhysicalMemory for Flat {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        Ram(&self.ram).read(at, into)
    }

    fn ram(&self) -> Vec<GpaRange> {
        Ram(&self.ram).ram()
    }
}

/// Bytes as the RAM of a machine, from guest-physical zero on.
pub(crate) struct Ram<B>(pub(crate) B);

impl<B: AsRef<[u8]>> PhysicalMemory for Ram<B> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let ram = self.0.as_ref();
        let start = usize::try_from(at.0).ok();
        let found = start.and_then(|start| ram.get(start..start.checked_add(into.len())?));
        into.copy_from_slice(found.ok_or(MemoryError::NotBacked {
            at,
            len: into.len(),
        })?);
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        vec![GpaRange {
            start: Gpa(0),
            end: Gpa(self.0.as_ref().len() as u64),
        }]
    }
}
