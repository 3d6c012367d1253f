//! What `status` says. Owns the shape of the report; the judgement is [`known`](super::known)'s and
//! [`settle`](super::settle)'s.

use serde::{Deserialize, Serialize};
use vmpatch_introspect::{Gva, PhysicalMemory};

use super::known::{Known, KnownPatch, Source, State};
use super::settle::{Interrupted, Verdict};
use crate::arena::{CallbackRecord, Manifest, SiteRecord, SiteRole};
use crate::journal::{Ending, Entry, Operation};

/// More patches than one boot has arena pages; the manifest that an earlier one left may claim anything.
const MAX_STALE: usize = 1024;

/// All that holds of the patches of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The boot it speaks of.
    pub boot: String,
    /// One for each name, in the order they were placed.
    pub patches: Vec<PatchReport>,
    /// The change that nobody ended.
    pub interrupted: Option<Interrupted>,
    /// Patches that an earlier boot of this VM had: gone with it.
    pub stale: Vec<StalePatch>,
    /// What could not be looked at, and why.
    pub notes: Vec<String>,
}

/// One patch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatchReport {
    /// Its name.
    pub name: String,
    /// SHA-256 of its content.
    pub digest: String,
    /// What the guest's text says.
    pub state: State,
    /// Who remembers it.
    pub source: Source,
    /// The functions it replaces.
    pub functions: Vec<String>,
    /// Functions of it that are called when it is applied or rolled back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub callbacks: Vec<CallbackRecord>,
    /// Modules that it changed and that are gone, its changes with them.
    pub unloaded: Vec<String>,
    /// Applied patches that lie upon it and must be rolled back first.
    pub above: Vec<String>,
    /// Places that hold neither its old nor its new bytes; of an applied patch, hooks that are not there.
    pub damage: Vec<Damage>,
    /// What this host last did with it.
    pub last: Option<LastChange>,
}

/// A place that holds what it should not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The function.
    pub function: String,
    /// Where the entry jump lies.
    pub at: Gva,
    /// What is there, in hex.
    pub found: String,
    /// What was there before the patch, in hex.
    pub old: String,
    /// The jump, in hex.
    pub new: String,
}

/// What this host last did with a patch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastChange {
    /// Which way.
    pub operation: Operation,
    /// When it was begun, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The patch that took its place, where that was the change.
    pub replaced_by: Option<String>,
    /// How it ended; `None`: not yet.
    pub ending: Option<Ending>,
}

/// A patch that an earlier boot had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StalePatch {
    /// Its name.
    pub name: String,
    /// The boot it was applied in.
    pub boot: String,
    /// When, in milliseconds since 1970; `None` where only the manifest it left behind tells of it.
    pub unix_ms: Option<u64>,
}

impl Report {
    /// Whether something needs a person: damage, or a change whose end is not known.
    #[must_use]
    pub fn needs_attention(&self) -> bool {
        let unknown =
            |open: &Interrupted| matches!(open.verdict, Verdict::Damaged | Verdict::Unsettled);
        self.interrupted.as_ref().is_some_and(unknown)
            || self
                .patches
                .iter()
                .any(|patch| patch.state == State::Damaged || !patch.damage.is_empty())
    }
}

/// One report for each name.
pub(super) fn patches(
    known: &Known,
    entries: &[Entry],
    boot: &str,
    memory: &dyn PhysicalMemory,
) -> Vec<PatchReport> {
    let mut reports: Vec<PatchReport> = Vec::new();
    for patch in known.patches() {
        let name = &patch.record.name;
        let counts = known
            .named(name)
            .is_some_and(|counts| std::ptr::eq(counts, patch));
        if counts {
            reports.push(report(known, patch, entries, boot, memory));
        }
    }
    reports
}

