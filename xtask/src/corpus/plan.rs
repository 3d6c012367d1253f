//! What is handed to the driver that runs where stock kernels can run, and what it hands back, as files of the folder for results:
//! `plan.json`, and `results.jsonl` with one line as each entry begins and one as it ends.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Probe;

const PLAN: &str = "plan.json";
const RESULTS: &str = "results.jsonl";

/// All that is to be done in a guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Name of the guest image.
    pub guest: String,
    /// First file system, with modules and probes.
    pub initrd: PathBuf,
    /// Patches to try, in their order.
    pub trials: Vec<Trial>,
}

/// One patch to try.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Trial {
    /// Name of the entry and of the patch.
    pub name: String,
    /// The patch file.
    pub patch: PathBuf,
    /// Modules to load first, in this order.
    pub modules: Vec<String>,
    /// How the fix is seen.
    pub probe: Option<Probe>,
    /// `check` is expected to refuse it, and the guest must never see it applied.
    pub only_check: bool,
}

/// A line of the results.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Line {
    /// This entry is about to be tried.
    Begun(String),
    /// What came of it.
    Ended(Box<Outcome>),
}

/// What came of one patch in a guest.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Name of the entry.
    pub name: String,
    /// `check` went through.
    pub verified: bool,
    /// `apply` went through.
    pub applied: bool,
    /// `rollback` went through.
    pub rolled_back: bool,
    /// The probe saw the fix come and go.
    pub exercised: bool,
    /// Functions that were replaced.
    pub functions: usize,
    /// Linking and verifying, in milliseconds, as the product measured it there.
    pub link_verify_ms: f64,
    /// How long the guest stood still for the apply, in microseconds.
    pub stop_us: f64,
    /// `check` said no, by its exit code.
    pub refused: bool,
    /// What went another way than hoped: the first thing, in full.
    pub trouble: Option<String>,
}

impl Plan {
    /// Writes it.
    pub(crate) fn save(&self, out: &Path) -> Result<()> {
        let path = out.join(PLAN);
        fs::write(&path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads it.
    pub(crate) fn load(out: &Path) -> Result<Self> {
        let path = out.join(PLAN);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }
}

impl Line {
    /// Adds it to the results.
    pub(crate) fn add(&self, out: &Path) -> Result<()> {
        let path = out.join(RESULTS);
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        writeln!(file, "{}", serde_json::to_string(self)?)?;
        Ok(())
    }
}

/// What came of each entry so far. An entry that was begun and not ended took its machine with it.
pub(crate) fn outcomes(out: &Path) -> Result<Vec<Outcome>> {
    let text = fs::read_to_string(out.join(RESULTS)).unwrap_or_default();
    let mut all: Vec<Outcome> = Vec::new();
    for line in text.lines() {
        match serde_json::from_str(line).with_context(|| format!("a line of {RESULTS}: {line}"))? {
            Line::Begun(name) => all.push(Outcome {
                name,
                trouble: Some("the machine that it was tried in ended".to_owned()),
                ..Outcome::default()
            }),
            Line::Ended(outcome) => {
                all.retain(|other| other.name != outcome.name);
                all.push(*outcome);
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_did_not_end_is_known() {
        let out = tempfile::tempdir().unwrap();
        let ended = Outcome {
            name: "a".to_owned(),
            verified: true,
            ..Outcome::default()
        };
        for line in [
            Line::Begun("a".to_owned()),
            Line::Ended(Box::new(ended)),
            Line::Begun("b".to_owned()),
        ] {
            line.add(out.path()).unwrap();
        }
        let all = outcomes(out.path()).unwrap();
        assert_eq!(all.len(), 2);
        assert!(all[0].verified && all[0].trouble.is_none());
        assert!(all[1].trouble.is_some());
    }
}
