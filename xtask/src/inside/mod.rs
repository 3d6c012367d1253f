//! Drivers that run where stock kernels can run: in the test host, or directly. Started by the commands of the same name with
//! everything prepared; they find it by the variables of [`crate::workbench`].

mod corpus;
mod demo;
mod soak;
pub(crate) mod stats;

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use vmpatch_testkit::Answer;

/// The drivers.
#[derive(Debug, Subcommand)]
pub(crate) enum Inside {
    /// Patch and roll back once, for people to watch
    Demo {
        /// The guest
        guest: String,
    },
    /// Try every patch of a plan
    Corpus {
        /// Folder of the plan and the results
        out: PathBuf,
    },
    /// Patch and roll back many times
    Soak {
        /// The guest
        guest: String,
        /// How often
        cycles: u32,
    },
}

/// Runs a driver.
pub(crate) fn run(inside: &Inside) -> Result<i32> {
    match inside {
        Inside::Corpus { out } => corpus::run(out),
        Inside::Demo { guest } => demo::run(guest),
        Inside::Soak { guest, cycles } => soak::run(guest, *cycles),
    }
}

/// Where this runs, as the report calls it.
fn place() -> String {
    std::env::var("VMPATCH_WHERE").unwrap_or_else(|_| "direct".to_owned())
}

/// How long linking and verifying took, in milliseconds, as the product measured it.
pub(crate) fn link_verify_ms(checked: &Answer) -> f64 {
    let phase = |name| checked.json["phases_us"][name].as_f64().unwrap_or(0.0);
    (phase("linked") + phase("verified")) / 1000.0
}
