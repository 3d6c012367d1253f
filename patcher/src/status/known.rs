//! Every patch that this boot of the guest has seen, by manifest and journal together, and what its sites
//! say now. Owns the judgement; reads no journal and no manifest itself, and writes nothing.
//!
//! Patches can lie one upon the other, so live bytes are *peeled*: a patch whose new bytes are all in view
//! is applied, and its old bytes come into view in their place. What is left when nothing can be peeled is
//! not applied where its old bytes are in view, and damaged where they are not.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vmpatch_introspect::target::{Edit, MemoryError};
use vmpatch_introspect::{Gpa, PhysicalMemory};

use crate::arena::{BusyKind, Manifest, PatchRecord};
use crate::journal::{Entry, history};

/// More patches than a manifest and a journal of one boot can name.
const MAX_PATCHES: usize = 8192;

/// What the live bytes say of a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Every site jumps to its new code.
    Applied,
    /// Every site is as before the patch: never applied, or rolled back.
    NotApplied,
    /// Neither: somebody else has written there.
    Damaged,
}

/// Who remembers a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The guest's arena alone: the journal of this host is lost, or another host applied it.
    Manifest,
    /// The journal alone: the manifest is lost.
    Journal,
    /// Both.
    Both,
}

/// One patch and what holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownPatch {
    /// What is recorded of it.
    pub record: PatchRecord,
    /// Who remembers it.
    pub source: Source,
    /// What the live bytes say.
    pub state: State,
    /// Its place among the applied: 0 was peeled first, so nothing lies upon it.
    pub depth: Option<usize>,
}

/// The patches of one boot, in the order they were placed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    patches: Vec<KnownPatch>,
}

impl Known {
    /// Judges every patch that manifest or journal names for `boot`. A site that cannot be read is damaged.
    #[must_use]
    pub fn judge(
        manifest: Option<&Manifest>,
        entries: &[Entry],
        boot: &str,
        memory: &dyn PhysicalMemory,
    ) -> Self {
        let mut patches = merged(manifest, entries, boot);
        let mut view = View {
            memory,
            peeled: BTreeMap::new(),
        };
        let mut depth = 0;
        while let Some(top) = find_applied(&patches, &view) {
            if let Some(patch) = patches.get_mut(top) {
                patch.state = State::Applied;
                patch.depth = Some(depth);
                view.peel(&patch.record);
            }
            depth += 1;
        }
        for patch in patches.iter_mut().filter(|patch| patch.depth.is_none()) {
            if view.shows(&patch.record, |edit| &edit.old) {
                patch.state = State::NotApplied;
            }
        }
        Self { patches }
    }

    /// All of them.
    #[must_use]
    pub fn patches(&self) -> &[KnownPatch] {
        &self.patches
    }

    /// The patch of that name that counts: the applied one, else the one placed last.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<&KnownPatch> {
        let named = || {
            self.patches
                .iter()
                .rev()
                .filter(|patch| patch.record.name == name)
        };
        named()
            .find(|patch| patch.state == State::Applied)
            .or_else(|| named().next())
    }

    /// The applied patches that lie upon `patch`: they change the same place, or its new code.
    #[must_use]
    pub fn above(&self, patch: &KnownPatch) -> Vec<&str> {
        let upon = |other: &&KnownPatch| {
            other
                .depth
                .zip(patch.depth)
                .is_some_and(|(other, this)| other < this)
                && lies_upon(&other.record, &patch.record)
        };
        self.patches
            .iter()
            .filter(upon)
            .map(|other| other.record.name.as_str())
            .collect()
    }
}

/// The last placed of the patches not yet peeled whose new bytes are in view.
fn find_applied(patches: &[KnownPatch], view: &View<'_>) -> Option<usize> {
    patches.iter().rposition(|patch| {
        let changes_something = patch.record.sites.iter().any(|site| !site.edits.is_empty());
        patch.depth.is_none() && changes_something && view.shows(&patch.record, |edit| &edit.new)
    })
}

fn merged(manifest: Option<&Manifest>, entries: &[Entry], boot: &str) -> Vec<KnownPatch> {
    let from_manifest = manifest.filter(|manifest| manifest.boot == boot);
    let mut patches: Vec<KnownPatch> = Vec::new();
    for record in from_manifest
        .iter()
        .flat_map(|manifest| &manifest.patches)
        .take(MAX_PATCHES)
    {
        note(&mut patches, record, Source::Manifest);
    }
    for begun in history::of_boot(entries, boot) {
        note(&mut patches, &begun.patch, Source::Journal);
    }
    patches
}

fn note(patches: &mut Vec<KnownPatch>, record: &PatchRecord, source: Source) {
    match patches.iter_mut().find(|known| known.record == *record) {
        Some(known) if known.source != source => known.source = Source::Both,
        Some(_) => {}
        None => patches.push(KnownPatch {
            record: record.clone(),
            source,
            state: State::Damaged,
            depth: None,
        }),
    }
}

fn lies_upon(upper: &PatchRecord, lower: &PatchRecord) -> bool {
    let same_place = upper.sites.iter().any(|one| {
        lower
            .sites
            .iter()
            .any(|other| one.covered.overlaps(&other.covered))
    });
    let new_code = || lower.busy.iter().filter(|busy| busy.kind == BusyKind::New);
    let replaces_its_code = upper
        .busy
        .iter()
        .filter(|busy| busy.kind != BusyKind::New)
        .any(|busy| new_code().any(|new| new.range.overlaps(&busy.range)));
    same_place || replaces_its_code
}

/// Live memory with some patches peeled off.
struct View<'a> {
    memory: &'a dyn PhysicalMemory,
    peeled: BTreeMap<Gpa, u8>,
}

impl View<'_> {
    /// Whether one side of every edit of a patch is what is in view.
    fn shows(&self, record: &PatchRecord, side: impl Fn(&Edit) -> &Vec<u8>) -> bool {
        let mut edits = record.sites.iter().flat_map(|site| &site.edits);
        edits.all(|edit| {
            self.at(edit.at, side(edit).len())
                .is_ok_and(|now| now == *side(edit))
        })
    }

    fn at(&self, at: Gpa, len: usize) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; len];
        self.memory.read(at, &mut bytes)?;
        let end = at.checked_add(len as u64).unwrap_or(Gpa(u64::MAX));
        for (&place, &byte) in self.peeled.range(at..end) {
            let index = usize::try_from(place.0.wrapping_sub(at.0)).unwrap_or(usize::MAX);
            if let Some(into) = bytes.get_mut(index) {
                *into = byte;
            }
        }
        Ok(bytes)
    }

    fn peel(&mut self, record: &PatchRecord) {
        for edit in record.sites.iter().flat_map(|site| &site.edits) {
            let bytes = edit.old.iter().enumerate();
            self.peeled
                .extend(bytes.map(|(index, &byte)| (edit.at.wrapping_add(index as u64), byte)));
        }
    }
}
