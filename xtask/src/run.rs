//! Running other programs: quiet while they succeed, their last words when they fail. Does not know what they do.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use vmpatch_kbuild::command::last_words;

/// Runs to the end, output kept back; fails with its last lines.
pub(crate) fn quiet(command: &mut Command) -> Result<Output> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", name(command)))?;
    if !output.status.success() {
        bail!(
            "{} failed ({}):\n{}",
            name(command),
            output.status,
            last_words(&output)
        );
    }
    Ok(output)
}

/// Standard output of a program that must succeed.
pub(crate) fn stdout(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&quiet(command)?.stdout).into_owned())
}

/// Runs to the end, standard error shown as it comes; each line of standard output goes to `line` at once. Returns whether
/// it succeeded.
pub(crate) fn lines(command: &mut Command, mut line: impl FnMut(&str)) -> Result<bool> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", name(command)))?;
    if let Some(output) = child.stdout.take() {
        for text in BufReader::new(output).split(b'\n') {
            line(&String::from_utf8_lossy(&text?));
        }
    }
    Ok(child.wait()?.success())
}

/// A child that ends with this value.
#[derive(Debug)]
pub(crate) struct Reaped(pub(crate) Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Gone already in the ordinary case.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a program of this name is on the path.
pub(crate) fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn name(command: &Command) -> String {
    let mut words = vec![command.get_program()];
    words.extend(command.get_args().take(3));
    words.join(OsStr::new(" ")).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_carries_the_last_words() {
        let error = quiet(Command::new("sh").args(["-c", "echo ouch >&2; exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("ouch") && error.contains('3'), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = format!(
            "{:#}",
            quiet(&mut Command::new("no-such-program-here")).unwrap_err()
        );
        assert!(
            error.contains("cannot start no-such-program-here"),
            "{error}"
        );
    }
}
