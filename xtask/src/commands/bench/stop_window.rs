//! The stop window where the host's side of it runs at native speed: on this machine's own `/dev/kvm`, which may emulate the
//! guest's kernel mode but not the host. One vCPU, a lean kernel, a hundred parked kthreads.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use vmpatch_testkit::{Answer, Boot, Guest, Image, Side, Tool, patch_file};

use super::spinner;
use crate::commands::setup;
use crate::host::{self, Place};
use crate::inside::stats::percentile;
use crate::workbench::Workbench;
use crate::{progress, publish};

pub(super) const GUEST: &str = "lean-orc";
const PATCH: &str = "proc-version";
const VCPUS: u32 = 1;
/// For a processor that emulates kernel mode: nothing that its emulator does not know, and nothing slow that the guest can do
/// without. The initcalls left out sort BTF sets for half an hour.
const EMULATED: &str = "acpi=off pci=off mitigations=off nosmp noxsave lpj=10000000 tsc=reliable \
    initcall_blacklist=kfunc_init,bpf_map_iter_init,cpumask_kfunc_init rcupdate.rcu_cpu_stall_suppress=1 \
    clearcpuid=smap,smep,umip,fsgsbase,pcid,popcnt,rdrand,rdseed,cx16,xsave,erms,fsrm,rep_good,movbe,bmi1,bmi2,clflushopt,clwb,\
invpcid,avx,avx2,rdtscp,rdpid";

/// The last line.
#[derive(Serialize)]
struct Line {
    bench: &'static str,
    median_us: f64,
    p99_us: f64,
    vcpus: u32,
    tasks: usize,
    phases_us: BTreeMap<String, f64>,
    rollback_median_us: f64,
    rollback_p99_us: f64,
    cycles: u32,
    kernel: String,
    emulated_kernel_mode: bool,
}

/// Prepares, boots, measures.
pub(super) fn run(cycles: u32) -> Result<i32> {
    let manifest = setup::tools()?;
    let bench = Workbench::prepare(manifest, "stop-window", &[GUEST], &[PATCH])?;
    let initrd = bench.out().join("initrd");
    publish::file(&initrd, &spinner::archive()?)?;
    let (tool, image) = (
        Tool::at(bench.vmpatch()),
        Image::in_folder(bench.guests()?.join(GUEST))?,
    );
    let patch = patch_file(
        &tool,
        &bench.out().join("objects").join(GUEST).join(PATCH),
        PATCH,
        Side::Forward,
        bench.out(),
    )?;
    let emulated = host::place() == Place::TestHost;
    let step = progress::step(
        "booting the lean kernel (half a minute and more where kernel mode is emulated)",
    );
    let guest = boot(emulated, initrd).start(&tool, &image)?;
    // The program starts after the last line.
    std::thread::sleep(Duration::from_secs(3));
    step.done();
    let line = measure(
        &guest,
        patch.to_str().context("a path that is not UTF-8")?,
        cycles,
        image.release()?,
        emulated,
    )?;
    println!("{}", serde_json::to_string(&line)?);
    Ok(0)
}

/// The guest, not started.
pub(super) fn boot(emulated: bool, initrd: std::path::PathBuf) -> Boot {
    let mut boot = Boot::new("stop-window")
        .vcpus(VCPUS)
        .cmdline("planted.kthreads=100 loglevel=7");
    if emulated {
        boot = boot.cmdline(EMULATED);
        boot.args.push("--assist-emulation".to_owned());
    }
    boot.elf = true;
    boot.initrd = Some(initrd);
    boot.ready = "Run /init as init process".to_owned();
    boot.limit = Duration::from_secs(900);
    boot
}

fn measure(
    guest: &Guest,
    patch: &str,
    cycles: u32,
    kernel: String,
    emulated: bool,
) -> Result<Line> {
    let tasks = guest
        .call(&["inspect", "tasks"])?
        .expect_code(0)?
        .json
        .as_array()
        .map_or(0, Vec::len);
    let (mut applies, mut rollbacks) = (Vec::new(), Vec::new());
    let mut phases: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for cycle in 1..=cycles {
        let applied = guest
            .call(&["apply", patch, "--timeout", "60s"])?
            .expect_code(0)?;
        applies.push(applied.number("stop_window_us")?);
        collect(&applied, &mut phases);
        let back = guest
            .call(&["rollback", PATCH, "--timeout", "60s"])?
            .expect_code(0)?;
        rollbacks.push(back.number("stop_window_us")?);
        if cycle.is_multiple_of(20) {
            progress::note(&format!("{cycle} cycles"));
        }
    }
    Ok(Line {
        bench: "stop-window",
        median_us: percentile(&applies, 0.5),
        p99_us: percentile(&applies, 0.99),
        vcpus: VCPUS,
        tasks,
        phases_us: phases
            .into_iter()
            .map(|(name, values)| (name, percentile(&values, 0.5)))
            .collect(),
        rollback_median_us: percentile(&rollbacks, 0.5),
        rollback_p99_us: percentile(&rollbacks, 0.99),
        cycles,
        kernel,
        emulated_kernel_mode: emulated,
    })
}

/// What the machine itself measured of the stop (`kick`, `registers`, `write`, `resume`), how long the tool took over the stacks
/// (`stacks`), and how long it waited for each answer (`tool_…`).
fn collect(answer: &Answer, phases: &mut BTreeMap<String, Vec<f64>>) {
    let stop = answer.json["stop_us"].as_object().into_iter().flatten();
    let seen = [
        ("stopped", "tool_stop"),
        ("checked", "stacks"),
        ("resumed", "tool_switch"),
    ];
    let seen = seen
        .iter()
        .filter_map(|(phase, name)| Some((*name, answer.json["phases_us"].get(phase)?)));
    for (name, value) in stop.map(|(name, value)| (name.as_str(), value)).chain(seen) {
        phases
            .entry(name.to_owned())
            .or_default()
            .extend(value.as_f64());
    }
}
