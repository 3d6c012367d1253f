//! The journal: what this host meant to do to a guest, made durable before it is done. Owns the intents of
//! one VM and their endings; the guest's side of the story is the manifest in its arena.
//!
//! ```text
//!                 ┌── commit(applied) ──▶ committed
//!   begin ─▶ open ┤
//!                 └── abandon(reason) ──▶ abandoned
//!             │
//!             └── the program dies: stays open until a later run settles it by the live bytes
//! ```
//!
//! Invariant: no guest byte is written unless a durable intent holds its old and new value.

mod bytes;
pub mod codec;
pub mod folder;
pub mod history;
pub mod intent;
pub mod lock;
pub mod record;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

pub use folder::{Entry, Folder, FolderError};
pub use intent::Intent;
pub use lock::{Lock, LockError};
pub use record::{ArenaEdit, Begun, Ending, Operation};

use crate::apply::change::Change;
use crate::apply::observer::{Boundary, Observer};

/// Closed changes that no longer bear on the guest are kept up to this many, for `status` and people.
const KEEP: usize = 32;

/// The journal of one VM, locked: no other vmpatch changes this VM while it lives.
#[derive(Debug)]
pub struct Journal {
    folder: Folder,
    _lock: Lock,
}

/// Why the journal does not let a change begin or end.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another program is at work.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The journal cannot be read or written.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// An earlier change has no ending yet.
    #[error("an earlier {} of patch {patch} was interrupted; `vmpatch status` says what holds", operation.verb())]
    Open {
        /// Which way it went.
        operation: Operation,
        /// Its patch.
        patch: String,
    },
}

impl Journal {
    /// Opens the journal in `folder`, made if it is not there, and keeps everybody else out.
    ///
    /// # Errors
    /// [`JournalError::Lock`] where another vmpatch is at work, [`JournalError::Folder`].
    pub fn open(folder: &Path) -> Result<Self, JournalError> {
        let folder = Folder::create(folder)?;
        let lock = Lock::take(folder.path())?;
        Ok(Self {
            folder,
            _lock: lock,
        })
    }

    /// Every change of this VM, oldest first.
    ///
    /// # Errors
    /// [`JournalError::Folder`].
    pub fn entries(&self) -> Result<Vec<Entry>, JournalError> {
        Ok(self.folder.entries()?)
    }

    /// Makes the intent of a change durable. From here on the guest may be written to.
    ///
    /// # Errors
    /// [`JournalError`]; the guest is as before.
    pub fn begin<'o>(
        self,
        change: Change,
        observer: &'o dyn Observer,
    ) -> Result<Intent<'o>, JournalError> {
        let entries = self.folder.entries()?;
        refuse_open(&entries)?;
        self.prune(&entries, change.boot())?;
        let number = entries
            .last()
            .map_or(1, |last| last.number.saturating_add(1));
        self.folder.begin(number, &intent_of(&change))?;
        observer.boundary(Boundary::Begun);
        Ok(Intent::new(self, number, change, observer))
    }

    /// Writes down how a change ended.
    pub(crate) fn end(&self, number: u64, ending: &Ending) -> Result<(), JournalError> {
        Ok(self.folder.end(number, ending)?)
    }

    /// Forgets the oldest changes that no longer bear on the guest: of other boots, abandoned, taken back.
    fn prune(&self, entries: &[Entry], boot: &str) -> Result<(), JournalError> {
        let standing = history::standing(entries, boot);
        let stands = |entry: &&Entry| standing.iter().any(|(number, _)| *number == entry.number);
        let idle: Vec<_> = entries.iter().filter(|entry| !stands(entry)).collect();
        let surplus = idle.len().saturating_sub(KEEP);
        for entry in idle.into_iter().take(surplus) {
            self.folder.forget(entry.number)?;
        }
        Ok(())
    }
}

/// Milliseconds since 1970 by the host's clock.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The version that records carry.
#[must_use]
pub fn tool() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

fn refuse_open(entries: &[Entry]) -> Result<(), JournalError> {
    match history::open(entries) {
        Some((_, begun)) => Err(JournalError::Open {
            operation: begun.operation,
            patch: begun.patch.name.clone(),
        }),
        None => Ok(()),
    }
}

fn intent_of(change: &Change) -> Begun {
    Begun {
        tool: tool(),
        unix_ms: now_ms(),
        operation: change.operation(),
        boot: change.boot().to_owned(),
        patch: change.patch().clone(),
        replaced: change.replaced().to_vec(),
        map: change.map().to_vec(),
        edits: change.edits().to_vec(),
        modules: change.busy().modules().to_vec(),
        arena: change.arena().to_vec(),
    }
}
