//! Builds the planted module against a prepared kernel folder. The source is `guest-images/planted/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{paths, run};

const FILES: [&str; 2] = ["Kbuild", "planted.c"];

/// All of the source as one byte string, to tell whether it changed.
pub(super) fn source() -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for file in FILES {
        let path = folder().join(file);
        all.extend(fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
    }
    Ok(all)
}

/// The module's bytes; `scratch` gets a folder with what the build leaves, removed again.
pub(super) fn build(kernel: &Path, scratch: &Path) -> Result<Vec<u8>> {
    let dir = scratch.join("planted");
    fs::create_dir_all(&dir)?;
    for file in FILES {
        fs::copy(folder().join(file), dir.join(file))?;
    }
    run::quiet(
        Command::new("make")
            .args(["-s", "CC=gcc-12", "HOSTCC=gcc-12", "modules"])
            .arg("-C")
            .arg(kernel)
            .arg(format!("M={}", dir.display())),
    )
    .context("the planted module does not build")?;
    run::quiet(
        Command::new("strip")
            .arg("--strip-debug")
            .arg(dir.join("planted.ko")),
    )?;
    let module = fs::read(dir.join("planted.ko")).context("no planted.ko after its build")?;
    fs::remove_dir_all(&dir)?;
    Ok(module)
}

/// Makes it a part of a kernel source tree whose files may be links to another: what changes is replaced, not written to.
pub(super) fn link_into(source: &Path) -> Result<()> {
    fs::copy(folder().join("planted.c"), source.join("kernel/planted.c"))?;
    let makefile = source.join("kernel/Makefile");
    let text = fs::read_to_string(&makefile)
        .with_context(|| format!("cannot read {}", makefile.display()))?;
    fs::remove_file(&makefile)?;
    fs::write(&makefile, format!("{text}\nobj-y += planted.o\n"))?;
    Ok(())
}

fn folder() -> PathBuf {
    paths::guest_images().join("planted")
}
