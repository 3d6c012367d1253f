//! Modules outside the kernel's source, compiled by a prepared kernel folder. Their sources are folders of `guest-images/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{paths, run};

/// A module's source.
#[derive(Clone, Copy, Debug)]
pub(crate) struct External {
    /// Name of the module, of its folder and of its one C file.
    pub name: &'static str,
}

impl External {
    /// All of the source as one byte string, to tell whether it changed.
    pub(crate) fn source(&self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        for file in self.files() {
            let path = self.folder().join(file);
            all.extend(fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        }
        Ok(all)
    }

    /// Copies the source into `dir`, which is made.
    pub(crate) fn copy(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir)?;
        for file in self.files() {
            fs::copy(self.folder().join(&file), dir.join(&file))?;
        }
        Ok(())
    }

    /// The whole module of the source in `dir`, without what is only for debuggers.
    pub(crate) fn module(&self, kernel: &Path, dir: &Path) -> Result<Vec<u8>> {
        self.make(kernel, dir, &["modules"])?;
        let module = dir.join(format!("{}.ko", self.name));
        run::quiet(Command::new("strip").arg("--strip-debug").arg(&module))?;
        fs::read(&module).with_context(|| format!("no {} after its build", module.display()))
    }

    /// The object of the source in `dir`, each function and each variable with a section of its own.
    pub(crate) fn object(&self, kernel: &Path, dir: &Path) -> Result<Vec<u8>> {
        let object = format!("{}.o", self.name);
        let made = dir.join(&object);
        // What there is was compiled with other flags.
        if made.exists() {
            fs::remove_file(&made)?;
        }
        self.make(kernel, dir, &[vmpatch_kbuild::tree::FLAGS, &object])?;
        fs::read(&made).with_context(|| format!("no {} after its build", made.display()))
    }

    /// Where its source lies.
    pub(crate) fn folder(&self) -> PathBuf {
        paths::guest_images().join(self.name)
    }

    fn files(&self) -> [String; 2] {
        ["Kbuild".to_owned(), format!("{}.c", self.name)]
    }

    fn make(&self, kernel: &Path, dir: &Path, words: &[&str]) -> Result<()> {
        run::quiet(
            Command::new("make")
                .args(["-s", "CC=gcc-12", "HOSTCC=gcc-12"])
                .arg("-C")
                .arg(kernel)
                .arg(format!("M={}", dir.display()))
                .args(words),
        )
        .with_context(|| format!("the module {} does not build", self.name))?;
        Ok(())
    }
}
