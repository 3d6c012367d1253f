//! Every patch of the corpus into one busy guest and out again. One that ends the guest does not end the others: they go on in a
//! new one.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use vmpatch_testkit::{Answer, Boot, Guest, Image, Tool};

use crate::corpus::build::REFUSED;
use crate::corpus::plan::{self, Line, Outcome, Plan, Trial};
use crate::corpus::{Probe, ramdisk};

const VCPUS: u32 = 2;
/// No protection keys, which not every processor has: what a probe sees must not hang on that.
const CMDLINE: &str = "vmpatch.planted=no nopku";
const SOON: Duration = Duration::from_secs(20);

/// Tries what the plan in this folder asks for and has no outcome yet.
pub(super) fn run(out: &Path) -> Result<i32> {
    let (plan, tool) = (Plan::load(out)?, Tool::from_env()?);
    let image = Image::named(&plan.guest)?;
    // A machine that failed is begun anew: what came of the others is known.
    let done = plan::outcomes(out)?;
    let left = plan
        .trials
        .iter()
        .filter(|trial| done.iter().all(|seen| seen.name != trial.name));
    let mut guest = None;
    for trial in left {
        let mut live = match guest.take() {
            Some(live) => live,
            None => boot(&plan, &tool, &image)?,
        };
        Line::Begun(trial.name.clone()).add(out)?;
        let outcome = try_one(&mut live, trial);
        println!("# {} {}", outcome.name, told(&outcome));
        // One that was left in would be in the way of the next, and of what is told of it.
        let is_clean = outcome.applied == outcome.rolled_back;
        let lives = is_clean && (outcome.trouble.is_none() || is_well(&mut live));
        Line::Ended(Box::new(outcome)).add(out)?;
        guest = lives.then_some(live);
    }
    Ok(0)
}

fn told(outcome: &Outcome) -> String {
    match &outcome.trouble {
        Some(trouble) => trouble.lines().next().unwrap_or_default().to_owned(),
        None => format!("in and out, {:.0} µs", outcome.stop_us),
    }
}

fn boot(plan: &Plan, tool: &Tool, image: &Image) -> Result<Guest> {
    println!("# booting {} with {VCPUS} vCPUs", image.release()?);
    let mut boot = Boot::new("corpus").vcpus(VCPUS).cmdline(CMDLINE);
    boot.initrd = Some(plan.initrd.clone());
    boot.memory = "512M".to_owned();
    let mut guest = boot.start(tool, image)?;
    guest.ask("/corpus/load > /dev/null 2>&1 &")?;
    Ok(guest)
}

/// Whether the guest can take the next one.
fn is_well(guest: &mut Guest) -> bool {
    guest.troubles().is_empty() && guest.console.ask("true", SOON).is_ok()
}

/// Never fails: what went wrong is part of the outcome.
fn try_one(guest: &mut Guest, trial: &Trial) -> Outcome {
    let mut outcome = Outcome {
        name: trial.name.clone(),
        ..Outcome::default()
    };
    let tried = steps(guest, trial, &mut outcome);
    let troubles = guest.troubles();
    outcome.trouble = match tried {
        Err(error) => Some(format!("{error:#}")),
        Ok(()) if !troubles.is_empty() => Some(format!(
            "the guest's kernel complains: {}",
            troubles.join(" | ")
        )),
        Ok(()) => None,
    };
    outcome
}

fn steps(guest: &mut Guest, trial: &Trial, outcome: &mut Outcome) -> Result<()> {
    load(guest, trial)?;
    let patch = trial.patch.to_str().context("a path that is not UTF-8")?;
    if let Some(probe) = &trial.probe {
        if !probe.setup.is_empty() {
            guest.ask(&probe.setup)?;
        }
        expect(guest, trial, probe, "before apply", &probe.before)?;
    }
    let checked = guest.call(&["check", patch, "--timeout", "60s"])?;
    outcome.refused = checked.code == Some(REFUSED);
    let checked = done("check", checked)?;
    outcome.verified = true;
    outcome.functions = checked.json["functions"].as_array().map_or(0, Vec::len);
    outcome.link_verify_ms = super::link_verify_ms(&checked);
    if trial.only_check {
        return Ok(());
    }
    let applied = call(guest, &["apply", patch, "--timeout", "60s"])?;
    outcome.applied = true;
    outcome.stop_us = applied.number("stop_window_us").unwrap_or_default();
    let seen = match &trial.probe {
        Some(probe) => expect(guest, trial, probe, "after apply", &probe.after),
        None => Ok(()),
    };
    call(guest, &["rollback", &trial.name, "--timeout", "60s"])?;
    outcome.rolled_back = true;
    seen?;
    if let Some(probe) = &trial.probe {
        expect(guest, trial, probe, "after rollback", &probe.before)?;
        outcome.exercised = true;
    }
    Ok(())
}

fn load(guest: &mut Guest, trial: &Trial) -> Result<()> {
    for module in &trial.modules {
        let file = ramdisk::module(module);
        guest
            .ask(&format!("[ -d /sys/module/{module} ] || insmod {file}"))
            .with_context(|| format!("the guest does not load {module}"))?;
    }
    Ok(())
}

fn call(guest: &Guest, words: &[&str]) -> Result<Answer> {
    done(words[0], guest.call(words)?)
}

fn done(verb: &str, answer: Answer) -> Result<Answer> {
    if answer.code != Some(0) {
        let reason = answer.json["reason"]
            .as_str()
            .unwrap_or(answer.stderr.trim());
        bail!("{verb}: exit code {:?}: {reason}", answer.code);
    }
    Ok(answer)
}

fn expect(guest: &mut Guest, trial: &Trial, probe: &Probe, when: &str, wanted: &str) -> Result<()> {
    let command = format!("PROBE={}; {}", ramdisk::program(&trial.name), probe.run);
    let lines = guest.ask(&command)?;
    let printed: Vec<_> = lines.iter().map(|line| line.trim()).collect();
    let printed = printed.join("\n");
    ensure!(
        printed == wanted,
        "the probe prints {printed:?} {when}, not {wanted:?}"
    );
    Ok(())
}
