//! The journal of one VM, settled, with what is known of every patch of this boot: where every change begins.
//! Owns the order of opening: lock, then settle what was interrupted, then judge the patches.

use std::path::Path;

use vmpatch_introspect::Target;

use super::known::{Known, State};
use super::settle::{self, Interrupted};
use crate::apply::{Change, Observer};
use crate::arena::{Loaded, Manifest, codec};
use crate::journal::{Entry, Intent, Journal, JournalError};
use crate::link::layers::{LayerError, Layers, Stacking};

/// A settled journal and what is known of the guest's patches.
#[derive(Debug)]
pub struct Ledger {
    journal: Journal,
    boot: String,
    pub(super) entries: Vec<Entry>,
    known: Known,
    interrupted: Option<Interrupted>,
    pub(super) manifest: Option<Manifest>,
    manifest_trouble: Option<String>,
}

/// Why a patch may not be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// It is applied already.
    #[error("patch {name} is applied already")]
    Applied {
        /// Its name.
        name: String,
    },
    /// Another patch of that name is applied.
    #[error(
        "another patch named {name} is applied (digest {digest}); roll it back first, or apply this one with --replace"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// The digest of the one that is applied.
        digest: String,
    },
    /// A change was interrupted, and it is not known what became of it.
    #[error(
        "it is not known what became of an earlier change of patch {patch}; see `vmpatch status`"
    )]
    Open {
        /// The patch.
        patch: String,
    },
}

impl Ledger {
    /// Locks and opens the journal, settles what was interrupted, and judges every patch of this boot
    /// by the modules that are loaded.
    ///
    /// # Errors
    /// [`JournalError`]; nothing was written to the guest.
    pub fn open(
        folder: &Path,
        vm: &dyn Target,
        boot: &str,
        loaded: Loaded<'_>,
    ) -> Result<Self, JournalError> {
        let journal = Journal::open(folder)?;
        let mut entries = journal.entries()?;
        let mut interrupted = None;
        if let Some((number, open)) = settle::judge(&entries, boot, vm, loaded) {
            interrupted = Some(settle::record(&journal, number, open)?);
            entries = journal.entries()?;
        }
        let (manifest, manifest_trouble) = read_manifest(vm);
        let known = Known::judge(manifest.as_ref(), &entries, boot, vm, loaded);
        let boot = boot.to_owned();
        Ok(Self {
            journal,
            boot,
            entries,
            known,
            interrupted,
            manifest,
            manifest_trouble,
        })
    }

    /// The boot it speaks of.
    #[must_use]
    pub fn boot(&self) -> &str {
        &self.boot
    }

    /// The patches of this boot.
    #[must_use]
    pub const fn known(&self) -> &Known {
        &self.known
    }

    /// The change that was found interrupted, and what became of it.
    #[must_use]
    pub const fn interrupted(&self) -> Option<&Interrupted> {
        self.interrupted.as_ref()
    }

    /// Why the guest's manifest could not be read, where that is so.
    #[must_use]
    pub fn manifest_trouble(&self) -> Option<&str> {
        self.manifest_trouble.as_deref()
    }

    /// The patches that are applied, as what a new one lies upon or takes the place of.
    ///
    /// # Errors
    /// [`LayerError::Unclear`].
    pub fn layers(&self, stacking: Stacking) -> Result<Layers, LayerError> {
        Layers::of(&self.known, stacking)
    }

    /// Whether a patch may be applied: not a second time, and no other of the same name unless it replaces that.
    ///
    /// # Errors
    /// [`AdmitError`].
    pub fn admit(&self, name: &str, digest: &str, stacking: Stacking) -> Result<(), AdmitError> {
        if let Some(open) = self.interrupted().filter(|open| !open.recorded) {
            return Err(AdmitError::Open {
                patch: open.patch.clone(),
            });
        }
        let named = self.known.named(name);
        let Some(there) = named.filter(|it| it.state == State::Applied) else {
            return Ok(());
        };
        let name = name.to_owned();
        match (there.record.digest == digest, stacking) {
            (true, _) => Err(AdmitError::Applied { name }),
            (false, Stacking::Replace) => Ok(()),
            (false, Stacking::Upon) => Err(AdmitError::NameTaken {
                name,
                digest: there.record.digest.clone(),
            }),
        }
    }

    /// Makes the intent of a change durable. From here on the guest may be written to.
    ///
    /// # Errors
    /// [`JournalError`]; the guest is as before.
    pub fn begin(
        self,
        change: Change,
        observer: &dyn Observer,
    ) -> Result<Intent<'_>, JournalError> {
        self.journal.begin(change, observer)
    }
}

/// The guest's manifest, or why there is none.
pub(super) fn read_manifest(vm: &dyn Target) -> (Option<Manifest>, Option<String>) {
    let read = vm
        .arena()
        .map_err(|why| why.to_string())
        .and_then(|slot| codec::read(vm, slot).map_err(|why| why.to_string()));
    match read {
        Ok(manifest) => (manifest, None),
        Err(why) => (None, Some(why)),
    }
}
