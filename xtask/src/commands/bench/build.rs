//! Build: from the diff of a one-file fix to a patch file, in a source that is ready; and patches linked and verified against a live
//! guest, on this machine's own `/dev/kvm`, where the work of the host runs at its own speed.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use vmpatch_testkit::{Guest, Image, Tool};

use super::{spinner, stop_window};
use crate::commands::{corpus, setup};
use crate::corpus::Entry;
use crate::corpus::build::{Kernel, now};
use crate::host::{self, Place};
use crate::inside::link_verify_ms;
use crate::inside::stats::percentile;
use crate::workbench::Workbench;
use crate::{progress, publish};

/// A fix of one file that is built into the kernel.
const FIX: &str = "statx-verity";
/// Fixes for the live guest, of one function and of several.
const LIVE: [&str; 3] = [FIX, "fs-pin-rcu", "klist-wakeup"];

/// The last line.
#[derive(Serialize)]
struct Line {
    bench: &'static str,
    diff_to_patch_median_s: f64,
    diff_to_patch_max_s: f64,
    link_verify_median_ms: f64,
    link_verify_max_ms: f64,
    patches: usize,
    functions_max: usize,
    rounds: u32,
    kernel: String,
    emulated_kernel_mode: bool,
}

/// Prepares and measures.
pub(super) fn run(rounds: u32) -> Result<i32> {
    let manifest = setup::tools()?;
    let kernel = corpus::kernel(&manifest, corpus::GUEST)?;
    let lean = corpus::kernel(&manifest, stop_window::GUEST)?;
    let bench = Workbench::prepare(manifest, "build", &[stop_window::GUEST], &[])?;
    let tool = Tool::at(bench.vmpatch());
    let builds = builds(&tool, &kernel, &bench, rounds)?;
    let image = Image::in_folder(bench.guests()?.join(stop_window::GUEST))?;
    let emulated = host::place() == Place::TestHost;
    let guest = boot(&bench, &tool, &image, emulated)?;
    let (times, functions_max) = checks(&guest, &lean, &bench, rounds)?;
    let line = Line {
        bench: "build",
        diff_to_patch_median_s: percentile(&builds, 0.5),
        diff_to_patch_max_s: percentile(&builds, 1.0),
        link_verify_median_ms: percentile(&times, 0.5),
        link_verify_max_ms: percentile(&times, 1.0),
        patches: LIVE.len(),
        functions_max,
        rounds,
        kernel: image.release()?,
        emulated_kernel_mode: emulated,
    };
    println!("{}", serde_json::to_string(&line)?);
    Ok(0)
}

/// Seconds of each round; one more goes before, which may have to make the source ready.
fn builds(tool: &Tool, kernel: &Kernel, bench: &Workbench, rounds: u32) -> Result<Vec<f64>> {
    let step = progress::step(format!("building {FIX} {rounds} times"));
    let entry = Entry::load(&[FIX.to_owned()])?.pop().context("no entry")?;
    let to = bench.out().join("fix.vmpatch");
    let mut seconds = Vec::new();
    for _ in 0..=rounds {
        let built = now(tool, kernel, &entry.diff(), &to)?;
        ensure!(built.is_patch(), "{FIX} is not built: {}", built.reason());
        seconds.push(built.seconds);
    }
    step.done();
    Ok(seconds.split_off(1))
}

fn boot(bench: &Workbench, tool: &Tool, image: &Image, emulated: bool) -> Result<Guest> {
    let step = progress::step(
        "booting the lean kernel (half a minute and more where kernel mode is emulated)",
    );
    let initrd = bench.out().join("initrd");
    publish::file(&initrd, &spinner::archive()?)?;
    let mut boot = stop_window::boot(emulated, initrd);
    boot.id = "bench-build".to_owned();
    let guest = boot.start(tool, image)?;
    step.done();
    Ok(guest)
}

/// Milliseconds of linking and verifying, and the most functions that a patch had.
fn checks(
    guest: &Guest,
    lean: &Kernel,
    bench: &Workbench,
    rounds: u32,
) -> Result<(Vec<f64>, usize)> {
    let (mut times, mut most) = (Vec::new(), 0);
    for name in LIVE {
        let file = patch(
            &guest.tool,
            lean,
            name,
            &bench.out().join(format!("{name}.vmpatch")),
        )?;
        let file = file.to_str().context("a path that is not UTF-8")?;
        for _ in 0..rounds {
            let checked = guest
                .call(&["check", file, "--timeout", "60s"])?
                .expect_code(0)?;
            times.push(link_verify_ms(&checked));
            most = most.max(checked.json["functions"].as_array().map_or(0, Vec::len));
        }
    }
    Ok((times, most))
}

/// A fix of the corpus as a patch.
fn patch(tool: &Tool, kernel: &Kernel, name: &str, to: &Path) -> Result<PathBuf> {
    let entry = Entry::load(&[name.to_owned()])?.pop().context("no entry")?;
    let built = now(tool, kernel, &entry.diff(), to)?;
    ensure!(built.is_patch(), "{name} is not built: {}", built.reason());
    Ok(to.to_path_buf())
}
