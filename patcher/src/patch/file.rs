//! A patch as a file: what surrounds the content. Owns the header and the checksum. What the content means is
//! the parent module's business, whether it is well formed [`super::check`]'s, the file on disk [`disk`]'s.
//!
//! ```text
//!  0  8  magic "VMPATCH\0"
//!  8  4  format version                little-endian, as all numbers here
//! 12  4  header length, 32
//! 16  8  body length
//! 24  4  CRC-32 (IEEE) of the whole file, this field as zero
//! 28  4  zero
//! 32  …  body: the patch in postcard encoding
//! ```

mod disk;

use std::io;
use std::path::{Path, PathBuf};

use super::Patch;
use super::check::{self, Malformed};
use super::digest::Digest;

/// First bytes of every patch file.
pub const MAGIC: [u8; 8] = *b"VMPATCH\0";
/// The format this program writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 3;
/// Largest file accepted, header included: four times what the arena (4 MiB) can hold.
pub const MAX_FILE_BYTES: u64 = 16 << 20;

const HEADER_BYTES: usize = 32;
const CRC_AT: usize = 24;

/// Why a patch file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PatchFileError {
    /// The file cannot be opened or read.
    #[error("cannot read patch file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write patch file {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The path is a directory, a pipe or a device.
    #[error("{path} is not a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Other first bytes than a patch file has.
    #[error("not a patch file: it does not begin with the mark of one")]
    NotAPatch,
    /// A format version this program does not know.
    #[error("written by another version of vmpatch: format {found}, this one reads format {known}")]
    OtherVersion {
        /// Version in the file.
        found: u32,
        /// The version this program reads.
        known: u32,
    },
    /// Fewer bytes than the header says.
    #[error("patch file is truncated: {have} of {need} bytes are there")]
    Truncated {
        /// Bytes there are.
        have: u64,
        /// Bytes there should be.
        need: u64,
    },
    /// More bytes than the header says.
    #[error("patch file has {have} bytes but should end after {need}")]
    Trailing {
        /// Bytes there are.
        have: u64,
        /// Bytes there should be.
        need: u64,
    },
    /// Beyond [`MAX_FILE_BYTES`].
    #[error("patch file is too large: {size} bytes, at most {limit} are accepted")]
    TooLarge {
        /// Size found or claimed, in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A header field that has only one right value has another.
    #[error("patch file header is damaged: {field}")]
    Header {
        /// Which field.
        field: &'static str,
    },
    /// The checksum in the header is not that of the file.
    #[error("patch file is damaged: its checksum is {computed:08x}, its header says {stored:08x}")]
    Checksum {
        /// What the header says.
        stored: u32,
        /// What the bytes give.
        computed: u32,
    },
    /// The body is not an encoded patch.
    #[error("patch file content cannot be decoded: {0}")]
    Decode(postcard::Error),
    /// The patch cannot be encoded.
    #[error("patch cannot be encoded: {0}")]
    Encode(postcard::Error),
    /// The content contradicts itself or goes beyond a limit.
    #[error("patch file content is malformed: {0}")]
    Malformed(#[from] Malformed),
}

/// A well-formed patch with its identity. Can only be had through [`check::check`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatchFile {
    patch: Patch,
    digest: Digest,
    body: Vec<u8>,
}

impl PatchFile {
    /// Checks and encodes a patch.
    ///
    /// # Errors
    /// What [`decode`] would say of the file, and a patch beyond the size limit.
    pub fn new(patch: Patch) -> Result<Self, PatchFileError> {
        check::check(&patch)?;
        let body = postcard::to_stdvec(&patch).map_err(PatchFileError::Encode)?;
        within_limit(file_bytes(body.len() as u64))?;
        Ok(Self {
            digest: Digest::of(&body),
            patch,
            body,
        })
    }

    /// Reads and checks a patch file.
    ///
    /// # Errors
    /// Not readable, or as [`decode`].
    pub fn open(path: &Path) -> Result<Self, PatchFileError> {
        decode(&disk::read_limited(path)?)
    }

