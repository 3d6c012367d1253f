//! What the crates' own tests compare with real kernels, made ready: dumps of stopped guests, samples of patches, whole objects,
//! a kernel's source; and the variables that name them. Boots nothing but what is dumped.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::manifest::Manifest;
use crate::{dumps, images, objects, paths};

/// Patches that are linked for and applied to dumps: each another kind of change.
const SAMPLES: [&str; 13] = [
    "cmdline-suffix",
    "dev-valid-name",
    "dummy-length",
    "getuid",
    "loadavg-const",
    "loadavg-format",
    "loadavg-warn",
    "meminfo-const",
    "proc-version",
    "shadow-count",
    "uptime-cond",
    "uptime-fault",
    "version-banner",
];
/// The guest that the samples are for.
const SAMPLED: &str = "debian-6.12";
/// Files whose every function must be found in the guests: between them they have every kind of place that a kernel rewrites,
/// and some are of modules that are loaded where dumps are taken.
const WHOLE: [&str; 12] = [
    "arch/x86/kernel/process_64.c",
    "drivers/block/loop.c",
    "drivers/net/dummy.c",
    "drivers/net/net_failover.c",
    "fs/fat/dir.c",
    "fs/namei.c",
    "kernel/fork.c",
    "kernel/sched/core.c",
    "kernel/signal.c",
    "lib/vsprintf.c",
    "mm/memory.c",
    "net/core/dev.c",
];
/// The guests that they are compiled for, and the variable that lists them.
const COMPARED: [(&str, &str); 2] = [
    ("debian-6.12", "VMPATCH_WHOLE_OBJECTS"),
    ("debian-6.1", "VMPATCH_WHOLE_OBJECTS_6_1"),
];

/// Makes all of it unless the cache has it; returns the variables.
pub(crate) fn prepare(manifest: &Manifest) -> Result<Vec<(&'static str, OsString)>> {
    let mut variables = vec![
        ("VMPATCH_DUMPS", dumps::make(manifest)?.into_os_string()),
        ("VMPATCH_SAMPLES", samples(manifest)?.into_os_string()),
        ("VMPATCH_SOURCE", kernel(manifest)?.into_os_string()),
    ];
    for (guest, variable) in COMPARED {
        let list = objects::whole(manifest, guest, &WHOLE)?;
        variables.push((variable, std::env::join_paths(list)?));
    }
    Ok(variables)
}

/// A folder with a pair of objects for each sample, under its name.
fn samples(manifest: &Manifest) -> Result<PathBuf> {
    let dir = fresh("samples")?;
    for sample in SAMPLES {
        let pair = objects::make(manifest, SAMPLED, sample)?;
        symlink(pair.dir(), dir.join(sample))?;
    }
    Ok(dir)
}

/// A folder with the source, as `linux`, and the configuration of the guest that the samples are for.
fn kernel(manifest: &Manifest) -> Result<PathBuf> {
    let dir = fresh("kernel")?;
    let recipe = images::recipe(manifest, SAMPLED)?;
    symlink(recipe.source, dir.join("linux"))?;
    fs::write(dir.join("config"), recipe.config)?;
    Ok(dir)
}

/// An empty folder of this clone.
fn fresh(name: &str) -> Result<PathBuf> {
    let dir = paths::repo().join("target/runs").join(name);
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot clear {}", dir.display()))?;
    }
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}
