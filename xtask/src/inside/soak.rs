//! The soak: both vCPUs busy in user and kernel mode, a patch in and out again and again.

use anyhow::Result;
use serde::Serialize;
use vmpatch_testkit::{Boot, Image, Side, Soak, SoakReport, Tool, objects, patch_file};

use super::stats::percentile;

const PATCH: &str = "proc-version";
const VCPUS: u32 = 2;

/// Boots and runs the cycles; fails if the guest shows any trace of them.
pub(super) fn run(name: &str, cycles: u32) -> Result<i32> {
    let (tool, image) = (Tool::from_env()?, Image::named(name)?);
    let file = patch_file(
        &tool,
        &objects(name, PATCH)?,
        PATCH,
        Side::Forward,
        &std::env::temp_dir(),
    )?;
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
    println!(
        "{}",
        serde_json::to_string(&line(&report, pass, &image.release()?))?
    );
    Ok(i32::from(!pass))
}

fn show(cycle: u32) {
    if cycle.is_multiple_of(10) {
        println!("# {cycle} cycles");
    }
}

/// The last line.
#[derive(Serialize)]
struct Line<'a> {
    soak: &'static str,
    cycles: u32,
    oops: usize,
    text_equal: bool,
    kernel: &'a str,
    vcpus: u32,
    retries: u64,
    apply_stop_window_us: Windows,
    rollback_stop_window_us: Windows,
    r#where: String,
}

#[derive(Serialize)]
struct Windows {
    median: f64,
    p99: f64,
}

impl Windows {
    fn of(values: &[f64]) -> Self {
        Self {
            median: percentile(values, 0.5),
            p99: percentile(values, 0.99),
        }
    }
}

fn line<'a>(report: &SoakReport, pass: bool, kernel: &'a str) -> Line<'a> {
    Line {
        soak: if pass { "pass" } else { "fail" },
        cycles: report.cycles,
        oops: report.troubles.len(),
        text_equal: report.text_equal,
        kernel,
        vcpus: VCPUS,
        retries: report.retries,
        apply_stop_window_us: Windows::of(&report.apply_us),
        rollback_stop_window_us: Windows::of(&report.rollback_us),
        r#where: super::place(),
    }
}
