//! What the journal remembers of one change: the records and their meaning. Owns no file; the bytes on
//! disk are [`codec`](super::codec)'s business.

use serde::{Deserialize, Serialize};
use vmpatch_introspect::Gpa;
use vmpatch_introspect::target::Edit;

use crate::arena::{MapEdits, ModuleClaim, PatchRecord};

/// Which way a change goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Old functions are replaced by new ones.
    Apply,
    /// The old functions run again.
    Rollback,
}

impl Operation {
    /// The verb of the command line.
    #[must_use]
    pub const fn verb(self) -> &'static str {
        match self {
            Self::Apply => "apply",
            Self::Rollback => "rollback",
        }
    }
}

/// Arena bytes written while the guest runs, of any length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArenaEdit {
    /// Where, within the arena slot.
    pub at: Gpa,
    /// What was there. As long as `new`.
    #[serde(with = "super::bytes")]
    pub old: Vec<u8>,
    /// What is to be there.
    #[serde(with = "super::bytes")]
    pub new: Vec<u8>,
}

/// The intent: everything that a later run of this program needs to tell what holds and to undo it,
/// without the patch file and without the guest's manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// Version of the program that wrote it.
    pub tool: String,
    /// Wall time in milliseconds since 1970.
    pub unix_ms: u64,
    /// Which way.
    pub operation: Operation,
    /// [`Identity::boot`](vmpatch_introspect::identity::Identity::boot) of the guest it was meant for.
    pub boot: String,
    /// The patch, as the guest's manifest has it: name, digest, arena extents, sites, busy ranges.
    pub patch: PatchRecord,
    /// Names of the patches that it undoes to make room for its own.
    pub replaced: Vec<String>,
    /// Old and new value of the page-table entries written first inside the stop. They say nothing of the patch: they belong
    /// to whoever maps the arena.
    pub map: MapEdits,
    /// Old and new value of every other byte written inside the stop.
    pub edits: Vec<Edit>,
    /// Modules that some of these bytes lie in.
    pub modules: Vec<ModuleClaim>,
    /// Old and new value of every arena byte written before it.
    pub arena: Vec<ArenaEdit>,
}

/// How an intent ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// The guest runs with every edit in place.
    Committed {
        /// Wall time in milliseconds since 1970.
        unix_ms: u64,
        /// The stop window in nanoseconds; `None` where a later run found the edits in place.
        window_ns: Option<u64>,
    },
    /// The guest runs with no edit in place.
    Abandoned {
        /// Wall time in milliseconds since 1970.
        unix_ms: u64,
        /// Why.
        reason: String,
    },
}

/// One record of a journal file: first the intent, then, if it came to that, its ending.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// The intent.
    Begun(Box<Begun>),
    /// Its ending.
    Ended(Ending),
}
