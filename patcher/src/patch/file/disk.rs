//! Patch files on disk: read with a limit, written so that a reader sees the old file or the new one. Knows nothing of
//! what is in them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::{MAX_FILE_BYTES, PatchFileError, within_limit};

/// The whole of a regular file that is within the limit, even if it grows meanwhile.
pub(super) fn read_limited(path: &Path) -> Result<Vec<u8>, PatchFileError> {
    let failed = |source| PatchFileError::Read {
        path: path.to_owned(),
        source,
    };
    // Asked before opening, because opening a pipe waits for its writer.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(PatchFileError::NotAFile {
            path: path.to_owned(),
        });
    }
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    within_limit(size)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    within_limit(bytes.len() as u64)?;
    Ok(bytes)
}

/// Puts a file in place: readers see the old one or the whole new one, also after a power cut.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary_beside(path)?;
    let written = write_synced(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| sync_directory_of(path));
    written.inspect_err(|_| {
        // Either it is gone already or it stays: the first error is the one to report.
        let _ = fs::remove_file(&temporary);
    })
}

/// A name in the same directory, so that renaming does not cross file systems.
fn temporary_beside(path: &Path) -> io::Result<PathBuf> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidFilename))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.tmp", std::process::id()));
    Ok(path.with_file_name(hidden))
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_directory_of(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)?.sync_all()
}
