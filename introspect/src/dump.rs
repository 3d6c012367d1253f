//! A machine that stands still for ever: raw guest RAM in a file and the registers of its vCPUs. For
//! post-mortem use and for tests. Can be "stopped" like any other; every write is refused.
//!
//! A dump folder holds `ram.bin` (the RAM ranges one after the other), `vcpus.json` (`[Vcpu]`) and, where
//! RAM is more than one range from zero, `ram.json` (`[GpaRange]`).

mod mapping;

use std::fs;
use std::path::{Path, PathBuf};

use crate::address::{Gpa, GpaRange};
use crate::target::{
    ArenaError, Edit, MemoryError, PhysicalMemory, ResumeError, StopError, StopReport, StopRequest,
    StoppedTarget, Target, WriteError,
};
use crate::vcpu::Vcpu;
use mapping::Mapping;

/// Why a dump could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// A file of it cannot be read.
    #[error("cannot read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of it does not say what it should.
    #[error("{path} is malformed")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The RAM ranges overlap, are not sorted, or do not add up to the file.
    #[error("the RAM ranges of {0} are not sorted or do not add up to its size")]
    Ranges(PathBuf),
}

/// A dead machine.
#[derive(Debug)]
pub struct Dump {
    name: String,
    ram: Mapping,
    ranges: Vec<GpaRange>,
    vcpus: Vec<Vcpu>,
}

impl Dump {
    /// Opens the dump in `folder`.
    ///
    /// # Errors
    /// [`DumpError`].
    pub fn open(folder: &Path) -> Result<Self, DumpError> {
        let path = folder.join("ram.bin");
        let ram = Mapping::open(&path).map_err(|source| DumpError::File {
            path: path.clone(),
            source,
        })?;
        let vcpus = read_json(&folder.join("vcpus.json"))?;
        let layout = folder.join("ram.json");
        let ranges = if layout.exists() {
            read_json(&layout)?
        } else {
            vec![whole(ram.len())]
        };
        if !adds_up(&ranges, ram.len()) {
            return Err(DumpError::Ranges(path));
        }
        let name = folder
            .file_name()
            .unwrap_or(folder.as_os_str())
            .to_string_lossy()
            .into_owned();
        Ok(Self {
            name,
            ram,
            ranges,
            vcpus,
        })
    }

    /// Registers of every vCPU, by index.
    #[must_use]
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// Offset into the file of a range of guest-physical memory, if all of it is there.
    fn offset(&self, at: Gpa, len: usize) -> Option<usize> {
        let end = at.checked_add(len as u64)?;
        let mut before = 0;
        for range in &self.ranges {
            if range.start <= at && end <= range.end {
                return usize::try_from(before + (at.0 - range.start.0)).ok();
            }
            before += range.size();
        }
        None
    }
}

fn whole(len: usize) -> GpaRange {
    GpaRange {
        start: Gpa(0),
        end: Gpa(len as u64),
    }
}

fn adds_up(ranges: &[GpaRange], len: usize) -> bool {
    let sorted = ranges.is_sorted_by(|a, b| a.end <= b.start);
    let ordered = ranges.iter().all(|range| range.start <= range.end);
    let sum = ranges
        .iter()
        .try_fold(0_u64, |sum, range| sum.checked_add(range.size()));
    sorted && ordered && sum == Some(len as u64)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, DumpError> {
    let text = fs::read(path).map_err(|source| DumpError::File {
        path: path.into(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| DumpError::Malformed {
        path: path.into(),
        source,
    })
}

impl PhysicalMemory for Dump {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let missing = MemoryError::NotBacked {
            at,
            len: into.len(),
        };
        let offset = self.offset(at, into.len()).ok_or_else(|| missing.clone())?;
        if self.ram.copy(offset, into) {
            Ok(())
        } else {
            Err(missing)
        }
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.ranges.clone()
    }
}

impl Target for Dump {
    fn name(&self) -> &str {
        &self.name
    }

    fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    fn stop(&self, _request: StopRequest) -> Result<Box<dyn StoppedTarget + '_>, StopError> {
        Ok(Box::new(StoppedDump(self)))
    }

    fn arena(&self) -> Result<GpaRange, ArenaError> {
        Err(ArenaError::Unsupported(
            "a dump cannot be written".to_owned(),
        ))
    }

    fn write_arena(&self, at: Gpa, bytes: &[u8]) -> Result<(), ArenaError> {
        Err(ArenaError::Outside {
            at,
            len: bytes.len(),
        })
    }
}

/// A dump is always stopped; this is the form the flow wants to see.
#[derive(Debug)]
struct StoppedDump<'a>(&'a Dump);

impl StoppedTarget for StoppedDump<'_> {
    fn memory(&self) -> &dyn PhysicalMemory {
        self.0
    }

    fn vcpus(&self) -> &[Vcpu] {
        &self.0.vcpus
    }

    fn write(&mut self, batch: &[Edit]) -> Result<(), WriteError> {
        match batch.first() {
            Some(edit) => Err(WriteError::ReadOnly { at: edit.at }),
            None => Ok(()),
        }
    }

    fn resume(self: Box<Self>) -> Result<StopReport, ResumeError> {
        Ok(StopReport::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump(ranges: Option<&str>) -> Result<Dump, DumpError> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("ram.bin"), (0..64).collect::<Vec<u8>>()).unwrap();
        fs::write(folder.path().join("vcpus.json"), "[]").unwrap();
        if let Some(ranges) = ranges {
            fs::write(folder.path().join("ram.json"), ranges).unwrap();
        }
        Dump::open(folder.path())
    }

    const TWO: &str = r#"[{"start":0,"end":32},{"start":4096,"end":4128}]"#;

    #[test]
    fn ranges_lie_one_after_the_other_in_the_file() {
        let dump = dump(Some(TWO)).unwrap();
        let mut bytes = [0; 2];
        dump.read(Gpa(4097), &mut bytes).unwrap();
        assert_eq!(bytes, [33, 34]);
    }

    #[test]
    fn a_read_that_leaves_a_range_is_refused() {
        let dump = dump(Some(TWO)).unwrap();
        assert!(dump.read(Gpa(31), &mut [0; 2]).is_err());
        assert!(dump.read(Gpa(4127), &mut [0; 1]).is_ok());
        assert!(dump.read(Gpa(u64::MAX), &mut [0; 2]).is_err());
    }

    #[test]
    fn ranges_that_do_not_add_up_are_refused() {
        assert!(matches!(
            dump(Some(r#"[{"start":0,"end":65}]"#)),
            Err(DumpError::Ranges(_))
        ));
        let overlapping = r#"[{"start":0,"end":32},{"start":31,"end":63}]"#;
        assert!(matches!(dump(Some(overlapping)), Err(DumpError::Ranges(_))));
    }

    #[test]
    fn a_write_is_refused() {
        let dump = dump(None).unwrap();
        let mut stopped = dump.stop(StopRequest::default()).unwrap();
        let edit = Edit {
            at: Gpa(1),
            old: vec![1],
            new: vec![2],
        };
        assert!(matches!(
            stopped.write(&[edit]),
            Err(WriteError::ReadOnly { at: Gpa(1) })
        ));
    }
}
