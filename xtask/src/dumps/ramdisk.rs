//! The first file system of a guest that is dumped: busybox, its init, a few modules of its own package.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::manifest::Guest;
use crate::{packages, paths};

/// Modules that depend on each other or not, some with data of their own.
const MODULES: [&str; 5] = [
    "fs/fat/fat",
    "drivers/net/dummy",
    "drivers/block/loop",
    "net/core/failover",
    "drivers/net/net_failover",
];

/// The init script.
pub(super) fn init() -> Result<Vec<u8>> {
    let path = paths::guest_images().join("dump/init");
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// The archive.
pub(super) fn archive(guest: &Guest, tree: &Path, init: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for dir in ["bin", "dev", "modules", "proc", "sys", "tmp"] {
        archive.directory(dir)?;
    }
    let busybox =
        fs::read("/bin/busybox").context("cannot read /bin/busybox (package busybox-static)")?;
    archive.file("bin/busybox", 0o755, &busybox)?;
    archive.file("init", 0o755, init)?;
    for (number, module) in MODULES.iter().enumerate() {
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.file(
            &format!("modules/{number}{name}.ko"),
            0o644,
            &packages::module(guest, tree, module)?,
        )?;
    }
    Ok(archive.finish()?)
}
