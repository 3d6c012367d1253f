//! Whether what was read off a source still holds: which files it has, and which of them changed since. Reads no file.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use crate::diff::Part;
use crate::error::{At, BuildError};

/// Seconds by which the time of a file may lag behind the clock.
const LAG: i64 = 2;

/// A source as it is at one time.
pub(crate) struct Seen {
    /// Before anything was looked at, in seconds.
    at: i64,
    /// Of the makefiles, with their sizes and times.
    makefiles: Sha256,
    /// Of the names of all other files.
    names: Sha256,
    /// Those with their times of change.
    files: Vec<(PathBuf, i64)>,
}

impl Seen {
    /// Looks at all that a kernel may be made of.
    pub(crate) fn of(source: &Path) -> Result<Self, BuildError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut seen = Self {
            at: now.map_or(0, |now| now.as_secs().cast_signed()),
            makefiles: Sha256::new(),
            names: Sha256::new(),
            files: Vec::new(),
        };
        seen.add(source, Path::new(""))?;
        Ok(seen)
    }

    fn add(&mut self, source: &Path, folder: &Path) -> Result<(), BuildError> {
        let at = source.join(folder);
        let entries = fs::read_dir(&at).at(&at)?;
        let mut entries = entries.collect::<Result<Vec<_>, _>>().at(&at)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = folder.join(entry.file_name());
            let kind = entry.file_type().at(&at)?;
            if kind.is_dir() && path != Path::new(".git") && Part::of(&path) != Part::None {
                self.add(source, &path)?;
            } else if kind.is_file() {
                // An editor's may be gone already.
                entry
                    .metadata()
                    .iter()
                    .for_each(|it| self.add_file(&path, it));
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path, what: &Metadata) {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        let bytes = path.as_os_str().as_encoded_bytes();
        if name.starts_with(b"Makefile") || name.starts_with(b"Kbuild") {
            let numbers = [
                what.size().cast_signed(),
                what.mtime(),
                what.mtime_nsec(),
                what.ctime(),
                what.ctime_nsec(),
            ];
            self.makefiles.update(bytes);
            numbers
                .iter()
                .for_each(|number| self.makefiles.update(number.to_le_bytes()));
        } else if matches!(Part::of(path), Part::Source | Part::Header) {
            self.names.update(bytes);
            self.names.update([0]);
            self.files.push((path.to_owned(), what.ctime()));
        }
    }

    /// One line that is another when a makefile is.
    pub(crate) fn makefiles(&self) -> String {
        format!("makefiles {}", hex(&self.makefiles))
    }

    /// One line for [`Self::changed_since`].
    pub(crate) fn files(&self) -> String {
        format!("files {} {}", hex(&self.names), self.at)
    }

    /// Which files changed since another had this line; `None` if some came or went.
    pub(crate) fn changed_since(&self, line: &str) -> Option<Vec<&Path>> {
        let (names, at) = line.strip_prefix("files ")?.split_once(' ')?;
        let at: i64 = at.parse().ok()?;
        let changed = || {
            let newer = self.files.iter().filter(|(_, time)| time + LAG >= at);
            newer.map(|(path, _)| path.as_path()).collect()
        };
        (names == hex(&self.names)).then(changed)
    }
}

fn hex(digest: &Sha256) -> String {
    let bytes = digest.clone().finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_and_what_came_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path();
        fs::create_dir(source.join("fs")).unwrap();
        for file in ["fs/a.c", "fs/b.h", "fs/Makefile"] {
            fs::write(source.join(file), "").unwrap();
        }
        let seen = Seen::of(source).unwrap();
        let later = seen.files().replace(&seen.at.to_string(), "99999999999");
        assert_eq!(seen.changed_since(&later), Some(vec![]));
        let all = vec![Path::new("fs/a.c"), Path::new("fs/b.h")];
        assert_eq!(seen.changed_since(&seen.files()), Some(all));
        fs::write(source.join("fs/Makefile"), "obj-y := a.o").unwrap();
        let other = Seen::of(source).unwrap();
        assert!(other.makefiles() != seen.makefiles());
        assert!(other.changed_since(&later).is_some());
        fs::write(source.join("fs/c.c"), "").unwrap();
        assert_eq!(Seen::of(source).unwrap().changed_since(&later), None);
    }
}
