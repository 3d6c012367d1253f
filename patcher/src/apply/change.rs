//! A change of a guest: one batch of edits, what must stand on no stack while it is written, and what goes
//! into the arena before. Apply and rollback are both one of these, so there is one way to write. Owns the
//! derivation of both; writes nothing.

use std::time::Duration;

use vmpatch_introspect::target::{Edit, MemoryError, Target};
use vmpatch_introspect::{Gpa, PhysicalMemory};

use super::callback::Caller;
use crate::arena::{CallbackRecord, MapEdits, ModuleClaim, PatchRecord, SiteRecord};
use crate::journal::record::{ArenaEdit, Operation};
use crate::patch::CallbackKind;
use crate::quiescence::BusyRanges;
use crate::verify::Verified;

/// More arena bytes than one patch may bring.
const MAX_ARENA: usize = 4 << 20;
const PAGE: u64 = vmpatch_introspect::address::PAGE_SIZE;

/// What is to be written, where, and under which conditions.
#[derive(Clone, Debug)]
pub struct Change {
    operation: Operation,
    boot: String,
    patch: PatchRecord,
    replaced: Vec<String>,
    map: MapEdits,
    edits: Vec<Edit>,
    arena: Vec<ArenaEdit>,
    busy: BusyRanges,
    calls: Calls,
}

/// What is called in the stop.
#[derive(Clone, Debug, Default)]
pub struct Calls {
    /// Before the edits.
    pub before: Option<CallbackRecord>,
    /// After them.
    pub after: Option<CallbackRecord>,
    /// What calls need to know of the guest.
    pub caller: Option<Caller>,
}

/// Why no change can be made of it.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// An edit is empty, crosses a page, or its sides differ in length.
    #[error("edit at guest-physical {at}: {what}")]
    Malformed {
        /// Where.
        at: Gpa,
        /// What is wrong.
        what: &'static str,
    },
    /// More than one patch may bring.
    #[error("{0} bytes for the arena, more than the {MAX_ARENA} allowed")]
    TooLarge(usize),
    /// The arena cannot be read.
    #[error("arena: {0}")]
    Arena(#[from] MemoryError),
}

impl Change {
    /// The change that applies a verified patch. Reads what the arena holds now, for the intent.
    ///
    /// # Errors
    /// [`ChangeError`].
    pub fn apply(verified: &Verified, vm: &dyn Target) -> Result<Self, ChangeError> {
        let bytes = verified
            .arena_writes
            .iter()
            .map(|write| write.bytes.len())
            .sum();
        if bytes > MAX_ARENA {
            return Err(ChangeError::TooLarge(bytes));
        }
        let arena = verified
            .arena_writes
            .iter()
            .map(|write| arena_edit(vm, write.at, &write.bytes))
            .collect::<Result<_, _>>()?;
        Self {
            operation: Operation::Apply,
            calls: Calls::of(&verified.record, Operation::Apply),
            boot: verified.boot.clone(),
            busy: BusyRanges::new(verified.busy(), verified.places())
                .in_modules(verified.modules().cloned()),
            patch: verified.record.clone(),
            replaced: verified
                .switch
                .undone
                .iter()
                .map(|undone| undone.record.name.clone())
                .collect(),
            map: verified.map.clone(),
            edits: verified.switch.edits.clone(),
            arena,
        }
        .checked()
    }

    /// The change that takes an applied patch back: its edits reversed but for those in modules that are gone, gated on its
    /// new functions. Of its hooks go those that nobody else needs, `unneeded`. Its
    /// arena pages stay as they are, for timers and RCU callbacks may still point there.
    ///
    /// # Errors
    /// [`ChangeError::Malformed`].
    pub fn rollback(
        patch: &PatchRecord,
        unloaded: &[ModuleClaim],
        unneeded: &[&SiteRecord],
        boot: &str,
    ) -> Result<Self, ChangeError> {
        let places: Vec<_> = patch
            .sites_outside(unloaded)
            .chain(unneeded.iter().copied())
            .cloned()
            .collect();
        let modules = patch.modules.iter();
        let modules = modules.filter(|it| !unloaded.contains(it)).cloned();
        let hooks = unneeded.iter().flat_map(|hook| &hook.edits);
        let mut edits = patch.rollback_edits(unloaded);
        edits.extend(hooks.map(Edit::reversed));
        Self {
            operation: Operation::Rollback,
            calls: Calls::of(patch, Operation::Rollback),
            boot: boot.to_owned(),
            busy: BusyRanges::new(patch.busy_for_rollback(), &places).in_modules(modules),
            map: Vec::new(),
            edits,
            patch: patch.clone(),
            replaced: Vec::new(),
            arena: Vec::new(),
        }
        .checked()
    }

