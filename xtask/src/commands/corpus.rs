//! `cargo xtask corpus`: every fix of `tests/corpus/` from its diff to a patch, and that into a running guest and out again.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use vmpatch_testkit::Tool;

use super::setup;
use crate::corpus::build::{self, Built, Kernel};
use crate::corpus::modules::{Module, Modules};
use crate::corpus::plan::{self, Outcome, Plan, Trial};
use crate::corpus::verdict::{self, Row};
use crate::corpus::{Entry, Expected, ramdisk};
use crate::manifest::Manifest;
use crate::workbench::Workbench;
use crate::{packages, paths, progress, publish};

/// The kernel that the entries mend.
pub(crate) const GUEST: &str = "debian-6.12";
/// For the boot, and for each entry where all is emulated.
const BOOT: Duration = Duration::from_secs(300);
const EACH: Duration = Duration::from_secs(90);

/// Options of the command.
#[derive(Debug, Args)]
pub(crate) struct CorpusArgs {
    /// Entries to run; all without
    names: Vec<String>,
    /// Build patches and judge refusals, and boot no guest
    #[arg(long)]
    build_only: bool,
}

/// Builds all, tries them in one guest, shows the table; the last line is JSON.
pub(crate) fn run(args: &CorpusArgs) -> Result<i32> {
    let manifest = setup::tools()?;
    let entries = Entry::load(&args.names)?;
    let kernel = build::kernel(&manifest, GUEST)?;
    let modules = modules(&manifest, &entries)?;
    // A folder of its own: what is built now must not disturb a guest that another run has.
    let name = if args.build_only {
        "corpus-build"
    } else {
        "corpus"
    };
    let bench = Workbench::prepare(manifest, name, &[GUEST], &[])?;
    let built = build_all(&Tool::at(bench.vmpatch()), &kernel, &entries)?;
    let outcomes = if args.build_only {
        Vec::new()
    } else {
        try_all(&bench, &entries, &built, &modules)?
    };
    report(&entries, &built, &outcomes, args.build_only)
}

fn modules(manifest: &Manifest, entries: &[Entry]) -> Result<Vec<Vec<Module>>> {
    let guest = packages::settle(manifest.guest(GUEST)?)?;
    let tree = packages::unpacked(&guest, &guest.image)?;
    let all = Modules::of(&guest, tree)?;
    let of = |entry: &Entry| all.with_dependencies(&entry.modules);
    entries.iter().map(of).collect()
}

fn build_all(tool: &Tool, kernel: &Kernel, entries: &[Entry]) -> Result<Vec<Built>> {
    let product = build::product(tool)?;
    let mut all = Vec::new();
    for (at, entry) in entries.iter().enumerate() {
        let step = progress::step(format!("{}/{} {}", at + 1, entries.len(), entry.name));
        let built = build::build(tool, &product, kernel, entry)
            .unwrap_or_else(|error| Built::failed(&error));
        step.done();
        all.push(built);
    }
    Ok(all)
}

/// Tries every patch there is where stock kernels can run.
fn try_all(
    bench: &Workbench,
    entries: &[Entry],
    built: &[Built],
    modules: &[Vec<Module>],
) -> Result<Vec<Outcome>> {
    let mut trials = Vec::new();
    for ((entry, built), modules) in entries.iter().zip(built).zip(modules) {
        if built.is_patch() {
            trials.push(trial(bench, entry, modules)?);
        }
    }
    let limit = BOOT + EACH * u32::try_from(trials.len())?;
    let initrd = bench.out().join("initrd");
    let base = bench.guests()?.join(GUEST).join("initrd");
    let archive = ramdisk::make(&base, &once_each(modules), entries, bench.out())?;
    publish::file(&initrd, &archive)?;
    let plan = Plan {
        guest: GUEST.to_owned(),
        initrd,
        trials,
    };
    plan.save(bench.out())?;
    if !plan.trials.is_empty() {
        let out = bench.out().to_str().context("a path that is not UTF-8")?;
        bench.run_inside(&["corpus", out], limit)?;
    }
    plan::outcomes(bench.out())
}

fn trial(bench: &Workbench, entry: &Entry, modules: &[Module]) -> Result<Trial> {
    let (built, patch) = (
        build::patch(entry)?,
        bench.out().join(format!("{}.vmpatch", entry.name)),
    );
    fs::copy(&built, &patch).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(Trial {
        name: entry.name.clone(),
        patch,
        modules: modules.iter().map(|module| module.name.clone()).collect(),
        probe: entry.probe.clone(),
        only_check: entry.expected != Expected::Patchable,
    })
}

fn once_each(modules: &[Vec<Module>]) -> Vec<Module> {
    let mut all: Vec<Module> = modules.concat();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all.dedup_by(|a, b| a.name == b.name);
    all
}

fn report(
    entries: &[Entry],
    built: &[Built],
    outcomes: &[Outcome],
    build_only: bool,
) -> Result<i32> {
    let mut rows = Vec::new();
    for (entry, built) in entries.iter().zip(built) {
        let seen = outcomes.iter().find(|seen| seen.name == entry.name);
        if let Some(seen) = seen {
            let log = build::folder(entry)?.join("guest.json");
            publish::file(&log, &serde_json::to_vec_pretty(seen)?)?;
        }
        rows.push(if build_only {
            Row::only_built(entry, built)
        } else {
            verdict::row(entry, built, seen)
        });
    }
    print!("{}", verdict::table(&rows));
    let logs = paths::cache()?.join("corpus");
    println!("logs: {}/NAME/build.json, guest.json", logs.display());
    let line = verdict::line(entries, built, outcomes, &rows);
    println!("{}", serde_json::to_string(&line)?);
    Ok(i32::from(!line.passes()))
}
