//! Every patch that this boot of the guest has seen, by manifest and journal together, and what its sites
//! say now. Owns the judgement; reads no journal and no manifest itself, and writes nothing.
//!
//! Patches can lie one upon the other, so live bytes are *peeled*: a patch whose new bytes are all in view
//! is applied, and its old bytes come into view in their place. When nothing can be peeled any more, what
//! is left is not applied if its places hold what was there before it, or before a patch that lay beneath it
//! then and is gone since; anything else is damage.

use serde::{Deserialize, Serialize};
use vmpatch_introspect::PhysicalMemory;
use vmpatch_introspect::target::Edit;

use crate::arena::{BusyKind, Loaded, Manifest, ModuleClaim, Overlay, PatchRecord, SiteRecord};
use crate::journal::{Entry, history};

/// More patches than the arena of one boot has pages; a guest may claim more, but is not believed.
const MAX_PATCHES: usize = 1024;

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
    /// Modules that it changed and that are gone, its changes with them.
    pub unloaded: Vec<ModuleClaim>,
    /// Its hooks that are in place.
    pub hooks: Vec<SiteRecord>,
    /// Its place among the applied: 0 was peeled first, so nothing lies upon it.
    pub depth: Option<usize>,
}

/// The patches of one boot, in the order they were placed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    patches: Vec<KnownPatch>,
}

impl KnownPatch {
    /// Its places that are still there.
    pub fn sites(&self) -> impl Iterator<Item = &SiteRecord> {
        self.record.sites_outside(&self.unloaded)
    }

    /// What it has changed there.
    pub fn edits(&self) -> impl Iterator<Item = &Edit> {
        self.sites().flat_map(|site| &site.edits)
    }
}

impl Known {
    /// Judges every patch that manifest or journal names for `boot`. A site that cannot be read is damaged; one in a module
    /// that is not among those loaded is gone.
    #[must_use]
    pub fn judge(
        manifest: Option<&Manifest>,
        entries: &[Entry],
        boot: &str,
        memory: &dyn PhysicalMemory,
        loaded: Loaded<'_>,
    ) -> Self {
        let mut patches = merged(manifest, entries, boot);
        for patch in &mut patches {
            patch.unloaded = patch.record.unloaded(loaded, memory);
            let hooks = patch.record.hooks.iter();
            // What cannot be read is left to the comparison of the stop.
            let in_place = hooks.filter(|hook| hook.is_in_place(memory).unwrap_or(true));
            patch.hooks = in_place.cloned().collect();
        }
        let mut view = Overlay::over(memory);
        let mut depth = 0;
        while let Some(top) = find_applied(&patches, &view) {
            if let Some(patch) = patches.get_mut(top) {
                patch.state = State::Applied;
                patch.depth = Some(depth);
                view.peel(patch.edits());
            }
            depth += 1;
        }
        let settled: Vec<bool> = patches
            .iter()
            .map(|patch| is_gone(patch, &patches, &view))
            .collect();
        for (patch, gone) in patches.iter_mut().zip(settled) {
            if patch.depth.is_none() && gone {
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

    /// The hooks in place, each once.
    #[must_use]
    pub fn hooks(&self) -> Vec<&SiteRecord> {
        let mut found: Vec<&SiteRecord> = Vec::new();
        for hook in self.patches.iter().flat_map(|patch| &patch.hooks) {
            if !found.iter().any(|other| other.at == hook.at) {
                found.push(hook);
            }
        }
        found
    }

    /// The hooks in place that nobody needs once `patch` is gone: its own, and those of patches that went with their module. One
    /// that is damaged may still run new code.
    #[must_use]
    pub fn hooks_without(&self, patch: &KnownPatch) -> Vec<&SiteRecord> {
        let stays =
            |other: &&KnownPatch| other.state != State::NotApplied && other.record != patch.record;
        let needed = |hook: &SiteRecord| {
            let staying = self.patches.iter().filter(stays);
            let mut hooks = staying.flat_map(|other| &other.record.hooks);
            hooks.any(|other| other.at == hook.at)
        };
        let mut hooks = self.hooks();
        hooks.retain(|hook| !needed(hook));
        hooks
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
fn find_applied(patches: &[KnownPatch], view: &Overlay<'_>) -> Option<usize> {
    patches.iter().rposition(|patch| {
        let mut changes = patch.edits().peekable();
        patch.depth.is_none()
            && changes.peek().is_some()
            && changes.all(|edit| view.holds(edit.at, &edit.new))
    })
}

/// Whether nothing of a patch is in view, and what is in its places is known from before some patch.
fn is_gone(patch: &KnownPatch, all: &[KnownPatch], view: &Overlay<'_>) -> bool {
    let known_before = |edit: &Edit| {
        let edits = all.iter().flat_map(KnownPatch::edits);
        let same_place = edits.filter(|other| other.at == edit.at);
        same_place
            .map(|other| &other.old)
            .any(|old| view.holds(edit.at, old))
    };
    patch.edits().all(|edit| view.holds(edit.at, &edit.old))
        || patch
            .edits()
            .all(|edit| !view.holds(edit.at, &edit.new) && known_before(edit))
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
            unloaded: Vec::new(),
            hooks: Vec::new(),
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
