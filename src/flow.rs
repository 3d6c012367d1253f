//! The way of a patch, one step a line. Owns the order of the steps and nothing of what they do.
//!
//! ```text
//! open ─▶ attach ─▶ link ─▶ verify ─▶ intent ─▶ place ─▶ stop ─▶ check stacks ─▶ switch ─▶ commit
//! ```
//!
//! A check leaves the line before the intent and looks at the stacks alone; rollback joins it at the
//! intent, with the edits reversed.

use std::path::Path;
use std::time::Duration;

use vmpatch_introspect::target::StopRequest;
use vmpatch_patcher::apply::{
    Attempt, Attempted, Boundary, Change, Failure as Unapplied, Observer, Rehearsed, Schedule,
    rehearse,
};
use vmpatch_patcher::arena::{Arena, PatchRecord};
use vmpatch_patcher::journal::Intent;
use vmpatch_patcher::link::Plan;
use vmpatch_patcher::link::live::Guest;
use vmpatch_patcher::patch::file::PatchFile;
use vmpatch_patcher::quiescence::NotQuiet;
use vmpatch_patcher::rollback;
use vmpatch_patcher::status::Ledger;
use vmpatch_patcher::verify::{FunctionReport, Verified, verify};

use crate::exit::Failure;
use crate::held::Held;
use crate::live::{Live, Tables};

/// A change made to a guest.
pub(crate) struct Changed {
    /// The patch.
    pub(crate) record: PatchRecord,
    /// What became of each function, where it was applied.
    pub(crate) functions: Vec<FunctionReport>,
    /// The stop that made it.
    pub(crate) attempted: Attempted,
}

/// Puts a patch into the running kernel.
pub(crate) fn apply(
    id: &str,
    patch: &Path,
    timeout: Duration,
    watch: &dyn Observer,
) -> Result<Changed, Failure> {
    let parsed = open(patch, watch)?;
    let live = attach(id, watch)?;
    let (verified, ledger) = fit(&parsed, &live, watch)?;
    let change = Change::apply(&verified, live.vm())?;
    let changed = switch(ledger, change, &live, timeout, watch)?;
    Ok(Changed {
        functions: verified.functions,
        ..changed
    })
}

/// A patch that could have been applied.
pub(crate) struct Checked {
    /// The patch and every byte it would write.
    pub(crate) verified: Verified,
    /// The stop that showed it.
    pub(crate) attempted: Attempted<Rehearsed>,
}

/// Goes through every gate of an apply, and writes nothing.
pub(crate) fn check(
    id: &str,
    patch: &Path,
    timeout: Duration,
    watch: &dyn Observer,
) -> Result<Checked, Failure> {
    let parsed = open(patch, watch)?;
    let live = attach(id, watch)?;
    let (verified, _ledger) = fit(&parsed, &live, watch)?;
    let change = Change::apply(&verified, live.vm())?;
    let mut tables = Tables::load(&live)?;
    let attempted = Schedule::until(timeout).run(watch, || {
        tables
            .refresh(&live, change.busy())
            .map_err(NotQuiet::Unknown)?;
        rehearse(
            &change,
            live.vm(),
            &tables.witness(&live),
            StopRequest::for_change(),
        )
    })?;
    Ok(Checked {
        verified,
        attempted,
    })
}

/// Patches that wait for a module of this VM.
pub(crate) fn held(id: &str) -> Result<Held, Failure> {
    crate::live::held(id)
}

/// The modules that a patch changes and that are not loaded. Those that are just coming or going count as loaded: it is for
/// linking to say what is wrong with them.
pub(crate) fn absent_modules(
    id: &str,
    patch: &Path,
    watch: &dyn Observer,
) -> Result<Vec<String>, Failure> {
    let parsed = open(patch, watch)?;
    let wanted = parsed.patch().modules();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let loaded = attach(id, watch)?.modules()?;
    let is_absent = |name: &&str| !loaded.iter().any(|module| module.name == *name);
    Ok(wanted
        .into_iter()
        .filter(is_absent)
        .map(str::to_owned)
        .collect())
}

