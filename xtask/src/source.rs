//! Kernel source trees in the cache. Nothing is ever built inside one: builds use a folder of their own (`make O=`).

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::manifest::Guest;
use crate::publish::Staging;
use crate::{packages, paths, progress, run};

/// The source that the guest's kernel was built from, unpacked.
pub(crate) fn unpacked(guest: &Guest) -> Result<PathBuf> {
    let name = guest.package_name(&guest.source);
    let target = paths::cache()?
        .join("tree")
        .join(format!("{name}-tree_{}", guest.version));
    if target.exists() {
        return Ok(target);
    }
    let deb = packages::fetch(guest, &guest.source)?;
    let step = progress::step(format!("unpacking {name} {}", guest.version));
    let staging = Staging::beside(&target)?;
    // Straight from the package into tar: the archive inside is 150 MB that nobody needs again.
    let packed = format!("./usr/src/{name}.tar.xz");
    let script = r#"set -e; dpkg-deb --fsys-tarfile "$1" | tar -xO "$2" | tar -xJ --strip-components=1 -C "$3""#;
    run::quiet(
        Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(deb)
            .arg(packed)
            .arg(staging.dir()),
    )
    .with_context(|| format!("cannot unpack {name}"))?;
    staging.publish()?;
    step.done();
    Ok(target)
}
