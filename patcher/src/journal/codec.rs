//! The bytes of one journal file. Owns framing, checksums and caps; opens no file.
//!
//! ```text
//! file    magic "VMPJRNL\0" │ version u32 │ crc32 of the 12 bytes before │ record …
//! record  length u32 │ crc32 of the body │ crc32 of index, length, body crc │ body (postcard)
//! ```
//!
//! All numbers are little-endian. A record's index is part of its head's checksum, so records cannot change
//! places. A file that ends within a record is *torn*: the writer died, and what the record was to
//! announce is not known to have happened. An illegible ending counts as torn too, for an intent without an
//! ending is settled by looking at the guest itself; an illegible intent is *damage*, reported and never
//! guessed around.

use super::record::{Begun, Ending, Record};

const MAGIC: &[u8; 8] = b"VMPJRNL\0";
const VERSION: u32 = 4;
const HEADER: usize = 16;
const HEAD: usize = 12;

/// The largest body of one record, in bytes.
pub const MAX_BODY: usize = 16 << 20;
/// The largest file, in bytes.
pub const MAX_FILE: u64 = MAX_BODY as u64 + 4096;

/// Why bytes are no journal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Other magic, or the header's checksum is wrong.
    #[error("not a vmpatch journal file")]
    NotAJournal,
    /// Another version of this program wrote it.
    #[error("journal format {found}, this program knows format {known}: use the vmpatch that wrote it", known = VERSION)]
    OtherVersion {
        /// The version found.
        found: u32,
    },
    /// Larger than any record this program writes.
    #[error("journal record of {0} bytes, more than the {MAX_BODY} allowed")]
    TooLarge(usize),
    /// Bytes that no torn write explains.
    #[error("journal is damaged at byte {at}: {what}")]
    Damaged {
        /// Offset in the file.
        at: usize,
        /// What does not fit.
        what: &'static str,
    },
    /// A record could not be encoded.
    #[error("journal record cannot be encoded: {0}")]
    Encode(String),
}

/// What one journal file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transcript {
    /// The intent; `None` where the file was torn before it was complete, so that nothing was written.
    pub begun: Option<Begun>,
    /// How it ended; `None` where it is still open.
    pub ending: Option<Ending>,
    /// Offset of the first byte of a torn record: where the next one is to be written.
    pub torn_at: Option<usize>,
}

