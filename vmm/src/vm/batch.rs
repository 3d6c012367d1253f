//! Changing guest bytes while every vCPU stands: a batch is compared, written and read back as one, or
//! leaves no trace. Owns the rules and the way back; does not own when it is allowed ([`super::stop`]).

use vmpatch_introspect::address::{Gpa, PAGE_SIZE};
use vmpatch_introspect::target::{Edit, MemoryError, PhysicalMemory, WriteError};

use crate::memory::GuestMemory;

/// The most edits of one batch.
pub const MAX_EDITS: usize = 512;

/// The most bytes of one batch, all `new` sides together.
pub const MAX_BATCH_BYTES: usize = 48 << 10;

/// Where a batch goes: memory that can be read back.
pub(crate) trait Places: PhysicalMemory {
    /// Copies `bytes` to `at` and records the pages as dirty.
    fn put(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError>;
}

impl Places for GuestMemory {
    fn put(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        self.write(at, bytes)
    }
}

/// What one stop wrote, in order. Kept until the guest is resumed.
#[derive(Debug, Default)]
pub(crate) struct Undo(Vec<Edit>);

impl Undo {
    /// Writes a batch, and remembers it.
    ///
    /// # Errors
    /// [`WriteError`]; but for [`WriteError::UndoFailed`] nothing differs from before.
    pub(crate) fn write(&mut self, places: &dyn Places, batch: &[Edit]) -> Result<(), WriteError> {
        validate(places, batch)?;
        for edit in batch {
            compare(places, edit)?;
        }
        let before = self.0.len();
        for edit in batch {
            self.0.push(edit.clone());
            if !put_and_check(places, edit.at, &edit.new) {
                self.back_to(places, before)?;
                return Err(WriteError::ReadBack { at: edit.at });
            }
        }
        // Once more, all of them: no later edit may have changed an earlier one.
        let changed = batch.iter().find(|edit| !holds(places, edit.at, &edit.new));
        if let Some(edit) = changed {
            self.back_to(places, before)?;
            return Err(WriteError::ReadBack { at: edit.at });
        }
        Ok(())
    }

    /// Takes everything back, newest first.
    ///
    /// # Errors
    /// [`WriteError::UndoFailed`] names a place that does not hold its old bytes.
    pub(crate) fn all(&mut self, places: &dyn Places) -> Result<(), WriteError> {
        self.back_to(places, 0)
    }

    /// Goes on past a failure, to restore what can be restored, and then names the first.
    fn back_to(&mut self, places: &dyn Places, kept: usize) -> Result<(), WriteError> {
        let mut failed = None;
        for edit in self.0.drain(kept..).rev() {
            if !put_and_check(places, edit.at, &edit.old) {
                failed = failed.or(Some(edit.at));
            }
        }
        match failed {
            Some(at) => Err(WriteError::UndoFailed { at }),
            None => Ok(()),
        }
    }
}

/// Everything that can be known before a byte is touched.
fn validate(places: &dyn Places, batch: &[Edit]) -> Result<(), WriteError> {
    let bytes: usize = batch.iter().map(|edit| edit.new.len()).sum();
    if batch.len() > MAX_EDITS || bytes > MAX_BATCH_BYTES {
        let at = batch.first().map_or(Gpa(0), |edit| edit.at);
        let what = format!(
            "{} edits of {bytes} bytes are too many at once",
            batch.len()
        );
        return Err(WriteError::Malformed { at, what });
    }
    for edit in batch {
        if let Some(what) = fault(places, edit) {
            return Err(WriteError::Malformed { at: edit.at, what });
        }
    }
    let mut ranges: Vec<_> = batch.iter().map(|edit| (edit.at, edit.new.len())).collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if let [(low, len), (high, _)] = *pair
            && high.0 - low.0 < len as u64
        {
            let what = format!("overlaps the edit at {low}");
            return Err(WriteError::Malformed { at: high, what });
        }
    }
    Ok(())
}

fn fault(places: &dyn Places, edit: &Edit) -> Option<String> {
    let (old, new) = (edit.old.len(), edit.new.len());
    if old != new {
        return Some(format!("{old} bytes expected but {new} to be written"));
    }
    if new == 0 {
        return Some("it is empty".into());
    }
    if edit.at.page_offset() + new as u64 > PAGE_SIZE {
        return Some(format!("its {new} bytes cross a page"));
    }
    let mut now = vec![0; new];
    let read = places.read(edit.at, &mut now);
    read.err().map(|error| error.to_string())
}

fn compare(places: &dyn Places, edit: &Edit) -> Result<(), WriteError> {
    let mut found = vec![0; edit.old.len()];
    let read = places.read(edit.at, &mut found);
    if read.is_ok() && found == edit.old {
        return Ok(());
    }
    Err(WriteError::Differs {
        at: edit.at,
        expected: edit.old.clone(),
        found,
    })
}

fn put_and_check(places: &dyn Places, at: Gpa, bytes: &[u8]) -> bool {
    places.put(at, bytes).is_ok() && holds(places, at, bytes)
}

