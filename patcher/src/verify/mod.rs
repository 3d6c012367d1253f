//! Proof that the old functions really are what runs (run-pre matching), and the last thing made before
//! the journal: a [`Verified`] holds every byte that is to be written, and what is there now.

use serde::{Deserialize, Serialize};

use vmpatch_introspect::target::Edit;
use vmpatch_introspect::{Gva, GvaRange};

use crate::arena::{ArenaWrite, BusyRange, MapEdits, PatchRecord};

/// A patch that is linked for one boot of one guest and whose old functions were found running there.
/// Nothing in it depends on the patch file any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// The boot it was made for ([`Identity::boot`](vmpatch_introspect::identity::Identity::boot)).
    pub boot: String,
    /// What the manifest will say of it: name, digest, sites, busy ranges.
    pub record: PatchRecord,
    /// Into the arena slot while the guest runs, in this order: the manifest, so that no other patch is
    /// given these pages; new code and data; then the page-table entries.
    pub arena_writes: Vec<ArenaWrite>,
    /// In the stop, first: map the arena window. Not reversed by rollback.
    pub map: MapEdits,
    /// In the stop, after `map`: the entry jumps. Rollback reverses them.
    pub switch: Vec<Edit>,
    /// What each function became, for the report.
    pub functions: Vec<FunctionReport>,
}

impl Verified {
    /// The whole batch of the stop, in order.
    #[must_use]
    pub fn batch(&self) -> Vec<Edit> {
        self.map.iter().chain(&self.switch).cloned().collect()
    }

    /// What must stand on no stack when the batch is written.
    pub fn busy(&self) -> impl Iterator<Item = &BusyRange> {
        self.record.busy_for_apply()
    }
}

/// One replaced function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionReport {
    /// Its symbol.
    pub name: String,
    /// The old function in the guest.
    pub old: GvaRange,
    /// The new function in the arena.
    pub new: GvaRange,
    /// Where the entry jump goes.
    pub site: Gva,
}
