//! Objects compiled from a guest's kernel source with the guest's own configuration: pairs to make a patch from, one source file
//! before and after a fix, and whole files to find in the guest. A work tree of hard links is patched, never the unpacked source.

mod worktree;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::images::{self, Recipe};
use crate::manifest::Manifest;
use crate::publish::Staging;
use crate::{checksum, paths, progress};
use worktree::WorkTree;

/// Each function and each datum in a section of its own, so that a change is seen where it is.
const FLAGS: &str = "-ffunction-sections -fdata-sections";

/// Folder with `old.o` and `new.o`.
#[derive(Debug)]
pub(crate) struct Pair {
    dir: PathBuf,
}

impl Pair {
    /// Where both lie, as `old.o` and `new.o`.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Compiles the file that `guest-images/patches/<patch>.patch` changes, without and with it, for this guest.
pub(crate) fn make(manifest: &Manifest, guest: &str, patch: &str) -> Result<Pair> {
    let path = paths::guest_images()
        .join("patches")
        .join(format!("{patch}.patch"));
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let recipe = images::recipe(manifest, guest)?;
    let dir = cached(guest, patch, &recipe, &text, |work, into| {
        work.compile_both(&path, &changed_file(&text)?, into)?;
        ensure!(
            fs::read(into.join("old.o"))? != fs::read(into.join("new.o"))?,
            "{patch} changes nothing in the object compiled for {guest}"
        );
        Ok(())
    })?;
    Ok(Pair { dir })
}

/// Compiles these files as they are for this guest.
pub(crate) fn whole(manifest: &Manifest, guest: &str, files: &[&str]) -> Result<Vec<PathBuf>> {
    let recipe = images::recipe(manifest, guest)?;
    let name = |file: &str| file.trim_end_matches(".c").replace('/', "-") + ".o";
    let dir = cached(guest, "whole", &recipe, &files.join("\n"), |work, into| {
        let places: Vec<_> = files.iter().map(|f| (*f, into.join(name(f)))).collect();
        work.compile_unpatched(&places)
    })?;
    Ok(files.iter().map(|file| dir.join(name(file))).collect())
}

/// The folder that `fill` filled, now or some time ago, from the same kernel and the same `input`.
fn cached(
    guest: &str,
    name: &str,
    recipe: &Recipe,
    input: &str,
    fill: impl FnOnce(&WorkTree, &Path) -> Result<()>,
) -> Result<PathBuf> {
    let digest = checksum::of_parts(&[
        recipe.identity.as_bytes(),
        input.as_bytes(),
        FLAGS.as_bytes(),
    ]);
    let root = paths::cache()?;
    let dir = root
        .join("objects")
        .join(guest)
        .join(format!("{name}-{}", &digest[..12]));
    let lock = root.join(format!("objects-{guest}.lock"));
    let lock = fs::File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
    // Held to the end of this function: two commands in one work tree would compile each other's source.
    lock.lock()
        .context("waiting for another command that compiles for this guest")?;
    if !dir.exists() {
        let step = progress::step(format!("compiling {name} for {guest}"));
        let work = WorkTree::prepared(guest, recipe)?;
        let staging = Staging::beside(&dir)?;
        fill(&work, staging.dir())?;
        staging.publish()?;
        step.done();
    }
    Ok(dir)
}

/// The one C file that a patch changes, relative to the root of the source.
fn changed_file(patch: &str) -> Result<String> {
    let mut files = patch
        .lines()
        .filter_map(|l| l.strip_prefix("+++ b/"))
        .map(|f| f.split('\t').next().unwrap_or(f));
    match (files.next(), files.next()) {
        (Some(file), None) if file.ends_with(".c") => Ok(file.to_owned()),
        _ => bail!("a patch for a demo or test changes exactly one .c file"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_changed_file_is_read_from_the_patch() {
        let patch = "--- a/fs/proc/version.c\n+++ b/fs/proc/version.c\t2026-01-01\n@@ -1 +1 @@\n";
        assert_eq!(changed_file(patch).unwrap(), "fs/proc/version.c");
    }

    #[test]
    fn a_patch_of_two_files_is_refused() {
        assert!(changed_file("+++ b/a.c\n+++ b/b.c\n").is_err());
    }
}