fn holds(places: &dyn Places, at: Gpa, bytes: &[u8]) -> bool {
    let mut now = vec![0; bytes.len()];
    places.read(at, &mut now).is_ok() && now == bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use vmpatch_introspect::address::GpaRange;

    /// Two pages, of which some bytes cannot be set to some value.
    struct Flaky {
        bytes: RefCell<Vec<u8>>,
        stuck: Option<(usize, u8)>,
    }

    impl Flaky {
        fn new(stuck: Option<(usize, u8)>) -> Self {
            let bytes = (0..8192u32).map(|n| n as u8).collect();
            Self {
                bytes: RefCell::new(bytes),
                stuck,
            }
        }
    }

    impl PhysicalMemory for Flaky {
        fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
            let (bytes, len) = (self.bytes.borrow(), into.len());
            let start = at.0 as usize;
            let part = bytes.get(start..start.saturating_add(len));
            into.copy_from_slice(part.ok_or(MemoryError::NotBacked { at, len })?);
            Ok(())
        }

        fn ram(&self) -> Vec<GpaRange> {
            Vec::new()
        }
    }

    impl Places for Flaky {
        fn put(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
            let mut memory = self.bytes.borrow_mut();
            for (place, &byte) in (at.0 as usize..).zip(bytes) {
                if self.stuck != Some((place, byte)) {
                    memory[place] = byte;
                }
            }
            Ok(())
        }
    }

    fn edit(at: u64, old: &[u8], new: &[u8]) -> Edit {
        Edit {
            at: Gpa(at),
            old: old.to_vec(),
            new: new.to_vec(),
        }
    }

    fn untouched(memory: &Flaky) -> bool {
        *memory.bytes.borrow() == *Flaky::new(None).bytes.borrow()
    }

    #[test]
    fn one_difference_leaves_all_unwritten() {
        let memory = Flaky::new(None);
        let batch = [edit(1, &[1], &[9]), edit(2, &[0xee], &[9])];
        let error = Undo::default().write(&memory, &batch).unwrap_err();
        assert!(
            matches!(error, WriteError::Differs { at: Gpa(2), .. }),
            "{error}"
        );
        assert!(untouched(&memory));
    }

    #[test]
    fn a_batch_that_does_not_read_back_is_undone() {
        let memory = Flaky::new(Some((2, 9)));
        let batch = [edit(1, &[1], &[9]), edit(2, &[2], &[9])];
        let error = Undo::default().write(&memory, &batch).unwrap_err();
        assert!(
            matches!(error, WriteError::ReadBack { at: Gpa(2) }),
            "{error}"
        );
        assert!(untouched(&memory));
    }

    #[test]
    fn an_undo_that_fails_is_said_and_the_rest_is_undone() {
        let memory = Flaky::new(Some((2, 2)));
        let mut undo = Undo::default();
        undo.write(&memory, &[edit(1, &[1], &[9]), edit(2, &[2], &[9])])
            .unwrap();
        undo.write(&memory, &[edit(2, &[9], &[8])]).unwrap();
        let error = undo.all(&memory).unwrap_err();
        assert!(
            matches!(error, WriteError::UndoFailed { at: Gpa(2) }),
            "{error}"
        );
        assert_eq!(memory.bytes.borrow()[1], 1);
    }

    #[test]
    fn several_batches_are_undone_newest_first() {
        let memory = Flaky::new(None);
        let mut undo = Undo::default();
        undo.write(&memory, &[edit(7, &[7, 8], &[1, 2])]).unwrap();
        undo.write(&memory, &[edit(8, &[2, 9], &[3, 4])]).unwrap();
        undo.all(&memory).unwrap();
        assert!(untouched(&memory));
    }

    #[test]
    fn malformed_edits_are_refused_before_anything_is_written() {
        let many = vec![edit(1, &[1], &[2]); MAX_EDITS + 1];
        let page = [0; 4096];
        let large: Vec<_> = (0..13).map(|n| edit(n * 4096, &page, &page)).collect();
        let cases = [
            ("crosses a page", vec![edit(4095, &[255, 0], &[1, 1])]),
            ("is not backed", vec![edit(8192, &[0], &[1])]),
            (
                "is at the end of the address space",
                vec![edit(u64::MAX, &[0], &[1])],
            ),
            ("is empty", vec![edit(1, &[], &[])]),
            ("has two lengths", vec![edit(1, &[1], &[1, 2])]),
            (
                "overlaps",
                vec![edit(2, &[2, 3], &[0, 0]), edit(1, &[1, 2], &[0, 0])],
            ),
            ("has too many edits", many),
            ("has too many bytes", large),
        ];
        for (what, batch) in cases {
            let memory = Flaky::new(None);
            let result = Undo::default().write(&memory, &batch);
            assert!(
                matches!(result, Err(WriteError::Malformed { .. })),
                "one that {what}"
            );
            assert!(untouched(&memory), "one that {what}");
        }
    }
}
