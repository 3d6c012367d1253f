//! Apply: the phases of one change, each a value that consumes the one before. Rollback goes the same way
//! with its edits reversed; there is no other code that writes to a guest.
//!
//! ```text
//!   Change ── journal.begin ──▶ Intent ── place ──▶ Placed ── stop ──▶ Stopped
//!                                 │                    ▲                  │ check_stacks
//!                                 │                    │ Err: guest runs  ▼
//!                                 │                    ├──────────────  Quiet
//!                                 ▼                    │ Err: undone      │ switch: write, resume
//!                        commit / abandon ◀────────────┴──────────────  Applied
//! ```
//!
//! Only [`Stopped::check_stacks`] makes a [`Quiet`], and only a [`Quiet`] can write. Dropping any of them
//! undoes what was written and resumes the guest: the machine's own stop does that.
//!
//! A change of a machine made of plain bytes:
//!
//! ```
//! use vmpatch_introspect::target::StopRequest;
//! use vmpatch_patcher::apply::{Attempt, Change, Schedule, Unobserved};
//! use vmpatch_patcher::link::layers::Stacking;
//! use vmpatch_patcher::rollback;
//! use vmpatch_patcher::status::{self, Ledger, State};
//! use vmpatch_patcher::testing::{ScriptedGuest, sample};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vm = sample::machine();
//! let guest = ScriptedGuest::default();
//! let folder = tempfile::tempdir()?;
//! let verified = sample::verified(&vm, "fix");
//!
//! let ledger = Ledger::open(folder.path(), &vm, sample::BOOT, vmpatch_patcher::arena::Loaded::default())?;
//! ledger.admit("fix", &verified.record.digest, Stacking::Upon)?;
//! let intent = ledger.begin(Change::apply(&verified, &vm)?, &Unobserved)?;
//! let placed = intent.place(&vm)?;
//! let attempted = Schedule::default().run(&Unobserved, || {
//!     let stopped = placed.stop(StopRequest::default())?;
//!     let quiet = stopped.check_stacks(&guest)?;
//!     Ok::<_, Attempt>(quiet.switch()?)
//! });
//! intent.conclude(&vm, attempted)?;
//!
//! let report = status::report(folder.path(), &vm, sample::BOOT, vmpatch_patcher::arena::Loaded::default());
//! assert_eq!(report.patches[0].state, State::Applied);
//!
//! // The way back is the same way, with another change.
//! let ledger = Ledger::open(folder.path(), &vm, sample::BOOT, vmpatch_patcher::arena::Loaded::default())?;
//! let change = rollback::change(&ledger, "fix")?;
//! # let _ = ledger.begin(change, &Unobserved)?;
//! # Ok(())
//! # }
//! ```
//!
//! What was not checked cannot be written, for it does not compile:
//!
//! ```compile_fail
//! use vmpatch_patcher::apply::Stopped;
//! fn hasty(stopped: Stopped<'_>) {
//!     let _ = stopped.switch();
//! }
//! ```
//!
//! Nor can it be written again once it runs on:
//!
//! ```compile_fail
//! use vmpatch_patcher::apply::Quiet;
//! fn greedy(quiet: Quiet<'_>) {
//!     let _ = quiet.switch();
//!     let _ = quiet.switch();
//! }
//! ```

pub mod callback;
pub mod change;
pub mod failure;
pub mod observer;
pub mod place;
pub mod rehearse;
pub mod retry;

use vmpatch_introspect::target::{Edit, StopReport};
use vmpatch_introspect::{Deadline, StoppedTarget};

pub use callback::{CallbackError, Caller, CallerError};
pub use change::{Calls, Change, ChangeError};
pub use failure::{Attempt, Failure, FailureKind};
pub use observer::{Boundary, Observer, Setback, Timings, Unobserved};
pub use place::{PlaceError, Placed};
pub use rehearse::{Rehearsed, rehearse};
pub use retry::Schedule;

use crate::arena::CallbackRecord;
use crate::quiescence::{self, Examined, NotQuiet, Witness};

/// Every vCPU is out of guest mode. Nothing is known of their stacks yet.
#[must_use = "the guest stands still; dropped, it runs on unchanged"]
pub struct Stopped<'a> {
    target: Box<dyn StoppedTarget + 'a>,
    change: &'a Change,
    observer: &'a dyn Observer,
    /// When the lease leaves no more time to look.
    deadline: Deadline,
}

