//! The way of a patch, one step a line. Owns the order of the steps and nothing of what they do.
//!
//! ```text
//! open ─▶ attach ─▶ link ─▶ verify ─▶ intent ─▶ place ─▶ stop ─▶ check stacks ─▶ switch ─▶ commit
//! ```
//!
//! A check leaves the line before the intent and looks at the stacks alone; rollback joins it at the
//! intent, with the edits reversed.

use std::path::Path;

use vmpatch_introspect::modules::{Module, ModulePlace};
use vmpatch_introspect::target::StopRequest;
use vmpatch_patcher::apply::{
    Attempt, Attempted, Boundary, Caller, Change, Failure as Unapplied, Observer, Rehearsed,
    Schedule, rehearse,
};
use vmpatch_patcher::arena::{Arena, CallbackRecord, PatchRecord};
use vmpatch_patcher::journal::Intent;
use vmpatch_patcher::link::Plan;
use vmpatch_patcher::link::layers::Stacking;
use vmpatch_patcher::link::live::Guest;
use vmpatch_patcher::patch::file::PatchFile;
use vmpatch_patcher::quiescence::NotQuiet;
use vmpatch_patcher::rollback;
use vmpatch_patcher::status::Ledger;
use vmpatch_patcher::verify::{FunctionReport, Verified, verify};

use crate::cli::Limits;
use crate::exit::Failure;
use crate::held::Held;
use crate::live::{Live, Tables};

/// A change made to a guest.
pub(crate) struct Changed {
    /// The patch.
    pub(crate) record: PatchRecord,
    /// Patches that were undone for it.
    pub(crate) replaced: Vec<String>,
    /// Callbacks that were called.
    pub(crate) called: Vec<CallbackRecord>,
    /// What became of each function, where it was applied.
    pub(crate) functions: Vec<FunctionReport>,
    /// The stop that made it.
    pub(crate) attempted: Attempted,
}

/// A patch, and the guest that it is for.
pub(crate) struct Candidate {
    file: PatchFile,
    live: Live,
    /// Loaded modules, where the patch changes any.
    modules: Vec<Module>,
}

/// A patch that could have been applied.
pub(crate) struct Checked {
    /// The patch and every byte it would write.
    pub(crate) verified: Verified,
    /// The stop that showed it.
    pub(crate) attempted: Attempted<Rehearsed>,
}

/// Opens the patch file and finds the guest's kernel.
pub(crate) fn meet(id: &str, patch: &Path, watch: &dyn Observer) -> Result<Candidate, Failure> {
    let file = PatchFile::open(patch)?;
    watch.boundary(Boundary::Parsed);
    let live = attach(id, watch)?;
    // The symbols of all modules are only read where some are to be changed.
    let modules = match file.patch().modules().is_empty() {
        true => Vec::new(),
        false => live.modules()?,
    };
    Ok(Candidate {
        file,
        live,
        modules,
    })
}

impl Candidate {
    /// The modules that the patch changes and that are not loaded. Those that are just coming or going count as loaded: it is
    /// for linking to say what is wrong with them.
    pub(crate) fn absent_modules(&self) -> Vec<String> {
        let wanted = self.file.patch().modules().into_iter();
        let is_absent = |name: &&str| !self.modules.iter().any(|module| module.name == *name);
        wanted.filter(is_absent).map(str::to_owned).collect()
    }

    /// Keeps the patch until its modules are loaded.
    pub(crate) fn hold(&self) -> Result<&PatchFile, Failure> {
        self.live.held().keep(&self.file)?;
        Ok(&self.file)
    }

    /// Goes through every gate of an apply, and writes nothing.
    pub(crate) fn check(
        self,
        stacking: Stacking,
        limits: Limits,
        watch: &dyn Observer,
    ) -> Result<Checked, Failure> {
        let (verified, _ledger) = self.fit(stacking, watch)?;
        let live = &self.live;
        let change = Change::apply(&verified, live.vm())?;
        let change = calling(change, live, limits)?;
        let mut tables = Tables::load(live)?;
        let attempted = Schedule::until(limits.timeout).run(watch, || {
            tables
                .refresh(live, change.busy())
                .map_err(NotQuiet::Unknown)?;
            let request = StopRequest::for_change();
            rehearse(&change, live.vm(), &tables.witness(live), request)
        })?;
        Ok(Checked {
            verified,
            attempted,
        })
    }

    /// Puts the patch into the running kernel.
    pub(crate) fn apply(
        self,
        stacking: Stacking,
        limits: Limits,
        watch: &dyn Observer,
    ) -> Result<Changed, Failure> {
        let (verified, ledger) = self.fit(stacking, watch)?;
        let change = Change::apply(&verified, self.live.vm())?;
        let change = calling(change, &self.live, limits)?;
        let changed = switch(ledger, change, &self.live, limits, watch)?;
        Ok(Changed {
            functions: verified.functions,
            ..changed
        })
    }

