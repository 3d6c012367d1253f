//! The initial RAM disk: as high as the kernel allows below the hole, and clear of the kernel. Owns its
//! placement; what is in it is the guest's business.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};
use vmpatch_introspect::address::{Gpa, GpaRange};

use super::image::Loaded;
use super::map;
use crate::memory::GuestMemory;

/// Why an initial RAM disk cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The file cannot be opened or read.
    #[error("initial RAM disk {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// No room above the kernel.
    #[error(
        "initial RAM disk {}: {size} bytes do not fit between the kernel's end at {} MiB and {} MiB; give \
         the machine more memory",
        path.display(), room.start.0.div_ceil(1 << 20), room.end.0 >> 20
    )]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Where it would have to go.
        room: GpaRange,
    },
    /// It could not be copied.
    #[error("initial RAM disk {}: {source}", path.display())]
    Copy {
        /// Which file.
        path: PathBuf,
        /// What vm-memory said.
        source: vm_memory::GuestMemoryError,
    },
}

/// Loads the file at `path` for the loaded `kernel`; where it is now.
///
/// # Errors
/// [`InitrdError`].
pub fn load(memory: &GuestMemory, kernel: &Loaded, path: &Path) -> Result<GpaRange, InitrdError> {
    let read = |source| InitrdError::Read {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(read)?;
    let size = file.metadata().map_err(read)?.len();
    let room = room(memory, kernel);
    let range = place(room, size).ok_or_else(|| InitrdError::TooLarge {
        path: path.to_owned(),
        size,
        room,
    })?;
    let count = usize::try_from(size).unwrap_or(usize::MAX);
    memory
        .mapping()
        .read_exact_volatile_from(GuestAddress(range.start.0), &mut file, count)
        .map_err(|source| InitrdError::Copy {
            path: path.to_owned(),
            source,
        })?;
    Ok(range)
}

/// `initrd_addr_max` is the last address that may be used.
fn room(memory: &GuestMemory, kernel: &Loaded) -> GpaRange {
    let limit = u64::from(kernel.header.initrd_addr_max).saturating_add(1);
    let end = map::low_ram(memory.layout()).end.min(Gpa(limit));
    GpaRange {
        start: kernel.range.end,
        end,
    }
}

/// The highest page-aligned place in `room`.
fn place(room: GpaRange, size: u64) -> Option<GpaRange> {
    let start = Gpa(room.end.0.checked_sub(size)?).page_base();
    (start >= room.start).then(|| GpaRange::sized(start, size))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmpatch_introspect::address::PAGE_SIZE;

    const ROOM: GpaRange = GpaRange {
        start: Gpa(0x300_0000),
        end: Gpa(0x400_0000),
    };

    #[test]
    fn it_lies_at_the_top_on_a_page_of_its_own() {
        let placed = place(ROOM, PAGE_SIZE + 1).unwrap();
        assert_eq!(
            (placed.start, placed.size()),
            (Gpa(0x3ff_e000), PAGE_SIZE + 1)
        );
    }

    #[test]
    fn it_never_reaches_into_the_kernel() {
        assert!(place(ROOM, ROOM.size()).is_some());
        assert_eq!(place(ROOM, ROOM.size() + 1), None);
        assert_eq!(place(ROOM, u64::MAX), None);
    }
}
