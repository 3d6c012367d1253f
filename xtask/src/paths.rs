//! Where things are: the clone and the cache. Does not create anything.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Root of this clone, known at compile time because `cargo xtask` always builds in the clone it serves.
pub(crate) fn repo() -> &'static Path {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.parent().unwrap_or(crate_dir)
}

/// Folder of this clone with everything the guests are made of.
pub(crate) fn guest_images() -> PathBuf {
    repo().join("guest-images")
}

/// `$VMPATCH_CACHE`, by default `~/.cache/vmpatch`: kernels and all that is made once. Survives the clone.
pub(crate) fn cache() -> Result<PathBuf> {
    vmpatch_kbuild::cache::dir().context("there is no cache")
}
