//! Where machines are found: `<run directory>/<id>/` with the control socket, `vm.json` and a lock that
//! the VMM holds as long as it lives. Owns naming, claiming, cleaning and listing.
//!
//! The lock is an open-file-description lock: it goes with its process however that ends, and whether it is
//! held can be asked without taking it.
#![allow(unsafe_code)]

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::message::Description;
use super::wire::own_uid;
use crate::config::is_id;

/// Names another place for all machines.
pub const RUN_DIR_VARIABLE: &str = "VMPATCH_RUN_DIR";

/// Bytes of a socket's path, its final zero included (unix(7)).
const MAX_SOCKET_PATH: usize = 108;
/// A description is this long at most.
const MAX_DESCRIPTION: u64 = 64 << 10;

/// A machine's place, claimed by this process. Dropping it removes it.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
}

/// Why a machine's place could not be had or found.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// No directory to put machines in.
    #[error(
        "neither ${RUN_DIR_VARIABLE} nor $XDG_RUNTIME_DIR is set: nowhere to put a VM's socket"
    )]
    Nowhere,
    /// Not an id.
    #[error("{0:?} is no VM id: letters, digits, '-', '_' and '.', at most 64")]
    Id(String),
    /// The id is in use.
    #[error("a VM called {0} runs already")]
    Taken(String),
    /// The socket's path is too long for the host kernel.
    #[error("{path}: too long for a socket's path; set ${RUN_DIR_VARIABLE} to a shorter place", path = .0.display())]
    TooLong(PathBuf),
    /// The file system refused.
    #[error("{path}: {source}", path = .path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// A machine found in the run directory.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its id.
    pub id: String,
    /// Its directory.
    pub path: PathBuf,
    /// What it wrote of itself, if it can be read.
    pub description: Option<Description>,
}

/// The directory of all machines: `$VMPATCH_RUN_DIR`, else `/run/vmpatch` for root, else
/// `$XDG_RUNTIME_DIR/vmpatch`.
///
/// # Errors
/// [`RunDirError::Nowhere`].
pub fn base() -> Result<PathBuf, RunDirError> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(path) = set(RUN_DIR_VARIABLE) {
        return Ok(path.into());
    }
    if own_uid() == 0 {
        return Ok("/run/vmpatch".into());
    }
    let runtime = set("XDG_RUNTIME_DIR").ok_or(RunDirError::Nowhere)?;
    Ok(Path::new(&runtime).join("vmpatch"))
}

/// The control socket of a machine's directory.
#[must_use]
pub fn socket_of(path: &Path) -> PathBuf {
    path.join("control.sock")
}

impl RunDir {
    /// Claims the place of `id` in `base`, and removes what a dead VMM left there.
    ///
    /// # Errors
    /// [`RunDirError::Taken`] where a living VMM has it; else what the file system said.
    pub fn claim(base: &Path, id: &str) -> Result<Self, RunDirError> {
        if !is_id(id) {
            return Err(RunDirError::Id(id.into()));
        }
        let path = base.join(id);
        let socket = socket_of(&path);
        if socket.as_os_str().len() >= MAX_SOCKET_PATH {
            return Err(RunDirError::TooLong(socket));
        }
        // A dying owner may remove the lock file between our opening and our locking it: then again.
        for _ in 0..10 {
            make_private(&path).map_err(at(&path))?;
            let lock = match open_lock(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(at(&path))?,
            };
            if !set_lock(&lock).map_err(at(&path))? {
                return Err(RunDirError::Taken(id.into()));
            }
            if is_still_there(&lock, &path) {
                let claimed = Self { path, _lock: lock };
                claimed.remove_files();
                return Ok(claimed);
            }
        }
        Err(RunDirError::Taken(id.into()))
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the control socket goes.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        socket_of(&self.path)
    }

    /// Writes `vm.json`, whole or not at all.
    ///
    /// # Errors
    /// What the file system said.
    pub fn describe(&self, description: &Description) -> Result<(), RunDirError> {
        let (path, draft) = (self.path.join("vm.json"), self.path.join("vm.json.new"));
        let text =
            serde_json::to_vec_pretty(description).map_err(|error| at(&path)(error.into()))?;
        fs::write(&draft, text).map_err(at(&draft))?;
        fs::rename(&draft, &path).map_err(at(&path))
    }

