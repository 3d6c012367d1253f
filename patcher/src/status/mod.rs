//! Status: what holds of every patch, told by three witnesses that can each be missing: the guest's live
//! text, the manifest in its arena, the journal of this host. Live text always has the last word. Writes
//! nothing to the guest; it completes the journal where a change was interrupted.

pub mod known;
pub mod ledger;
pub mod report;
pub mod settle;
pub mod shadow;

use std::path::Path;

use vmpatch_introspect::Target;

pub use known::{Known, KnownPatch, Source, State};
pub use ledger::{AdmitError, Ledger};
pub use report::{Damage, LastChange, PatchReport, Report, StalePatch};
pub use settle::{Interrupted, Verdict};
pub use shadow::ShadowData;

use crate::arena::Loaded;
use crate::journal::{Folder, JournalError, LockError};

/// What holds in the guest's boot `boot`, by the journal in `folder` and the guest itself. The guest runs on.
/// Where another vmpatch is at work, or the journal cannot be read, the report says so and tells the rest.
#[must_use]
pub fn report(folder: &Path, vm: &dyn Target, boot: &str, loaded: Loaded<'_>) -> Report {
    match Ledger::open(folder, vm, boot, loaded) {
        Ok(ledger) => of_ledger(&ledger, vm),
        Err(why) => without_ledger(folder, vm, (boot, loaded), &why),
    }
}

fn of_ledger(ledger: &Ledger, vm: &dyn Target) -> Report {
    let manifest = ledger
        .manifest_trouble()
        .map(|why| format!("manifest: {why}"));
    Report {
        boot: ledger.boot().to_owned(),
        patches: report::patches(ledger.known(), &ledger.entries, ledger.boot(), vm),
        interrupted: ledger.interrupted().cloned(),
        stale: report::stale(&ledger.entries, ledger.manifest.as_ref(), ledger.boot()),
        notes: manifest.into_iter().collect(),
    }
}

/// The report of somebody who may settle nothing. A change that another vmpatch is at is not interrupted.
fn without_ledger(
    folder: &Path,
    vm: &dyn Target,
    (boot, loaded): (&str, Loaded<'_>),
    trouble: &JournalError,
) -> Report {
    let mut notes = vec![trouble.to_string()];
    let entries = match trouble {
        JournalError::Lock(LockError::Held { .. }) => Folder::at(folder).entries(),
        _ => Ok(Vec::new()),
    };
    let entries = entries.unwrap_or_else(|why| {
        notes.push(why.to_string());
        Vec::new()
    });
    let (manifest, manifest_trouble) = ledger::read_manifest(vm);
    notes.extend(manifest_trouble.map(|why| format!("manifest: {why}")));
    let known = Known::judge(manifest.as_ref(), &entries, boot, vm, loaded);
    Report {
        boot: boot.to_owned(),
        patches: report::patches(&known, &entries, boot, vm),
        interrupted: None,
        stale: report::stale(&entries, manifest.as_ref(), boot),
        notes,
    }
}
