//! Rollback: which change takes a patch back, and whether it may. The change itself goes the way of every
//! other one, through [`apply`](crate::apply); nothing is written here.

use crate::apply::{Change, ChangeError};
use crate::status::{Ledger, State};

/// Why a patch cannot be taken back.
#[derive(Debug, thiserror::Error)]
pub enum RollbackError {
    /// Neither the guest's manifest nor this host's journal has heard of it in this boot.
    #[error(
        "no patch named {name} was applied since this guest booted{}",
        name_hint(name)
    )]
    NoSuchPatch {
        /// The name asked for.
        name: String,
    },
    /// It is known, but its sites are as before it.
    #[error("patch {name} is not applied{}", gone_hint(unloaded))]
    NotApplied {
        /// Its name.
        name: String,
        /// Modules that took their part of it along when they were unloaded.
        unloaded: Vec<String>,
    },
    /// Its sites hold neither its old nor its new bytes.
    #[error("the guest's text at {} is neither as patch {name} left it nor as before: not touched", functions.join(", "))]
    Damaged {
        /// Its name.
        name: String,
        /// The functions it replaces.
        functions: Vec<String>,
    },
    /// Other patches lie upon it.
    #[error("patch {name} lies beneath {}: roll that back first, or all of them with --cascade", above.join(", "))]
    Beneath {
        /// Its name.
        name: String,
        /// Those above.
        above: Vec<String>,
    },
    /// Its record makes no change.
    #[error(transparent)]
    Change(#[from] ChangeError),
}

/// What became of a patch whose modules are gone.
fn gone_hint(unloaded: &[String]) -> String {
    match unloaded {
        [] => String::new(),
        modules => format!(": it went with module {}", modules.join(", ")),
    }
}

/// For who gives the file's name, as to apply.
fn name_hint(name: &str) -> &'static str {
    if name.ends_with(".vmpatch") {
        "; rollback takes the patch's name, as `vmpatch status` shows it, not its file"
    } else {
        ""
    }
}

/// Everything that lies upon a patch, directly or by way of others, and the patch itself: in the order in which they can be
/// rolled back.
#[must_use]
pub fn cascade(ledger: &Ledger, name: &str) -> Vec<String> {
    let known = ledger.known();
    let mut wanted = vec![name];
    let mut next = 0;
    while let Some(patch) = wanted.get(next).and_then(|name| known.named(name)) {
        let above = known.above(patch).into_iter();
        let new: Vec<_> = above.filter(|name| !wanted.contains(name)).collect();
        wanted.extend(new);
        next += 1;
    }
    wanted.sort_by_key(|name| known.named(name).and_then(|patch| patch.depth));
    wanted.into_iter().map(str::to_owned).collect()
}

/// The change that takes `name` back, by manifest and journal; no patch file is needed.
///
/// # Errors
/// [`RollbackError`].
pub fn change(ledger: &Ledger, name: &str) -> Result<Change, RollbackError> {
    let named = || name.to_owned();
    let patch = ledger
        .known()
        .named(name)
        .ok_or_else(|| RollbackError::NoSuchPatch { name: named() })?;
    match patch.state {
        State::Applied => {}
        State::NotApplied => {
            let unloaded = patch.unloaded.iter().map(|module| module.name.clone());
            return Err(RollbackError::NotApplied {
                name: named(),
                unloaded: unloaded.collect(),
            });
        }
        State::Damaged => {
            let functions = patch
                .record
                .sites
                .iter()
                .map(|site| site.function.clone())
                .collect();
            return Err(RollbackError::Damaged {
                name: named(),
                functions,
            });
        }
    }
    let above: Vec<_> = ledger
        .known()
        .above(patch)
        .into_iter()
        .map(str::to_owned)
        .collect();
    if !above.is_empty() {
        return Err(RollbackError::Beneath {
            name: named(),
            above,
        });
    }
    let unneeded = ledger.known().hooks_without(patch);
    Ok(Change::rollback(
        &patch.record,
        &patch.unloaded,
        &unneeded,
        ledger.boot(),
    )?)
}
