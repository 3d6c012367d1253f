//! The change that nobody ended: what the live bytes say of it. Owns the verdict and its record; a change
//! that neither holds nor does not is left open for people to look at.
//!
//! ```text
//!   open intent ─┬ of another boot ──────────▶ stale         recorded as abandoned
//!                ├ the VM cannot be stopped ─▶ unsettled     stays open
//!                ├ every site as before ─────▶ not written   recorded as abandoned
//!                ├ every site as meant ──────▶ in place      recorded as committed
//!                └ anything else ────────────▶ damaged       stays open
//! ```
//!
//! The bytes are looked at in a stop: only then is it sure that no stop of the program that died still
//! lasts, whose lease would take the bytes back a moment later.

use serde::{Deserialize, Serialize};
use vmpatch_introspect::target::{Edit, StopRequest};
use vmpatch_introspect::{PhysicalMemory, Target};

use crate::arena::{Loaded, ModuleClaim};
use crate::journal::{Begun, Ending, Entry, Journal, JournalError, Operation, history, now_ms};

/// What became of an interrupted change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The guest has booted anew: there is nothing left of it.
    Stale,
    /// Nothing of it was written: the guest runs as before.
    NotWritten,
    /// All of it was written, but not recorded.
    InPlace,
    /// The guest's text is neither as before nor as meant.
    Damaged,
    /// The VM could not be stopped to look, so nobody knows yet.
    Unsettled,
}

/// A change that was begun and not ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupted {
    /// Which way it went.
    pub operation: Operation,
    /// Its patch.
    pub patch: String,
    /// When it was begun, in milliseconds since 1970.
    pub unix_ms: u64,
    /// What became of it.
    pub verdict: Verdict,
    /// Whether the journal says so now.
    pub recorded: bool,
}

/// Judges the open change of a journal, if there is one. Records nothing. What cannot be read is damaged.
#[must_use]
pub fn judge(
    entries: &[Entry],
    boot: &str,
    vm: &dyn Target,
    loaded: Loaded<'_>,
) -> Option<(u64, Interrupted)> {
    let (number, begun) = history::open(entries)?;
    let interrupted = Interrupted {
        operation: begun.operation,
        patch: begun.patch.name.clone(),
        unix_ms: begun.unix_ms,
        verdict: verdict(begun, boot, vm, loaded),
        recorded: false,
    };
    Some((number, interrupted))
}

/// Writes the ending that a verdict implies; a damaged change stays open.
///
/// # Errors
/// The record could not be written.
pub fn record(
    journal: &Journal,
    number: u64,
    mut interrupted: Interrupted,
) -> Result<Interrupted, JournalError> {
    let unix_ms = now_ms();
    let abandoned = |reason: &str| Ending::Abandoned {
        unix_ms,
        reason: reason.to_owned(),
    };
    let ending = match interrupted.verdict {
        Verdict::Stale => abandoned("interrupted; the guest has booted anew since"),
        Verdict::NotWritten => abandoned("interrupted before anything was written"),
        Verdict::InPlace => Ending::Committed {
            unix_ms,
            window_ns: None,
        },
        Verdict::Damaged | Verdict::Unsettled => return Ok(interrupted),
    };
    journal.end(number, &ending)?;
    interrupted.recorded = true;
    Ok(interrupted)
}

fn verdict(begun: &Begun, boot: &str, vm: &dyn Target, loaded: Loaded<'_>) -> Verdict {
    if begun.boot != boot {
        return Verdict::Stale;
    }
    match vm.stop(StopRequest::default()) {
        Ok(stopped) => live_verdict(begun, stopped.memory(), loaded),
        Err(_) => Verdict::Unsettled,
    }
}

fn live_verdict(begun: &Begun, memory: &dyn PhysicalMemory, loaded: Loaded<'_>) -> Verdict {
    // What lay in a module that is gone since tells nothing.
    let gone = |claim: &&ModuleClaim| !claim.is_loaded(loaded, memory);
    let gone: Vec<_> = begun.modules.iter().filter(gone).collect();
    let is_left = |edit: &&Edit| !gone.iter().any(|claim| claim.has_frame(edit.at));
    let left = || begun.edits.iter().filter(is_left);
    if left().all(|edit| holds(memory, edit, &edit.old)) {
        Verdict::NotWritten
    } else if left().all(|edit| holds(memory, edit, &edit.new)) {
        Verdict::InPlace
    } else {
        Verdict::Damaged
    }
}

fn holds(memory: &dyn PhysicalMemory, edit: &Edit, bytes: &[u8]) -> bool {
    let mut now = vec![0; bytes.len()];
    memory.read(edit.at, &mut now).is_ok() && now == bytes
}
