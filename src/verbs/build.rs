//! `vmpatch build`: a patch file from two objects.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::anyhow;
use serde::Serialize;
use vmpatch_patcher::build::{BuildOptions, BuildReport, build};
use vmpatch_patcher::patch::Requirement;
use vmpatch_patcher::patch::file::PatchFile;

use crate::cli::Build;
use crate::exit::Failure;
use crate::report::Output;

#[derive(Serialize)]
struct Answer {
    result: &'static str,
    patch: String,
    digest: String,
    file: String,
    #[serde(flatten)]
    report: BuildReport,
}

/// Compares the objects and writes the patch.
pub(crate) fn run(asked: &Build, output: &Output) -> Result<(), Failure> {
    let options = BuildOptions {
        name: name(asked)?,
        requires: requires(asked),
    };
    let (old, new) = (read(&asked.old)?, read(&asked.new)?);
    let (patch, report) = build(&old, &new, &options)?;
    let file = PatchFile::new(patch)?;
    file.save(&asked.output)?;
    let answer = Answer {
        result: "built",
        patch: options.name,
        digest: file.digest().to_string(),
        file: asked.output.display().to_string(),
        report,
    };
    output.answer(&answer, |answer| {
        format!("{}\nwritten to {}", answer.report, answer.file)
    });
    Ok(())
}

fn requires(asked: &Build) -> Requirement {
    Requirement {
        object: "vmlinux".to_owned(),
        release: asked.release.clone(),
        build_id: asked.build_id.as_ref().map(|id| id.to_ascii_lowercase()),
    }
}

fn name(asked: &Build) -> Result<String, Failure> {
    let from_file = || asked.output.file_stem()?.to_str().map(str::to_owned);
    asked.name.clone().or_else(from_file).ok_or_else(|| {
        Failure::Usage(format!(
            "{} gives the patch no name; use --name",
            asked.output.display()
        ))
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Failure::Usage(format!("there is no object {}", path.display())),
        _ => Failure::Other(anyhow!(error).context(format!("reading {}", path.display()))),
    })
}
