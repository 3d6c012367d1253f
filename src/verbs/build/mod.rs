//! `vmpatch build`: a patch file from pairs of objects, given or compiled from the diff of a fix.

mod answer;
mod given;
mod kernel;
mod objects;
mod target;

use vmpatch_kbuild::Running;
use vmpatch_patcher::build::{BuildError, BuildOptions, build};
use vmpatch_patcher::patch::file::PatchFile;
use vmpatch_patcher::patch::{Requirement, check};

use crate::cli::Build;
use crate::exit::Failure;
use crate::report::Output;
use answer::Answer;
use objects::{Objects, Origin};

/// Compares the objects and writes the patch.
pub(crate) fn run(asked: &Build, output: &Output) -> Result<(), Failure> {
    let name = name(asked)?;
    let target = target::target(asked)?;
    let objects = Objects::of(asked, target.as_ref(), output)?;
    let options = BuildOptions {
        name,
        requires: requires(asked, target.as_ref(), objects.origin.as_ref())?,
        safe_types: asked.safe_types.clone(),
    };
    let (patch, report) =
        build(&objects.pairs(), &options).map_err(|error| refusal(error, asked.explain))?;
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
    output.answer(&answer, |answer| answer.text(asked.explain));
    Ok(())
}

/// Why there is no patch, with all that was seen if that is asked for.
fn refusal(error: BuildError, explain: bool) -> Failure {
    let seen = match &error {
        BuildError::Refused(report) | BuildError::NothingChanged(report) if explain => {
            format!("\n{}", answer::report(report, true))
        }
        _ => String::new(),
    };
    match Failure::from(error) {
        Failure::Refused { reason, details } => Failure::Refused {
            reason: reason + &seen,
            details,
        },
        other => other,
    }
}

/// What the guest must be: what the call says, or else the kernel that was looked at, or else the one that was compiled.
fn requires(
    asked: &Build,
    target: Option<&Running>,
    origin: Option<&Origin>,
) -> Result<Requirement, Failure> {
    let given = Requirement {
        release: asked.release.clone(),
        build_id: asked.build_id.as_ref().map(|id| id.to_ascii_lowercase()),
    };
    let seen = Requirement {
        release: target.map(|it| it.release().to_owned()),
        build_id: target.and_then(|it| Some(it.build_id()?.to_owned())),
    };
    for (what, given, seen) in [
        ("release", &given.release, &seen.release),
        ("build id", &given.build_id, &seen.build_id),
    ] {
        if let (Some(given), Some(seen)) = (given, seen)
            && given != seen
        {
            return Err(Failure::refused(format!(
                "the kernel to be patched has the {what} {seen}, and {given} is asked for"
            )));
        }
    }
    let compiled = || origin?.release.clone();
    Ok(Requirement {
        release: given.release.or(seen.release).or_else(compiled),
        build_id: given.build_id.or(seen.build_id),
    })
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
    fn the_guest_must_be_what_is_said_and_what_was_looked_at() {
        let banner = "Linux version 6.12.1 (a) (gcc 12, ld) #1";
        let target = Running::of_banner(banner, Some("ab".to_owned())).unwrap();
        let required = |words: &[&str]| {
            let all = ["vmpatch", "build", "--old", "a", "--new", "b", "-o", "x"];
            let cli = Cli::try_parse_from(all.iter().chain(words)).unwrap();
            let Verb::Build(asked) = &cli.verb else {
                panic!("not build")
            };
            requires(asked, Some(&target), None)
        };
        let seen = Requirement {
            release: Some("6.12.1".to_owned()),
            build_id: Some("ab".to_owned()),
        };
        assert_eq!(required(&[]).unwrap(), seen);
        assert_eq!(required(&["--build-id", "AB"]).unwrap(), seen);
        for other in [["--release", "6.12.2"], ["--build-id", "ac"]] {
            let refused = required(&other).unwrap_err().reason();
            assert!(refused.contains(other[1]), "{refused}");
        }
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
        for good in [
            "--old a --new b",
            "--old a --new b --old c --new d --object ext4 --object vmlinux",
            "--source s --config c --diff d --explain",
            "--debian 6.12.107-1 --diff d",
            "--debian 6.12.107-1 --diff d --vm web1",
            "--old a --new b --vmlinux v",
            "--debian 6.12.107-1 --flavour cloud-amd64 --diff d",
        ] {
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
            "--source s --config c --diff d --object ext4",
            "--old a --new b --object a/b",
            "--debian 6.12.107-1",
            "--debian 6.12.107-1 --source s --config c --diff d",
            "--flavour cloud-amd64 --source s --config c --diff d",
            "--diff d",
            "--old a --new b --vmlinux v --vm web1",
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