/// What has to be rolled back for a patch, the patch itself the last.
pub(crate) fn cascade(id: &str, patch: &str, watch: &dyn Observer) -> Result<Vec<String>, Failure> {
    let live = attach(id, watch)?;
    let places = live.places()?;
    let ledger = Ledger::open(
        &live.journal(),
        live.vm(),
        live.boot(),
        live.loaded(&places),
    )?;
    Ok(rollback::cascade(&ledger, patch))
}

/// Takes a patch out of the running kernel.
pub(crate) fn roll_back(
    id: &str,
    patch: &str,
    timeout: Duration,
    watch: &dyn Observer,
) -> Result<Changed, Failure> {
    let live = attach(id, watch)?;
    let places = live.places()?;
    let ledger = Ledger::open(
        &live.journal(),
        live.vm(),
        live.boot(),
        live.loaded(&places),
    )?;
    let change = rollback::change(&ledger, patch)?;
    switch(ledger, change, &live, timeout, watch)
}

fn open(patch: &Path, watch: &dyn Observer) -> Result<PatchFile, Failure> {
    let parsed = PatchFile::open(patch)?;
    watch.boundary(Boundary::Parsed);
    Ok(parsed)
}

fn attach(id: &str, watch: &dyn Observer) -> Result<Live, Failure> {
    let live = Live::attach(id)?;
    watch.boundary(Boundary::Attached);
    Ok(live)
}

/// Every step that needs neither a stop nor a write: the patch is proved to fit this guest.
fn fit(
    parsed: &PatchFile,
    live: &Live,
    watch: &dyn Observer,
) -> Result<(Verified, Ledger), Failure> {
    let places = live.places()?;
    let ledger = Ledger::open(
        &live.journal(),
        live.vm(),
        live.boot(),
        live.loaded(&places),
    )?;
    ledger.admit(&parsed.patch().name, &parsed.digest().to_string())?;
    // The symbols of all modules are only read where some are to be changed.
    let modules = match parsed.patch().modules().is_empty() {
        true => Vec::new(),
        false => live.modules()?,
    };
    let guest = Guest::new(&live.kernel, live.vm())
        .with_modules(&modules)
        .with_places(&places);
    let arena = Arena::open(&live.kernel, live.vm(), live.arena()?)?;
    let plan = Plan::link(parsed, &guest, &arena)?;
    watch.boundary(Boundary::Linked);
    let verified = verify(plan, &guest, &arena)?;
    watch.boundary(Boundary::Verified);
    Ok((verified, ledger))
}

/// The one way to write to a guest: a durable intent, then attempts until the guest is quiet.
fn switch(
    ledger: Ledger,
    change: Change,
    live: &Live,
    timeout: Duration,
    watch: &dyn Observer,
) -> Result<Changed, Failure> {
    let record = change.patch().clone();
    let tables = Tables::load(live)?;
    let intent = ledger.begin(change, watch)?;
    let attempted = attempt(&intent, live, tables, timeout);
    let attempted = intent.conclude(live.vm(), attempted)?;
    Ok(Changed {
        record,
        functions: Vec::new(),
        attempted,
    })
}

/// Each attempt is a whole stop.
fn attempt(
    intent: &Intent<'_>,
    live: &Live,
    mut tables: Tables,
    timeout: Duration,
) -> Result<Attempted, Unapplied> {
    let placed = intent.place(live.vm())?;
    let ranges = intent.change().busy();
    Schedule::until(timeout).run(intent.observer(), || {
        tables.refresh(live, ranges).map_err(NotQuiet::Unknown)?;
        let stopped = placed.stop(StopRequest::for_change())?;
        let quiet = stopped.check_stacks(&tables.witness(live))?;
        Ok::<_, Attempt>(quiet.switch()?)
    })
}
