//! Who holds the machine: pure rules without threads or KVM, and the reasons for a refusal.
//!
//! ```text
//!              begin(holder)              done
//!   Running ─────────────────▶ Stopping ───────▶ Stopped(holder)
//!      ▲                          │ late              │
//!      ├──────────────────────────┘                   │ the same holder lets go
//!      └──────────────────────────────────────────────┘
//!   Stopped(Patch) ── undo failed ──▶ Stuck: nobody lets it go but by ending it
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

/// Who can stop a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holder {
    /// Its owner: `vmpatch pause`.
    Owner,
    /// A session that patches it.
    Patch,
}

/// See the module. That the machine has finished is not told here but by its outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// They are being stopped.
    Stopping(Holder),
    /// All stand.
    Stopped(Holder),
    /// All stand, with a half-written batch that could not be undone.
    Stuck,
}

impl State {
    /// The state in which `holder` may stop it.
    ///
    /// # Errors
    /// The reason, for people.
    pub fn begin(self, holder: Holder) -> Result<Self, String> {
        match self {
            Self::Running => Ok(Self::Stopping(holder)),
            other => Err(other.to_string()),
        }
    }

    /// The state after `holder` lets go.
    ///
    /// # Errors
    /// The reason, for people.
    pub fn let_go(self, holder: Holder) -> Result<Self, String> {
        match self {
            Self::Stopped(by) if by == holder => Ok(Self::Running),
            other => Err(other.to_string()),
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "it runs",
            Self::Stopping(_) => "it is being stopped",
            Self::Stopped(Holder::Owner) => "its owner has paused it",
            Self::Stopped(Holder::Patch) => "it is stopped for a patch",
            Self::Stuck => "it stays stopped because a write could not be undone",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_running_machine_is_stopped() {
        for state in [
            State::Stopping(Holder::Patch),
            State::Stopped(Holder::Owner),
            State::Stopped(Holder::Patch),
            State::Stuck,
        ] {
            assert_eq!(state.begin(Holder::Patch), Err(state.to_string()));
        }
        assert_eq!(
            State::Running.begin(Holder::Owner),
            Ok(State::Stopping(Holder::Owner))
        );
    }

    #[test]
    fn nobody_lets_go_while_it_is_being_stopped() {
        // The one who stops it writes the next state; a second writer would be written over.
        assert!(
            State::Stopping(Holder::Owner)
                .let_go(Holder::Owner)
                .is_err()
        );
    }

    #[test]
    fn nobody_lets_go_what_another_holds() {
        assert!(State::Stopped(Holder::Patch).let_go(Holder::Owner).is_err());
        assert!(State::Stopped(Holder::Owner).let_go(Holder::Patch).is_err());
        assert!(State::Stuck.let_go(Holder::Patch).is_err());
        assert!(State::Running.let_go(Holder::Owner).is_err());
    }
}
