//! Patches that are applied already: what they are called, what they lie upon, and the guest's text as it is beneath them. A
//! patch may replace a function that another one has replaced; it then lies upon that one. Owns the view without their jumps;
//! which of them are applied is [`Known`]'s to judge.

use std::collections::BTreeMap;

use vmpatch_introspect::{Gpa, Gva, GvaRange, ReadError};

use super::live::{Guest, Live};
use crate::arena::{BusyKind, BusyRange, Manifest, PatchRecord, SiteRecord};
use crate::patch::Patch;
use crate::status::{Known, State};

/// Why a patch cannot be applied beside those that are there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
    /// It is applied already.
    #[error("patch `{name}` is applied already")]
    AlreadyApplied {
        /// Its name.
        name: String,
    },
    /// Another patch of that name is applied.
    #[error("another patch named `{name}` is applied; roll it back first")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// A function of it is hooked for the sake of a patch.
    #[error(
        "`{function}` is hooked for patch `{owner}`, whose new code may trap; roll that back first"
    )]
    Hooked {
        /// The function.
        function: String,
        /// The patch.
        owner: String,
    },
    /// A patch that covers a function of it is neither applied nor rolled back.
    #[error("patch `{owner}` has left `{function}` in a state that is neither old nor new")]
    Unclear {
        /// The function.
        function: String,
        /// The patch.
        owner: String,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Layers {
    /// Applied, the uppermost first.
    applied: Vec<PatchRecord>,
    damaged: Vec<PatchRecord>,
}

impl Layers {
    /// Judges the patches of a guest's arena.
    #[must_use]
    pub fn find(guest: &Guest<'_>, manifest: &Manifest) -> Self {
        let boot = &guest.kernel().identity.boot;
        let memory = guest.memory().physical;
        let known = Known::judge(Some(manifest), &[], boot, memory, guest.loaded());
        let of = |state| {
            let mut found: Vec<_> = known.patches().iter().collect();
            found.retain(|patch| patch.state == state);
            found.sort_by_key(|patch| patch.depth);
            found
                .into_iter()
                .map(|patch| patch.record.clone())
                .collect()
        };
        Self {
            applied: of(State::Applied),
            damaged: of(State::Damaged),
        }
    }

    /// Whether the patch, by name and digest, can be applied at all.
    ///
    /// # Errors
    /// [`LayerError::AlreadyApplied`], [`LayerError::NameTaken`].
    pub fn admit(&self, patch: &Patch, digest: &str) -> Result<(), LayerError> {
        let Some(same) = self.applied.iter().find(|it| it.name == patch.name) else {
            return Ok(());
        };
        let name = same.name.clone();
        Err(match same.digest == digest {
            true => LayerError::AlreadyApplied { name },
            false => LayerError::NameTaken { name },
        })
    }

    /// The uppermost patch that has replaced a function, if any has.
    ///
    /// # Errors
    /// [`LayerError::Unclear`], [`LayerError::Hooked`].
    pub fn upon(
        &self,
        function: &str,
        range: GvaRange,
    ) -> Result<Option<&PatchRecord>, LayerError> {
        let inside = |site: &SiteRecord| site.covered.overlaps(&range) || range.contains(site.at);
        let has_site = |record: &&PatchRecord| record.sites.iter().any(inside);
        let has_hook = |record: &&PatchRecord| record.hooks.iter().any(inside);
        if let Some(hooked) = self.applied.iter().find(has_hook) {
            return Err(LayerError::Hooked {
                function: function.to_owned(),
                owner: hooked.name.clone(),
            });
        }
        if let Some(unclear) = self.damaged.iter().find(has_site) {
            return Err(LayerError::Unclear {
                function: function.to_owned(),
                owner: unclear.name.clone(),
            });
        }
        Ok(self.applied.iter().find(has_site))
    }

    /// The guest as it is beneath all of them.
    #[must_use]
    pub fn beneath<'a>(&self, live: &'a dyn Live) -> Beneath<'a> {
        let mut covered = BTreeMap::new();
        for site in self.applied.iter().flat_map(|record| &record.sites) {
            let old = site.edits.iter().flat_map(|edit| &edit.old);
            let places = (0..).map(|offset| site.at.wrapping_add(offset));
            covered.extend(places.zip(old.copied()));
        }
        Beneath { live, covered }
    }
}

/// The code of a patch, as what a patch upon it replaces in turn: all of it, for its parts and helpers lead back into the
/// function without a frame of their own in it.
pub fn code_of(record: &PatchRecord) -> impl Iterator<Item = BusyRange> {
    record.busy_for_rollback().map(|it| BusyRange {
        kind: BusyKind::Old,
        ..it.clone()
    })
}

/// A guest without the jumps of its patches.
pub struct Beneath<'a> {
    live: &'a dyn Live,
    covered: BTreeMap<Gva, u8>,
}

impl Live for Beneath<'_> {
    fn named(&self, name: &str) -> Vec<Gva> {
        self.live.named(name)
    }

    fn named_in(&self, object: &str, name: &str) -> Vec<Gva> {
        self.live.named_in(object, name)
    }

    fn defined_in(&self, object: &str, name: &str) -> Vec<Gva> {
        self.live.defined_in(object, name)
    }

    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), ReadError> {
        self.live.read(at, into)?;
        let end = at.wrapping_add(into.len() as u64);
        if at >= end {
            return Ok(());
        }
        for (place, byte) in self.covered.range(at..end) {
            if let Some(into) = into.get_mut(place.wrapping_sub(at.0).0 as usize) {
                *into = *byte;
            }
        }
        Ok(())
    }

    fn physical(&self, at: Gva) -> Result<Gpa, ReadError> {
        self.live.physical(at)
    }

    fn describe(&self, at: Gva) -> String {
        self.live.describe(at)
    }
}
