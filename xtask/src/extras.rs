//! What tests of a distribution's kernel have besides its image and the pairs of objects: modules to load, in a first file system
//! with them; the pair of objects of the module `statics`; patches that the product built from diffs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vmpatch_testkit::Tool;

use crate::corpus::build::{self, Kernel};
use crate::corpus::modules::{Module, Modules};
use crate::cpio::{self, Archive};
use crate::external::External;
use crate::manifest::Manifest;
use crate::publish::Staging;
use crate::workbench::Workbench;
use crate::{checksum, images, objects, packages, paths, progress, publish, run};

/// Functions with static variables of their own.
const STATICS: External = External { name: "statics" };
/// Patches of `guest-images/patches/` that are built from their diffs.
const DIFFS: [&str; 1] = ["classics"];
/// Patches of modules that tests load when they want to, as objects.
const PAIRS: [&str; 1] = ["dummy-length"];
/// Modules of the kernel's own package that tests load when they want to.
const MODULES: [&str; 1] = ["dummy"];

/// Makes all of it for a guest, in `extras/GUEST` of the folder for results; objects go to those of the other patches.
pub(crate) fn prepare(bench: &Workbench, guest: &str) -> Result<()> {
    let manifest = bench.manifest();
    let extras = bench.out().join("extras").join(guest);
    fs::create_dir_all(&extras)?;
    let statics = statics(manifest, guest)?;
    let objects = bench.out().join("objects").join(guest);
    symlink(&statics, objects.join(STATICS.name))?;
    for name in PAIRS {
        let pair = objects::make(manifest, guest, name)?;
        symlink(pair.dir(), objects.join(name))?;
    }
    let module = fs::read(statics.join("statics.ko")).context("cannot read the module statics")?;
    let mut modules = stock(manifest, guest)?;
    modules.push(Module {
        name: STATICS.name.to_owned(),
        bytes: module,
    });
    let base = bench.guests()?.join(guest).join("initrd");
    publish::file(&extras.join("initrd"), &ramdisk(&base, &modules)?)?;
    let tool = Tool::at(bench.vmpatch());
    let kernel = build::kernel(manifest, guest)?;
    let product = build::product(&tool)?;
    for name in DIFFS {
        let patch = built(&tool, &product, &kernel, guest, name)?;
        symlink(patch, extras.join(format!("{name}.vmpatch")))?;
    }
    Ok(())
}

/// Folder with the module, and with its objects before and after `guest-images/patches/statics.patch`.
fn statics(manifest: &Manifest, guest: &str) -> Result<PathBuf> {
    let name = STATICS.name;
    let fix = fs::read(diff(name))?;
    let kernel = images::build_tree(manifest, guest)?;
    let digest = checksum::of_parts(&[
        kernel.as_os_str().as_encoded_bytes(),
        &STATICS.source()?,
        &fix,
        vmpatch_kbuild::tree::FLAGS.as_bytes(),
    ]);
    let dir = paths::cache()?
        .join("objects")
        .join(guest)
        .join(format!("{name}-{}", &digest[..12]));
    if dir.exists() {
        return Ok(dir);
    }
    let step = progress::step(format!("compiling {name} for {guest}"));
    let staging = Staging::beside(&dir)?;
    let source = staging.dir().join("source");
    STATICS.copy(&source)?;
    let module = STATICS.module(&kernel, &source)?;
    fs::write(staging.dir().join("statics.ko"), module)?;
    let old = STATICS.object(&kernel, &source)?;
    fs::write(staging.dir().join("old.o"), old)?;
    let mut patch = Command::new("patch");
    patch.args(["-s", "-p1", "-d"]).arg(&source);
    run::quiet(patch.arg("-i").arg(diff(name)))?;
    let new = STATICS.object(&kernel, &source)?;
    fs::write(staging.dir().join("new.o"), new)?;
    fs::write(staging.dir().join("object"), name)?;
    fs::remove_dir_all(source)?;
    staging.publish()?;
    step.done();
    Ok(dir)
}

fn stock(manifest: &Manifest, guest: &str) -> Result<Vec<Module>> {
    let guest = packages::settle(manifest.guest(guest)?)?;
    let tree = packages::unpacked(&guest, &guest.image)?;
    Modules::of(&guest, tree)?.with_dependencies(&MODULES.map(str::to_owned))
}

/// The guest's own first file system, and one with modules in `/extras` behind it.
fn ramdisk(base: &Path, modules: &[Module]) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    archive.directory("extras")?;
    for module in modules {
        archive.file(&format!("extras/{}.ko", module.name), 0o644, &module.bytes)?;
    }
    cpio::behind(base, &archive.finish()?)
}

fn built(tool: &Tool, product: &str, kernel: &Kernel, guest: &str, name: &str) -> Result<PathBuf> {
    let patch = paths::cache()?
        .join("extras")
        .join(guest)
        .join(name)
        .join(format!("{name}.vmpatch"));
    let step = progress::step(format!("building {name} for {guest}"));
    let built = build::kept(tool, product, kernel, &diff(name), &patch)?;
    ensure!(
        built.is_patch(),
        "{name} for {guest} is refused: {}",
        built.reason()
    );
    step.done();
    Ok(patch)
}

fn diff(name: &str) -> PathBuf {
    paths::guest_images()
        .join("patches")
        .join(format!("{name}.patch"))
}
