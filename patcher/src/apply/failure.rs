//! Why a change was not made, and what that says of the guest. Owns the verdicts that the command line turns
//! into exit codes; each phase owns its own error.

use vmpatch_introspect::target::{ArenaError, ResumeError, StopError, SwitchError, WriteError};
use vmpatch_introspect::{AttachError, CallError, Gva};

use super::callback::{CallbackError, Named};
use super::change::ChangeError;
use super::place::PlaceError;
use crate::journal::{JournalError, LockError};
use crate::quiescence::{Busy, NotQuiet};

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Something stood in the way until the timeout.
    #[error("still busy after {attempts} attempts: {busy}")]
    Busy {
        /// At the last attempt.
        busy: Busy,
        /// How many there were.
        attempts: u32,
    },
    /// The guest has booted anew since the patch was linked for it.
    #[error("the guest has booted anew since it was looked at; nothing was written")]
    OtherBoot,
    /// The stopped guest could not be examined.
    #[error("the stopped guest cannot be examined, so nothing was written: {0}")]
    Unknown(#[source] AttachError),
    /// The change cannot be made of what was given.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// The journal does not let it begin or end.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The arena was not filled.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The machine was not stopped.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// The batch was not written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The guest was not resumed as asked.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// A callback was not called, or failed.
    #[error(transparent)]
    Callback(#[from] CallbackError),
    /// It failed when a callback had run.
    #[error("{why}; {callback} had been called by then, and what it wrote stays")]
    AfterCallback {
        /// The callback.
        callback: Named,
        /// The failure.
        #[source]
        why: Box<Failure>,
    },
}

/// What a failure means to whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The guest or the patch does not allow it.
    Refused,
    /// Something was in the way until the timeout.
    Busy,
    /// The machine cannot be reached.
    Unreachable,
    /// Anything else.
    Other,
}

impl Failure {
    /// What it means to whoever asked.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::AfterCallback { why, .. } => why.kind(),
            Self::Callback(CallbackError::NoVcpu { .. }) => FailureKind::Busy,
            Self::Callback(CallbackError::Machine(CallError::Unreachable(_))) => {
                FailureKind::Unreachable
            }
            Self::Callback(CallbackError::Machine(CallError::NotRestored { .. })) => {
                FailureKind::Other
            }
            Self::Busy { .. } => FailureKind::Busy,
            Self::OtherBoot
            | Self::Unknown(_)
            | Self::Change(_)
            | Self::Callback(_)
            | Self::Place(
                PlaceError::Changed { .. } | PlaceError::Write(ArenaError::Unsupported(_)),
            )
            | Self::Stop(StopError::NotRunning(_))
            | Self::Write(WriteError::Differs { .. } | WriteError::Malformed { .. })
            | Self::Journal(
                JournalError::Open { .. } | JournalError::Lock(LockError::Held { .. }),
            ) => FailureKind::Refused,
            Self::Stop(StopError::Unreachable(_))
            | Self::Write(WriteError::Unreachable(_))
            | Self::Resume(ResumeError::Unreachable(_))
            | Self::Place(PlaceError::Write(ArenaError::Unreachable(_))) => {
                FailureKind::Unreachable
            }
            _ => FailureKind::Other,
        }
    }

    /// Whether the guest is certain to run as before. Where not, the intent must stay open.
    #[must_use]
    pub fn guest_unchanged(&self) -> bool {
        if let Self::AfterCallback { why, .. } = self {
            return why.guest_unchanged();
        }
        !matches!(
            self,
            Self::Callback(CallbackError::Machine(
                CallError::NotRestored { .. } | CallError::Unreachable(_)
            )) | Self::Write(WriteError::UndoFailed { .. } | WriteError::Unreachable(_))
                | Self::Resume(ResumeError::Unreachable(_))
        )
    }
}

impl Failure {
    /// Names the place in the kernel where a callback failed, if it is not one of the patch's.
    pub fn name_place(&mut self, name: impl Fn(Gva) -> Option<String>) {
        match self {
            Self::Callback(why) => why.name_place(name),
            Self::AfterCallback { why, .. } => {
                if let Self::Callback(why) = &mut **why {
                    why.name_place(name);
                }
            }
            _ => {}
        }
    }

    /// Whether a callback has run, so that something in the guest may know of the patch's code and data.
    #[must_use]
    pub const fn callback_has_run(&self) -> bool {
        match self {
            Self::Callback(why) => why.has_run(),
            Self::AfterCallback { .. } => true,
            _ => false,
        }
    }
}

/// Why one attempt was given up.
#[derive(Debug, thiserror::Error)]
pub enum Attempt {
    /// The machine was not stopped.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// It was not quiet.
    #[error(transparent)]
    NotQuiet(#[from] NotQuiet),
    /// The batch was not written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The guest was not resumed as asked.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// A callback was not called, or failed.
    #[error(transparent)]
    Callback(#[from] CallbackError),
    /// It failed when a callback had run: there is no other attempt, for it would run once more.
    #[error("{why}")]
    AfterCallback {
        /// The callback.
        callback: Named,
        /// What failed.
        #[source]
        why: Box<Attempt>,
    },
}

impl From<SwitchError> for Attempt {
    fn from(why: SwitchError) -> Self {
        match why {
            SwitchError::Write(why) => Self::Write(why),
            SwitchError::Resume(why) => Self::Resume(why),
        }
    }
}

impl Attempt {
    /// Whether the next attempt may go better: the guest runs as before, and what was in the way may pass.
    #[must_use]
    pub const fn passes(&self) -> bool {
        matches!(
            self,
            Self::NotQuiet(NotQuiet::Busy(_) | NotQuiet::Unknown(AttachError::Late { .. }))
                | Self::Stop(StopError::Deadline { .. })
                | Self::Write(WriteError::LeaseExpired)
                | Self::Resume(ResumeError::LeaseExpired)
                | Self::Callback(
                    CallbackError::NoVcpu { .. } | CallbackError::Machine(CallError::LeaseExpired)
                )
        )
    }

    /// Whether there was not time enough to look at the guest.
    #[must_use]
    pub const fn is_late(&self) -> bool {
        matches!(
            self,
            Self::NotQuiet(NotQuiet::Unknown(AttachError::Late { .. }))
        )
    }

    /// The failure it is, if it was the last of so many attempts.
    #[must_use]
    pub fn after(self, attempts: u32) -> Failure {
        match self {
            Self::NotQuiet(NotQuiet::Busy(busy)) => Failure::Busy { busy, attempts },
            Self::NotQuiet(NotQuiet::OtherBoot) => Failure::OtherBoot,
            Self::NotQuiet(NotQuiet::Unknown(why)) => Failure::Unknown(why),
            Self::Stop(why) => Failure::Stop(why),
            Self::Write(why) => Failure::Write(why),
            Self::Resume(why) => Failure::Resume(why),
            Self::Callback(why) => Failure::Callback(why),
            Self::AfterCallback { callback, why } => {
                let why = Box::new(why.after(attempts));
                Failure::AfterCallback { callback, why }
            }
        }
    }
}
