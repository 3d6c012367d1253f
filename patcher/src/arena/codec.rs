//! The manifest as bytes in the slot. Two copies, written in turn: a writer that dies half-way leaves the
//! other one whole. What the content means is [`manifest`](super::manifest)'s business.
//!
//! ```text
//!  0  8  magic "VMPARENA"
//!  8  4  format version             little-endian, as all numbers here
//! 12  4  body length
//! 16  8  generation
//! 24  4  CRC-32 (IEEE) of header and body, this field as zero
//! 28  4  zero
//! 32  …  body: the manifest in postcard encoding
//! ```

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::{Gpa, GpaRange, PhysicalMemory};

use super::manifest::{Manifest, ManifestError};
use super::window::{MANIFEST_PAGES, manifest_copy};

const MAGIC: [u8; 8] = *b"VMPARENA";
/// The format this program writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 4;
const HEADER: usize = 32;
const CRC_AT: usize = 24;
/// Most bytes of one copy.
const LIMIT: usize = MANIFEST_PAGES as usize * PAGE_SIZE as usize;

/// What one copy holds.
enum Copy {
    /// Never written.
    Blank,
    /// Whole.
    Whole(Manifest),
    /// Torn or overwritten.
    Damaged(&'static str),
    /// Of another format.
    OtherVersion(u32),
}

/// The bytes of a manifest.
///
/// # Errors
/// [`ManifestError::TooLarge`] where it does not fit one copy.
pub fn encode(manifest: &Manifest) -> Result<Vec<u8>, ManifestError> {
    let body = postcard::to_allocvec(manifest).map_err(ManifestError::Encode)?;
    if body.len() > LIMIT - HEADER {
        return Err(ManifestError::TooLarge {
            size: body.len(),
            limit: LIMIT - HEADER,
        });
    }
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&manifest.generation.to_le_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&body);
    let crc = checksum(&bytes);
    bytes.splice(CRC_AT..CRC_AT + 4, crc.to_le_bytes());
    Ok(bytes)
}

/// Where the copy of a generation lies.
#[must_use]
pub const fn place(slot: GpaRange, generation: u64) -> Gpa {
    manifest_copy(slot, (generation % 2) as u32)
}

/// Reads the newer whole copy; `None` if neither was ever written.
///
/// # Errors
/// [`ManifestError`]: no copy is whole, or one is of another format version.
pub fn read(
    memory: &dyn PhysicalMemory,
    slot: GpaRange,
) -> Result<Option<Manifest>, ManifestError> {
    let mut newest: Option<Manifest> = None;
    let mut damage = None;
    for parity in 0..2 {
        match read_copy(memory, place(slot, parity))? {
            Copy::Blank => {}
            Copy::Damaged(what) => damage = Some(what),
            Copy::OtherVersion(found) => {
                return Err(ManifestError::OtherVersion {
                    found,
                    known: FORMAT_VERSION,
                });
            }
            Copy::Whole(it) if newest.as_ref().is_none_or(|n| n.generation < it.generation) => {
                newest = Some(it);
            }
            Copy::Whole(_) => {}
        }
    }
    match (newest, damage) {
        (Some(manifest), _) => Ok(Some(manifest)),
        (None, Some(what)) => Err(ManifestError::Damaged {
            at: slot.start,
            what: what.to_owned(),
        }),
        (None, None) => Ok(None),
    }
}

fn read_copy(memory: &dyn PhysicalMemory, at: Gpa) -> Result<Copy, ManifestError> {
    let mut header = [0; HEADER];
    memory.read(at, &mut header)?;
    if header == [0; HEADER] {
        return Ok(Copy::Blank);
    }
    if !header.starts_with(&MAGIC) {
        return Ok(Copy::Damaged("wrong mark"));
    }
    let version = word(&header, 8);
    if version == 0 {
        return Ok(Copy::Damaged("no version"));
    }
    if version != FORMAT_VERSION {
        return Ok(Copy::OtherVersion(version));
    }
    let length = word(&header, 12) as usize;
    if length > LIMIT - HEADER {
        return Ok(Copy::Damaged("impossible length"));
    }
    let mut bytes = vec![0; HEADER + length];
    memory.read(at, &mut bytes)?;
    Ok(decode(&bytes))
}

fn decode(bytes: &[u8]) -> Copy {
    if checksum(bytes) != word(bytes, CRC_AT) {
        return Copy::Damaged("wrong checksum");
    }
    let body = bytes.get(HEADER..).unwrap_or_default();
    match postcard::from_bytes::<Manifest>(body) {
        Ok(manifest) if manifest.check() => Copy::Whole(manifest),
        Ok(_) => Copy::Damaged("impossible content"),
        Err(_) => Copy::Damaged("content that cannot be decoded"),
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(bytes.get(..CRC_AT).unwrap_or_default());
    hasher.update(&[0; 4]);
    hasher.update(bytes.get(CRC_AT + 4..).unwrap_or_default());
    hasher.finalize()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|four| four.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Slot, record};
    use super::*;

    fn manifest(generation: u64) -> Manifest {
        Manifest {
            boot: "b00t".into(),
            generation,
            next_page: 40,
            patches: vec![record("fix")],
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let slot = Slot::new();
        slot.write(place(slot.range, 3), &encode(&manifest(3)).unwrap());
        assert_eq!(read(&slot, slot.range).unwrap(), Some(manifest(3)));
    }

    #[test]
    fn an_untouched_slot_has_no_manifest() {
        let slot = Slot::new();
        assert_eq!(read(&slot, slot.range).unwrap(), None);
    }

    #[test]
    fn a_torn_newer_copy_leaves_the_older_one_in_force() {
        let slot = Slot::new();
        slot.write(place(slot.range, 3), &encode(&manifest(3)).unwrap());
        let newer = encode(&manifest(4)).unwrap();
        // The slot is zero where nothing was written, so zeroes at the end are not missed.
        let last = newer.iter().rposition(|&byte| byte != 0).unwrap();
        for cut in 1..=last {
            slot.write(place(slot.range, 4), &newer[..cut]);
            assert_eq!(
                read(&slot, slot.range).unwrap().unwrap().generation,
                3,
                "cut at {cut}"
            );
        }
        slot.write(place(slot.range, 4), &newer);
        assert_eq!(read(&slot, slot.range).unwrap().unwrap().generation, 4);
    }

    #[test]
    fn every_flipped_bit_of_the_only_copy_is_seen() {
        let slot = Slot::new();
        let bytes = encode(&manifest(2)).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            slot.write(place(slot.range, 2), &flipped);
            assert!(read(&slot, slot.range).is_err(), "bit {bit}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_a_guest_writes_with_a_right_checksum_is_read_without_a_panic(
            body in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
            generation: u64,
        ) {
            let mut bytes = encode(&manifest(generation)).unwrap();
            bytes.truncate(HEADER);
            bytes.splice(12..16, (body.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&body);
            bytes.splice(CRC_AT..CRC_AT + 4, [0; 4]);
            let crc = checksum(&bytes).to_le_bytes();
            bytes.splice(CRC_AT..CRC_AT + 4, crc);
            let slot = Slot::new();
            slot.write(place(slot.range, generation), &bytes);
            if let Ok(Some(manifest)) = read(&slot, slot.range) {
                proptest::prop_assert!(manifest.check());
            }
        }
    }
}
