//! The two objects of a build: read, or compiled from a source without and with the diff of a fix.

use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use serde::Serialize;
use vmpatch_kbuild::{Diff, Pair, Tree};

use crate::cli::Build;
use crate::exit::Failure;
use crate::report::Output;

/// Both objects.
pub(super) struct Objects {
    /// What they are called.
    pub(super) file: String,
    pub(super) old: Vec<u8>,
    pub(super) new: Vec<u8>,
    /// Where they are from, if they were compiled.
    pub(super) origin: Option<Origin>,
}

/// What objects were compiled from.
#[derive(Serialize)]
pub(super) struct Origin {
    file: PathBuf,
    compiler: String,
    /// Files of the diff that no kernel is made of.
    ignored: Vec<PathBuf>,
}

impl Objects {
    pub(super) fn of(asked: &Build, output: &Output) -> Result<Self, Failure> {
        if let (Some(old), Some(new)) = (&asked.old, &asked.new) {
            return Ok(Self {
                file: new.display().to_string(),
                old: read(old, "object")?,
                new: read(new, "object")?,
                origin: None,
            });
        }
        match (&asked.source, &asked.config, &asked.diff) {
            (Some(source), Some(config), Some(diff)) => compiled(source, config, diff, output),
            _ => Err(Failure::Usage(
                "give --old and --new, or --source, --config and --diff".to_owned(),
            )),
        }
    }
}

fn compiled(
    source: &Path,
    config: &Path,
    diff: &Path,
    output: &Output,
) -> Result<Objects, Failure> {
    let diff = Diff::parse(&read(diff, "diff")?).map_err(vmpatch_kbuild::BuildError::from)?;
    let config = String::from_utf8_lossy(&read(config, "configuration")?).into_owned();
    let progress = output.progress("reading the source");
    let step = |what: &str| progress.set_message(what.to_owned());
    let tree = Tree::ready(source, &config, &cache()?, &step)?;
    let pairs = tree.compile_both(&diff, &step)?;
    progress.finish_and_clear();
    let Pair { file, old, new, .. } = only(pairs)?;
    Ok(Objects {
        file: file.display().to_string(),
        old,
        new,
        origin: Some(Origin {
            file,
            compiler: tree.compiler().to_owned(),
            ignored: diff.ignored().to_vec(),
        }),
    })
}

/// The one pair there may be, of vmlinux.
fn only(pairs: Vec<Pair>) -> Result<Pair, Failure> {
    let [pair] = <[Pair; 1]>::try_from(pairs).map_err(|pairs| {
        let files: Vec<_> = pairs
            .iter()
            .map(|pair| pair.file.display().to_string())
            .collect();
        Failure::refused(format!(
            "the diff changes {} files ({}): a patch of several objects cannot be made yet",
            pairs.len(),
            files.join(", ")
        ))
    })?;
    match &pair.module {
        None => Ok(pair),
        Some(module) => Err(Failure::refused(format!(
            "{} belongs to the module {module}: functions of modules cannot be replaced yet",
            pair.file.display()
        ))),
    }
}

fn cache() -> Result<PathBuf, Failure> {
    vmpatch_kbuild::cache::dir().map_err(|error| Failure::Usage(error.to_string()))
}

fn read(path: &Path, what: &str) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Failure::Usage(format!("there is no {what} {}", path.display())),
        _ => Failure::Other(anyhow!(error).context(format!("reading {}", path.display()))),
    })
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "compiled {} by {}", self.file.display(), self.compiler)?;
        for ignored in &self.ignored {
            write!(
                f,
                "\nignored {}: no part of a kernel for x86",
                ignored.display()
            )?;
        }
        Ok(())
    }
}
