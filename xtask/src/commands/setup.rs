//! `cargo xtask setup`: this machine gets what the other commands need. They all call it; it is quick when nothing is missing.

use anyhow::Result;

use crate::apt;
use crate::manifest::Manifest;

/// Programs of this machine; returns the manifest that names them.
pub(crate) fn tools() -> Result<Manifest> {
    let manifest = Manifest::load()?;
    apt::ensure_tools(&manifest.tools)?;
    Ok(manifest)
}
