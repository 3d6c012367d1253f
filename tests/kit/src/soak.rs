//! Apply and roll back the same patch many times in one boot, the guest busy all the while.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{Answer, Guest};

/// What to do.
#[derive(Clone, Debug)]
pub struct Soak<'a> {
    /// The patch file.
    pub patch: &'a Path,
    /// Its name, for the rollback.
    pub name: &'a str,
    /// How many times.
    pub cycles: u32,
    /// Called after each cycle with its number.
    pub progress: fn(u32),
}

/// What was seen.
#[derive(Clone, Debug)]
pub struct SoakReport {
    /// Cycles that went through.
    pub cycles: u32,
    /// Stop windows of every apply, in microseconds.
    pub apply_us: Vec<f64>,
    /// Stop windows of every rollback, in microseconds.
    pub rollback_us: Vec<f64>,
    /// Attempts beyond the first, all changes together.
    pub retries: u64,
    /// Oopses and warnings beyond the boot's own.
    pub troubles: Vec<String>,
    /// Kernel code and read-only data are byte for byte as before.
    pub text_equal: bool,
}

impl Soak<'_> {
    /// Runs all cycles.
    ///
    /// # Errors
    /// A change that does not go through.
    pub fn run(&self, guest: &mut Guest) -> Result<SoakReport> {
        let before = guest.snapshot()?;
        guest.ask("busy 2")?;
        let mut report = SoakReport {
            cycles: 0,
            apply_us: Vec::new(),
            rollback_us: Vec::new(),
            retries: 0,
            troubles: Vec::new(),
            text_equal: false,
        };
        let file = self.patch.to_str().context("a path that is not UTF-8")?;
        for cycle in 1..=self.cycles {
            let (window, tries) = change(guest, &["apply", file, "--timeout", "60s"], cycle)?;
            report.apply_us.push(window);
            report.retries += tries;
            let (window, tries) =
                change(guest, &["rollback", self.name, "--timeout", "60s"], cycle)?;
            report.rollback_us.push(window);
            report.retries += tries;
            report.cycles = cycle;
            (self.progress)(cycle);
        }
        guest.ask("idle; sleep 1")?;
        let after = guest.snapshot()?;
        report.text_equal = before.code == after.code && before.rodata == after.rodata;
        report.troubles = guest.troubles();
        Ok(report)
    }
}

fn change(guest: &Guest, words: &[&str], cycle: u32) -> Result<(f64, u64)> {
    let answer: Answer = guest
        .call(words)?
        .expect_code(0)
        .with_context(|| format!("cycle {cycle}, {}", words[0]))?;
    ensure!(
        answer.time < Duration::from_secs(120),
        "cycle {cycle} took {:?}",
        answer.time
    );
    let tries = answer.json["attempts"]
        .as_u64()
        .unwrap_or(1)
        .saturating_sub(1);
    Ok((answer.number("stop_window_us")?, tries))
}
