//! Running other programs to their end: their output is kept back, its end shown if they fail.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};

use crate::error::BuildError;

/// How many lines of a failed program's output are shown.
const LAST_WORDS: usize = 25;

/// How many errors that were told before.
const ERRORS: usize = 10;

/// What of the environment is handed on to what makes code: where programs, their libraries and their files are. Whatever else
/// is set may be a flag to a compiler or to the kernel's makefiles (KCPPFLAGS, CPATH, LLVM, …), and is not the kernel's.
const HANDED_ON: [&str; 5] = [
    "PATH",
    "HOME",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "PKG_CONFIG_PATH",
];

/// A command that sees nothing else of the environment.
pub(crate) fn plain(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    let handed_on = HANDED_ON
        .iter()
        .filter_map(|name| std::env::var_os(name).map(|it| (name, it)));
    command.env_clear().envs(handed_on);
    command
}

/// Runs to the end, whatever comes of it.
pub(crate) fn finish(command: &mut Command) -> Result<Output, BuildError> {
    finish_reading(command, Stdio::null())
}

/// Likewise, with this input.
pub(crate) fn finish_reading(command: &mut Command, input: Stdio) -> Result<Output, BuildError> {
    let output = command.env("LC_ALL", "C").stdin(input).output();
    output.map_err(|why| BuildError::NotStarted {
        program: command.get_program().to_string_lossy().into_owned(),
        why,
    })
}

/// Runs to the end; fails with its last lines.
pub(crate) fn succeed(what: &str, command: &mut Command) -> Result<Output, BuildError> {
    succeeded(what, finish(command)?)
}

/// Fails with the last lines of what has failed.
pub(crate) fn succeeded(what: &str, output: Output) -> Result<Output, BuildError> {
    match output.status.success() {
        true => Ok(output),
        false => Err(BuildError::Failed {
            what: what.to_owned(),
            said: last_words(&output),
        }),
    }
}

/// What a program said of errors, and the end of all that it said, which tell why it failed.
#[must_use]
pub fn last_words(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(LAST_WORDS);
    let (before, last) = lines.split_at(skipped);
    // A compiler may say much of each error, and what it was about first.
    let errors = before.iter().filter(|line| line.contains(": error: "));
    let told: Vec<&str> = errors.take(ERRORS).chain(last).copied().collect();
    told.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_flag_of_whoever_calls_reaches_what_makes_code() {
        // Set by whatever runs the tests.
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        let told = finish(&mut plain("env")).unwrap();
        let told = String::from_utf8(told.stdout).unwrap();
        let names = told.lines().filter_map(|line| line.split_once('='));
        let names: Vec<_> = names.map(|(name, _)| name).collect();
        assert!(names.contains(&"PATH"), "{told}");
        let known = |name: &&str| HANDED_ON.contains(name) || *name == "LC_ALL";
        assert!(names.iter().all(known), "{told}");
    }

    #[test]
    fn errors_are_told_however_much_was_said_after_them() {
        let script = "echo 'a.c:1:2: error: first' >&2; seq 100 >&2; echo last >&2; exit 1";
        let failed = succeed("it", Command::new("sh").args(["-c", script])).unwrap_err();
        let said = failed.to_string();
        assert!(
            said.contains("error: first") && said.ends_with("last"),
            "{said}"
        );
        assert!(!said.contains("\n50\n"), "{said}");
    }
}
