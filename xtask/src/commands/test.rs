//! `cargo xtask test`: unit tests of every crate, then the end-to-end tests against real guests.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::setup;
use crate::manifest::Manifest;
use crate::tally::{Reader, Tally};
use crate::workbench::{PATCHES, Workbench, build_test};
use crate::{comparisons, extras, images, paths, progress, run};

/// Guests and which end-to-end tests each goes through: all of them, or those whose names hold one of these.
const SUITES: [(&str, &[&str]); 3] = [
    ("debian-6.12", &[]),
    (
        "debian-6.1",
        &[
            "apply::",
            "oracle::",
            "busy::",
            "hooks::",
            "shadow::",
            "sleeper::",
            "classics::",
        ],
    ),
    ("lean-fp", &["apply::", "oracle::", "busy::", "sleeper::"]),
];
/// Topics of tests that need what `xtask/src/extras.rs` makes.
const EXTRAS: [&str; 2] = ["classics::", "held::"];
/// The end-to-end tests take minutes in emulation; beyond this something hangs.
const LIMIT: Duration = Duration::from_secs(25 * 60);

/// Options of the command.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// End-to-end tests only
    #[arg(long)]
    e2e: bool,
    /// The crates' own tests only
    #[arg(long, conflicts_with_all = ["e2e", "all", "guest", "filter"])]
    unit: bool,
    /// Guests too whose kernels must be built first (some minutes each, once)
    #[arg(long)]
    all: bool,
    /// Only this guest
    #[arg(long)]
    guest: Option<String>,
    /// Only end-to-end tests whose names hold one of these
    filter: Vec<String>,
}

/// Runs the tests; the last line tells how many ended how.
pub(crate) fn run(args: &TestArgs) -> Result<i32> {
    let manifest = setup::tools()?;
    let mut tally = Tally::default();
    if !args.e2e {
        tally = unit_tests(&manifest)?;
    }
    if args.unit {
        println!("{tally}");
        return Ok(0);
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
    prepare_extras(&bench, &program, args, &suites)?;
    let log = bench.out().join("e2e.log");
    // Begun anew, it is counted anew.
    let mut script = format!("rm -f {}\n", log.display());
    for (guest, own) in &suites {
        let filter = filter(args, own);
        script.push_str(&format!(
            "echo; echo '## guest {guest}'; VMPATCH_GUEST={guest} {} --ignored --test-threads 1 {} 2>&1 | tee -a {}\n",
            program.display(),
            filter.join(" "),
            log.display(),
        ));
    }
    bench.run(vec!["/bin/sh".to_owned(), "-c".to_owned(), script], LIMIT)?;
    tally.skipped += skipped(&program, &left_out)?;
    report(&bench, suites.len(), tally)
}

/// Makes what only some tests need, for the guests whose suites have one of those.
fn prepare_extras(
    bench: &Workbench,
    program: &Path,
    args: &TestArgs,
    suites: &[Suite],
) -> Result<()> {
    for (guest, own) in suites {
        let tests = tests(program, &filter(args, own))?;
        let needs = |test: &String| EXTRAS.iter().any(|topic| test.starts_with(topic));
        if bench.manifest().guest(guest).is_ok() && tests.iter().any(needs) {
            extras::prepare(bench, guest)?;
        }
    }
    Ok(())
}

fn filter<'a>(args: &'a TestArgs, own: &[&'a str]) -> Vec<&'a str> {
    if args.filter.is_empty() {
        own.to_vec()
    } else {
        args.filter.iter().map(String::as_str).collect()
    }
}

/// Names of the end-to-end tests that pass the filter.
fn tests(program: &Path, filter: &[&str]) -> Result<Vec<String>> {
    let list = run::stdout(
        Command::new(program)
            .args(["--ignored", "--list"])
            .args(filter),
    )?;
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(names.map(str::to_owned).collect())
}

/// Runs the crates' own tests, with real kernels to compare with.
fn unit_tests(manifest: &Manifest) -> Result<Tally> {
    let variables = comparisons::prepare(manifest)?;
    progress::note("unit tests");
    let mut reader = Reader::default();
    let succeeded = run::lines(
        Command::new("cargo")
            .args(["test", "--workspace", "--locked", "--no-fail-fast"])
            .args(["--", "--show-output"])
            .envs(variables)
            .current_dir(paths::repo()),
        |line| {
            if let Some(shown) = reader.take(line) {
                println!("{shown}");
            }
        },
    )?;
    ensure!(succeeded, "unit tests: {}", reader.tally);
    progress::note(&format!("unit tests: {}", reader.tally));
    Ok(reader.tally)
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
        let tests = tests(program, filter)?.len();
        progress::warn(&format!(
            "SKIPPED: {tests} tests of {guest}, whose kernel is not built (cargo xtask test --all)"
        ));
        count += u32::try_from(tests)?;
    }
    Ok(count)
}

/// Adds the end-to-end tests to `tally` and prints it.
fn report(bench: &Workbench, suites: usize, mut tally: Tally) -> Result<i32> {
    let log = bench.out().join("e2e.log");
    let e2e = Tally::of(
        &fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))?,
    );
    let whole = usize::try_from(e2e.finished).is_ok_and(|n| n == suites);
    if !whole {
        progress::warn(&format!(
            "{} of {suites} test programs came to their end",
            e2e.finished
        ));
    }
    tally += e2e;
    println!("{tally}");
    Ok(i32::from(e2e.failed > 0 || e2e.passed == 0 || !whole))
}
