//! Page walks: from a guest-virtual address and a page-table root to guest-physical memory.

use crate::address::{Gpa, Gva};
use crate::target::{MemoryError, PhysicalMemory};

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
    /// Writable at every level.
    pub writable: bool,
    /// Executable at every level.
    pub executable: bool,
    /// Open to user mode at every level.
    pub user: bool,
}

impl AddressSpace {
    /// Walks the tables for `at`. `Ok(None)` is "not mapped".
    ///
    /// # Errors
    /// A table that lies outside guest RAM.
    pub fn translate(
        &self,
        _memory: &dyn PhysicalMemory,
        _at: Gva,
    ) -> Result<Option<Translation>, MemoryError> {
        Ok(None)
    }
}

/// Kernel-virtual memory: physical memory seen through the kernel's own page tables.
#[derive(Clone, Copy)]
pub struct KernelMemory<'a> {
    /// What the walk reads.
    pub physical: &'a dyn PhysicalMemory,
    /// The kernel's tables.
    pub space: AddressSpace,
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

impl KernelMemory<'_> {
    /// Fills `into` from `at` on, page by page.
    ///
    /// # Errors
    /// [`ReadError`]; `into` is then unspecified.
    pub fn read(&self, at: Gva, _into: &mut [u8]) -> Result<(), ReadError> {
        Err(ReadError::NotMapped(at))
    }

    /// One little-endian 64-bit word.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_u64(&self, at: Gva) -> Result<u64, ReadError> {
        let mut word = [0; 8];
        self.read(at, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// One little-endian 32-bit word.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_u32(&self, at: Gva) -> Result<u32, ReadError> {
        let mut word = [0; 4];
        self.read(at, &mut word)?;
        Ok(u32::from_le_bytes(word))
    }

    /// A pointer.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_pointer(&self, at: Gva) -> Result<Gva, ReadError> {
        self.read_u64(at).map(Gva)
    }
}
