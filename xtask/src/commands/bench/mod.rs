//! `cargo xtask bench`: figures, each from one command that sets itself up and ends with one JSON line.

mod attach;
mod build;
mod spinner;
mod stop_window;

use anyhow::Result;
use clap::Subcommand;

/// The benches.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// How long a guest stands still for a patch (this machine's own /dev/kvm, lean kernel, 100 kthreads)
    StopWindow {
        /// Applies and rollbacks to measure
        #[arg(long, default_value_t = 100)]
        cycles: u32,
    },
    /// From the diff of a fix to a patch, and that linked and verified against a live guest
    Build {
        /// Times to measure each
        #[arg(long, default_value_t = 5)]
        rounds: u32,
    },
    /// From nothing to all symbols, types and tasks of a stock guest
    Attach {
        /// Times to measure
        #[arg(long, default_value_t = 20)]
        rounds: u32,
    },
}

/// Runs a bench.
pub(crate) fn run(bench: &Bench) -> Result<i32> {
    match bench {
        Bench::StopWindow { cycles } => stop_window::run(*cycles),
        Bench::Build { rounds } => build::run(*rounds),
        Bench::Attach { rounds } => attach::run(*rounds),
    }
}
