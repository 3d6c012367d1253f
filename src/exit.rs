//! How a verb can end other than well, and the exit code of each ending. Decided here and nowhere else.

use serde::Serialize;
use serde_json::Value;

/// Exit codes of the command-line contract. Code 2 (usage) is clap's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExitCode {
    /// Done as asked.
    Done,
    /// Something not foreseen: a bug, a full disk, a broken machine.
    Other,
    /// The call makes no sense as given.
    Usage,
    /// Refused, with the reason; nothing was written.
    Refused,
    /// Busy until the timeout; nothing was written.
    Busy,
    /// The VM cannot be reached.
    Unreachable,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(match code {
            ExitCode::Done => 0,
            ExitCode::Other => 1,
            ExitCode::Usage => 2,
            ExitCode::Refused => 3,
            ExitCode::Busy => 4,
            ExitCode::Unreachable => 5,
        })
    }
}

/// An ending other than success.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The call makes no sense as given.
    Usage(String),
    /// A gate said no: what was found, what was expected, what to do. `details` goes into the JSON.
    Refused {
        /// The sentence for people.
        reason: String,
        /// Fields added to the JSON answer.
        details: Value,
    },
    /// Some stack was in the way until the timeout.
    Busy {
        /// The sentence for people.
        reason: String,
        /// Fields added to the JSON answer: `busy`, `attempts`.
        details: Value,
    },
    /// The VM is not there or does not answer.
    Unreachable(String),
    /// Anything else.
    Other(anyhow::Error),
}

impl Failure {
    /// A refusal with nothing to add to its reason.
    #[expect(clippy::needless_pass_by_value, reason = "it stands behind `map_err`")]
    pub(crate) fn refused(reason: impl ToString) -> Self {
        Self::Refused {
            reason: reason.to_string(),
            details: Value::Null,
        }
    }

    /// The exit code of this ending.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::Usage,
            Self::Refused { .. } => ExitCode::Refused,
            Self::Busy { .. } => ExitCode::Busy,
            Self::Unreachable(_) => ExitCode::Unreachable,
            Self::Other(_) => ExitCode::Other,
        }
    }

    /// The word for it in JSON.
    pub(crate) fn result(&self) -> &'static str {
        match self {
            Self::Usage(_) => "usage",
            Self::Refused { .. } => "refused",
            Self::Busy { .. } => "busy",
            Self::Unreachable(_) => "unreachable",
            Self::Other(_) => "failed",
        }
    }

    /// The sentence for people.
    pub(crate) fn reason(&self) -> String {
        match self {
            Self::Usage(reason) | Self::Unreachable(reason) => reason.clone(),
            Self::Refused { reason, .. } | Self::Busy { reason, .. } => reason.clone(),
            Self::Other(error) => chain(error),
        }
    }

    /// What the JSON answer holds beside result and reason.
    pub(crate) fn details(&self) -> &Value {
        match self {
            Self::Refused { details, .. } | Self::Busy { details, .. } => details,
            Self::Usage(_) | Self::Unreachable(_) | Self::Other(_) => &Value::Null,
        }
    }
}

/// An error and its causes, each told once: many errors tell their cause themselves.
fn chain(error: &anyhow::Error) -> String {
    let mut told = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !told.contains(&cause) {
            told = format!("{told}: {cause}");
        }
    }
    told
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

/// The JSON answer of a failed verb.
#[derive(Serialize)]
pub(crate) struct FailureAnswer<'a> {
    result: &'static str,
    reason: String,
    #[serde(flatten, skip_serializing_if = "Value::is_null")]
    details: &'a Value,
}

impl<'a> From<&'a Failure> for FailureAnswer<'a> {
    fn from(failure: &'a Failure) -> Self {
        Self {
            result: failure.result(),
            reason: failure.reason(),
            details: failure.details(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_cause_that_its_error_tells_is_not_told_again() {
        let error = anyhow::anyhow!("no such file")
            .context("kernel: no such file")
            .context("run");
        assert_eq!(chain(&error), "run: kernel: no such file");
    }

    #[test]
    fn a_refusal_carries_its_details_into_the_json_answer() {
        let failure = Failure::Refused {
            reason: "no".to_owned(),
            details: json!({ "function": "f" }),
        };
        let answer = serde_json::to_value(FailureAnswer::from(&failure)).unwrap();
        assert_eq!(
            answer,
            json!({ "result": "refused", "reason": "no", "function": "f" })
        );
    }
}