    /// The same, with what its callbacks need.
    #[must_use]
    pub fn calling(mut self, caller: Caller) -> Self {
        self.calls.caller = Some(caller);
        self
    }

    /// The same without its callbacks.
    #[must_use]
    pub fn without_callbacks(mut self) -> Self {
        self.calls = Calls::default();
        self
    }

    /// What is called in the stop.
    #[must_use]
    pub const fn calls(&self) -> &Calls {
        &self.calls
    }

    /// Which way it goes.
    #[must_use]
    pub const fn operation(&self) -> Operation {
        self.operation
    }

    /// The boot of the guest it is for.
    #[must_use]
    pub fn boot(&self) -> &str {
        &self.boot
    }

    /// The patch it concerns.
    #[must_use]
    pub const fn patch(&self) -> &PatchRecord {
        &self.patch
    }

    /// Names of the patches that it undoes to make room for its own, the uppermost first.
    #[must_use]
    pub fn replaced(&self) -> &[String] {
        &self.replaced
    }

    /// What maps the arena in the stop, before the edits; nothing takes it back.
    #[must_use]
    pub fn map(&self) -> &[Edit] {
        &self.map
    }

    /// What the stop changes in the guest's text, in order.
    #[must_use]
    pub fn edits(&self) -> &[Edit] {
        &self.edits
    }

    /// The whole batch of the stop, in order.
    #[must_use]
    pub fn batch(&self) -> Vec<Edit> {
        self.map.iter().chain(&self.edits).cloned().collect()
    }

    /// What goes into the arena before the stop, in order.
    #[must_use]
    pub fn arena(&self) -> &[ArenaEdit] {
        &self.arena
    }

    /// What must stand on no stack.
    #[must_use]
    pub const fn busy(&self) -> &BusyRanges {
        &self.busy
    }

    fn checked(self) -> Result<Self, ChangeError> {
        for edit in self.map.iter().chain(&self.edits) {
            let end = edit.at.page_offset().saturating_add(edit.new.len() as u64);
            let what = match (
                edit.old.len() == edit.new.len(),
                edit.new.is_empty(),
                end > PAGE,
            ) {
                (false, ..) => "its two sides differ in length",
                (_, true, _) => "it is empty",
                (.., true) => "it crosses a page",
                _ => continue,
            };
            return Err(ChangeError::Malformed { at: edit.at, what });
        }
        Ok(self)
    }
}

impl Calls {
    /// What a patch wants called. Of patches that it replaces nothing is called: it is for the newer patch to know what the
    /// older ones left, as with livepatch (Linux v6.12 Documentation/livepatch/cumulative-patches.rst).
    fn of(patch: &PatchRecord, operation: Operation) -> Self {
        let (before, after) = match operation {
            Operation::Apply => (CallbackKind::PreApply, CallbackKind::PostApply),
            Operation::Rollback => (CallbackKind::PreRollback, CallbackKind::PostRollback),
        };
        Self {
            before: patch.callback(before).cloned(),
            after: patch.callback(after).cloned(),
            caller: None,
        }
    }

    /// The callbacks, in the order in which they are called.
    pub fn iter(&self) -> impl Iterator<Item = &CallbackRecord> {
        self.before.iter().chain(&self.after)
    }

    /// How much longer than others the stop may last for them.
    #[must_use]
    pub fn time(&self) -> Duration {
        let budget = self.caller.as_ref().map(|caller| caller.budget);
        let count = self.iter().count();
        budget.unwrap_or_default().saturating_mul(count as u32)
    }
}

fn arena_edit(vm: &dyn Target, at: Gpa, new: &[u8]) -> Result<ArenaEdit, MemoryError> {
    let mut old = vec![0; new.len()];
    PhysicalMemory::read(vm, at, &mut old)?;
    Ok(ArenaEdit {
        at,
        old,
        new: new.to_vec(),
    })
}