/// A stopped guest in which nothing stands in the way of the change.
#[must_use = "the guest stands still; dropped, it runs on unchanged"]
pub struct Quiet<'a> {
    target: Box<dyn StoppedTarget + 'a>,
    change: &'a Change,
    observer: &'a dyn Observer,
    examined: Examined,
}

/// The guest runs with the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// What the stop cost.
    pub report: StopReport,
    /// What was examined in it.
    pub examined: Examined,
}

/// What came of the last attempt, and how many stops it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempted<T = Applied> {
    /// The last attempt.
    pub applied: T,
    /// How many there were, from 1.
    pub attempts: u32,
}

impl<'a> Stopped<'a> {
    /// Examines vCPUs and stacks. An error lets the guest run on.
    ///
    /// # Errors
    /// [`NotQuiet`], with what is in the way.
    pub fn check_stacks(self, witness: &dyn Witness) -> Result<Quiet<'a>, NotQuiet> {
        let Self {
            target,
            change,
            observer,
            deadline,
        } = self;
        let (memory, vcpus) = (target.memory(), target.vcpus());
        let examined = quiescence::examine(witness, memory, vcpus, change.busy(), &deadline)?;
        observer.boundary(Boundary::Checked);
        Ok(Quiet {
            target,
            change,
            observer,
            examined,
        })
    }
}

impl Quiet<'_> {
    /// Compares, writes and reads back the batch, all or nothing, and lets the guest run with it.
    ///
    /// Callbacks are called before and after the edits, when the arena is mapped.
    ///
    /// # Errors
    /// [`Attempt`]: of a write that failed, the guest runs on unchanged, but for
    /// [`UndoFailed`](vmpatch_introspect::target::WriteError::UndoFailed); of a resume that did, it says whether the
    /// writes were kept; of a callback that failed, the kernel's text is as before.
    pub fn switch(self) -> Result<Applied, Attempt> {
        if self.change.calls().iter().next().is_some() {
            return self.switch_with_calls();
        }
        let Self {
            target,
            change,
            observer,
            examined,
        } = self;
        let report = target.switch(&change.batch())?;
        observer.boundary(Boundary::Resumed);
        Ok(Applied { report, examined })
    }

    fn switch_with_calls(self) -> Result<Applied, Attempt> {
        let Self {
            mut target,
            change,
            observer,
            examined,
        } = self;
        let calls = change.calls();
        let call = |target: &mut dyn StoppedTarget, callback: &CallbackRecord| {
            let caller = calls.caller.as_ref();
            let caller = caller.ok_or_else(|| CallbackError::unprepared(callback))?;
            caller.call(target, change.patch(), callback)
        };
        target.write(change.map())?;
        if let Some(before) = &calls.before
            && let Err(why) = call(&mut *target, before)
        {
            let has_run = why.has_run();
            return Err(take_back(target, &[], (before, why), has_run));
        }
        let after_callback = |why: Attempt| match &calls.before {
            Some(before) => Attempt::AfterCallback {
                callback: before.into(),
                why: Box::new(why),
            },
            None => why,
        };
        let written = target.write(change.edits());
        written.map_err(|why| after_callback(why.into()))?;
        if let Some(after) = &calls.after
            && let Err(why) = call(&mut *target, after)
        {
            let has_run = why.has_run() || calls.before.is_some();
            let why = take_back(target, change.edits(), (after, why), has_run);
            return Err(after_callback(why));
        }
        // The last one that ran, for what may still fail.
        let report = target.resume().map_err(|why| match &calls.after {
            Some(after) => Attempt::AfterCallback {
                callback: after.into(),
                why: Box::new(why.into()),
            },
            None => after_callback(why.into()),
        })?;
        observer.boundary(Boundary::Resumed);
        Ok(Applied { report, examined })
    }
}

/// Ends a stop in which a callback failed: the edits are taken back. If some of it or of one before it was executed the arena stays
/// mapped, for a callback may have left something in the guest that points there; and there is no other attempt then.
fn take_back(
    mut target: Box<dyn StoppedTarget + '_>,
    written: &[Edit],
    (callback, why): (&CallbackRecord, CallbackError),
    has_run: bool,
) -> Attempt {
    if !has_run || matches!(why, CallbackError::Machine(_)) {
        // Dropping it undoes everything.
        return why.into();
    }
    let reversed: Vec<_> = written.iter().rev().map(Edit::reversed).collect();
    if let Err(why) = target.write(&reversed) {
        return Attempt::AfterCallback {
            callback: callback.into(),
            why: Box::new(why.into()),
        };
    }
    match target.resume() {
        // With or without the arena mapped, the text is as before.
        Ok(_) | Err(_) => why.into(),
    }
}