    /// Every step that needs neither a stop nor a write: the patch is proved to fit this guest.
    fn fit(&self, stacking: Stacking, watch: &dyn Observer) -> Result<(Verified, Ledger), Failure> {
        let live = &self.live;
        let places = live.places()?;
        let ledger = ledger(live, &places)?;
        let digest = self.file.digest().to_string();
        ledger.admit(&self.file.patch().name, &digest, stacking)?;
        let layers = ledger.layers(stacking)?;
        let guest = Guest::new(&live.kernel, live.vm())
            .with_modules(&self.modules)
            .with_places(&places);
        let arena = Arena::open(&live.kernel, live.vm(), live.arena()?)?;
        let plan = Plan::link(&self.file, &guest, &arena, &layers)?;
        watch.boundary(Boundary::Linked);
        let verified = verify(plan, &guest, &arena)?;
        watch.boundary(Boundary::Verified);
        Ok((verified, ledger))
    }
}

/// Patches that wait for a module of this VM.
pub(crate) fn held(id: &str) -> Result<Held, Failure> {
    crate::live::held(id)
}

/// What has to be rolled back for a patch, the patch itself the last.
pub(crate) fn cascade(id: &str, patch: &str, watch: &dyn Observer) -> Result<Vec<String>, Failure> {
    let live = attach(id, watch)?;
    let ledger = ledger(&live, &live.places()?)?;
    Ok(rollback::cascade(&ledger, patch))
}

/// Takes a patch out of the running kernel, with its callbacks or without.
pub(crate) fn roll_back(
    id: &str,
    patch: &str,
    skip_callbacks: bool,
    limits: Limits,
    watch: &dyn Observer,
) -> Result<Changed, Failure> {
    let live = attach(id, watch)?;
    let ledger = ledger(&live, &live.places()?)?;
    let change = rollback::change(&ledger, patch)?;
    let change = match skip_callbacks {
        true => change.without_callbacks(),
        false => calling(change, &live, limits)?,
    };
    switch(ledger, change, &live, limits, watch)
}

fn attach(id: &str, watch: &dyn Observer) -> Result<Live, Failure> {
    let live = Live::attach(id)?;
    watch.boundary(Boundary::Attached);
    Ok(live)
}

/// The journal, settled, and what is known of the guest's patches.
fn ledger(live: &Live, places: &[ModulePlace]) -> Result<Ledger, Failure> {
    let (folder, loaded) = (live.journal(), live.loaded(places));
    Ok(Ledger::open(&folder, live.vm(), live.boot(), loaded)?)
}

/// A change with what its callbacks need, if it has any.
fn calling(change: Change, live: &Live, limits: Limits) -> Result<Change, Failure> {
    if change.calls().iter().next().is_none() {
        return Ok(change);
    }
    let caller = Caller::of(&live.kernel, live.vm(), limits.callback_limit)?;
    Ok(change.calling(caller))
}

/// The one way to write to a guest: a durable intent, then attempts until the guest is quiet.
fn switch(
    ledger: Ledger,
    change: Change,
    live: &Live,
    limits: Limits,
    watch: &dyn Observer,
) -> Result<Changed, Failure> {
    let (record, replaced) = (change.patch().clone(), change.replaced().to_vec());
    let called = change.calls().iter().cloned().collect();
    let tables = Tables::load(live)?;
    let intent = ledger.begin(change, watch)?;
    let attempted = attempt(&intent, live, tables, limits);
    let attempted = attempted.map_err(|mut failure| {
        failure.name_place(|at| live.name(at));
        failure
    });
    let attempted = intent.conclude(live.vm(), attempted)?;
    Ok(Changed {
        record,
        replaced,
        called,
        functions: Vec::new(),
        attempted,
    })
}

/// Each attempt is a whole stop.
fn attempt(
    intent: &Intent<'_>,
    live: &Live,
    mut tables: Tables,
    limits: Limits,
) -> Result<Attempted, Unapplied> {
    let placed = intent.place(live.vm())?;
    let ranges = intent.change().busy();
    Schedule::until(limits.timeout).run(intent.observer(), || {
        tables.refresh(live, ranges).map_err(NotQuiet::Unknown)?;
        let stopped = placed
            .stop(StopRequest::for_change())
            .map_err(Attempt::from)?;
        let quiet = stopped.check_stacks(&tables.witness(live))?;
        quiet.switch()
    })
}
