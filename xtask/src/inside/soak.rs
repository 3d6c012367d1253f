//! The soak: both vCPUs busy in user and kernel mode, a patch in and out again and again.

use anyhow::Result;
use serde_json::json;
use vmpatch_testkit::{Boot, Image, Side, Soak, SoakReport, Tool, patch_file};

use super::stats::percentile;

const PATCH: &str = "proc-version";
const VCPUS: u32 = 2;

/// Boots and runs the cycles; fails if the guest shows any trace of them.
pub(super) fn run(name: &str, cycles: u32) -> Result<i32> {
    let (tool, image) = (Tool::from_env()?, Image::named(name)?);
    let file = patch_file(&tool, name, PATCH, Side::Forward, &std::env::temp_dir())?;
    println!("# booting {} with {VCPUS} vCPUs", image.release()?);
    let mut guest = Boot::new("soak").vcpus(VCPUS).start(&tool, &image)?;
    let soak = Soak {
        patch: &file,
        name: PATCH,
        cycles,
        progress: show,
    };
    let report = soak.run(&mut guest)?;
    for trouble in &report.troubles {
        println!("# guest: {trouble}");
    }
    let pass = report.troubles.is_empty() && report.text_equal;
    println!("{}", line(&report, pass, &image.release()?));
    Ok(i32::from(!pass))
}

fn show(cycle: u32) {
    if cycle.is_multiple_of(10) {
        println!("# {cycle} cycles");
    }
}

fn line(report: &SoakReport, pass: bool, kernel: &str) -> serde_json::Value {
    json!({
        "soak": if pass { "pass" } else { "fail" },
        "cycles": report.cycles,
        "oops": report.troubles.len(),
        "text_equal": report.text_equal,
        "kernel": kernel,
        "vcpus": VCPUS,
        "retries": report.retries,
        "apply_stop_window_us": { "median": percentile(&report.apply_us, 0.5), "p99": percentile(&report.apply_us, 0.99) },
        "rollback_stop_window_us": { "median": percentile(&report.rollback_us, 0.5), "p99": percentile(&report.rollback_us, 0.99) },
        "where": super::place(),
    })
}