    /// Writes the file: readers see the old one or the whole new one, also after a power cut.
    ///
    /// # Errors
    /// [`PatchFileError::Write`]; the old file is then as it was.
    pub fn save(&self, path: &Path) -> Result<(), PatchFileError> {
        disk::replace(path, &self.encode()).map_err(|source| PatchFileError::Write {
            path: path.to_owned(),
            source,
        })
    }

    /// The whole file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut file = Vec::with_capacity(HEADER_BYTES + self.body.len());
        file.extend_from_slice(&MAGIC);
        file.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        file.extend_from_slice(&(HEADER_BYTES as u32).to_le_bytes());
        file.extend_from_slice(&(self.body.len() as u64).to_le_bytes());
        file.extend_from_slice(&[0; 8]);
        file.extend_from_slice(&self.body);
        let crc = checksum(&file);
        file[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        file
    }

    /// The content.
    #[must_use]
    pub fn patch(&self) -> &Patch {
        &self.patch
    }

    /// The identity of the content.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The content, by value.
    #[must_use]
    pub fn into_patch(self) -> Patch {
        self.patch
    }
}

/// Checks and decodes a whole patch file.
///
/// # Errors
/// Each way a file can be wrong has its own [`PatchFileError`].
pub fn decode(file: &[u8]) -> Result<PatchFile, PatchFileError> {
    let body = unwrap_body(file)?;
    let (patch, rest) = postcard::take_from_bytes::<Patch>(body).map_err(PatchFileError::Decode)?;
    if !rest.is_empty() {
        return Err(Malformed::Leftover { bytes: rest.len() }.into());
    }
    check::check(&patch)?;
    Ok(PatchFile {
        patch,
        digest: Digest::of(body),
        body: body.to_vec(),
    })
}

/// Checks everything around the body and returns it.
fn unwrap_body(file: &[u8]) -> Result<&[u8], PatchFileError> {
    let have = file.len() as u64;
    if file.is_empty() || file.iter().zip(&MAGIC).any(|(is, wanted)| is != wanted) {
        return Err(PatchFileError::NotAPatch);
    }
    // The version may be all that an older or newer format shares with this one.
    let found = u32_at(file, 8).ok_or(truncated(have, HEADER_BYTES as u64))?;
    if found != FORMAT_VERSION {
        return Err(PatchFileError::OtherVersion {
            found,
            known: FORMAT_VERSION,
        });
    }
    let (Some(header_len), Some(body_len), Some(stored), Some(zero)) = (
        u32_at(file, 12),
        u64_at(file, 16),
        u32_at(file, CRC_AT),
        u32_at(file, 28),
    ) else {
        return Err(truncated(have, HEADER_BYTES as u64));
    };
    if header_len as usize != HEADER_BYTES {
        return Err(PatchFileError::Header {
            field: "header length",
        });
    }
    let need = within_limit(file_bytes(body_len))?;
    match have {
        _ if have < need => return Err(truncated(have, need)),
        _ if have > need => return Err(PatchFileError::Trailing { have, need }),
        _ => {}
    }
    let computed = checksum(file);
    if computed != stored {
        return Err(PatchFileError::Checksum { stored, computed });
    }
    if zero != 0 {
        return Err(PatchFileError::Header {
            field: "reserved bytes",
        });
    }
    Ok(&file[HEADER_BYTES..])
}

fn truncated(have: u64, need: u64) -> PatchFileError {
    PatchFileError::Truncated { have, need }
}

fn file_bytes(body_len: u64) -> u64 {
    body_len.saturating_add(HEADER_BYTES as u64)
}

fn within_limit(size: u64) -> Result<u64, PatchFileError> {
    if size > MAX_FILE_BYTES {
        return Err(PatchFileError::TooLarge {
            size,
            limit: MAX_FILE_BYTES,
        });
    }
    Ok(size)
}

/// CRC of a file of at least header length, its own field counted as zero.
fn checksum(file: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&file[..CRC_AT]);
    crc.update(&[0; 4]);
    crc.update(&file[CRC_AT + 4..]);
    crc.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(
        bytes.get(at..at.checked_add(8)?)?.try_into().ok()?,
    ))
}

#[cfg(test)]
mod tests;
