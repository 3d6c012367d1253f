//! `cargo xtask test`: unit tests of every crate, then the end-to-end tests against real guests.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::setup;
use crate::tally::Tally;
use crate::workbench::{PATCHES, Workbench, build_test};
use crate::{dumps, paths, progress, run};

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
    let chosen = |name: &str| args.guest.as_deref().is_none_or(|g| g == name);
    let suites: Vec<_> = SUITES.iter().filter(|(guest, _)| chosen(guest)).collect();
    ensure!(!suites.is_empty(), "no such guest in the end-to-end tests");
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
    report(&bench, suites.len())
}

fn report(bench: &Workbench, suites: usize) -> Result<i32> {
    let log = bench.out().join("e2e.log");
    let tally = Tally::of(
        &fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))?,
    );
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
