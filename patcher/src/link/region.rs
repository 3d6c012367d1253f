//! Parts of a kernel where no function can be replaced.

use vmpatch_introspect::{Gva, GvaRange};

use super::live::{Guest, Live};

/// Why code there cannot be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// Outside the kernel's text.
    #[error("it does not lie in the kernel's text")]
    NotText,
    /// Freed after boot, or about to be.
    #[error("it is init code, which is freed after boot")]
    Init,
    /// Runs with the user half of the page tables, where the arena is not mapped.
    #[error("it is entry code, which runs where the arena is not mapped")]
    EntryCode,
}

/// Checks a function or a part of it.
///
/// # Errors
/// [`RegionError`].
pub fn check(range: GvaRange, guest: &Guest<'_>) -> Result<(), RegionError> {
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

fn overlaps(range: GvaRange, start: Option<Gva>, end: Option<Gva>) -> bool {
    match (start, end) {
        (Some(start), Some(end)) => range.overlaps(&GvaRange { start, end }),
        _ => false,
    }
}
