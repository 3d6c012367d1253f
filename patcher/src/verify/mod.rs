//! Proof that the old functions really are what runs (run-pre matching), and the last thing made before
//! the journal: a [`Verified`] holds every byte that is to be written, and what is there now.

pub mod disassembly;
pub mod locate;
pub mod run_pre;
pub mod tolerance;

use serde::{Deserialize, Serialize};

use vmpatch_introspect::target::{Edit, MemoryError};
use vmpatch_introspect::{Gva, GvaRange, PhysicalMemory};

use crate::arena::{
    Arena, ArenaError, ArenaWrite, BusyRange, MapEdits, ModuleClaim, PatchRecord, SiteRecord,
};
use crate::link::layers::Layers;
use crate::link::names::{Learned, Names};
use crate::link::{Guest, Live, Plan};
use crate::status::KnownPatch;
use locate::{LocateError, Wanted};
use run_pre::Matcher;

/// Why a plan does not hold.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// What runs is not what was planned for.
    #[error(transparent)]
    Locate(#[from] LocateError),
    /// Guest memory changed between linking and now.
    #[error("`{function}` changed while the patch was being linked")]
    Changed {
        /// The function.
        function: String,
    },
    /// The arena cannot take it.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// Guest memory cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl VerifyError {
    /// Both versions of an old function side by side, where it is not what runs.
    #[must_use]
    pub fn difference(&self) -> &[String] {
        match self {
            Self::Locate(error) => error.difference(),
            _ => &[],
        }
    }
}

/// Proves the plan against the guest as it is now, and turns it into what is to be written.
///
/// # Errors
/// [`VerifyError`].
pub fn verify(plan: Plan<'_>, guest: &Guest<'_>, arena: &Arena) -> Result<Verified, VerifyError> {
    let memory = guest.memory().physical;
    old_functions_run(&plan, guest, &guest.over(&plan.layers.beneath(memory)))?;
    let ground = plan.layers.ground(memory);
    for site in &plan.record.sites {
        is_as_before(site, &ground)?;
    }
    let switch = Switch::of(&plan.record, plan.layers, memory)?;
    let arrival = arena.admit(&plan.record, &plan.contents, &plan.fixtures, plan.global)?;
    Ok(Verified {
        boot: guest.kernel().identity.boot.clone(),
        arena_writes: arrival.writes,
        map: arrival.map,
        switch,
        functions: reports(&plan),
        record: plan.record,
    })
}

/// The edits of hooks that no other patch has placed.
fn hooks_to_place(
    record: &PatchRecord,
    memory: &dyn PhysicalMemory,
) -> Result<Vec<Edit>, VerifyError> {
    let mut edits = Vec::new();
    for hook in &record.hooks {
        if !hook.is_in_place(memory)? {
            is_as_before(hook, memory)?;
            edits.extend(hook.edits.iter().cloned());
        }
    }
    Ok(edits)
}

fn is_as_before(site: &SiteRecord, memory: &dyn PhysicalMemory) -> Result<(), VerifyError> {
    for edit in &site.edits {
        let mut now = vec![0; edit.old.len()];
        memory.read(edit.at, &mut now)?;
        if now != edit.old {
            return Err(VerifyError::Changed {
                function: site.function.clone(),
            });
        }
    }
    Ok(())
}

fn old_functions_run(
    plan: &Plan<'_>,
    guest: &Guest<'_>,
    beneath: &dyn Live,
) -> Result<(), VerifyError> {
    let names = Names::look_up(&plan.patch.symbols, &plan.patch.units, guest);
    let matcher = Matcher {
        live: beneath,
        facts: &plan.facts,
        names: &names,
    };
    let mut learned = Learned::new();
    for (wanted, planned) in plan.patch.replaced.iter().zip(&plan.located) {
        if matcher.locate(Wanted::of(plan.patch, wanted), &mut learned)? != *planned {
            return Err(VerifyError::Changed {
                function: wanted.name.clone(),
            });
        }
    }
    Ok(())
}

