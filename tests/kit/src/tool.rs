//! One call of `vmpatch`: its exit code, its JSON answer, its words. Does not judge them.

use std::ffi::OsStr;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// No call takes as long, not even where all is emulated and the host is busy.
const LIMIT: Duration = Duration::from_secs(240);
/// How often a call is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// The binary under test.
#[derive(Clone, Debug)]
pub struct Tool {
    path: PathBuf,
    env: Vec<(String, String)>,
    limit: Duration,
}

/// What one call answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output as JSON, or null.
    pub json: Value,
    /// Standard output as it was.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Wall-clock time of the whole process.
    pub time: Duration,
}

impl Tool {
    /// The binary that `VMPATCH_BIN` names.
    ///
    /// # Errors
    /// The variable is not set: tests are run by `cargo xtask test`, which sets it.
    pub fn from_env() -> Result<Self> {
        let path = std::env::var_os("VMPATCH_BIN")
            .context("VMPATCH_BIN is not set; run this by `cargo xtask`")?;
        Ok(Self::at(path))
    }

    /// The binary at this place.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            env: Vec::new(),
            limit: LIMIT,
        }
    }

    /// The same tool, whose calls may take so long, as those may that wait for each other.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        Self {
            limit,
            ..self.clone()
        }
    }

    /// The same tool with one more variable in its environment.
    #[must_use]
    pub fn with_env(&self, name: &str, value: &str) -> Self {
        let mut other = self.clone();
        other.env.push((name.to_owned(), value.to_owned()));
        other
    }

    /// The tool as a command to which arguments can be added.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command
            .envs(self.env.iter().map(|(n, v)| (n, v)))
            .stdin(Stdio::null());
        command
    }

    /// The same, started by another program that gives way to it.
    #[must_use]
    pub fn command_after(&self, before: &[&str]) -> Command {
        let mut words = before.iter();
        let mut command = Command::new(words.next().unwrap_or(&"env"));
        command
            .args(words)
            .arg(&self.path)
            .envs(self.env.iter().map(|(n, v)| (n, v)))
            .stdin(Stdio::null());
        command
    }

    /// Calls it with `--json`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn call<I, S>(&self, args: I) -> Result<Answer>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let since = Instant::now();
        let mut command = self.command();
        command.arg("--json").args(args);
        let output = ended(&mut command, self.limit)
            .with_context(|| format!("cannot run {}", self.path.display()))?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(Answer {
            code: output.status.code(),
            json: serde_json::from_str(&stdout).unwrap_or(Value::Null),
            stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            time: since.elapsed(),
        })
    }

    /// Calls it for people, output shown as it comes, and returns its exit code.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn show<I, S>(&self, args: I) -> Result<Option<i32>>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let status = self
            .command()
            .args(args)
            .status()
            .with_context(|| format!("cannot start {}", self.path.display()))?;
        Ok(status.code())
    }
}

/// What a program said, once it has ended by itself.
///
/// # Errors
/// It cannot be started, or did not end in time; it is killed then, and the message holds what it said.
pub(crate) fn ended(command: &mut Command, limit: Duration) -> Result<Output> {
    let until = Instant::now() + limit;
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("it does not start")?;
    let stdout = child.stdout.take().map(read_all);
    let stderr = child.stderr.take().map(read_all);
    loop {
        if let Some(status) = child.try_wait().context("it cannot be waited for")? {
            return Ok(Output {
                status,
                stdout: said(stdout),
                stderr: said(stderr),
            });
        }
        if Instant::now() >= until {
            child.kill().context("it cannot be killed")?;
            child.wait().context("it cannot be waited for")?;
            let [stdout, stderr] = [stdout, stderr].map(|reader| reader.filter(ends_soon));
            bail!(
                "it did not end within {} s, having said: {}{}",
                limit.as_secs(),
                String::from_utf8_lossy(&said(stdout)),
                String::from_utf8_lossy(&said(stderr))
            );
        }
        thread::sleep(LOOK);
    }
}

fn said(reader: Option<JoinHandle<Vec<u8>>>) -> Vec<u8> {
    reader
        .and_then(|reader| reader.join().ok())
        .unwrap_or_default()
}

/// Not where a child of the killed command still holds its output.
fn ends_soon(reader: &JoinHandle<Vec<u8>>) -> bool {
    let until = Instant::now() + Duration::from_secs(1);
    while !reader.is_finished() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    reader.is_finished()
}

fn read_all(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is what there is.
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

impl Answer {
    /// The answer, if the exit code is this one.
    ///
    /// # Errors
    /// Any other code; the message holds all that was said.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        if self.code != Some(code) {
            bail!(
                "exit code {:?}, not {code}\nstdout: {}\nstderr: {}",
                self.code,
                self.stdout.trim(),
                self.stderr.trim()
            );
        }
        Ok(self)
    }

    /// A whole number in the JSON answer.
    ///
    /// # Errors
    /// It is not there; the message holds the whole answer.
    pub fn number(&self, key: &str) -> Result<f64> {
        self.json
            .get(key)
            .and_then(Value::as_f64)
            .with_context(|| format!("no number {key} in {}", self.stdout.trim()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_does_not_end_is_killed_and_its_words_are_kept() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo begun; exec sleep 60"]);
        let error = ended(&mut command, Duration::from_millis(300)).unwrap_err();
        assert!(error.to_string().contains("begun"), "{error}");
        let begin = Instant::now();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 20 & wait"]);
        assert!(ended(&mut command, Duration::from_millis(300)).is_err());
        assert!(
            begin.elapsed() < Duration::from_secs(15),
            "its child is waited for"
        );
        let output = ended(Command::new("sh").args(["-c", "exit 3"]), LIMIT).unwrap();
        assert_eq!(output.status.code(), Some(3));
    }
}
