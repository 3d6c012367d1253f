//! Attach: from nothing to all symbols, types and tasks of a stock 6.12 guest. Measured on a dump, for the work is all the host's:
//! a guest in the test host would measure the emulation.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::commands::setup;
use crate::{dumps, paths, progress, run};

const GUEST: &str = "debian-6.12";

/// Makes the dump, builds and runs the measurement.
pub(super) fn run(rounds: u32) -> Result<i32> {
    let manifest = setup::tools()?;
    let dump = dumps::make_one(&manifest, GUEST)?;
    let step = progress::step("building and measuring");
    let text = run::stdout(
        Command::new("cargo")
            .args([
                "run",
                "--release",
                "--quiet",
                "--locked",
                "--package",
                "vmpatch-introspect",
                "--example",
                "attach",
                "--",
            ])
            .arg(dump)
            .arg(rounds.to_string())
            .current_dir(paths::repo()),
    )?;
    step.done();
    let measured: Value =
        serde_json::from_str(text.lines().last().unwrap_or_default()).context("no figures came")?;
    println!(
        "{{\"bench\":\"attach\",\"median_ms\":{},\"p99_ms\":{},\"kernel\":{},\"symbols\":{},\"tasks\":{},\"rounds\":{}}}",
        measured["median_ms"],
        measured["p99_ms"],
        measured["kernel"],
        measured["symbols"],
        measured["tasks"],
        measured["rounds"],
    );
    Ok(0)
}
