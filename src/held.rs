//! Patches that wait for a module: kept as whole files beside the journal of their VM until the module is loaded. Owns that
//! folder; who looks into it is `status`, `reconcile` and `rollback`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;
use vmpatch_patcher::patch::file::PatchFile;

use crate::exit::Failure;

/// Most patches looked at; one VM has no arena for more.
const MOST: usize = 1024;

/// The folder of one VM.
pub(crate) struct Held {
    folder: PathBuf,
}

/// One patch that waits.
#[derive(Debug, Serialize)]
pub(crate) struct Waiting {
    /// Its name.
    pub(crate) patch: String,
    /// SHA-256 of its content.
    pub(crate) digest: String,
    /// The modules it changes.
    pub(crate) modules: Vec<String>,
    #[serde(skip)]
    pub(crate) file: PathBuf,
}

impl Held {
    /// Those of the VM whose folder this is.
    pub(crate) fn of(folder: &Path) -> Self {
        Self {
            folder: folder.join("held"),
        }
    }

    /// Keeps a patch. One of the same name that waits already is replaced.
    pub(crate) fn keep(&self, patch: &PatchFile) -> Result<(), Failure> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))?;
        Ok(patch.save(&self.file(&patch.patch().name))?)
    }

    /// Lets go of a patch; whether it had waited.
    pub(crate) fn release(&self, name: &str) -> Result<bool, Failure> {
        let file = self.file(name);
        match fs::remove_file(&file) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(anyhow::Error::new(error)
                .context(format!("cannot remove {}", file.display()))
                .into()),
        }
    }

    /// All that wait, by name. A file that is no patch is left out and told in the second list.
    pub(crate) fn all(&self) -> Result<(Vec<Waiting>, Vec<String>), Failure> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Default::default());
            }
            entries => entries.with_context(|| format!("cannot read {}", self.folder.display()))?,
        };
        let files = entries
            .take(MOST)
            .filter_map(|entry| Some(entry.ok()?.path()));
        let mut files: Vec<_> = files
            .filter(|file| file.extension().is_some_and(|ending| ending == "vmpatch"))
            .collect();
        files.sort();
        let (mut waiting, mut notes) = (Vec::new(), Vec::new());
        for file in files {
            match PatchFile::open(&file) {
                Ok(patch) => waiting.push(Waiting::of(&patch, file)),
                Err(why) => notes.push(format!("held patch {}: {why}", file.display())),
            }
        }
        Ok((waiting, notes))
    }

    /// A name of a patch is one of a file too.
    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.vmpatch"))
    }
}

impl Waiting {
    fn of(patch: &PatchFile, file: PathBuf) -> Self {
        let modules = patch.patch().modules().into_iter();
        Self {
            patch: patch.patch().name.clone(),
            digest: patch.digest().to_string(),
            modules: modules.map(str::to_owned).collect(),
            file,
        }
    }
}
