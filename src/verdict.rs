//! What each part's errors mean to whoever called: the one place where they become endings of a verb.

use std::io::ErrorKind;

use serde_json::json;
use vmpatch_introspect::AttachError;
use vmpatch_introspect::target::{ResumeError, StopError};
use vmpatch_patcher::apply::{CallerError, ChangeError, Failure as Unapplied, FailureKind};
use vmpatch_patcher::arena::ArenaError;
use vmpatch_patcher::build::BuildError;
use vmpatch_patcher::journal::JournalError;
use vmpatch_patcher::link::LinkError;
use vmpatch_patcher::link::layers::LayerError;
use vmpatch_patcher::patch::file::PatchFileError;
use vmpatch_patcher::rollback::RollbackError;
use vmpatch_patcher::status::AdmitError;
use vmpatch_patcher::verify::VerifyError;
use vmpatch_vmm::client::{CallError, ConnectError};
use vmpatch_vmm::control::rundir::RunDirError;
use vmpatch_vmm::machine::MachineError;

use crate::exit::Failure;

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(_) => Self::refused(error),
            CallError::Place(error) => error.into(),
            CallError::Connect { path, source } if source.kind() == ErrorKind::NotFound => {
                Self::Unreachable(format!(
                    "no VM runs at {}; `vmpatch list` shows those that run",
                    path.display()
                ))
            }
            _ => Self::Unreachable(error.to_string()),
        }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Call(error) => error.into(),
            ConnectError::Protocol { .. } => Self::refused(error),
            ConnectError::Map(_) | ConnectError::Page(_) => Self::Other(error.into()),
        }
    }
}

impl From<RunDirError> for Failure {
    fn from(error: RunDirError) -> Self {
        match error {
            RunDirError::Taken { .. } => Self::refused(error),
            RunDirError::Id(_) => Self::Usage(error.to_string()),
            _ => Self::Other(error.into()),
        }
    }
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Config(_) => Self::Usage(error.to_string()),
            MachineError::Host(_) => Self::refused(error),
            _ => Self::Other(error.into()),
        }
    }
}

impl From<vmpatch_kbuild::DebianError> for Failure {
    fn from(error: vmpatch_kbuild::DebianError) -> Self {
        use vmpatch_kbuild::DebianError as Error;
        match error {
            Error::Failed(error) => error.into(),
            Error::Name(_) | Error::Flavour { .. } => Self::Usage(error.to_string()),
            _ => Self::refused(error),
        }
    }
}

impl From<vmpatch_kbuild::BuildError> for Failure {
    fn from(error: vmpatch_kbuild::BuildError) -> Self {
        use vmpatch_kbuild::BuildError as Error;
        match error {
            Error::NoSource(..) => Self::Usage(error.to_string()),
            Error::Failed { .. } | Error::NotStarted { .. } | Error::File { .. } => {
                Self::Other(error.into())
            }
            _ => Self::refused(error),
        }
    }
}

impl From<StopError> for Failure {
    fn from(error: StopError) -> Self {
        match error {
            StopError::Unreachable(_) => Self::Unreachable(error.to_string()),
            StopError::Deadline { .. } | StopError::NotRunning(_) => Self::refused(error),
        }
    }
}

impl From<ResumeError> for Failure {
    fn from(error: ResumeError) -> Self {
        match error {
            ResumeError::Unreachable(_) => Self::Unreachable(error.to_string()),
            ResumeError::LeaseExpired => Self::Other(error.into()),
        }
    }
}

impl From<Unapplied> for Failure {
    fn from(error: Unapplied) -> Self {
        let reason = error.to_string();
        match (error.kind(), error) {
            (_, Unapplied::Busy { busy, attempts }) => Self::Busy {
                reason,
                details: json!({ "attempts": attempts, "busy": busy }),
            },
            (FailureKind::Busy, _) => Self::Busy {
                reason,
                details: json!({}),
            },
            (FailureKind::Refused, _) => Self::refused(reason),
            (FailureKind::Unreachable, _) => Self::Unreachable(reason),
            (FailureKind::Other, error) => Self::Other(error.into()),
        }
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        Unapplied::from(error).into()
    }
}

impl From<PatchFileError> for Failure {
    fn from(error: PatchFileError) -> Self {
        match &error {
            PatchFileError::Read { path, source } if source.kind() == ErrorKind::NotFound => {
                Self::Usage(format!("there is no patch file {}", path.display()))
            }
            PatchFileError::Write { .. } => Self::Other(error.into()),
            _ => Self::refused(error),
        }
    }
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Self {
        let reason = error.to_string();
        match error {
            BuildError::NothingChanged(report) | BuildError::Refused(report) => Self::Refused {
                reason,
                details: json!({ "report": report }),
            },
            _ => Self::refused(reason),
        }
    }
}

impl From<LinkError> for Failure {
    fn from(error: LinkError) -> Self {
        differing(&error.to_string(), error.difference())
    }
}

impl From<VerifyError> for Failure {
    fn from(error: VerifyError) -> Self {
        differing(&error.to_string(), error.difference())
    }
}

/// A refusal, with the code that differs where that is why.
fn differing(reason: &str, difference: &[String]) -> Failure {
    if difference.is_empty() {
        return Failure::refused(reason);
    }
    Failure::Refused {
        reason: format!("{reason}\n{}", difference.join("\n")),
        details: json!({ "difference": difference }),
    }
}

/// Errors that always mean "refused; nothing was written".
macro_rules! refused {
    ($($error:ty),+ $(,)?) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::refused(error)
            }
        }
    )+};
}

refused!(
    AttachError,
    AdmitError,
    LayerError,
    RollbackError,
    ChangeError,
    CallerError,
    ArenaError,
);
