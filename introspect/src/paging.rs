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

    /// Little-endian words at these offsets from `at`, one after the other in this order, into as many of `into`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_words(&self, at: Gva, offsets: &[u64], into: &mut [u64]) -> Result<(), ReadError> {
        let (frame, left) = self.locate(at)?;
        let fits = |offset: &u64| offset.checked_add(8).is_some_and(|end| end <= left);
        if offsets.iter().all(fits) {
            return Ok(self.physical.read_words(frame, offsets, into)?);
        }
        for (offset, word) in offsets.iter().zip(into) {
            *word = self.read_u64(at.wrapping_add(*offset))?;
        }
        Ok(())
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
mod tests;
