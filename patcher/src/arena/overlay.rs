//! Memory with some bytes laid over it: a guest's text as it would be without some patches, or with others. Owns the bytes
//! and what has to be written to make them true; writes nothing.

use std::collections::BTreeMap;

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::target::{Edit, MemoryError};
use vmpatch_introspect::{Gpa, GpaRange, PhysicalMemory};

/// See the module.
#[derive(Clone)]
pub struct Overlay<'a> {
    memory: &'a dyn PhysicalMemory,
    bytes: BTreeMap<Gpa, u8>,
}

impl<'a> Overlay<'a> {
    /// Memory as it is.
    #[must_use]
    pub const fn over(memory: &'a dyn PhysicalMemory) -> Self {
        let bytes = BTreeMap::new();
        Self { memory, bytes }
    }

    /// Lays the old bytes of these edits over what there was.
    pub fn peel<'e>(&mut self, edits: impl IntoIterator<Item = &'e Edit>) {
        for edit in edits {
            self.lay(edit.at, &edit.old);
        }
    }

    /// Lays the new bytes of these edits over what there was.
    pub fn put<'e>(&mut self, edits: impl IntoIterator<Item = &'e Edit>) {
        for edit in edits {
            self.lay(edit.at, &edit.new);
        }
    }

    /// Whether these bytes are to be seen.
    #[must_use]
    pub fn holds(&self, at: Gpa, bytes: &[u8]) -> bool {
        let mut now = vec![0; bytes.len()];
        self.read(at, &mut now).is_ok() && now == bytes
    }

    /// What has to be written to the memory for it to be so: runs of bytes, none of which crosses a page.
    ///
    /// # Errors
    /// The memory beneath cannot be read.
    pub fn edits(&self) -> Result<Vec<Edit>, MemoryError> {
        let mut edits: Vec<Edit> = Vec::new();
        for (&at, &byte) in &self.bytes {
            let mut old = [0];
            self.memory.read(at, &mut old)?;
            let last = edits.last_mut();
            let goes_on = |edit: &&mut Edit| {
                let end = edit.at.checked_add(edit.new.len() as u64);
                end == Some(at) && at.0 % PAGE_SIZE != 0
            };
            match last.filter(goes_on) {
                Some(edit) => {
                    edit.old.extend(old);
                    edit.new.push(byte);
                }
                None => edits.push(Edit {
                    at,
                    old: old.to_vec(),
                    new: vec![byte],
                }),
            }
        }
        Ok(edits)
    }

    fn lay(&mut self, at: Gpa, bytes: &[u8]) {
        let places = (0..).map(|offset| at.wrapping_add(offset));
        self.bytes.extend(places.zip(bytes.iter().copied()));
    }
}

impl PhysicalMemory for Overlay<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(at, into)?;
        let end = at.checked_add(into.len() as u64).unwrap_or(Gpa(u64::MAX));
        for (place, byte) in self.bytes.range(at..end) {
            let index = usize::try_from(place.0.wrapping_sub(at.0)).unwrap_or(usize::MAX);
            if let Some(into) = into.get_mut(index) {
                *into = *byte;
            }
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.memory.ram()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Slot;
    use super::*;

    fn edit(at: u64, old: &[u8], new: &[u8]) -> Edit {
        let (old, new) = (old.to_vec(), new.to_vec());
        let at = Gpa(at);
        Edit { at, old, new }
    }

    #[test]
    fn what_is_laid_last_is_seen_and_the_rest_is_as_beneath() {
        let slot = Slot::new();
        slot.write(Gpa(0x10), b"abcdef");
        let mut overlay = Overlay::over(&slot);
        overlay.peel(&[edit(0x11, b"XY", b"bc")]);
        overlay.put(&[edit(0x12, b"Y", b"Z")]);
        assert!(overlay.holds(Gpa(0x10), b"aXZdef"));
        assert!(overlay.holds(Gpa(0x12), b"Z"));
        assert!(!overlay.holds(Gpa(0x10), b"abc"));
    }

    #[test]
    fn what_has_to_be_written_is_one_edit_a_run_and_a_page() {
        let slot = Slot::new();
        slot.write(Gpa(0xffe), b"abcd");
        slot.write(Gpa(0x1010), b"e");
        let mut overlay = Overlay::over(&slot);
        overlay.put(&[edit(0xffe, b"", b"ABC"), edit(0x1010, b"", b"E")]);
        // Laid over a part of the first, and going on from it.
        overlay.peel(&[edit(0x1000, b"12", b"")]);
        assert_eq!(
            overlay.edits().unwrap(),
            [
                edit(0xffe, b"ab", b"AB"),
                edit(0x1000, b"cd", b"12"),
                edit(0x1010, b"e", b"E"),
            ]
        );
    }
}
