//! A machine of plain bytes, a scripted guest and a journal folder, and the two changes as the command line
//! makes them.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::time::Duration;

use tempfile::TempDir;
use vmpatch_introspect::Gpa;
use vmpatch_introspect::target::StopRequest;
use vmpatch_patcher::apply::{Attempted, Change, Failure, Observer, Schedule, Unobserved};
use vmpatch_patcher::arena::Loaded;
use vmpatch_patcher::journal::{Entry, Folder};
use vmpatch_patcher::link::layers::Stacking;
use vmpatch_patcher::rollback;
use vmpatch_patcher::status::{self, Ledger, Report, State};
use vmpatch_patcher::testing::sample::{self, BOOT};
use vmpatch_patcher::testing::{Machine, ScriptedGuest};

/// One VM and this host's memory of it.
pub(crate) struct Bench {
    pub(crate) machine: Machine,
    pub(crate) guest: ScriptedGuest,
    pub(crate) folder: TempDir,
    pub(crate) schedule: Schedule,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self {
            machine: sample::machine(),
            guest: ScriptedGuest::default(),
            folder: folder(),
            schedule: Schedule::until(Duration::ZERO),
        }
    }

    pub(crate) fn apply(&self, name: &str) -> Result<Attempted, Failure> {
        self.apply_watched(name, Stacking::Upon, &Unobserved)
    }

    pub(crate) fn apply_watched(
        &self,
        name: &str,
        stacking: Stacking,
        observer: &dyn Observer,
    ) -> Result<Attempted, Failure> {
        let ledger = self.ledger();
        ledger
            .admit(name, &format!("{name}-digest"), stacking)
            .unwrap();
        let layers = ledger.layers(stacking).unwrap();
        let verified = sample::verified_beside(&self.machine, name, &layers);
        let change = Change::apply(&verified, &self.machine)?;
        self.make(ledger, change, observer)
    }

    pub(crate) fn rollback(&self, name: &str) -> Result<Attempted, Failure> {
        self.rollback_watched(name, &Unobserved)
    }

    pub(crate) fn rollback_watched(
        &self,
        name: &str,
        observer: &dyn Observer,
    ) -> Result<Attempted, Failure> {
        let ledger = self.ledger();
        let change = rollback::change(&ledger, name).unwrap();
        self.make(ledger, change, observer)
    }

    /// One change, as every verb makes it.
    pub(crate) fn make(
        &self,
        ledger: Ledger,
        change: Change,
        observer: &dyn Observer,
    ) -> Result<Attempted, Failure> {
        let intent = ledger.begin(change, observer)?;
        let attempted = intent
            .place(&self.machine)
            .map_err(Failure::from)
            .and_then(|placed| {
                self.schedule.run(observer, || {
                    let stopped = placed.stop(StopRequest::default())?;
                    let quiet = stopped.check_stacks(&self.guest)?;
                    quiet.switch()
                })
            });
        intent.conclude(&self.machine, attempted)
    }

    pub(crate) fn ledger(&self) -> Ledger {
        Ledger::open(self.folder.path(), &self.machine, BOOT, Loaded::default()).unwrap()
    }

    pub(crate) fn report(&self) -> Report {
        status::report(self.folder.path(), &self.machine, BOOT, Loaded::default())
    }

    pub(crate) fn state(&self, name: &str) -> Option<State> {
        let report = self.report();
        report
            .patches
            .iter()
            .find(|patch| patch.name == name)
            .map(|patch| patch.state)
    }

    pub(crate) fn entries(&self) -> Vec<Entry> {
        Folder::at(self.folder.path()).entries().unwrap()
    }

    /// The guest's kernel text: the RAM but for the page that holds page-table entries.
    pub(crate) fn text(&self) -> Vec<u8> {
        let mut bytes = self.machine.ram_image().to_vec();
        bytes.drain(0x3000..0x4000);
        bytes
    }

    /// Scribbles over the first function's entry jump.
    pub(crate) fn scribble(&self) {
        let site = sample::FIRST.0 + 5 - sample::TEXT.0;
        self.machine.set(Gpa(site), &[0xaa; 5]);
    }
}

/// A journal folder in memory where there is such a place: hundreds of syncs to a disk take their time.
fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}
