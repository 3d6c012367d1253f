//! `cargo xtask test`: unit tests of every crate, then the end-to-end tests against real guests.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::setup;
use crate::manifest::Manifest;
use crate::tally::Tally;
use crate::workbench::{PATCHES, Workbench, build_test};
use crate::{dumps, images, paths, progress, run};

/// Guests and which end-to-end tests each goes through: all of them, or those whose names hold one of these.
const SUITES: [(&str, &[&str]); 3] = [
    ("debian-6.12", &[]),
    ("debian-6.1", &["apply::", "oracle::", "busy::"]),
    ("lean-fp", &["apply::", "oracle::", "busy::"]),
];
/// The end-to-end tests take minutes in emulation; beyond this something hangs.
const LIMIT: Duration = Duration::from_secs(25 * 60);

/// Options of the command.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// End-to-end tests only
    #[arg(long)]
    e2e: bool,
    /// Guests too whose kernels must be built first (some minutes each, once)
    #[arg(long)]
    all: bool,
    /// Only this guest
    #[arg(long)]
    guest: Option<String>,
    /// Only end-to-end tests whose names hold one of these
    filter: Vec<String>,
}

/// Runs the tests; the last line tells the end-to-end tests' count.
pub(crate) fn run(args: &TestArgs) -> Result<i32> {
    let manifest = setup::tools()?;
    if !args.e2e {
        let dumps = dumps::make(&manifest)?;
        progress::note("unit tests");
        run::shown(
            Command::new("cargo")
                .args(["test", "--workspace", "--locked"])
                .env("VMPATCH_DUMPS", dumps)
                .current_dir(paths::repo()),
        )?;
    }
    let (suites, left_out) = suites(args, &manifest)?;
    // A patch for another kernel must be refused, so both distributions' objects are needed.
    let mut guests = vec!["debian-6.12", "debian-6.1"];
    guests.extend(
        suites
            .iter()
            .map(|(guest, _)| *guest)
            .filter(|g| g.starts_with("lean")),
    );
    let bench = Workbench::prepare(manifest, "test", &guests, &PATCHES)?;
    let program = build_test("e2e")?;
    let mut script = String::new();
    for (guest, own) in &suites {
        let filter: Vec<&str> = if args.filter.is_empty() {
            own.to_vec()
        } else {
            args.filter.iter().map(String::as_str).collect()
        };
        script.push_str(&format!(
            "echo; echo '## guest {guest}'; VMPATCH_GUEST={guest} {} --ignored --test-threads 1 {} 2>&1 | tee -a {}\n",
            program.display(),
            filter.join(" "),
            bench.out().join("e2e.log").display(),
        ));
    }
    bench.run(vec!["/bin/sh".to_owned(), "-c".to_owned(), script], LIMIT)?;
    report(&bench, suites.len(), skipped(&program, &left_out)?)
}

type Suite = (&'static str, &'static [&'static str]);

/// The suites to run, and those left out because their kernel is not built yet.
fn suites(args: &TestArgs, manifest: &Manifest) -> Result<(Vec<Suite>, Vec<Suite>)> {
    let (mut run, mut left_out) = (Vec::new(), Vec::new());
    for suite in SUITES
        .into_iter()
        .filter(|(guest, _)| args.guest.as_deref().is_none_or(|g| g == *guest))
    {
        let wanted = args.all || args.guest.is_some() || images::is_quick(manifest, suite.0)?;
        let list = if wanted { &mut run } else { &mut left_out };
        list.push(suite);
    }
    ensure!(!run.is_empty(), "no such guest in the end-to-end tests");
    Ok((run, left_out))
}

/// How many tests the suites left out would have been.
fn skipped(program: &Path, left_out: &[Suite]) -> Result<u32> {
    let mut count = 0;
    for (guest, filter) in left_out {
        let list = run::stdout(
            Command::new(program)
                .args(["--ignored", "--list"])
                .args(*filter),
        )?;
        let tests = list.lines().filter(|l| l.ends_with(": test")).count();
        progress::warn(&format!(
            "SKIPPED: {tests} tests of {guest}, whose kernel is not built (cargo xtask test --all)"
        ));
        count += u32::try_from(tests)?;
    }
    Ok(count)
}

fn report(bench: &Workbench, suites: usize, skipped: u32) -> Result<i32> {
    let log = bench.out().join("e2e.log");
    let mut tally = Tally::of(
        &fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))?,
    );
    tally.skipped += skipped;
    let whole = usize::try_from(tally.finished).is_ok_and(|n| n == suites);
    if !whole {
        progress::warn(&format!(
            "{} of {suites} test programs came to their end",
            tally.finished
        ));
    }
    println!("{tally}");
    Ok(i32::from(tally.failed > 0 || tally.passed == 0 || !whole))
}
