//! `cargo xtask demo`: a stock kernel is patched while it runs, and the patch taken back.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use super::setup;
use crate::workbench::Workbench;

/// Options of the command.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// The guest to patch
    #[arg(long, default_value = "debian-6.12")]
    guest: String,
}

/// Prepares and shows it; the last line is JSON.
pub(crate) fn run(args: &DemoArgs) -> Result<i32> {
    let manifest = setup::tools()?;
    let bench = Workbench::prepare(manifest, "demo", &[&args.guest], &["proc-version"])?;
    bench.run_inside(&["demo", &args.guest], Duration::from_secs(540))
}
