//! The objects of a build: read, or compiled from a source without and with the diff of a fix.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::anyhow;
use serde::Serialize;
use vmpatch_kbuild::fix::{LeftOut, Why};
use vmpatch_kbuild::{Diff, Orc, Pair, Running, Tree};
use vmpatch_patcher::build::{ObjectPair, UnwindData};
use vmpatch_patcher::patch::VMLINUX;

use super::given::given;
use super::kernel::Kernel;
use crate::cli::Build;
use crate::exit::Failure;
use crate::report::Output;

/// One file's objects, as [`ObjectPair`] has them.
pub(super) struct File {
    pub(super) name: String,
    pub(super) object: String,
    pub(super) old: Vec<u8>,
    pub(super) new: Vec<u8>,
    pub(super) wide: Option<Vec<u8>>,
    pub(super) orc: Orc,
}

/// The objects of all files.
pub(super) struct Objects {
    pub(super) files: Vec<File>,
    /// Where they are from, if they were compiled.
    pub(super) origin: Option<Origin>,
}

/// What objects were compiled from.
#[derive(Serialize)]
pub(super) struct Origin {
    /// What the compiler says of itself.
    pub(super) compiler: String,
    /// Of which kernel, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) release: Option<String>,
    /// Files that make no difference to the running kernel.
    pub(super) ignored: Vec<Ignored>,
    /// What of the diff stands elsewhere in the source than it says.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) moved: Vec<Moved>,
}

/// A hunk that was applied elsewhere than it says.
#[derive(Serialize)]
pub(super) struct Moved {
    pub(super) file: String,
    /// As the diff has it.
    pub(super) line: u32,
    /// How many lines further down.
    pub(super) by: i64,
}

/// A file that makes no difference.
#[derive(Serialize)]
pub(super) struct Ignored {
    pub(super) file: String,
    pub(super) reason: String,
    /// It was compiled, and came out the same.
    #[serde(skip)]
    pub(super) same: bool,
}

impl Objects {
    /// `target` is the kernel to be patched, where it is known: what is compiled must be that.
    pub(super) fn of(
        asked: &Build,
        target: Option<&Running>,
        output: &Output,
    ) -> Result<Self, Failure> {
        if !asked.old.is_empty() {
            let files = given(&asked.old, &asked.new, &asked.object)?;
            return Ok(Self {
                files,
                origin: None,
            });
        }
        let diff = asked.diff.as_ref().ok_or_else(|| {
            let needed =
                "give --old and --new, or --diff with --source and --config or with --debian";
            Failure::Usage(needed.to_owned())
        })?;
        let diff = Diff::parse(&read(diff, "diff")?).map_err(vmpatch_kbuild::BuildError::from)?;
        let progress = output.progress("reading the source");
        let step = |what: &str| progress.set_message(what.to_owned());
        let kernel = Kernel::of(asked, &step)?;
        if let Some(target) = target {
            target.is_made_of(&kernel.source, &kernel.config, kernel.release.as_deref())?;
        }
        let made = compiled(&kernel, &diff, asked.most_objects, &step);
        progress.finish_and_clear();
        made
    }

    pub(super) fn pairs(&self) -> Vec<ObjectPair<'_>> {
        self.files.iter().map(File::pair).collect()
    }
}

impl File {
    fn pair(&self) -> ObjectPair<'_> {
        ObjectPair {
            file: &self.name,
            object: &self.object,
            old: &self.old,
            new: &self.new,
            wide: self.wide.as_deref(),
            unwind: match &self.orc {
                Orc::Within => UnwindData::Within,
                Orc::Copy(copy) => UnwindData::Copy(copy),
                Orc::Absent(why) => UnwindData::Absent { why },
            },
        }
    }
}

impl From<Pair> for File {
    fn from(pair: Pair) -> Self {
        Self {
            name: pair.file.display().to_string(),
            object: pair.module.unwrap_or_else(|| VMLINUX.to_owned()),
            old: pair.old,
            new: pair.new,
            wide: pair.wide,
            orc: pair.orc,
        }
    }
}

impl From<vmpatch_kbuild::Moved> for Moved {
    fn from(moved: vmpatch_kbuild::Moved) -> Self {
        Self {
            file: moved.file.display().to_string(),
            line: moved.line,
            by: moved.by,
        }
    }
}

impl From<LeftOut> for Ignored {
    fn from(left: LeftOut) -> Self {
        Self {
            file: left.file.display().to_string(),
            reason: left.why.to_string(),
            same: left.why == Why::Same,
        }
    }
}

fn compiled(
    kernel: &Kernel,
    diff: &Diff,
    most: usize,
    step: &dyn Fn(&str),
) -> Result<Objects, Failure> {
    let tree = Tree::ready(&kernel.source, &kernel.config, &kernel.cache, step)?;
    let built = tree.compile_both(diff, most, step)?;
    Ok(Objects {
        files: built.pairs.into_iter().map(File::from).collect(),
        origin: Some(Origin {
            compiler: tree.compiler().to_owned(),
            release: kernel.release.clone(),
            ignored: built.left_out.into_iter().map(Ignored::from).collect(),
            moved: built.moved.into_iter().map(Moved::from).collect(),
        }),
    })
}

/// Reads a file that the call names.
pub(super) fn read(path: &Path, what: &str) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Failure::Usage(format!("there is no {what} {}", path.display())),
        _ => Failure::Other(anyhow!(error).context(format!("reading {}", path.display()))),
    })
}
