//! Putting a finished file or folder in its place in one rename, so that an interrupted command leaves either nothing or
//! the whole thing. Does not lock: who may make the same thing at once holds a lock of their own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{At, BuildError};

/// A folder next to `target` to build in; removed on drop unless published.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    target: PathBuf,
}

impl Staging {
    /// An empty folder beside `target`, on the same file system.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn beside(target: &Path) -> Result<Self, BuildError> {
        let nameless = || io::Error::new(io::ErrorKind::InvalidInput, "no name within a folder");
        let parts = target.parent().zip(target.file_name());
        let (parent, name) = parts.ok_or_else(nameless).at(target)?;
        let name = name.to_string_lossy();
        let dir = parent.join(format!(".{name}.{}.part", std::process::id()));
        clear_abandoned(parent, &format!(".{name}."));
        fs::create_dir_all(&dir).at(&dir)?;
        Ok(Self {
            dir,
            target: target.to_path_buf(),
        })
    }

    /// The folder to work in.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the whole folder the target. A target that is there already is replaced.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn publish(self) -> Result<(), BuildError> {
        if self.target.exists() {
            fs::remove_dir_all(&self.target).at(&self.target)?;
        }
        fs::rename(&self.dir, &self.target).at(&self.target)
    }

    /// Makes one file of the folder the target.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn publish_file(self, name: &str) -> Result<(), BuildError> {
        fs::rename(self.dir.join(name), &self.target).at(&self.target)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Gone already after a publish; a leftover is only rubbish in a cache.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Removes what killed commands left: folders of that name whose process is gone, and our own.
fn clear_abandoned(parent: &Path, prefix: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix(prefix)
            .and_then(|n| n.strip_suffix(".part"))
            .and_then(|p| p.parse::<u32>().ok());
        if pid
            .is_some_and(|p| p == std::process::id() || !Path::new(&format!("/proc/{p}")).exists())
        {
            // Only rubbish: what cannot be removed now is tried again next time.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Writes `bytes` to `path` in one step.
///
/// # Errors
/// [`BuildError::File`].
pub fn file(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let staging = Staging::beside(path)?;
    let name = "file";
    fs::write(staging.dir().join(name), bytes).at(path)?;
    staging.publish_file(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_of_an_abandoned_folder() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let staging = Staging::beside(&target).unwrap();
        fs::write(staging.dir().join("half"), b"x").unwrap();
        drop(staging);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_command_left_is_removed_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        // Beyond the largest process id there can be (Linux v6.12 include/linux/threads.h, PID_MAX_LIMIT).
        let dead = dir.path().join(".out.4194305.part");
        let alive = dir.path().join(".out.1.part");
        fs::create_dir(&dead).unwrap();
        fs::create_dir(&alive).unwrap();
        let _staging = Staging::beside(&dir.path().join("out")).unwrap();
        assert!(!dead.exists() && alive.exists());
    }

    #[test]
    fn a_published_folder_replaces_the_old_one_whole() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("old"), b"").unwrap();
        let staging = Staging::beside(&target).unwrap();
        fs::write(staging.dir().join("new"), b"").unwrap();
        staging.publish().unwrap();
        assert!(target.join("new").exists() && !target.join("old").exists());
    }
}
