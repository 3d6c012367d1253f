//! Whose a function is already: what the arena's manifest says of patches applied before.

use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::{GvaRange, PhysicalMemory};

use crate::arena::{Manifest, PatchRecord, PatchState};
use crate::patch::Patch;

/// Why a patch cannot be applied beside those that are there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnershipError {
    /// It is applied already.
    #[error("patch `{name}` is applied already")]
    AlreadyApplied {
        /// Its name.
        name: String,
    },
    /// Another patch of that name is applied.
    #[error("another patch named `{name}` is applied; roll it back first")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// A function of it is replaced by another patch.
    #[error("`{function}` is replaced by patch `{owner}`; roll that back first")]
    Owned {
        /// The function.
        function: String,
        /// The patch that has it.
        owner: String,
    },
    /// A patch that covers a function of it is neither applied nor rolled back.
    #[error("patch `{owner}` has left `{function}` in a state that is neither old nor new")]
    Unclear {
        /// The function.
        function: String,
        /// The patch.
        owner: String,
    },
    /// The sites of patches cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Whether the patch, by name and digest, can be applied at all.
///
/// # Errors
/// [`OwnershipError::AlreadyApplied`], [`OwnershipError::NameTaken`].
pub fn patch_is_free(
    patch: &Patch,
    digest: &str,
    manifest: &Manifest,
    memory: &dyn PhysicalMemory,
) -> Result<(), OwnershipError> {
    for record in manifest
        .patches
        .iter()
        .filter(|record| record.name == patch.name)
    {
        if record.state(memory)? != PatchState::Applied {
            continue;
        }
        let name = record.name.clone();
        return Err(if record.digest == digest {
            OwnershipError::AlreadyApplied { name }
        } else {
            OwnershipError::NameTaken { name }
        });
    }
    Ok(())
}

/// Whether no applied patch has a site in `range`.
///
/// # Errors
/// [`OwnershipError::Owned`], [`OwnershipError::Unclear`].
pub fn function_is_free(
    function: &str,
    range: GvaRange,
    manifest: &Manifest,
    memory: &dyn PhysicalMemory,
) -> Result<(), OwnershipError> {
    for record in manifest
        .patches
        .iter()
        .filter(|record| has_site_in(record, range))
    {
        let (function, owner) = (function.to_owned(), record.name.clone());
        match record.state(memory)? {
            PatchState::NotApplied => {}
            PatchState::Applied => return Err(OwnershipError::Owned { function, owner }),
            // Where a patch was placed twice, the other placing makes this one look damaged.
            PatchState::Damaged if placed_again(record, manifest, memory)? => {}
            PatchState::Damaged => return Err(OwnershipError::Unclear { function, owner }),
        }
    }
    Ok(())
}

fn has_site_in(record: &PatchRecord, range: GvaRange) -> bool {
    record
        .sites
        .iter()
        .any(|site| site.covered.overlaps(&range) || range.contains(site.at))
}

/// Whether each site of the record holds what another applied patch put there.
fn placed_again(
    record: &PatchRecord,
    manifest: &Manifest,
    memory: &dyn PhysicalMemory,
) -> Result<bool, MemoryError> {
    for other in &manifest.patches {
        let same = record
            .sites
            .iter()
            .all(|site| other.sites.iter().any(|it| it.at == site.at));
        if other != record && same && other.state(memory)? == PatchState::Applied {
            return Ok(true);
        }
    }
    Ok(false)
}
