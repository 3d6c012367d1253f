//! A stopped guest that can be changed: a dump with pages written over, and an arena slot. The folder of
//! dumps is named by `VMPATCH_DUMPS`, the folder of samples by `VMPATCH_SAMPLES`: for each a folder with the
//! pair of objects (`old.o`, `new.o`) and the name of what they are linked into (`object`) that a patch for Debian's 6.12 cloud kernel is built from. Without them
//! such tests are skipped, loudly; `cargo xtask test` makes both.
#![allow(dead_code, reason = "each test uses its own part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests use it")]

pub(crate) mod sleeper;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::modules::{Module, ModulePlace};
use vmpatch_introspect::target::{Edit, MemoryError};
use vmpatch_introspect::{Dump, Gpa, GpaRange, Kernel, PhysicalMemory};
use vmpatch_patcher::arena::ArenaWrite;
use vmpatch_patcher::build::{BuildOptions, ObjectPair, UnwindData, build};
use vmpatch_patcher::link;
use vmpatch_patcher::patch::file::PatchFile;

/// Where the slot lies: above any RAM of a dump.
const SLOT: GpaRange = GpaRange {
    start: Gpa(1 << 36),
    end: Gpa((1 << 36) + (4 << 20)),
};

/// A stopped guest.
pub(crate) struct Guest {
    pub(crate) kernel: Kernel,
    /// Its modules.
    pub(crate) modules: Vec<Module>,
    places: Vec<ModulePlace>,
    dump: Dump,
    pages: RefCell<BTreeMap<u64, Vec<u8>>>,
}

impl Guest {
    /// Every dump of Debian's cloud kernel of that version (`"6.12"`), with its name. Which update of it
    /// does not matter: dumps and objects are made of the same package.
    ///
    /// # Panics
    /// There are dumps, but none of that kernel.
    pub(crate) fn all(version: &str) -> Vec<(String, Self)> {
        let every = Self::every();
        let there_are_dumps = !every.is_empty();
        let wanted = |guest: &Self| {
            let release = &guest.kernel.identity.release;
            release.starts_with(&format!("{version}.")) && release.ends_with("-cloud-amd64")
        };
        let guests: Vec<_> = (every.into_iter())
            .filter(|(_, guest)| wanted(guest))
            .collect();
        assert!(
            !there_are_dumps || !guests.is_empty(),
            "VMPATCH_DUMPS holds no dump of Debian's {version} cloud kernel"
        );
        guests
    }

    /// Every dump, with its name.
    ///
    /// # Panics
    /// The folder holds none.
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
        assert!(!paths.is_empty(), "VMPATCH_DUMPS holds no dump");
        let named = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        paths
            .iter()
            .map(|path| (named(path), Self::at(path)))
            .collect()
    }

    fn at(folder: &Path) -> Self {
        let dump = Dump::open(folder).unwrap();
        let kernel = Kernel::attach(&dump, dump.vcpus()).unwrap();
        let modules = kernel.modules(&dump).unwrap();
        Self {
            kernel,
            places: modules.iter().map(Module::place).collect(),
            modules,
            dump,
            pages: RefCell::default(),
        }
    }

    /// How linking sees it.
    pub(crate) fn view(&self) -> link::Guest<'_> {
        link::Guest::new(&self.kernel, self)
            .with_modules(&self.modules)
            .with_places(&self.places)
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
pub(crate) fn samples() -> &'static [PatchFile] {
    static SAMPLES: OnceLock<Vec<PatchFile>> = OnceLock::new();
    let Some(folder) = std::env::var_os("VMPATCH_SAMPLES") else {
        eprintln!("SKIPPED: VMPATCH_SAMPLES names no folder of samples; nothing was linked");
        return &[];
    };
    SAMPLES.get_or_init(|| all_samples(Path::new(&folder)))
}

fn all_samples(folder: &Path) -> Vec<PatchFile> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut pairs: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    pairs.sort();
    assert!(!pairs.is_empty(), "VMPATCH_SAMPLES holds no sample");
    pairs.iter().map(|pair| sample(pair)).collect()
}

fn sample(pair: &Path) -> PatchFile {
    let name = pair.file_name().unwrap().to_string_lossy().into_owned();
    let bytes = |file| std::fs::read(pair.join(file)).unwrap();
    let options = BuildOptions {
        name: name.clone(),
        ..BuildOptions::default()
    };
    let home = std::fs::read_to_string(pair.join("object")).unwrap();
    let pair = ObjectPair {
        file: &name,
        object: &home,
        old: &bytes("old.o"),
        new: &bytes("new.o"),
        wide: None,
        unwind: UnwindData::Within,
    };
    let (patch, _) = build(&[pair], &options).unwrap_or_else(|why| panic!("{name}: {why}"));
    PatchFile::new(patch).unwrap()
}