fn reports(plan: &Plan<'_>) -> Vec<FunctionReport> {
    let functions = plan.located.iter().zip(&plan.new).zip(&plan.record.sites);
    functions
        .zip(&plan.over)
        .map(|(((old, new), site), over)| FunctionReport {
            name: site.function.clone(),
            old: old.range,
            new: *new,
            site: site.at,
            over: over.clone(),
        })
        .collect()
}

/// A patch that is linked for one boot of one guest and whose old functions were found running there.
/// [`verify`] makes it; nothing in it depends on the patch file any more.
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
    /// In the stop, after `map`.
    pub switch: Switch,
    /// What each function became, for the report.
    pub functions: Vec<FunctionReport>,
}

impl Verified {
    /// The whole batch of the stop, in order.
    #[must_use]
    pub fn batch(&self) -> Vec<Edit> {
        self.map.iter().chain(&self.switch.edits).cloned().collect()
    }

    /// What must stand on no stack when the batch is written.
    pub fn busy(&self) -> impl Iterator<Item = &BusyRange> {
        let undone = self.switch.undone.iter();
        let left = undone.flat_map(|it| it.record.busy_for_rollback());
        self.record.busy_for_apply().chain(left)
    }

    /// The places that are written.
    pub fn places(&self) -> impl Iterator<Item = &SiteRecord> {
        let left = self.switch.undone.iter().flat_map(Undone::sites);
        let places = self.record.places().chain(left);
        places.chain(&self.switch.unneeded)
    }

    /// The modules that some of these lie in.
    pub fn modules(&self) -> impl Iterator<Item = &ModuleClaim> {
        let left = self.switch.undone.iter().flat_map(Undone::modules);
        self.record.modules.iter().chain(left)
    }
}

/// What the stop changes in the guest's text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// The entry jumps, the hooks that are not there yet, and what undoes the patches that go.
    pub edits: Vec<Edit>,
    /// Patches that go, the uppermost first.
    pub undone: Vec<Undone>,
    /// Hooks that go with them.
    pub unneeded: Vec<SiteRecord>,
}

impl Switch {
    /// What a patch needs changed, by what is in place.
    ///
    /// # Errors
    /// [`VerifyError::Changed`] where a hook is neither there nor as before, [`VerifyError::Memory`].
    pub fn of(
        record: &PatchRecord,
        layers: &Layers,
        memory: &dyn PhysicalMemory,
    ) -> Result<Self, VerifyError> {
        let mut edits = record.apply_edits();
        edits.extend(hooks_to_place(record, memory)?);
        let undone: Vec<_> = layers.undone().iter().map(Undone::of).collect();
        let unneeded = layers.unneeded_hooks(&record.hooks);
        if !undone.is_empty() || !unneeded.is_empty() {
            // What others leave and what comes may be the same bytes: each of them once.
            let mut wanted = layers.ground(memory);
            wanted.peel(unneeded.iter().flat_map(|hook| &hook.edits));
            wanted.put(&edits);
            edits = wanted.edits()?;
        }
        Ok(Self {
            edits,
            undone,
            unneeded,
        })
    }
}

/// A patch that goes when another comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undone {
    /// What is recorded of it.
    pub record: PatchRecord,
    /// Modules that took their part of it along before.
    pub unloaded: Vec<ModuleClaim>,
}

impl Undone {
    /// What is known of a patch, as far as undoing it needs.
    #[must_use]
    pub fn of(patch: &KnownPatch) -> Self {
        Self {
            record: patch.record.clone(),
            unloaded: patch.unloaded.clone(),
        }
    }

    fn sites(&self) -> impl Iterator<Item = &SiteRecord> {
        self.record.sites_outside(&self.unloaded)
    }

    fn modules(&self) -> impl Iterator<Item = &ModuleClaim> {
        let modules = self.record.modules.iter();
        modules.filter(|it| !self.unloaded.contains(it))
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
    /// The applied patch whose version of it is no longer in effect while this one is applied.
    pub over: Option<String>,
}
