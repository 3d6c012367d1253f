//! Running other programs to their end: their output is kept back, its end shown if they fail.

use std::process::{Command, Output, Stdio};

use crate::error::BuildError;

/// How many lines of a failed program's output are shown.
const LAST_WORDS: usize = 25;

/// Runs to the end, whatever comes of it.
pub(crate) fn finish(command: &mut Command) -> Result<Output, BuildError> {
    let output = command.env("LC_ALL", "C").stdin(Stdio::null()).output();
    output.map_err(|why| BuildError::NotStarted {
        program: command.get_program().to_string_lossy().into_owned(),
        why,
    })
}

/// Runs to the end; fails with its last lines.
pub(crate) fn succeed(what: &str, command: &mut Command) -> Result<Output, BuildError> {
    let output = finish(command)?;
    match output.status.success() {
        true => Ok(output),
        false => Err(BuildError::Failed {
            what: what.to_owned(),
            said: last_words(&output),
        }),
    }
}

/// The end of all that a program said, which tells why it failed.
#[must_use]
pub fn last_words(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(LAST_WORDS);
    lines.get(skipped..).unwrap_or_default().join("\n")
}
