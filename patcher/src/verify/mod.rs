//! Proof that the old functions really are what runs (run-pre matching), and the last thing made before
//! the journal: a [`Verified`] holds every byte that is to be written, and what is there now.

pub mod disassembly;
pub mod locate;
pub mod run_pre;
pub mod tolerance;

use serde::{Deserialize, Serialize};

use vmpatch_introspect::target::{Edit, MemoryError};
use vmpatch_introspect::{Gva, GvaRange, PhysicalMemory};

use crate::arena::{Arena, ArenaError, ArenaWrite, BusyRange, MapEdits, PatchRecord, SiteRecord};
use crate::link::layers::Layers;
use crate::link::names::{Learned, Names};
use crate::link::{Guest, Live, Plan};
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
    let layers = Layers::find(guest, arena.manifest());
    old_functions_run(&plan, guest, &layers.beneath(guest))?;
    for site in &plan.record.sites {
        is_as_before(site, guest.memory().physical)?;
    }
    let mut switch = plan.record.apply_edits();
    switch.extend(hooks_to_place(&plan.record, guest)?);
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
fn hooks_to_place(record: &PatchRecord, guest: &Guest<'_>) -> Result<Vec<Edit>, VerifyError> {
    let memory = guest.memory().physical;
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
    /// In the stop, after `map`: the entry jumps, and the hooks that are not there yet. Rollback reverses them, but
    /// for hooks that another patch needs.
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
    /// The applied patch whose version of it is no longer in effect while this one is applied.
    pub over: Option<String>,
}
