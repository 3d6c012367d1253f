//! The guests' first file system: busybox, init, the planted module.

use std::fs;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::paths;

/// The init script.
pub(super) fn init() -> Result<Vec<u8>> {
    let path = paths::guest_images().join("init");
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// The archive, with this module as `/planted.ko`, if there is one.
pub(super) fn archive(module: Option<&[u8]>) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for dir in ["bin", "dev", "proc", "sys", "tmp"] {
        archive.directory(dir)?;
    }
    // Debian's busybox-static.
    let busybox =
        fs::read("/bin/busybox").context("cannot read /bin/busybox (package busybox-static)")?;
    archive.file("bin/busybox", 0o755, &busybox)?;
    archive.file("init", 0o755, &init()?)?;
    if let Some(module) = module {
        archive.file("planted.ko", 0o644, module)?;
    }
    Ok(archive.finish()?)
}
