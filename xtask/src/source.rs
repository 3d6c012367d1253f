//! Kernel source trees in the cache. Nothing is ever built inside one: builds use a folder of their own (`make O=`).

use std::path::PathBuf;

use anyhow::Result;
use vmpatch_kbuild::debian;

use crate::manifest::Guest;
use crate::publish::Staging;
use crate::{packages, paths, progress};

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
    debian::unpack_source(&name, &deb, staging.dir())?;
    staging.publish()?;
    step.done();
    Ok(target)
}
