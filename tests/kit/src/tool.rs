//! One call of `vmpatch`: its exit code, its JSON answer, its words. Does not judge them.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The binary under test.
#[derive(Clone, Debug)]
pub struct Tool {
    path: PathBuf,
    env: Vec<(String, String)>,
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
        let output = self
            .command()
            .arg("--json")
            .args(args)
            .output()
            .with_context(|| format!("cannot start {}", self.path.display()))?;
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
