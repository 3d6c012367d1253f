//! The first file system of the test host: busybox, the modules that make `/dev/kvm`, init. Rebuilt when any of it changes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::manifest::{Guest, Manifest};
use crate::{checksum, packages, paths, publish};

/// Kernel image and initial RAM disk of the test host.
#[derive(Debug)]
pub(super) struct Boot {
    /// Compressed kernel.
    pub kernel: PathBuf,
    /// Archive with init.
    pub initrd: PathBuf,
}

/// Makes what the test host boots.
pub(super) fn make(manifest: &Manifest) -> Result<Boot> {
    let guest = packages::settle(manifest.guest(&manifest.test_host.guest)?)?;
    let tree = packages::unpacked(&guest, &guest.image)?;
    let kernel = tree.join(format!("boot/vmlinuz-{}", guest.release()));
    let init = read(&paths::guest_images().join("test-host/init"))?;
    let digest = checksum::of_parts(&[
        &init,
        guest.version.as_bytes(),
        manifest.test_host.modules.join(" ").as_bytes(),
    ]);
    let initrd = paths::cache()?
        .join("host")
        .join(format!("{}.cpio", &digest[..16]));
    if !initrd.exists() {
        let archive = archive(manifest, &guest, &tree, &init)?;
        publish::file(&initrd, &archive)?;
    }
    Ok(Boot { kernel, initrd })
}

fn archive(manifest: &Manifest, guest: &Guest, tree: &Path, init: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for dir in ["bin", "proc", "sys", "dev", "full", "root", "modules"] {
        archive.directory(dir)?;
    }
    archive.file("bin/busybox", 0o755, &read(Path::new("/bin/busybox"))?)?;
    archive.file("init", 0o755, init)?;
    let mut order = String::new();
    for module in &manifest.test_host.modules {
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.file(
            &format!("modules/{name}.ko"),
            0o644,
            &packages::module(guest, tree, module)?,
        )?;
        order.push_str(name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    Ok(archive.finish()?)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