/// Patches that stood when an earlier boot ended, the latest boot last.
pub(super) fn stale(entries: &[Entry], manifest: Option<&Manifest>, boot: &str) -> Vec<StalePatch> {
    let mut boots: Vec<&str> = Vec::new();
    for begun in entries
        .iter()
        .filter_map(|entry| entry.transcript.begun.as_ref())
    {
        if begun.boot != boot && !boots.contains(&begun.boot.as_str()) {
            boots.push(&begun.boot);
        }
    }
    let standing = |boot: &&str| crate::journal::history::standing(entries, boot);
    let mut stale: Vec<_> = boots
        .iter()
        .flat_map(standing)
        .map(|(_, begun)| StalePatch {
            name: begun.patch.name.clone(),
            boot: begun.boot.clone(),
            unix_ms: Some(begun.unix_ms),
        })
        .collect();
    for left in left_behind(manifest, boot) {
        if !stale
            .iter()
            .any(|known| known.name == left.name && known.boot == left.boot)
        {
            stale.push(left);
        }
    }
    stale
}

/// What an earlier boot left in the slot: patches that it had placed.
fn left_behind(manifest: Option<&Manifest>, boot: &str) -> Vec<StalePatch> {
    let earlier = manifest.filter(|manifest| manifest.boot != boot);
    let patches = earlier.into_iter().flat_map(|manifest| {
        let boot = &manifest.boot;
        manifest.patches.iter().map(move |patch| StalePatch {
            name: patch.name.clone(),
            boot: boot.clone(),
            unix_ms: None,
        })
    });
    patches.take(MAX_STALE).collect()
}

fn report(
    known: &Known,
    patch: &KnownPatch,
    entries: &[Entry],
    boot: &str,
    memory: &dyn PhysicalMemory,
) -> PatchReport {
    let record = &patch.record;
    PatchReport {
        name: record.name.clone(),
        digest: record.digest.clone(),
        state: patch.state,
        source: patch.source,
        callbacks: record.callbacks.clone(),
        unloaded: patch
            .unloaded
            .iter()
            .map(|module| module.name.clone())
            .collect(),
        functions: record
            .sites
            .iter()
            .filter(|site| site.role == SiteRole::Entry)
            .map(|site| site.function.clone())
            .collect(),
        above: known.above(patch).into_iter().map(str::to_owned).collect(),
        damage: match patch.state {
            State::Damaged => damage(patch.sites(), memory, true),
            State::Applied => damage(&record.hooks, memory, false),
            State::NotApplied => Vec::new(),
        },
        last: last_change(entries, boot, &record.name),
    }
}

/// Places that hold neither their new bytes nor, where those are right too, their old ones.
fn damage<'a>(
    sites: impl IntoIterator<Item = &'a SiteRecord>,
    memory: &dyn PhysicalMemory,
    or_old: bool,
) -> Vec<Damage> {
    let mut damage = Vec::new();
    for site in sites {
        for edit in &site.edits {
            let mut found = vec![0; edit.old.len()];
            let read = memory.read(edit.at, &mut found);
            if read.is_ok() && (found == edit.new || or_old && found == edit.old) {
                continue;
            }
            damage.push(Damage {
                function: site.function.clone(),
                at: site.at,
                found: read.map_or_else(|why| why.to_string(), |()| hex(&found)),
                old: hex(&edit.old),
                new: hex(&edit.new),
            });
        }
    }
    damage
}

fn last_change(entries: &[Entry], boot: &str, name: &str) -> Option<LastChange> {
    entries.iter().rev().find_map(|entry| {
        let begun = entry.transcript.begun.as_ref()?;
        let is_its_own = begun.patch.name == name;
        let replaces_it = !is_its_own && begun.replaced.iter().any(|it| it == name);
        (begun.boot == boot && (is_its_own || replaces_it)).then(|| LastChange {
            operation: begun.operation,
            unix_ms: begun.unix_ms,
            replaced_by: replaces_it.then(|| begun.patch.name.clone()),
            ending: entry.transcript.ending.clone(),
        })
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
