//! Images of stock Debian kernels, and a folder to build modules for them, all from packages that are never installed.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Image, Parts, assemble};
use crate::manifest::Guest;
use crate::publish::Staging;
use crate::{packages, paths, progress, run};

/// Makes the image of a stock kernel.
pub(super) fn make(guest: &Guest) -> Result<Image> {
    let guest = packages::settle(guest)?;
    let tree = packages::unpacked(&guest, &guest.image)?;
    let build = build_tree(&guest)?;
    let parts = Parts {
        bzimage: tree.join(format!("boot/vmlinuz-{}", guest.release())),
        vmlinux: None,
        release: guest.release(),
        build: Some(&build),
        identity: guest.version.as_bytes(),
    };
    assemble(&guest.name, &parts)
}

/// The kernel's prepared build folder. Debian splits it over three packages that refer to each other by relative links
/// and one absolute path, which is set right here.
pub(crate) fn build_tree(guest: &Guest) -> Result<PathBuf> {
    let root =
        paths::cache()?
            .join("tree")
            .join(format!("build-{}_{}", guest.release(), guest.version));
    let build = root.join(format!("usr/src/linux-headers-{}", guest.release()));
    if root.exists() {
        return Ok(build);
    }
    let debs = [&guest.headers, &guest.common, &guest.kbuild].map(|p| packages::fetch(guest, p));
    let step = progress::step(format!("unpacking headers of {}", guest.release()));
    let staging = Staging::beside(&root)?;
    for deb in debs {
        run::quiet(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(deb?)
                .arg(staging.dir()),
        )?;
    }
    let makefile = staging.dir().join(format!(
        "usr/src/linux-headers-{}/Makefile",
        guest.release()
    ));
    let text = fs::read_to_string(&makefile)
        .with_context(|| format!("cannot read {}", makefile.display()))?;
    fs::write(
        &makefile,
        text.replace(
            "include /usr/src/",
            &format!("include {}/usr/src/", root.display()),
        ),
    )?;
    staging.publish()?;
    step.done();
    Ok(build)
}
