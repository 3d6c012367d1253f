//! The journal's folder: one file for each change, numbered in order. Owns names, permissions, durability
//! and the caps on what is read; the bytes of a file are [`codec`](super::codec)'s business.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::codec::{self, CodecError, MAX_FILE, Transcript};
use super::record::{Begun, Ending, Record};

const SUFFIX: &str = ".intent";
const UNFINISHED: &str = ".new";
/// More changes than one VM's folder ever keeps; what lies beyond was not put there by this program.
const MAX_FILES: usize = 16_384;

/// Why the journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The file system refused.
    #[error("journal {}: {why}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        #[source]
        why: io::Error,
    },
    /// A file does not hold what it should.
    #[error("journal {}: {why}; move it away to go by the guest's own manifest", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        why: CodecError,
    },
    /// More files than this program would ever leave there.
    #[error("journal {}: more than {MAX_FILES} files", .0.display())]
    TooMany(PathBuf),
}

/// One change, by its number in the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Counts the changes of this VM from 1.
    pub number: u64,
    /// What its file says.
    pub transcript: Transcript,
}

/// The folder of one VM.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Makes the folder, readable by its owner alone, where it is not there yet.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn create(path: &Path) -> Result<Self, FolderError> {
        if !path.is_dir() {
            make_folder(path).map_err(|why| FolderError::Io {
                path: path.to_owned(),
                why,
            })?;
        }
        Ok(Self::at(path))
    }

    /// The folder at `path`, which need not be there.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads every change, oldest first. No folder is no change.
    ///
    /// # Errors
    /// [`FolderError`]: a file that cannot be read hides what was done, so nothing is skipped.
    pub fn entries(&self) -> Result<Vec<Entry>, FolderError> {
        self.numbers()?
            .into_iter()
            .map(|number| {
                Ok(Entry {
                    number,
                    transcript: self.read(number)?,
                })
            })
            .collect()
    }

    /// Writes an intent durably: the file's bytes reach the disk under another name first, then the name,
    /// then the folder.
    ///
    /// # Errors
    /// [`FolderError`]; nothing of it counts then.
    pub fn begin(&self, number: u64, begun: &Begun) -> Result<(), FolderError> {
        let path = self.file(number);
        let record = Record::Begun(Box::new(begun.clone()));
        let framed = codec::frame(0, &record).map_err(|why| FolderError::Content {
            path: path.clone(),
            why,
        })?;
        let mut bytes = codec::header();
        bytes.extend(framed);
        let unfinished = path.with_extension(UNFINISHED.trim_start_matches('.'));
        self.at_path(&unfinished, |unfinished| replace(unfinished, &bytes))?;
        self.at_path(&path, |path| fs::rename(&unfinished, path))?;
        self.at_path(&self.path, sync_folder)
    }

    /// Adds the ending of a change, durably, over whatever torn record stood there.
    ///
    /// # Errors
    /// [`FolderError`]; the change then stays open and a later run settles it.
    pub fn end(&self, number: u64, ending: &Ending) -> Result<(), FolderError> {
        let path = self.file(number);
        let framed = codec::frame(1, &Record::Ended(ending.clone())).map_err(|why| {
            FolderError::Content {
                path: path.clone(),
                why,
            }
        })?;
        let torn_at = self.read(number)?.torn_at;
        self.at_path(&path, |path| append(path, torn_at, &framed))
    }

    /// Forgets a change that is of no more use to anybody.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn forget(&self, number: u64) -> Result<(), FolderError> {
        self.at_path(&self.file(number), |path| fs::remove_file(path))
    }

    fn read(&self, number: u64) -> Result<Transcript, FolderError> {
        let path = self.file(number);
        let bytes = self.at_path(&path, read_capped)?;
        codec::read(&bytes).map_err(|why| FolderError::Content { path, why })
    }

    fn numbers(&self) -> Result<Vec<u64>, FolderError> {
        let listing = match fs::read_dir(&self.path) {
            Ok(listing) => listing,
            Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(why) => {
                return Err(FolderError::Io {
                    path: self.path.clone(),
                    why,
                });
            }
        };
        let mut numbers = Vec::new();
        for (count, entry) in listing.enumerate() {
            if count >= MAX_FILES {
                return Err(FolderError::TooMany(self.path.clone()));
            }
            let entry = entry.map_err(|why| FolderError::Io {
                path: self.path.clone(),
                why,
            })?;
            numbers.extend(number_of(&entry.file_name()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn file(&self, number: u64) -> PathBuf {
        self.path.join(format!("{number:010}{SUFFIX}"))
    }

    fn at_path<T>(
        &self,
        path: &Path,
        work: impl FnOnce(&Path) -> io::Result<T>,
    ) -> Result<T, FolderError> {
        work(path).map_err(|why| FolderError::Io {
            path: path.to_owned(),
            why,
        })
    }
}

/// The number in a file name that this program gave; anything else in the folder is not its own.
fn number_of(name: &std::ffi::OsStr) -> Option<u64> {
    let digits = name.to_str()?.strip_suffix(SUFFIX)?;
    let own = digits.len() == 10 && digits.bytes().all(|byte| byte.is_ascii_digit());
    own.then(|| digits.parse().ok()).flatten()
}

/// The folder's own name must be as durable as what will be in it.
fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_folder(parent),
        _ => Ok(()),
    }
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn append(path: &Path, torn_at: Option<usize>, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    if let Some(end) = torn_at {
        file.set_len(end as u64)?;
    }
    file.seek(SeekFrom::End(0))?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn read_capped(path: &Path) -> io::Result<Vec<u8>> {
    // Without O_NONBLOCK a named pipe in the folder would hold the reader for ever.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!("larger than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
