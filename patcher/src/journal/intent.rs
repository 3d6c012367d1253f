//! An open intent: the right to write, and the duty to say how it ended. Owns the journal, and so the lock,
//! until then.

use vmpatch_introspect::Target;

use super::record::Ending;
use super::{Journal, JournalError, now_ms};
use crate::apply::change::Change;
use crate::apply::failure::Failure;
use crate::apply::observer::{Boundary, Observer};
use crate::apply::place::{PlaceError, Placed, take_back};
use crate::apply::{Applied, Attempted};

/// A change whose old and new bytes are on the disk. Dropped without an ending it stays open there, as if
/// the program had died, and the next run settles it.
#[must_use = "an intent must be committed or abandoned; dropped, it stays open until a later run settles it"]
pub struct Intent<'o> {
    journal: Journal,
    number: u64,
    change: Change,
    observer: &'o dyn Observer,
}

impl<'o> Intent<'o> {
    pub(super) const fn new(
        journal: Journal,
        number: u64,
        change: Change,
        observer: &'o dyn Observer,
    ) -> Self {
        Self {
            journal,
            number,
            change,
            observer,
        }
    }

    /// What is to be done.
    #[must_use]
    pub const fn change(&self) -> &Change {
        &self.change
    }

    /// Who watches.
    #[must_use]
    pub fn observer(&self) -> &'o dyn Observer {
        self.observer
    }

    /// Writes new code and data into the arena, where nothing executes it yet, and reads it back.
    ///
    /// # Errors
    /// [`PlaceError`]; no byte of the guest's own memory was touched.
    pub fn place<'a>(&'a self, vm: &'a dyn Target) -> Result<Placed<'a>, PlaceError> {
        Placed::new(self, vm)
    }

    /// Ends the intent: the guest runs with the change.
    ///
    /// # Errors
    /// The record could not be written. The change is in place all the same, and the next `status` says so.
    pub fn commit(self, applied: &Applied) -> Result<(), JournalError> {
        let window = u64::try_from(applied.report.window.as_nanos()).ok();
        let ending = Ending::Committed {
            unix_ms: now_ms(),
            window_ns: window,
        };
        self.journal.end(self.number, &ending)?;
        self.observer.boundary(Boundary::Committed);
        Ok(())
    }

    /// Ends the intent: the guest runs without the change. Takes back what was put into the arena.
    ///
    /// # Errors
    /// The record could not be written; the next `status` settles it.
    pub fn abandon(self, vm: &dyn Target, reason: &str) -> Result<(), JournalError> {
        take_back(vm, self.change.arena());
        self.end_abandoned(reason)
    }

    /// The same where a callback of the patch has run: what it left in the guest may point into the arena, so that all stays
    /// there, as after a rollback.
    fn abandon_after_callback(self, reason: &str) -> Result<(), JournalError> {
        self.end_abandoned(reason)
    }

    fn end_abandoned(&self, reason: &str) -> Result<(), JournalError> {
        let ending = Ending::Abandoned {
            unix_ms: now_ms(),
            reason: reason.to_owned(),
        };
        self.journal.end(self.number, &ending)
    }

    /// Ends the intent as an attempt says: commits what was applied, abandons what is certain not to be,
    /// and leaves open what nobody knows.
    ///
    /// # Errors
    /// The attempt's own failure, or that the ending could not be written.
    pub fn conclude(
        self,
        vm: &dyn Target,
        attempted: Result<Attempted, Failure>,
    ) -> Result<Attempted, Failure> {
        match attempted {
            Ok(attempted) => {
                self.commit(&attempted.applied)?;
                Ok(attempted)
            }
            Err(failure) if failure.guest_unchanged() && failure.callback_has_run() => {
                self.abandon_after_callback(&failure.to_string())?;
                Err(failure)
            }
            Err(failure) if failure.guest_unchanged() => {
                self.abandon(vm, &failure.to_string())?;
                Err(failure)
            }
            Err(failure) => Err(failure),
        }
    }
}
