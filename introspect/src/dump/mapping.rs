//! A read-only file mapping that only copies out, so that no reference to bytes that another process
//! might change ever exists. Owns the crate's only `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::{MmapOptions, MmapRaw};

/// A file, mapped.
#[derive(Debug)]
pub(super) struct Mapping(MmapRaw);

impl Mapping {
    /// Maps all of the file at `path`.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        MmapOptions::new()
            .map_raw_read_only(&File::open(path)?)
            .map(Self)
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Copies the bytes from `offset` on; false, and nothing copied, if they are not all there.
    pub(super) fn copy(&self, offset: usize, into: &mut [u8]) -> bool {
        if offset
            .checked_add(into.len())
            .is_none_or(|end| end > self.0.len())
        {
            return false;
        }
        let from = self.0.as_ptr().wrapping_add(offset);
        // SAFETY: `from` is valid for `into.len()` bytes: the sum was checked against the length of the
        // mapping, which lives as long as `self`. `into` is exclusive, so the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        true
    }
}
