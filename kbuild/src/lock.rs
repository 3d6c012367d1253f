//! A lock that one command at a time holds, and every program that it starts with it: what goes on after the command itself
//! was killed keeps it too, so that the next does not run against it.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::error::{At, BuildError};

/// See the module.
#[derive(Debug)]
pub(crate) struct Lock {
    /// Empty, so that whoever reads it as input comes to its end.
    file: File,
    at: PathBuf,
}

impl Lock {
    /// Takes the lock of this file; `wait` is told if somebody else has it.
    pub(crate) fn take(at: &Path, wait: &dyn Fn()) -> Result<Self, BuildError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(at).at(at)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                wait();
                file.lock().at(at)?;
            }
            Err(TryLockError::Error(error)) => return Err(error).at(at),
        }
        let at = at.to_owned();
        Ok(Self { file, at })
    }

    /// The input of a program that is to hold the lock until it ends (flock(2): of an open file, until its last descriptor is
    /// closed).
    pub(crate) fn held_as_input(&self) -> Result<Stdio, BuildError> {
        self.file.try_clone().map(Stdio::from).at(&self.at)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::process::Command;

    use super::*;

    #[test]
    fn what_was_started_keeps_the_lock_after_whoever_started_it_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("lock");
        let lock = Lock::take(&at, &|| panic!("nobody has it")).unwrap();
        let input = lock.held_as_input().unwrap();
        // The command has the input too, and is gone with this line.
        let sleep = Command::new("sleep").arg("0.3").stdin(input).spawn();
        drop(lock);
        let waited = Cell::new(false);
        let _lock = Lock::take(&at, &|| waited.set(true)).unwrap();
        assert!(waited.get());
        assert!(sleep.unwrap().wait().unwrap().success());
    }
}
