//! `cargo xtask lint`: what must hold of every commit, apart from the tests.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{dependencies, documents, paths, progress, run};

/// Runs every check; the first that fails ends it.
pub(crate) fn run() -> Result<i32> {
    check("formatting", || cargo(&["fmt", "--all", "--check"]))?;
    check("clippy", || {
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ])
    })?;
    check("the rule of dependencies", dependencies::check)?;
    check("the commands that the documents quote", documents::check)?;
    if run::on_path("cargo-deny") {
        check("cargo-deny", || {
            cargo(&["deny", "--log-level", "error", "check"])
        })?;
    } else {
        progress::warn(
            "cargo-deny is not installed: advisories and licences not checked (cargo install --locked cargo-deny)",
        );
    }
    Ok(0)
}

fn check(what: &str, how: impl FnOnce() -> Result<()>) -> Result<()> {
    let step = progress::step(format!("lint: {what}"));
    how().with_context(|| format!("lint: {what}"))?;
    step.done();
    Ok(())
}

fn cargo(args: &[&str]) -> Result<()> {
    let output = Command::new("cargo")
        .args(args)
        .current_dir(paths::repo())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
