//! Kernels built here from a guest's source and a committed fragment on top of `tinyconfig`. One build folder for each
//! source version and fragment; it stays, for modules and for objects compiled to make patches from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Image, Parts, assemble, planted};
use crate::manifest::{Guest, Lean, Manifest, Planted};
use crate::publish::Staging;
use crate::{checksum, packages, paths, progress, run, source};

/// A finished build.
#[derive(Debug)]
pub(super) struct Built {
    /// The build folder (`O=` of the kernel's make).
    pub dir: PathBuf,
    /// Names source version and configuration.
    pub identity: String,
}

/// Makes the image of a lean kernel.
pub(super) fn make(manifest: &Manifest, lean: &Lean) -> Result<Image> {
    let built = built(manifest, lean)?;
    let release = fs::read_to_string(built.dir.join("include/config/kernel.release"))?
        .trim()
        .to_owned();
    let parts = Parts {
        bzimage: built.dir.join("arch/x86/boot/bzImage"),
        vmlinux: Some(built.dir.join("vmlinux.stripped")),
        release,
        build: (lean.planted == Planted::Module).then_some(built.dir.as_path()),
        identity: built.identity.as_bytes(),
    };
    assemble(&lean.name, &parts)
}

/// Whether the kernel is in the cache.
pub(super) fn is_built(manifest: &Manifest, lean: &Lean) -> Result<bool> {
    Ok(Plan::of(manifest, lean)?.built.dir.exists())
}

/// Builds the kernel, or finds it built.
pub(super) fn built(manifest: &Manifest, lean: &Lean) -> Result<Built> {
    let plan = Plan::of(manifest, lean)?;
    if !plan.built.dir.exists() {
        let source = source::unpacked(&plan.guest)?;
        let step = progress::step(format!(
            "building kernel {} (some minutes, once)",
            lean.name
        ));
        compile(&source, &plan.fragment, lean.planted, &plan.built.dir)
            .with_context(|| format!("kernel {} does not build", lean.name))?;
        step.done();
    }
    Ok(plan.built)
}

/// What a lean kernel is built from and where it will lie.
struct Plan {
    guest: Guest,
    fragment: String,
    built: Built,
}

impl Plan {
    fn of(manifest: &Manifest, lean: &Lean) -> Result<Self> {
        let guest = packages::settle(manifest.guest(&lean.source)?)?;
        let path = paths::guest_images().join(&lean.fragment);
        let fragment =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let linked_in = if lean.planted == Planted::LinkedIn {
            planted::source()?
        } else {
            Vec::new()
        };
        let identity =
            checksum::of_parts(&[guest.version.as_bytes(), fragment.as_bytes(), &linked_in]);
        let dir = paths::cache()?
            .join("lean")
            .join(format!("{}-{}", lean.name, &identity[..12]));
        Ok(Self {
            guest,
            fragment,
            built: Built { dir, identity },
        })
    }
}

fn compile(source: &Path, fragment: &str, planted: Planted, target: &Path) -> Result<()> {
    let staging = Staging::beside(target)?;
    let dir = staging.dir();
    let linked = dir.join("linked-source");
    let source = match planted {
        Planted::Module => source,
        Planted::LinkedIn => {
            run::quiet(Command::new("cp").arg("-al").arg(source).arg(&linked))?;
            planted::link_into(&linked)?;
            &linked
        }
    };
    make_in(source, dir, &["tinyconfig"])?;
    let config = dir.join(".config");
    let tiny = fs::read_to_string(&config)?;
    fs::write(&config, format!("{tiny}{fragment}"))?;
    make_in(source, dir, &["olddefconfig"])?;
    check(&fs::read_to_string(&config)?, fragment)?;
    let jobs = format!(
        "-j{}",
        std::thread::available_parallelism().map_or(2, usize::from)
    );
    make_in(
        source,
        dir,
        &[&jobs, "vmlinux", "bzImage", "modules_prepare"],
    )?;
    run::quiet(
        Command::new("objcopy")
            .arg("--strip-debug")
            .arg(dir.join("vmlinux"))
            .arg(dir.join("vmlinux.stripped")),
    )?;
    // What `make modules` would leave if there were any: exported symbols, for modules built later.
    fs::copy(dir.join("vmlinux.symvers"), dir.join("Module.symvers"))
        .context("no vmlinux.symvers")?;
    relocate(dir, target)?;
    Ok(staging.publish()?)
}

/// The folder is renamed when it is done; its generated Makefile holds no path of its own but that of the source.
fn relocate(dir: &Path, target: &Path) -> Result<()> {
    let makefile = dir.join("Makefile");
    let text = fs::read_to_string(&makefile)?;
    fs::write(
        makefile,
        text.replace(&dir.display().to_string(), &target.display().to_string()),
    )?;
    Ok(())
}

fn make_in(source: &Path, out: &Path, targets: &[&str]) -> Result<()> {
    let mut command = Command::new("nice");
    command
        .args(["make", "-s", "CC=gcc-12", "HOSTCC=gcc-12"])
        .arg("-C")
        .arg(source)
        .arg(format!("O={}", out.display()));
    run::quiet(command.args(targets)).map(drop)
}

/// Kconfig drops silently what it cannot have; a fragment that did not hold is a mistake.
fn check(config: &str, fragment: &str) -> Result<()> {
    let wanted = fragment
        .lines()
        .filter(|l| l.starts_with("CONFIG_") || l.ends_with(" is not set"));
    let lost: Vec<&str> = wanted
        .filter(|w| !config.lines().any(|c| c == *w))
        .collect();
    if !lost.is_empty() {
        bail!("the configuration did not keep {}", lost.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_did_not_hold_is_named() {
        let error = check("CONFIG_A=y\n", "# why\nCONFIG_A=y\nCONFIG_B=y\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("CONFIG_B=y") && !error.contains("CONFIG_A"),
            "{error}"
        );
    }
}
