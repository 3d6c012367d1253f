//! `cargo xtask soak`: many applies and rollbacks in one boot of a busy guest.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use super::setup;
use crate::workbench::Workbench;

/// Options of the command.
#[derive(Debug, Args)]
pub(crate) struct SoakArgs {
    /// How often to apply and roll back
    #[arg(long, default_value_t = 200)]
    cycles: u32,
    /// The guest to patch
    #[arg(long, default_value = "debian-6.12")]
    guest: String,
}

/// Prepares and runs it; the last line is JSON.
pub(crate) fn run(args: &SoakArgs) -> Result<i32> {
    let manifest = setup::tools()?;
    let bench = Workbench::prepare(manifest, "soak", &[&args.guest], &["proc-version"])?;
    let limit = Duration::from_secs(600 + u64::from(args.cycles) * 30);
    bench.run_inside(&["soak", &args.guest, &args.cycles.to_string()], limit)
}
