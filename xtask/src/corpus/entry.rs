//! One entry of the corpus as data: `tests/corpus/NAME/entry.toml` beside its `fix.patch`. `tests/corpus/README.md` tells the form.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::paths;

/// A fix and what is expected of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    /// Name of its folder.
    #[serde(skip)]
    pub name: String,
    /// Subject of the upstream commit.
    pub title: String,
    /// Upstream commit, where known.
    pub commit: Option<String>,
    /// The CVE that it mends, if it has one.
    pub cve: Option<String>,
    /// Version of Debian's source package that it came with.
    pub release: String,
    /// Files that it changes.
    pub files: Vec<PathBuf>,
    /// What a human would say of it.
    pub expected: Expected,
    /// Why it is in the corpus, or why it must be refused.
    pub why: String,
    /// Modules that the guest must have loaded, by the names that `lsmod` shows.
    #[serde(default)]
    pub modules: Vec<String>,
    /// How the fix is seen from user space.
    pub probe: Option<Probe>,
}

/// A verdict that is expected.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Expected {
    /// It goes into a running kernel.
    Patchable,
    /// It is refused, and must be; the reason holds this.
    Refused(String),
    /// It could go in, and is refused all the same, with a reason that holds this: a known limit of vmpatch. It counts among the
    /// patchable ones that do not go through.
    Limit(String),
}

/// Shell commands for the guest. Where the entry has a `probe.c`, it lies compiled at `$PROBE`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Probe {
    /// Run once before the first `run`.
    #[serde(default)]
    pub setup: String,
    /// Prints what tells the old kernel from the new.
    pub run: String,
    /// What it prints without the patch, before and after.
    pub before: String,
    /// What it prints while the patch is in.
    pub after: String,
}

impl Entry {
    /// All entries, or those of these names, in the order of their names.
    pub(crate) fn load(names: &[String]) -> Result<Vec<Self>> {
        let root = root();
        let mut found = Vec::new();
        for folder in
            fs::read_dir(&root).with_context(|| format!("cannot list {}", root.display()))?
        {
            let folder = folder?.path();
            if folder.join("entry.toml").exists() {
                found.push(
                    folder
                        .file_name()
                        .unwrap_or_default()
                        .to_string_lossy()
                        .into_owned(),
                );
            }
        }
        found.sort();
        for name in names {
            ensure!(
                found.contains(name),
                "there is no {}",
                root.join(name).display()
            );
        }
        let wanted = found
            .iter()
            .filter(|name| names.is_empty() || names.contains(name));
        wanted.map(|name| Self::read(name)).collect()
    }

    fn read(name: &str) -> Result<Self> {
        let path = root().join(name).join("entry.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut entry = Self::parse(&text).with_context(|| path.display().to_string())?;
        name.clone_into(&mut entry.name);
        Ok(entry)
    }

    fn parse(text: &str) -> Result<Self> {
        let entry: Self = toml::from_str(text)?;
        if let Some(probe) = &entry.probe {
            ensure!(probe.before != probe.after, "its probe sees no difference");
            ensure!(
                entry.expected == Expected::Patchable,
                "what is refused has no probe"
            );
        }
        if let Expected::Refused(reason) | Expected::Limit(reason) = &entry.expected {
            ensure!(!reason.is_empty(), "an expected refusal names no reason");
        }
        Ok(entry)
    }

    /// Whether a human would say that it goes into a running kernel.
    pub(crate) fn is_patchable(&self) -> bool {
        !matches!(self.expected, Expected::Refused(_))
    }

    /// Its folder.
    pub(crate) fn dir(&self) -> PathBuf {
        root().join(&self.name)
    }

    /// Its diff.
    pub(crate) fn diff(&self) -> PathBuf {
        self.dir().join("fix.patch")
    }

    /// The program of its probe as source, if it has one.
    pub(crate) fn program(&self) -> Option<PathBuf> {
        Some(self.dir().join("probe.c")).filter(|path| path.exists())
    }

    /// What it is and where it is from, in one line.
    pub(crate) fn provenance(&self) -> String {
        let more = [&self.commit, &self.cve].into_iter().flatten();
        let more: String = more.map(|word| format!(", {word}")).collect();
        let files: Vec<_> = self
            .files
            .iter()
            .map(|file| file.to_string_lossy())
            .collect();
        format!(
            "{} ({}, {}{more}; {})",
            self.title,
            files.join(" "),
            self.release,
            self.why
        )
    }
}

fn root() -> PathBuf {
    paths::repo().join(Path::new("tests/corpus"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: &str = "title = 't'\nrelease = 'r'\nfiles = ['a.c']\nwhy = 'w'\n";

    #[test]
    fn an_entry_says_what_is_expected() {
        let patchable = Entry::parse(&format!("{ENTRY}expected = 'patchable'")).unwrap();
        assert_eq!(patchable.expected, Expected::Patchable);
        let refused = Entry::parse(&format!("{ENTRY}expected = {{ refused = 'layout' }}")).unwrap();
        assert_eq!(refused.expected, Expected::Refused("layout".to_owned()));
        assert!(Entry::parse(&format!("{ENTRY}expected = {{ refused = '' }}")).is_err());
        assert!(Entry::parse(ENTRY).is_err());
    }

    #[test]
    fn a_probe_that_sees_no_difference_is_no_probe() {
        let probe = "[probe]\nrun = 'x'\nbefore = '1'\nafter = '1'\n";
        assert!(Entry::parse(&format!("{ENTRY}expected = 'patchable'\n{probe}")).is_err());
    }

    #[test]
    fn every_entry_there_is_can_be_read_and_its_diff_changes_the_files_it_names() {
        for entry in Entry::load(&[]).unwrap() {
            let diff = fs::read_to_string(entry.diff()).unwrap();
            let changed: Vec<PathBuf> = diff
                .lines()
                .filter_map(|line| line.strip_prefix("+++ b/").map(PathBuf::from))
                .collect();
            assert_eq!(changed, entry.files, "{}", entry.name);
        }
    }
}