/// The header of a new file.
#[must_use]
pub fn header() -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// One record, framed; `index` counts the records of the file from 0.
///
/// # Errors
/// [`CodecError::TooLarge`], [`CodecError::Encode`].
pub fn frame(index: u32, record: &Record) -> Result<Vec<u8>, CodecError> {
    let body = postcard::to_stdvec(record).map_err(|why| CodecError::Encode(why.to_string()))?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= MAX_BODY)
        .ok_or(CodecError::TooLarge(body.len()))?;
    let crc = crc32fast::hash(&body);
    let mut bytes = Vec::with_capacity(HEAD + body.len());
    bytes.extend(length.to_le_bytes());
    bytes.extend(crc.to_le_bytes());
    bytes.extend(head_crc(index, length, crc).to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

/// Reads a whole file.
///
/// # Errors
/// [`CodecError`]; a torn end is no error.
pub fn read(bytes: &[u8]) -> Result<Transcript, CodecError> {
    let mut transcript = Transcript::default();
    if torn_header(bytes) {
        transcript.torn_at = Some(0);
        return Ok(transcript);
    }
    check_header(bytes)?;
    let mut at = HEADER;
    for index in 0.. {
        match next(bytes, at, index)? {
            Step::End => break,
            Step::Torn => {
                transcript.torn_at = Some(at);
                break;
            }
            Step::Record { record, end } => {
                transcript.take(record, at)?;
                at = end;
            }
        }
    }
    Ok(transcript)
}

impl Transcript {
    /// Begun comes first and once, its ending second and once.
    fn take(&mut self, record: Record, at: usize) -> Result<(), CodecError> {
        match (record, &self.begun, &self.ending) {
            (Record::Begun(begun), None, None) => self.begun = Some(*begun),
            (Record::Ended(ending), Some(_), None) => self.ending = Some(ending),
            _ => {
                return Err(CodecError::Damaged {
                    at,
                    what: "record out of order",
                });
            }
        }
        Ok(())
    }
}

enum Step {
    End,
    Torn,
    Record { record: Record, end: usize },
}

fn next(bytes: &[u8], at: usize, index: u32) -> Result<Step, CodecError> {
    let rest = bytes.get(at..).unwrap_or_default();
    if rest.is_empty() {
        return Ok(Step::End);
    }
    match parse(rest, at, index) {
        Err(CodecError::Damaged { .. }) if index > 0 => Ok(Step::Torn),
        step => step,
    }
}

fn parse(rest: &[u8], at: usize, index: u32) -> Result<Step, CodecError> {
    let damaged = |what| CodecError::Damaged { at, what };
    let (Some(length), Some(crc), Some(head)) = (word(rest, 0), word(rest, 4), word(rest, 8))
    else {
        return Ok(Step::Torn);
    };
    if head != head_crc(index, length, crc) {
        return unless_blank(rest.get(HEAD..), damaged("checksum of a record's head"));
    }
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if size > MAX_BODY {
        return Err(CodecError::TooLarge(size));
    }
    let Some(body) = rest.get(HEAD..HEAD + size) else {
        return Ok(Step::Torn);
    };
    if crc32fast::hash(body) != crc {
        let last = body.len().saturating_sub(1);
        return unless_blank(rest.get(HEAD + last..), damaged("checksum of a record"));
    }
    match postcard::take_from_bytes(body) {
        Ok((record, [])) => Ok(Step::Record {
            record,
            end: at + HEAD + size,
        }),
        Ok(_) => Err(damaged("record longer than its content")),
        Err(_) => Err(damaged("record that cannot be decoded")),
    }
}

/// A crash may leave the file longer than what reached the disk; the gap then reads as zeroes.
fn unless_blank(tail: Option<&[u8]>, damage: CodecError) -> Result<Step, CodecError> {
    match tail.unwrap_or_default().iter().all(|&byte| byte == 0) {
        true => Ok(Step::Torn),
        false => Err(damage),
    }
}

/// Whether the file ends, or turns to zeroes, within its header.
fn torn_header(bytes: &[u8]) -> bool {
    let whole = header();
    let kept = bytes
        .iter()
        .zip(&whole)
        .take_while(|(found, wanted)| found == wanted)
        .count();
    kept < HEADER
        && bytes
            .get(kept..)
            .is_some_and(|rest| rest.iter().all(|&byte| byte == 0))
}

fn check_header(bytes: &[u8]) -> Result<(), CodecError> {
    let (Some(fields), Some(version), Some(crc)) =
        (bytes.get(..12), word(bytes, 8), word(bytes, 12))
    else {
        return Err(CodecError::NotAJournal);
    };
    if !fields.starts_with(MAGIC) || crc32fast::hash(fields) != crc {
        return Err(CodecError::NotAJournal);
    }
    match version {
        VERSION => Ok(()),
        found => Err(CodecError::OtherVersion { found }),
    }
}

fn head_crc(index: u32, length: u32, crc: u32) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    hash.update(&index.to_le_bytes());
    hash.update(&length.to_le_bytes());
    hash.update(&crc.to_le_bytes());
    hash.finalize()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|word| u32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmpatch_introspect::Gpa;
    use vmpatch_introspect::target::Edit;

    use super::*;
    use crate::arena::PatchRecord;
    use crate::journal::record::Operation;

    fn begun(edits: Vec<Edit>) -> Begun {
        Begun {
            tool: "0.1.0".to_owned(),
            unix_ms: 1,
            operation: Operation::Apply,
            boot: "boot".to_owned(),
            patch: PatchRecord {
                name: "fix".to_owned(),
                digest: "00".to_owned(),
                extents: Vec::new(),
                modules: Vec::new(),
                sites: Vec::new(),
                busy: Vec::new(),
                hooks: Vec::new(),
                unwind: None,
                callbacks: Vec::new(),
            },
            replaced: Vec::new(),
            map: Vec::new(),
            edits,
            modules: Vec::new(),
            arena: Vec::new(),
        }
    }

    fn one_edit() -> Vec<Edit> {
        vec![Edit {
            at: Gpa(0x1005),
            old: vec![0x90; 5],
            new: vec![0xe9, 1, 2, 3, 4],
        }]
    }

    fn file(records: &[Record]) -> Vec<u8> {
        let mut bytes = header();
        for (index, record) in records.iter().enumerate() {
            bytes.extend(frame(u32::try_from(index).unwrap(), record).unwrap());
        }
        bytes
    }

    fn whole() -> (Vec<u8>, usize) {
        let intent = Record::Begun(Box::new(begun(one_edit())));
        let ending = Record::Ended(Ending::Committed {
            unix_ms: 2,
            window_ns: Some(9),
        });
        let length = file(std::slice::from_ref(&intent)).len();
        (file(&[intent, ending]), length)
    }

    #[test]
    fn what_was_written_is_read_back() {
        let (bytes, _) = whole();
        let read = read(&bytes).unwrap();
        assert_eq!(read.begun, Some(begun(one_edit())));
        assert_eq!(
            read.ending,
            Some(Ending::Committed {
                unix_ms: 2,
                window_ns: Some(9)
            })
        );
        assert_eq!(read.torn_at, None);
    }

    #[test]
    fn a_file_torn_at_any_byte_tells_what_came_before() {
        let (bytes, intent_end) = whole();
        for cut in 0..bytes.len() {
            let read = read(&bytes[..cut]).unwrap();
            assert_eq!(read.begun.is_some(), cut >= intent_end, "cut at {cut}");
            assert_eq!(read.ending, None, "cut at {cut}");
            let on_a_boundary = cut == intent_end || cut == HEADER;
            assert_eq!(read.torn_at.is_none(), on_a_boundary, "cut at {cut}");
        }
    }

    #[test]
    fn a_file_whose_end_reads_as_zeroes_is_torn_too() {
        let (bytes, intent_end) = whole();
        for cut in 0..bytes.len() {
            let mut zeroed = bytes[..cut].to_vec();
            zeroed.resize(bytes.len(), 0);
            if zeroed == bytes {
                continue;
            }
            let read = read(&zeroed).unwrap();
            assert!(
                read.begun.is_none() || cut + 4 >= intent_end,
                "zero from {cut}"
            );
            assert_eq!(read.ending, None, "zero from {cut}");
        }
    }

    #[test]
    fn a_flipped_bit_is_never_read_as_another_story() {
        let (bytes, intent_end) = whole();
        let sound = read(&bytes).unwrap();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                match read(&flipped) {
                    Err(_) => assert!(at < intent_end),
                    Ok(read) if read.begun.is_none() => assert!(at < intent_end),
                    Ok(read) => {
                        assert_eq!(read.begun, sound.begun);
                        assert_eq!(read.ending, None);
                    }
                }
            }
        }
    }

    #[test]
    fn another_format_is_refused_by_number() {
        for found in [VERSION - 1, VERSION + 1] {
            let mut bytes = MAGIC.to_vec();
            bytes.extend(found.to_le_bytes());
            bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
            assert_eq!(read(&bytes), Err(CodecError::OtherVersion { found }));
        }
    }

    #[test]
    fn records_cannot_change_places() {
        let intent = Record::Begun(Box::new(begun(Vec::new())));
        let mut bytes = header();
        bytes.extend(frame(1, &intent).unwrap());
        assert!(matches!(
            read(&bytes),
            Err(CodecError::Damaged { at: HEADER, .. })
        ));
        let twice = file(&[intent.clone(), intent]);
        assert!(matches!(read(&twice), Err(CodecError::Damaged { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = read(&bytes);
        }

        #[test]
        fn no_body_behind_a_sound_head_makes_the_reader_panic(
            body in proptest::collection::vec(any::<u8>(), 0..512)
        ) {
            let length = u32::try_from(body.len()).unwrap();
            let crc = crc32fast::hash(&body);
            let mut bytes = header();
            bytes.extend(length.to_le_bytes());
            bytes.extend(crc.to_le_bytes());
            bytes.extend(head_crc(0, length, crc).to_le_bytes());
            bytes.extend(&body);
            let _ = read(&bytes);
        }

        #[test]
        fn every_intent_survives_the_round_trip(
            edits in proptest::collection::vec(
                (any::<u64>(), proptest::collection::vec(any::<u8>(), 0..16)),
                0..8,
            )
        ) {
            let edits = edits
                .into_iter()
                .map(|(at, bytes)| Edit { at: Gpa(at), old: bytes.clone(), new: bytes })
                .collect();
            let intent = begun(edits);
            let bytes = file(&[Record::Begun(Box::new(intent.clone()))]);
            prop_assert_eq!(read(&bytes).unwrap().begun, Some(intent));
        }
    }
}
