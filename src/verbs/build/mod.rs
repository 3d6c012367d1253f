//! `vmpatch build`: a patch file from two objects, given or compiled from the diff of a fix.

mod objects;

use serde::Serialize;
use vmpatch_patcher::build::{BuildOptions, BuildReport, ObjectPair, build};
use vmpatch_patcher::patch::file::PatchFile;
use vmpatch_patcher::patch::{Requirement, VMLINUX, check};

use crate::cli::Build;
use crate::exit::Failure;
use crate::report::Output;
use objects::{Objects, Origin};

#[derive(Serialize)]
struct Answer {
    result: &'static str,
    patch: String,
    digest: String,
    file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    compiled: Option<Origin>,
    #[serde(flatten)]
    report: BuildReport,
}

/// Compares the objects and writes the patch.
pub(crate) fn run(asked: &Build, output: &Output) -> Result<(), Failure> {
    let options = BuildOptions {
        name: name(asked)?,
        requires: requires(asked),
    };
    let objects = Objects::of(asked, output)?;
    let pair = ObjectPair {
        file: &objects.file,
        object: VMLINUX,
        old: &objects.old,
        new: &objects.new,
        wide: None,
    };
    let (patch, report) = build(&[pair], &options)?;
    let file = PatchFile::new(patch)?;
    file.save(&asked.output)?;
    let answer = Answer {
        result: "built",
        patch: options.name,
        digest: file.digest().to_string(),
        file: asked.output.display().to_string(),
        compiled: objects.origin,
        report,
    };
    output.answer(&answer, |answer| {
        let origin = answer
            .compiled
            .as_ref()
            .map_or_else(String::new, |origin| format!("{origin}\n"));
        format!("{origin}{}\nwritten to {}", answer.report, answer.file)
    });
    Ok(())
}

fn requires(asked: &Build) -> Requirement {
    Requirement {
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
    fn objects_are_given_or_compiled_and_nothing_by_half() {
        let parse = |words: &str| {
            let all = ["vmpatch", "build", "-o", "x.vmpatch"];
            Cli::try_parse_from(all.into_iter().chain(words.split_whitespace()))
        };
        for good in ["--old a --new b", "--source s --config c --diff d"] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "--old a",
            "--new b",
            "--source s --diff d",
            "--source s --config c",
            "--config c --diff d",
            "--old a --new b --source s --config c --diff d",
            "--old a --new b --diff d",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
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
