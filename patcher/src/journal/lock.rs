//! One tool at a time on one VM: an advisory lock on a file in the journal's folder, which the kernel
//! releases when its holder dies. Owns the lock file and the name of its holder; nothing of the journal.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const FILE: &str = "lock";
/// More than any holder writes; the file may hold anything.
const MAX_HOLDER: u64 = 64;

/// The lock, held until dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error("another vmpatch ({holder}) is at work on this VM; wait for it to finish")]
    Held {
        /// Who, as they wrote it down.
        holder: String,
    },
    /// The lock file cannot be used.
    #[error("lock file: {0}")]
    Io(#[from] io::Error),
}

impl Lock {
    /// Takes the lock of `folder`, or says who has it. Never waits.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn take(folder: &Path) -> Result<Self, LockError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(folder.join(FILE))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LockError::Held {
                    holder: holder(&file),
                });
            }
            Err(TryLockError::Error(why)) => return Err(why.into()),
        }
        file.set_len(0)?;
        file.rewind()?;
        write!(file, "process {}", std::process::id())?;
        Ok(Self { _file: file })
    }
}

fn holder(file: &File) -> String {
    let mut bytes = Vec::new();
    match file.take(MAX_HOLDER).read_to_end(&mut bytes) {
        Ok(1..) => String::from_utf8_lossy(&bytes).escape_debug().to_string(),
        _ => "unknown process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_told_who_has_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take(folder.path()).unwrap();
        let refused = Lock::take(folder.path()).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("process {}", std::process::id())),
            "{refused}"
        );
        drop(first);
        Lock::take(folder.path()).unwrap();
    }
}
