//! Patches that are applied already: what a new one lies upon or takes the place of, and the guest's memory as it is beneath
//! them. A patch may replace a function that another one has replaced; it then lies upon that one. Or all of them go in the
//! stop in which it comes. Which are applied is [`Known`]'s to judge.

use vmpatch_introspect::{GvaRange, PhysicalMemory};

use crate::arena::{BusyKind, BusyRange, Overlay, PatchRecord, SiteRecord};
use crate::status::{Known, KnownPatch, State};

/// What becomes of the patches that are applied already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stacking {
    /// They stay, beside the new one or beneath it.
    #[default]
    Upon,
    /// All of them are undone in the stop in which the new one is applied.
    Replace,
}

/// Why a patch cannot be applied beside those that are there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
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
#[derive(Clone, Debug)]
pub struct Layers {
    stacking: Stacking,
    /// Applied, the uppermost first.
    applied: Vec<KnownPatch>,
    damaged: Vec<PatchRecord>,
    /// Hooks of any patch that are in place.
    hooks: Vec<SiteRecord>,
}

impl Layers {
    /// Those of one boot.
    ///
    /// # Errors
    /// [`LayerError::Unclear`] where one that is to be replaced is neither applied nor rolled back.
    pub fn of(known: &Known, stacking: Stacking) -> Result<Self, LayerError> {
        let in_state = |state| known.patches().iter().filter(move |it| it.state == state);
        let mut applied: Vec<_> = in_state(State::Applied).cloned().collect();
        applied.sort_by_key(|patch| patch.depth);
        let damaged: Vec<_> = in_state(State::Damaged)
            .map(|it| it.record.clone())
            .collect();
        if let (Stacking::Replace, Some(unclear)) = (stacking, damaged.first()) {
            let mut sites = unclear.sites.iter();
            return Err(LayerError::Unclear {
                function: sites
                    .next()
                    .map_or_else(String::new, |it| it.function.clone()),
                owner: unclear.name.clone(),
            });
        }
        Ok(Self {
            stacking,
            applied,
            damaged,
            hooks: known.hooks().into_iter().cloned().collect(),
        })
    }

    /// The uppermost patch that has replaced a function and stays, if any has.
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
        if let Some(hooked) = self.staying().find(has_hook) {
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
        Ok(self.staying().find(has_site))
    }

    /// The patches that are undone when the new one is applied, the uppermost first.
    #[must_use]
    pub fn undone(&self) -> &[KnownPatch] {
        match self.stacking {
            Stacking::Upon => &[],
            Stacking::Replace => &self.applied,
        }
    }

    /// Hooks that go, where the new patch needs `needed`.
    #[must_use]
    pub fn unneeded_hooks(&self, needed: &[SiteRecord]) -> Vec<SiteRecord> {
        let goes = |hook: &&SiteRecord| {
            self.stacking == Stacking::Replace && !needed.iter().any(|other| other.at == hook.at)
        };
        self.hooks.iter().filter(goes).cloned().collect()
    }

    /// Memory as it is beneath all of them.
    #[must_use]
    pub fn beneath<'a>(&self, memory: &'a dyn PhysicalMemory) -> Overlay<'a> {
        peeled(&self.applied, memory)
    }

    /// Memory as the new patch will find it: the places that it changes hold there what its rollback has to bring back.
    #[must_use]
    pub fn ground<'a>(&self, memory: &'a dyn PhysicalMemory) -> Overlay<'a> {
        peeled(self.undone(), memory)
    }

    fn staying(&self) -> impl Iterator<Item = &PatchRecord> {
        let stay = self.stacking == Stacking::Upon;
        let staying = self.applied.iter().filter(move |_| stay);
        staying.map(|patch| &patch.record)
    }
}

/// Without what these did, the uppermost of which comes first.
fn peeled<'a>(patches: &[KnownPatch], memory: &'a dyn PhysicalMemory) -> Overlay<'a> {
    let mut overlay = Overlay::over(memory);
    for patch in patches {
        overlay.peel(patch.edits());
    }
    overlay
}

/// The code of a patch, as what a patch upon it replaces in turn: all of it, for its parts and helpers lead back into the
/// function without a frame of their own in it.
pub fn code_of(record: &PatchRecord) -> impl Iterator<Item = BusyRange> {
    record.busy_for_rollback().map(|it| BusyRange {
        kind: BusyKind::Old,
        ..it.clone()
    })
}
