//! The planted module, built against a prepared kernel folder or linked into a kernel.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::external::External;

const PLANTED: External = External { name: "planted" };

/// All of the source as one byte string, to tell whether it changed.
pub(super) fn source() -> Result<Vec<u8>> {
    PLANTED.source()
}

/// The module's bytes; `scratch` gets a folder with what the build leaves, removed again.
pub(super) fn build(kernel: &Path, scratch: &Path) -> Result<Vec<u8>> {
    let dir = scratch.join("planted");
    PLANTED.copy(&dir)?;
    let module = PLANTED.module(kernel, &dir)?;
    fs::remove_dir_all(&dir)?;
    Ok(module)
}

/// Makes it a part of a kernel source tree whose files may be links to another: what changes is replaced, not written to.
pub(super) fn link_into(source: &Path) -> Result<()> {
    let planted = PLANTED.folder().join("planted.c");
    fs::copy(planted, source.join("kernel/planted.c"))?;
    let makefile = source.join("kernel/Makefile");
    let text = fs::read_to_string(&makefile)
        .with_context(|| format!("cannot read {}", makefile.display()))?;
    fs::remove_file(&makefile)?;
    fs::write(&makefile, format!("{text}\nobj-y += planted.o\n"))?;
    Ok(())
}
