//! Guest images: kernel, first file system and planted module of every guest in the manifest, in the cache. Each has a stamp of
//! all that it was made of and is made anew when that changes. Does not boot any.

mod bzimage;
mod debian;
mod lean;
mod planted;
mod ramdisk;
mod recipe;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::manifest::Manifest;
use crate::publish::Staging;
use crate::{checksum, packages, paths, progress};

pub(crate) use recipe::{Recipe, recipe};

/// A guest that can be booted.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    /// Name in the manifest.
    pub name: String,
    /// Folder that holds the files below.
    pub dir: PathBuf,
}

impl Image {
    /// Kernel release, as `uname -r` prints it.
    pub(crate) fn release(&self) -> Result<String> {
        let path = self.dir.join("release");
        Ok(fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?
            .trim()
            .to_owned())
    }

    fn in_cache(name: &str) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            dir: paths::cache()?.join("guests").join(name),
        })
    }
}

/// Names of all guests, distribution kernels first.
pub(crate) fn names(manifest: &Manifest) -> Vec<&str> {
    let guests = manifest.guests.iter().map(|g| g.name.as_str());
    guests
        .chain(manifest.leans.iter().map(|l| l.name.as_str()))
        .collect()
}

/// A folder to build modules in for a guest with a distribution's kernel.
pub(crate) fn build_tree(manifest: &Manifest, name: &str) -> Result<PathBuf> {
    debian::build_tree(&packages::settle(manifest.guest(name)?)?)
}

/// Whether making this image takes no kernel build.
pub(crate) fn is_quick(manifest: &Manifest, name: &str) -> Result<bool> {
    match manifest.leans.iter().find(|l| l.name == name) {
        Some(lean) => lean::is_built(manifest, lean),
        None => Ok(true),
    }
}

/// Makes the image of one guest unless the cache has it.
pub(crate) fn make(manifest: &Manifest, name: &str) -> Result<Image> {
    if let Ok(guest) = manifest.guest(name) {
        return debian::make(guest);
    }
    match manifest.leans.iter().find(|l| l.name == name) {
        Some(lean) => lean::make(manifest, lean),
        None => bail!("no guest {name}; there are {}", names(manifest).join(", ")),
    }
}

/// What an image is made of, before the planted module is built.
struct Parts<'a> {
    /// Kernel to boot, as bzImage.
    bzimage: PathBuf,
    /// The ELF kernel, if there is one already.
    vmlinux: Option<PathBuf>,
    release: String,
    /// Prepared kernel build folder for the planted module; none where the kernel has it linked in.
    build: Option<&'a Path>,
    /// Whatever names the kernel's exact version.
    identity: &'a [u8],
}

/// Puts an image together, or returns the one that was made of the same parts.
fn assemble(name: &str, parts: &Parts<'_>) -> Result<Image> {
    let image = Image::in_cache(name)?;
    let stamp = stamp(parts)?;
    if fs::read_to_string(image.dir.join("stamp")).is_ok_and(|s| s == stamp) {
        return Ok(image);
    }
    let step = progress::step(format!("making guest image {name}"));
    let staging = Staging::beside(&image.dir)?;
    fill(staging.dir(), parts).with_context(|| format!("cannot make guest image {name}"))?;
    fs::write(staging.dir().join("stamp"), stamp)?;
    staging.publish()?;
    step.done();
    Ok(image)
}

fn stamp(parts: &Parts<'_>) -> Result<String> {
    let planted = planted::source()?;
    let init = ramdisk::init()?;
    Ok(checksum::of_parts(&[
        parts.identity,
        parts.release.as_bytes(),
        &planted,
        &init,
    ]))
}

fn fill(dir: &Path, parts: &Parts<'_>) -> Result<()> {
    let packed = fs::read(&parts.bzimage)
        .with_context(|| format!("cannot read {}", parts.bzimage.display()))?;
    fs::write(dir.join("vmlinuz"), &packed)?;
    match &parts.vmlinux {
        Some(elf) => drop(
            fs::copy(elf, dir.join("vmlinux"))
                .with_context(|| format!("cannot read {}", elf.display()))?,
        ),
        None => fs::write(dir.join("vmlinux"), bzimage::payload(&packed)?)?,
    }
    fs::write(dir.join("release"), &parts.release)?;
    let module = parts
        .build
        .map(|build| planted::build(build, dir))
        .transpose()?;
    fs::write(dir.join("initrd"), ramdisk::archive(module.as_deref())?)?;
    Ok(())
}
