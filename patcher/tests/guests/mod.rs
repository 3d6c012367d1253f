//! A stopped guest that can be changed: a dump with pages written over, and an arena slot. The folder of
//! dumps is named by `VMPATCH_DUMPS`, the folder of patches built for them by `VMPATCH_SAMPLES`; without
//! them such tests are skipped, loudly.
#![allow(dead_code, reason = "each test uses its own part")]
#![allow(clippy::unwrap_used, reason = "only tests use it")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::target::{Edit, MemoryError};
use vmpatch_introspect::{Dump, Gpa, GpaRange, Kernel, PhysicalMemory};
use vmpatch_patcher::arena::ArenaWrite;
use vmpatch_patcher::patch::file::PatchFile;

/// Where the slot lies: above any RAM of a dump.
const SLOT: GpaRange = GpaRange {
    start: Gpa(1 << 36),
    end: Gpa((1 << 36) + (4 << 20)),
};

/// A stopped guest.
pub(crate) struct Guest {
    pub(crate) kernel: Kernel,
    dump: Dump,
    pages: RefCell<BTreeMap<u64, Vec<u8>>>,
}

impl Guest {
    /// Every dump of a kernel of that release, with its name.
    pub(crate) fn all(release: &str) -> Vec<(String, Self)> {
        let mut guests = Self::every();
        guests.retain(|(_, guest)| guest.kernel.identity.release == release);
        guests
    }

    /// Every dump, with its name.
    pub(crate) fn every() -> Vec<(String, Self)> {
        let Some(folder) = folder() else {
            return Vec::new();
        };
        let entries = std::fs::read_dir(folder).unwrap();
        let mut paths: Vec<_> = entries
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.join("ram.bin").exists())
            .collect();
        paths.sort();
        let named = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        paths
            .iter()
            .map(|path| (named(path), Self::at(path)))
            .collect()
    }

    fn at(folder: &Path) -> Self {
        let dump = Dump::open(folder).unwrap();
        let kernel = Kernel::attach(&dump, dump.vcpus()).unwrap();
        Self {
            kernel,
            dump,
            pages: RefCell::default(),
        }
    }

    /// Undoes every write.
    pub(crate) fn forget(&self) {
        self.pages.borrow_mut().clear();
    }

    /// The arena slot.
    pub(crate) fn slot(&self) -> GpaRange {
        SLOT
    }

    /// What the dump has where an edit goes.
    pub(crate) fn original(&self, edit: &Edit) -> Vec<u8> {
        let mut bytes = vec![0; edit.old.len()];
        self.dump.read(edit.at, &mut bytes).unwrap();
        bytes
    }

    /// Writes anywhere.
    pub(crate) fn write(&self, at: Gpa, bytes: &[u8]) {
        for (offset, byte) in (0..).zip(bytes) {
            let at = at.wrapping_add(offset);
            let mut pages = self.pages.borrow_mut();
            let page = pages.entry(at.page_base().0).or_insert_with(|| {
                let mut page = vec![0; PAGE_SIZE as usize];
                if self.dump.read(at.page_base(), &mut page).is_err() {
                    page.fill(0);
                }
                page
            });
            page[at.page_offset() as usize] = *byte;
        }
    }

    /// Does what a patch asks of the arena while the guest runs, then what it asks of the stop.
    pub(crate) fn carry_out(&self, writes: &[ArenaWrite], batch: &[Edit]) {
        for write in writes {
            assert!(SLOT.contains(write.at), "{:?}", write.at);
            self.write(write.at, &write.bytes);
        }
        for edit in batch {
            let mut now = vec![0; edit.old.len()];
            self.read(edit.at, &mut now).unwrap();
            assert_eq!(now, edit.old, "at {}", edit.at);
            self.write(edit.at, &edit.new);
        }
    }
}

impl PhysicalMemory for Guest {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let inside = SLOT.contains(at) && at.0 + into.len() as u64 <= SLOT.end.0;
        if inside {
            into.fill(0);
        } else {
            self.dump.read(at, into)?;
        }
        let pages = self.pages.borrow();
        let first = at.page_base().0;
        for (page, bytes) in pages.range(first..at.0 + into.len() as u64) {
            for (offset, byte) in (*page..).zip(bytes) {
                if let Some(place) = offset.checked_sub(at.0)
                    && let Some(place) = into.get_mut(place as usize)
                {
                    *place = *byte;
                }
            }
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.dump.ram()
    }
}

fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("VMPATCH_DUMPS").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("SKIPPED: VMPATCH_DUMPS names no folder of guest dumps; nothing was compared");
    }
    folder
}

/// Every sample patch, by name.
pub(crate) fn samples() -> Vec<PatchFile> {
    let Some(folder) = std::env::var_os("VMPATCH_SAMPLES") else {
        eprintln!("SKIPPED: VMPATCH_SAMPLES names no folder of patches; nothing was linked");
        return Vec::new();
    };
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|it| it == "vmpatch"))
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "VMPATCH_SAMPLES holds no patch");
    paths
        .iter()
        .map(|path| PatchFile::open(path).unwrap())
        .collect()
}
