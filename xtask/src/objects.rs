//! Pairs of objects to make a patch from: one source file of a guest's kernel before and after a fix, compiled with the guest's
//! own configuration. A work tree of hard links is patched, never the unpacked source.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::images::{self, Recipe};
use crate::manifest::Manifest;
use crate::publish::Staging;
use crate::{checksum, paths, progress, run};

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
    let digest = checksum::of_parts(&[
        recipe.identity.as_bytes(),
        text.as_bytes(),
        FLAGS.as_bytes(),
    ]);
    let dir = paths::cache()?
        .join("objects")
        .join(guest)
        .join(format!("{patch}-{}", &digest[..12]));
    let lock = paths::cache()?.join(format!("objects-{guest}.lock"));
    let lock = fs::File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
    // Held to the end of this function: two commands in one work tree would compile each other's source.
    lock.lock()
        .context("waiting for another command that compiles for this guest")?;
    if !dir.exists() {
        let step = progress::step(format!("compiling {patch} for {guest}"));
        let work = WorkTree::prepared(guest, &recipe)?;
        let staging = Staging::beside(&dir)?;
        work.compile_both(&path, &changed_file(&text)?, staging.dir())?;
        ensure!(
            fs::read(staging.dir().join("old.o"))? != fs::read(staging.dir().join("new.o"))?,
            "{patch} changes nothing in the object compiled for {guest}"
        );
        staging.publish()?;
        step.done();
    }
    Ok(Pair { dir })
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

/// A patchable copy of a source and a build folder prepared with a guest's configuration.
struct WorkTree {
    pristine: PathBuf,
    source: PathBuf,
    out: PathBuf,
}

impl WorkTree {
    fn prepared(guest: &str, recipe: &Recipe) -> Result<Self> {
        let root = paths::cache()?
            .join("kbuild")
            .join(format!("{guest}-{}", &recipe.identity_digest()[..12]));
        if !root.exists() {
            let step = progress::step(format!("preparing the source of {guest}"));
            let staging = Staging::beside(&root)?;
            run::quiet(
                Command::new("cp")
                    .arg("-al")
                    .arg(&recipe.source)
                    .arg(staging.dir().join("source")),
            )?;
            fs::create_dir(staging.dir().join("out"))?;
            fs::write(staging.dir().join("out/.config"), &recipe.config)?;
            staging.publish()?;
            step.done();
        }
        let tree = Self {
            pristine: recipe.source.clone(),
            source: root.join("source"),
            out: root.join("out"),
        };
        if !tree.out.join("prepared").exists() {
            let step = progress::step(format!("preparing to compile for {guest}"));
            tree.make(&["olddefconfig"])?;
            tree.make(&["prepare"])?;
            fs::write(tree.out.join("prepared"), "")?;
            step.done();
        }
        Ok(tree)
    }

    fn compile_both(&self, patch: &Path, file: &str, into: &Path) -> Result<()> {
        // An interrupted run may have left the file patched.
        self.restore(file)?;
        self.compile(file, &into.join("old.o"))?;
        let patched = run::quiet(
            Command::new("patch")
                .args(["-p1", "-s", "--no-backup-if-mismatch", "-i"])
                .arg(patch)
                .current_dir(&self.source),
        );
        let result = patched
            .map(drop)
            .and_then(|()| self.compile(file, &into.join("new.o")));
        self.restore(file)?;
        result
    }

    fn compile(&self, file: &str, to: &Path) -> Result<()> {
        let object = format!("{}.o", file.trim_end_matches(".c"));
        let made = self.out.join(&object);
        // The file's time stamp says nothing after a patch was taken back.
        if made.exists() {
            fs::remove_file(&made)?;
        }
        self.make(&[&format!("KCFLAGS={FLAGS}"), &object])?;
        fs::copy(&made, to).with_context(|| format!("no {object} after its compilation"))?;
        Ok(())
    }

    fn restore(&self, file: &str) -> Result<()> {
        let (from, to) = (self.pristine.join(file), self.source.join(file));
        fs::remove_file(&to).with_context(|| format!("no {file} in the source"))?;
        fs::hard_link(&from, &to).with_context(|| format!("cannot restore {file}"))
    }

    fn make(&self, targets: &[&str]) -> Result<()> {
        let jobs = format!(
            "-j{}",
            std::thread::available_parallelism().map_or(2, usize::from)
        );
        let mut command = Command::new("make");
        command
            .args(["-s", &jobs, "CC=gcc-12", "HOSTCC=gcc-12"])
            .arg("-C")
            .arg(&self.source);
        run::quiet(
            command
                .arg(format!("O={}", self.out.display()))
                .args(targets),
        )
        .map(drop)
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
