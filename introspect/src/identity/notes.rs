//! The GNU build id of vmlinux, from its ELF notes in memory.

use memchr::memmem::Finder;

use crate::address::{GvaRange, PAGE_SIZE};
use crate::image::Region;
use crate::paging::{KernelMemory, ReadError};
use crate::symbols::Symbols;

/// `NT_GNU_BUILD_ID`.
const BUILD_ID: u32 = 3;
/// Name, type and size of a build id of 20 bytes, as the linker writes it.
const HEADER: &[u8; 16] = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
const ID: usize = 20;
/// Most bytes of notes that are believed.
const MOST_NOTES: u64 = 64 << 10;

/// The build id in lower-case hex: from the notes between `__start_notes` and `__stop_notes`, or, for
/// kernels without data symbols, from the only note in read-only data that belongs to no vDSO image.
///
/// # Errors
/// Read-only data that cannot be read.
pub(super) fn build_id(
    memory: &KernelMemory<'_>,
    regions: &[Region],
    symbols: &Symbols,
) -> Result<Option<String>, ReadError> {
    if let (Ok(start), Ok(end)) = (
        symbols.unique("__start_notes"),
        symbols.unique("__stop_notes"),
    ) {
        let range = GvaRange { start, end };
        let mut notes = vec![0; usize::try_from(range.size().min(MOST_NOTES)).unwrap_or(0)];
        memory.read(start, &mut notes)?;
        return Ok(in_notes(&notes).map(hex));
    }
    search(memory, regions)
}

/// The build id in a row of notes (gabi, "Note Section"; the kernel pads to 4 bytes).
fn in_notes(notes: &[u8]) -> Option<&[u8]> {
    let mut rest = notes;
    loop {
        let word = |at: usize| {
            rest.get(at..at + 4)?
                .try_into()
                .ok()
                .map(u32::from_le_bytes)
        };
        let (name, desc, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
        let desc_at = name.checked_next_multiple_of(4)?.checked_add(12)?;
        let end = desc_at.checked_add(desc)?;
        if kind == BUILD_ID && rest.get(12..12 + name)? == b"GNU\0" {
            return rest.get(desc_at..end);
        }
        rest = rest.get(end.checked_next_multiple_of(4)?..)?;
    }
}

fn search(memory: &KernelMemory<'_>, regions: &[Region]) -> Result<Option<String>, ReadError> {
    let finder = Finder::new(HEADER);
    let mut found = Vec::new();
    for region in regions
        .iter()
        .filter(|region| !region.writable && !region.executable)
    {
        let mut page = region.range.start;
        let mut bytes = vec![0; PAGE_SIZE as usize + HEADER.len() + ID];
        while page < region.range.end {
            let left = region.range.end.0 - page.0;
            bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            memory.read(page, &mut bytes)?;
            found.extend(in_page(&finder, &bytes));
            page = page.wrapping_add(PAGE_SIZE);
        }
    }
    match found.as_slice() {
        [one] => Ok(Some(one.clone())),
        _ => Ok(None),
    }
}

/// A build id whose note begins in this page, unless the page begins an ELF image, as a vDSO does.
fn in_page(finder: &Finder<'_>, bytes: &[u8]) -> Option<String> {
    if bytes.starts_with(b"\x7fELF") {
        return None;
    }
    let start = finder
        .find(bytes)
        .filter(|start| *start < PAGE_SIZE as usize)?;
    bytes
        .get(start + HEADER.len()..start + HEADER.len() + ID)
        .map(hex)
}

/// Lower-case hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [name.len() as u32, desc.len() as u32, kind] {
            note.extend(word.to_le_bytes());
        }
        for part in [name, desc] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    #[test]
    fn the_build_id_is_found_behind_other_notes() {
        let mut notes = note(b"Xen\0", BUILD_ID, b"no");
        notes.extend(note(b"Linux\0", 0x100, b"salt"));
        notes.extend(note(b"GNU\0", BUILD_ID, &[0xab; 20]));
        assert_eq!(in_notes(&notes).map(hex), Some("ab".repeat(20)));
        assert_eq!(in_notes(&notes[..notes.len() - 1]), None);
    }

    proptest! {
        #[test]
        fn hostile_notes_never_panic(notes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = in_notes(&notes);
        }
    }
}
