//! A guest's packages in the cache: fetched, checked against the manifest, unpacked. Does not install any of them.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::manifest::{Guest, Package};
use crate::publish::Staging;
use crate::{apt, checksum, paths, progress, run};

/// The guest at the version that can really be had: the pinned one, or a substitute if that left the archive.
/// What it returns has its image package in the cache.
pub(crate) fn settle(guest: &Guest) -> Result<Guest> {
    let pinned = fetch(guest, &guest.image);
    let Err(error) = pinned else {
        return Ok(guest.clone());
    };
    if cached_but_wrong(guest, &guest.image)? {
        return Err(error);
    }
    let other = substitute(guest).with_context(|| {
        format!(
            "{} cannot be had and nothing may stand in: {error:#}",
            guest.release()
        )
    })?;
    progress::warn(&format!(
        "{} left the archive: taking {} ({}) instead, unpinned",
        guest.release(),
        other.release(),
        other.version
    ));
    fetch(&other, &other.image)?;
    Ok(other)
}

fn cached_but_wrong(guest: &Guest, package: &Package) -> Result<bool> {
    Ok(find(&debs()?, &guest.package_name(package), &guest.version)?.is_some())
}

fn substitute(guest: &Guest) -> Result<Guest> {
    let mut best: Option<Guest> = None;
    for name in vmpatch_kbuild::apt::names(&guest.substitute)? {
        let version = apt::newest_version(&name)?;
        if best
            .as_ref()
            .is_some_and(|b| !apt::is_newer(&version, &b.version))
        {
            continue;
        }
        let abi = name
            .strip_prefix("linux-image-")
            .and_then(|n| n.strip_suffix("-cloud-amd64"));
        best = abi.map(|abi| guest.substituted(abi, &version)).or(best);
    }
    best.with_context(|| format!("no package matches {}", guest.substitute))
}

/// The package as a file in the cache, its checksum verified.
pub(crate) fn fetch(guest: &Guest, package: &Package) -> Result<PathBuf> {
    let (dir, name) = (debs()?, guest.package_name(package));
    if let Some(deb) = find(&dir, &name, &guest.version)? {
        return verified(deb, package);
    }
    let step = progress::step(format!("fetching {name} {}", guest.version));
    let staging = Staging::beside(&dir.join(&name))?;
    let wanted = vmpatch_kbuild::apt::Package {
        name: name.clone(),
        version: guest.version.clone(),
    };
    vmpatch_kbuild::apt::download(&wanted, staging.dir())
        .with_context(|| format!("cannot fetch {name} from this machine's package archive"))?;
    let fetched = find(staging.dir(), &name, &guest.version)?
        .with_context(|| format!("{name} was fetched but is not there"))?;
    let fetched = verified(fetched, package)?;
    let deb = dir.join(fetched.file_name().unwrap_or_default());
    fs::rename(&fetched, &deb).with_context(|| format!("cannot keep {}", deb.display()))?;
    step.done();
    Ok(deb)
}

/// The package unpacked into a folder of its own in the cache. Only unpacked packages are trusted without a new checksum.
pub(crate) fn unpacked(guest: &Guest, package: &Package) -> Result<PathBuf> {
    let target = paths::cache()?.join("tree").join(format!(
        "{}_{}",
        guest.package_name(package),
        guest.version
    ));
    if target.exists() {
        return Ok(target);
    }
    let deb = fetch(guest, package)?;
    let step = progress::step(format!("unpacking {}", guest.package_name(package)));
    let staging = Staging::beside(&target)?;
    unpack(&deb, staging.dir())?;
    staging.publish()?;
    step.done();
    Ok(target)
}

/// Puts the files of a package under `root`, where others may be already.
pub(crate) fn unpack(deb: &Path, root: &Path) -> Result<()> {
    run::quiet(Command::new("dpkg-deb").arg("-x").arg(deb).arg(root))?;
    Ok(())
}

/// A module of the guest's own package, uncompressed: busybox loads plain ones only.
pub(crate) fn module(guest: &Guest, tree: &Path, module: &str) -> Result<Vec<u8>> {
    let plain = tree.join(format!(
        "lib/modules/{}/kernel/{module}.ko",
        guest.release()
    ));
    if plain.exists() {
        return fs::read(&plain).with_context(|| format!("cannot read {}", plain.display()));
    }
    let packed = plain.with_extension("ko.xz");
    let file =
        fs::File::open(&packed).with_context(|| format!("cannot open {}", packed.display()))?;
    let mut bytes = Vec::new();
    xz2::read::XzDecoder::new(file)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot unpack {}", packed.display()))?;
    Ok(bytes)
}

fn debs() -> Result<PathBuf> {
    let dir = paths::cache()?.join("debs");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

/// A package file by name and version; the version may be written with escapes.
fn find(dir: &Path, name: &str, version: &str) -> Result<Option<PathBuf>> {
    let starts = [
        format!("{name}_{version}_"),
        format!("{name}_{}_", version.replace(':', "%3a")),
    ];
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry.with_context(|| format!("cannot list {}", dir.display()))?;
        let file = entry.file_name().to_string_lossy().into_owned();
        if file.ends_with(".deb") && starts.iter().any(|s| file.starts_with(s)) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

fn verified(deb: PathBuf, package: &Package) -> Result<PathBuf> {
    if let Some(expected) = &package.sha256 {
        checksum::demand(&deb, expected)?;
    }
    Ok(deb)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_with_another_checksum_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let deb = dir.path().join("a_1_all.deb");
        fs::write(&deb, b"not what was pinned").unwrap();
        let package = Package {
            package: "a".into(),
            sha256: Some("00".repeat(32)),
        };
        assert!(
            verified(deb, &package)
                .unwrap_err()
                .to_string()
                .contains("SHA-256")
        );
    }

    #[test]
    fn a_longer_version_is_not_taken_for_a_shorter_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a_1.10_all.deb"), b"").unwrap();
        assert!(find(dir.path(), "a", "1.1").unwrap().is_none());
        assert!(find(dir.path(), "a", "1.10").unwrap().is_some());
    }
}
