//! A guest's kernel source made ready to compile single files of it. Does not know what the objects are for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::FLAGS;
use crate::images::Recipe;
use crate::publish::Staging;
use crate::{paths, progress, run};

/// A patchable copy of a source and a build folder prepared with a guest's configuration.
pub(super) struct WorkTree {
    pristine: PathBuf,
    source: PathBuf,
    out: PathBuf,
}

impl WorkTree {
    /// The tree of this guest, made unless the cache has it.
    pub(super) fn prepared(guest: &str, recipe: &Recipe) -> Result<Self> {
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

    /// Compiles a file as it is and patched, to `old.o` and `new.o`.
    pub(super) fn compile_both(&self, patch: &Path, file: &str, into: &Path) -> Result<()> {
        // An interrupted run may have left the file patched.
        self.restore(file)?;
        self.compile(&[(file, into.join("old.o"))])?;
        let patched = run::quiet(
            Command::new("patch")
                .args(["-p1", "-s", "--no-backup-if-mismatch", "-i"])
                .arg(patch)
                .current_dir(&self.source),
        );
        let result = patched
            .map(drop)
            .and_then(|()| self.compile(&[(file, into.join("new.o"))]));
        self.restore(file)?;
        result
    }

    /// Compiles files as they are, each to its place.
    pub(super) fn compile_unpatched(&self, files: &[(&str, PathBuf)]) -> Result<()> {
        for (file, _) in files {
            self.restore(file)?;
        }
        self.compile(files)
    }

    fn compile(&self, files: &[(&str, PathBuf)]) -> Result<()> {
        let objects: Vec<String> = files.iter().map(|(file, _)| object(file)).collect();
        for made in objects.iter().map(|object| self.out.join(object)) {
            // The file's time stamp says nothing after a patch was taken back.
            if made.exists() {
                fs::remove_file(&made)?;
            }
        }
        let flags = format!("KCFLAGS={FLAGS}");
        let mut targets = vec![flags.as_str()];
        targets.extend(objects.iter().map(String::as_str));
        self.make(&targets)?;
        for (object, (_, to)) in objects.iter().zip(files) {
            fs::copy(self.out.join(object), to)
                .with_context(|| format!("no {object} after its compilation"))?;
        }
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

/// The object of a source file.
fn object(file: &str) -> String {
    format!("{}.o", file.trim_end_matches(".c"))
}
