//! Dumps of stopped guests with the guest's own answers beside them, for tests that compare the two.
//! The folder that holds them is named by `VMPATCH_DUMPS`; without it such tests are skipped, loudly.
#![allow(dead_code, reason = "each test uses its own part")]
#![allow(clippy::unwrap_used, reason = "only tests use it")]

use std::fs;
use std::path::{Path, PathBuf};

use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::{Dump, Gpa, GpaRange, Kernel, PhysicalMemory};

/// A stopped guest and what it said of itself before.
pub(crate) struct Guest {
    /// Name of its folder.
    pub(crate) name: String,
    pub(crate) dump: Dump,
    pub(crate) kernel: Kernel,
    folder: PathBuf,
}

impl Guest {
    fn open(folder: &Path) -> Self {
        let dump = Dump::open(folder).unwrap();
        let kernel = Kernel::attach(&dump, dump.vcpus()).unwrap();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        Self {
            name,
            dump,
            kernel,
            folder: folder.to_owned(),
        }
    }

    /// One of the guest's answers, if it could give it.
    pub(crate) fn answer(&self, file: &str) -> Option<String> {
        let bytes = fs::read(self.folder.join(file)).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Runs `check` on every dump there is.
///
/// # Panics
/// `VMPATCH_DUMPS` is set but holds no dump.
pub(crate) fn each_guest(check: impl Fn(&Guest)) {
    some_guest(|guest| {
        check(guest);
        true
    });
}

/// Runs `check` on every dump there is. It returns whether the guest has what is to be compared, which some of them
/// may lack.
///
/// # Panics
/// `VMPATCH_DUMPS` is set but holds no dump, or none of a guest that has it.
pub(crate) fn some_guest(check: impl Fn(&Guest) -> bool) {
    let Some(folder) = std::env::var_os("VMPATCH_DUMPS") else {
        eprintln!("SKIPPED: VMPATCH_DUMPS names no folder of guest dumps; nothing was compared");
        return;
    };
    let mut folders: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("ram.bin").exists())
        .collect();
    folders.sort();
    assert!(
        !folders.is_empty(),
        "VMPATCH_DUMPS holds no dump: {}",
        folder.display()
    );
    let mut compared = 0;
    for folder in folders {
        let guest = Guest::open(&folder);
        eprintln!("comparing with {}", guest.name);
        if check(&guest) {
            compared += 1;
        } else {
            eprintln!("not compared: {} has nothing to compare", guest.name);
        }
    }
    assert!(compared > 0, "no guest of them has what is to be compared");
}

/// A guest's memory with other bytes in one place.
pub(crate) struct Changed<'a> {
    pub(crate) dump: &'a Dump,
    pub(crate) at: Gpa,
    pub(crate) bytes: Vec<u8>,
}

impl PhysicalMemory for Changed<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.dump.read(at, into)?;
        for (place, byte) in (self.at.0..).zip(&self.bytes) {
            let offset = place.checked_sub(at.0).map(usize::try_from);
            if let Some(to) = offset.and_then(|offset| into.get_mut(offset.unwrap())) {
                *to = *byte;
            }
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.dump.ram()
    }
}
