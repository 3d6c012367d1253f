//! All that a run against real guests needs, made ready: the product, guest images, pairs of objects, a folder for results, and
//! the variables that tell drivers and tests where these are.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::host::{self, Job};
use crate::manifest::Manifest;
use crate::{images, objects, paths, progress, run};

/// Patches that demo, soak and tests use.
pub(crate) const PATCHES: [&str; 8] = [
    "proc-version",
    "msleep-interruptible",
    "loadavg-warn",
    "uptime-fault",
    "shadow-count",
    "shadow-show",
    "shadow-free",
    "callbacks",
];

/// A prepared run.
#[derive(Debug)]
pub(crate) struct Workbench {
    manifest: Manifest,
    out: PathBuf,
    vmpatch: PathBuf,
}

impl Workbench {
    /// Builds the product and makes these guests and the objects of these patches for each of them.
    pub(crate) fn prepare(
        manifest: Manifest,
        name: &str,
        guests: &[&str],
        patches: &[&str],
    ) -> Result<Self> {
        let out = paths::repo().join("target/runs").join(name);
        if out.exists() {
            fs::remove_dir_all(&out).with_context(|| format!("cannot clear {}", out.display()))?;
        }
        for guest in guests {
            images::make(&manifest, guest)?;
            let links = out.join("objects").join(guest);
            fs::create_dir_all(&links)?;
            for patch in patches {
                let pair = objects::make(&manifest, guest, patch)?;
                symlink(pair.dir(), links.join(patch))?;
            }
        }
        let vmpatch = build_product()?;
        Ok(Self {
            manifest,
            out,
            vmpatch,
        })
    }

    /// What it was prepared by.
    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The folder for results.
    pub(crate) fn out(&self) -> &Path {
        &self.out
    }

    /// The product.
    pub(crate) fn vmpatch(&self) -> &Path {
        &self.vmpatch
    }

    /// The folder of guest images.
    pub(crate) fn guests(&self) -> Result<PathBuf> {
        Ok(paths::cache()?.join("guests"))
    }

    /// Runs a command where stock kernels can run.
    pub(crate) fn run(&self, argv: Vec<String>, limit: std::time::Duration) -> Result<i32> {
        let job = Job {
            argv,
            cwd: paths::repo().to_path_buf(),
            env: self.env()?,
            out: self.out.clone(),
            limit,
        };
        host::run(&self.manifest, &job)
    }

    /// Runs one of this program's own drivers where stock kernels can run.
    pub(crate) fn run_inside(&self, words: &[&str], limit: std::time::Duration) -> Result<i32> {
        let own = std::env::current_exe().context("cannot tell where this program lies")?;
        let mut argv = vec![own.display().to_string(), "inside".to_owned()];
        argv.extend(words.iter().map(|w| (*w).to_owned()));
        self.run(argv, limit)
    }

    /// Variables for drivers and tests.
    pub(crate) fn env(&self) -> Result<Vec<(String, String)>> {
        let text = |path: &Path| path.display().to_string();
        let mut env = crate::commands::host::host_env();
        env.push(("VMPATCH_BIN".to_owned(), text(&self.vmpatch)));
        env.push(("VMPATCH_GUESTS".to_owned(), text(&self.guests()?)));
        env.push((
            "VMPATCH_OBJECTS".to_owned(),
            text(&self.out.join("objects")),
        ));
        env.push(("VMPATCH_EXTRAS".to_owned(), text(&self.out.join("extras"))));
        env.push(("VMPATCH_WHERE".to_owned(), host::place().word().to_owned()));
        Ok(env)
    }
}

/// The product, optimised: in the test host all of it is emulated.
fn build_product() -> Result<PathBuf> {
    if let Some(built) = std::env::var_os("VMPATCH_BIN") {
        progress::warn("VMPATCH_BIN is set: the product is not built");
        return Ok(built.into());
    }
    let step = progress::step("building vmpatch");
    let text = run::stdout(
        Command::new("cargo")
            .args([
                "build",
                "--release",
                "--locked",
                "--package",
                "vmpatch",
                "--message-format",
                "json-render-diagnostics",
            ])
            .current_dir(paths::repo()),
    )?;
    step.done();
    executable(&text, "vmpatch", "bin")
}

/// Builds an integration test of the root package and returns its program.
pub(crate) fn build_test(name: &str) -> Result<PathBuf> {
    let text = run::stdout(
        Command::new("cargo")
            .args([
                "test",
                "--locked",
                "--package",
                "vmpatch",
                "--test",
                name,
                "--no-run",
            ])
            .args(["--message-format", "json-render-diagnostics"])
            .current_dir(paths::repo()),
    )?;
    executable(&text, name, "test")
}

/// The program that cargo says it built.
fn executable(messages: &str, name: &str, kind: &str) -> Result<PathBuf> {
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).unwrap_or(Value::Null);
        let kinds = message["target"]["kind"].as_array().into_iter().flatten();
        if message["target"]["name"] == name
            && kinds.into_iter().any(|k| k == kind)
            && let Some(path) = message["executable"].as_str()
        {
            return Ok(path.into());
        }
    }
    bail!("cargo built no {kind} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_taken_from_what_cargo_says() {
        let messages = "{\"reason\":\"x\"}\n{\"target\":{\"name\":\"e2e\",\"kind\":[\"test\"]},\"executable\":\"/t/e2e-1\"}\n";
        assert_eq!(
            executable(messages, "e2e", "test").unwrap(),
            Path::new("/t/e2e-1")
        );
        assert!(executable(messages, "e2e", "bin").is_err());
    }
}
