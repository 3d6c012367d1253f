//! Build: from the diff of a one-file fix to a patch file, in a source that is ready; and patches linked and verified against a live
//! guest, on this machine's own `/dev/kvm`, where the work of the host runs at its own speed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use vmpatch_testkit::{Guest, Image, Tool};

use super::{spinner, stop_window};
use crate::commands::{corpus, setup};
use crate::corpus::Entry;
use crate::corpus::build::{self, Kernel, now};
use crate::host::{self, Place};
use crate::inside::link_verify_ms;
use crate::inside::stats::percentile;
use crate::workbench::Workbench;
use crate::{progress, publish};

/// A fix of one file that is built into the kernel.
const FIX: &str = "statx-verity";
/// Patches for the live guest: fixes of one function and of two, and three fixes in one, of five.
const LIVE: [&[&str]; 4] = [
    &[FIX],
    &["fs-pin-rcu"],
    &["klist-wakeup"],
    &["fs-pin-rcu", "klist-wakeup", "signal-retarget"],
];

/// From a diff of one file to a patch file, in seconds, on two cores.
const BUILD_AIM_S: f64 = 20.0;
/// Linking and verifying a patch of up to five functions, in milliseconds.
const LINK_AIM_MS: f64 = 50.0;

/// The last line.
#[derive(Serialize)]
struct Line {
    bench: &'static str,
    /// Whether both medians, that of the largest patch for the second, are within what is aimed at.
    aims_met: bool,
    diff_to_patch_median_s: f64,
    diff_to_patch_max_s: f64,
    link_verify_median_ms: f64,
    link_verify_max_ms: f64,
    /// Of the patch with the most functions.
    largest_median_ms: f64,
    largest_functions: usize,
    patches: usize,
    rounds: u32,
    kernel: String,
    emulated_kernel_mode: bool,
}

/// Prepares and measures.
pub(super) fn run(rounds: u32) -> Result<i32> {
    let manifest = setup::tools()?;
    let kernel = build::kernel(&manifest, corpus::GUEST)?;
    let lean = build::kernel(&manifest, stop_window::GUEST)?;
    let bench = Workbench::prepare(manifest, "build", &[stop_window::GUEST], &[])?;
    let tool = Tool::at(bench.vmpatch());
    let builds = builds(&tool, &kernel, &bench, rounds)?;
    let image = Image::in_folder(bench.guests()?.join(stop_window::GUEST))?;
    let emulated = host::place() == Place::TestHost;
    let guest = boot(&bench, &tool, &image, emulated)?;
    let live = checks(&guest, &lean, &bench, rounds)?;
    let times: Vec<_> = live.iter().flat_map(|it| it.milliseconds.clone()).collect();
    let largest = live.iter().max_by_key(|it| it.functions);
    let largest = largest.context("no patch was checked")?;
    let (build_s, link_ms) = (
        percentile(&builds, 0.5),
        percentile(&largest.milliseconds, 0.5),
    );
    let line = Line {
        bench: "build",
        aims_met: build_s < BUILD_AIM_S && link_ms < LINK_AIM_MS,
        diff_to_patch_median_s: build_s,
        diff_to_patch_max_s: percentile(&builds, 1.0),
        link_verify_median_ms: percentile(&times, 0.5),
        link_verify_max_ms: percentile(&times, 1.0),
        largest_median_ms: link_ms,
        largest_functions: largest.functions,
        patches: live.len(),
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

/// A patch linked and verified again and again.
struct Live {
    functions: usize,
    milliseconds: Vec<f64>,
}

fn checks(guest: &Guest, lean: &Kernel, bench: &Workbench, rounds: u32) -> Result<Vec<Live>> {
    let patches = LIVE.iter().map(|fixes| {
        let step = progress::step(format!("checking {} {rounds} times", fixes.join(", ")));
        let live = check(
            guest,
            &patch(&guest.tool, lean, fixes, bench.out())?,
            rounds,
        )?;
        step.done();
        Ok(live)
    });
    patches.collect()
}

fn check(guest: &Guest, file: &Path, rounds: u32) -> Result<Live> {
    let file = file.to_str().context("a path that is not UTF-8")?;
    let (mut functions, mut milliseconds) = (0, Vec::new());
    for _ in 0..rounds {
        let checked = guest
            .call(&["check", file, "--timeout", "60s"])?
            .expect_code(0)?;
        milliseconds.push(link_verify_ms(&checked));
        functions = checked.json["functions"].as_array().map_or(0, Vec::len);
    }
    Ok(Live {
        functions,
        milliseconds,
    })
}

/// Fixes of the corpus as one patch.
fn patch(tool: &Tool, kernel: &Kernel, fixes: &[&str], folder: &Path) -> Result<PathBuf> {
    let names: Vec<_> = fixes.iter().map(|&name| name.to_owned()).collect();
    let diffs = Entry::load(&names)?.into_iter();
    let diffs = diffs.map(|entry| fs::read(entry.diff()));
    let diff = folder.join("live.patch");
    publish::file(&diff, &diffs.collect::<Result<Vec<_>, _>>()?.concat())?;
    let to = folder.join(format!("{}.vmpatch", names.join("-")));
    let built = now(tool, kernel, &diff, &to)?;
    ensure!(
        built.is_patch(),
        "{names:?} is not built: {}",
        built.reason()
    );
    Ok(to)
}