    fn remove_files(&self) {
        for name in ["control.sock", "vm.json", "vm.json.new"] {
            // Mostly not there; what cannot be removed shows when it is to be made.
            let _ = fs::remove_file(self.path.join(name));
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        self.remove_files();
        // While the lock is still held: whoever opened the file before sees that it is gone.
        let _ = fs::remove_file(lock_of(&self.path));
        // Stays if somebody has put a file of their own there.
        let _ = fs::remove_dir(&self.path);
    }
}

/// The machines in `base` whose VMM lives, by id. What dead ones left is removed.
///
/// # Errors
/// What the file system said, but for a `base` that is not there: no machines then.
pub fn list(base: &Path) -> Result<Vec<Found>, RunDirError> {
    let entries = match fs::read_dir(base) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(at(base))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(at(base))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(id) = name.filter(|name| is_id(name)) else {
            continue;
        };
        if is_live(&path) {
            let description = read_description(&path);
            found.push(Found {
                id: id.to_owned(),
                description,
                path,
            });
        } else if lock_of(&path).exists() {
            // Claiming and dropping removes it; if somebody else claims it meanwhile it is theirs.
            drop(RunDir::claim(base, id));
        }
    }
    found.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(found)
}

/// Whether a VMM holds this machine's directory.
#[must_use]
pub fn is_live(path: &Path) -> bool {
    File::open(lock_of(path)).is_ok_and(|lock| is_locked(&lock))
}

fn read_description(path: &Path) -> Option<Description> {
    let path = path.join("vm.json");
    let short = fs::metadata(&path).is_ok_and(|file| file.len() <= MAX_DESCRIPTION);
    let text = fs::read(path).ok().filter(|_| short)?;
    serde_json::from_slice(&text).ok()
}

fn lock_of(path: &Path) -> PathBuf {
    path.join("lock")
}

/// Makes a directory that only its owner enters. One that is there must be the owner's own.
fn make_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    match fs::metadata(path)?.uid() == own_uid() {
        true => Ok(()),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .read(true)
        .write(true)
        .truncate(false)
        .mode(0o600)
        .open(lock_of(path))
}

fn is_still_there(lock: &File, path: &Path) -> bool {
    let (Ok(ours), Ok(there)) = (lock.metadata(), fs::metadata(lock_of(path))) else {
        return false;
    };
    (ours.dev(), ours.ino()) == (there.dev(), there.ino())
}

/// Takes the lock; `false` where another holds it.
fn set_lock(file: &File) -> io::Result<bool> {
    let lock = whole_file();
    // SAFETY: the descriptor is open and `lock` outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    match result {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            error => Err(error),
        },
    }
}

fn is_locked(file: &File) -> bool {
    let mut lock = whole_file();
    // SAFETY: the descriptor is open and `lock` outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    result == 0 && i32::from(lock.l_type) != libc::F_UNLCK
}

/// A write lock on the whole file, whatever its length.
fn whole_file() -> libc::flock {
    libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap_or(0),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(0),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError::File { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(id: &str) -> Description {
        Description {
            id: id.into(),
            pid: 1,
            vcpus: 2,
            memory: 3,
            kernel: None,
        }
    }

    #[test]
    fn an_id_is_claimed_once() {
        let base = tempfile::tempdir().unwrap();
        let claimed = RunDir::claim(base.path(), "web1").unwrap();
        let error = RunDir::claim(base.path(), "web1").unwrap_err();
        assert!(matches!(error, RunDirError::Taken(_)), "{error}");
        assert!(RunDir::claim(base.path(), "web2").is_ok());
        drop(claimed);
        assert!(RunDir::claim(base.path(), "web1").is_ok());
    }

    #[test]
    fn a_living_machine_is_listed_with_its_description() {
        let base = tempfile::tempdir().unwrap();
        let claimed = RunDir::claim(base.path(), "web1").unwrap();
        claimed.describe(&description("web1")).unwrap();
        let found = list(base.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].description, Some(description("web1")));
        drop(claimed);
        assert!(list(base.path()).unwrap().is_empty());
        assert!(!base.path().join("web1").exists());
    }

    #[test]
    fn what_a_dead_machine_left_is_removed_by_listing_and_by_claiming() {
        let base = tempfile::tempdir().unwrap();
        for clean in ["list", "claim"] {
            let path = base.path().join("dead");
            fs::create_dir_all(&path).unwrap();
            for name in ["lock", "control.sock", "vm.json"] {
                fs::write(path.join(name), "left").unwrap();
            }
            if clean == "list" {
                assert!(list(base.path()).unwrap().is_empty());
                assert!(!path.exists());
            } else {
                let claimed = RunDir::claim(base.path(), "dead").unwrap();
                assert!(!claimed.socket().exists());
            }
        }
    }

    #[test]
    fn a_folder_that_is_no_machines_is_left_alone() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("other");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("vm.json"), "{}").unwrap();
        assert!(list(base.path()).unwrap().is_empty());
        assert!(path.join("vm.json").exists());
    }

    #[test]
    fn ids_that_leave_the_folder_and_paths_that_do_not_fit_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let error = RunDir::claim(base.path(), "../up").unwrap_err();
        assert!(matches!(error, RunDirError::Id(_)), "{error}");
        let deep = base.path().join("x".repeat(100));
        let error = RunDir::claim(&deep, "web1").unwrap_err();
        assert!(matches!(error, RunDirError::TooLong(_)), "{error}");
    }
}
