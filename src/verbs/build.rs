//! `vmpatch build`: a patch file from two objects.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::anyhow;
use serde::Serialize;
use vmpatch_patcher::build::{BuildOptions, BuildReport, build};
use vmpatch_patcher::patch::file::PatchFile;
use vmpatch_patcher::patch::{Requirement, check};

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
    let name = asked.name.clone().or_else(from_file).ok_or_else(|| {
        Failure::Usage(format!(
            "{} gives the patch no name; use --name",
            asked.output.display()
        ))
    })?;
    match check::patch_name(&name) {
        Ok(()) => Ok(name),
        Err(_) => Err(Failure::Usage(format!(
            "{name:?} cannot name a patch: a name begins with a letter or digit and has letters, digits, '.', '_' and '-', \
             {} at most; use --name",
            check::MAX_NAME
        ))),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Failure::Usage(format!("there is no object {}", path.display())),
        _ => Failure::Other(anyhow!(error).context(format!("reading {}", path.display()))),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Verb};

    fn named(words: &[&str]) -> Result<String, Failure> {
        let all = ["vmpatch", "build", "--old", "old.o", "--new", "new.o"];
        let cli = Cli::try_parse_from(all.iter().chain(words)).unwrap();
        let Verb::Build(asked) = &cli.verb else {
            panic!("not build")
        };
        name(asked)
    }

    #[test]
    fn the_name_is_the_files_unless_given() {
        assert_eq!(named(&["-o", "dir/fix-1.vmpatch"]).unwrap(), "fix-1");
        let given = named(&["-o", "x.vmpatch", "--name", "fix"]);
        assert_eq!(given.unwrap(), "fix");
    }

    #[test]
    fn a_name_that_leads_out_of_a_folder_is_a_usage_error() {
        for name in ["../x", "", "a b", "-x"] {
            let option = format!("--name={name}");
            let refused = named(&["-o", "x.vmpatch", &option]);
            assert!(matches!(refused, Err(Failure::Usage(_))), "{name}");
        }
        let refused = named(&["-o", "a b.vmpatch"]);
        assert!(matches!(refused, Err(Failure::Usage(_))));
    }
}
