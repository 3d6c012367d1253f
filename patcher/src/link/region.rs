//! Parts of a kernel and its modules where no function can be replaced.

use vmpatch_introspect::modules::Module;
use vmpatch_introspect::{Gva, GvaRange};

use super::live::{Guest, Live};
use crate::patch::VMLINUX;

/// Why code there cannot be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// Outside the text of its object.
    #[error("it does not lie in the text of its object")]
    NotText,
    /// Freed after boot, or about to be.
    #[error("it is init code, which is freed after boot")]
    Init,
    /// Runs with the user half of the page tables, where the arena is not mapped.
    #[error("it is entry code, which runs where the arena is not mapped")]
    EntryCode,
}

/// Checks a function of an object, or a part of it.
///
/// # Errors
/// [`RegionError`].
pub fn check(range: GvaRange, object: &str, guest: &Guest<'_>) -> Result<(), RegionError> {
    if object != VMLINUX {
        return in_module(range, guest.module(object));
    }
    let layout = &guest.kernel().layout;
    if layout.init.is_some_and(|init| init.overlaps(&range)) {
        return Err(RegionError::Init);
    }
    let within = layout.text.start <= range.start && range.end <= layout.text.end;
    if !within {
        return Err(RegionError::NotText);
    }
    // Bounds of `.entry.text` (Linux v6.12 include/asm-generic/sections.h).
    if overlaps(
        range,
        guest.unique("__entry_text_start"),
        guest.unique("__entry_text_end"),
    ) {
        return Err(RegionError::EntryCode);
    }
    Ok(())
}

fn in_module(range: GvaRange, module: Option<&Module>) -> Result<(), RegionError> {
    let init = module.and_then(|module| module.init_text);
    if init.is_some_and(|init| init.overlaps(&range)) {
        return Err(RegionError::Init);
    }
    let within = |text: &GvaRange| text.start <= range.start && range.end <= text.end;
    match module.map(|module| module.text) {
        Some(text) if within(&text) => Ok(()),
        _ => Err(RegionError::NotText),
    }
}

fn overlaps(range: GvaRange, start: Option<Gva>, end: Option<Gva>) -> bool {
    match (start, end) {
        (Some(start), Some(end)) => range.overlaps(&GvaRange { start, end }),
        _ => false,
    }
}
