//! A stock kernel's source and configuration, for tests that compile files of it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// Where both lie.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The unpacked source, which stays as it is.
    pub source: PathBuf,
    /// The configuration that the kernel was built with.
    pub config: PathBuf,
}

impl Kernel {
    /// The one that `cargo xtask test` made ready, in the folder that `VMPATCH_SOURCE` names; without it says that the test is skipped.
    #[must_use]
    pub fn given() -> Option<Self> {
        let Some(folder) = std::env::var_os("VMPATCH_SOURCE").map(PathBuf::from) else {
            println!("SKIPPED: VMPATCH_SOURCE is not set (cargo xtask test)");
            return None;
        };
        Some(Self {
            source: folder.join("linux"),
            config: folder.join("config"),
        })
    }

    /// A diff of a file, with `new` for the first line that is `old`, both without their ends.
    ///
    /// # Errors
    /// The file cannot be read or has no such line.
    pub fn changed(&self, file: &str, old: &str, new: &str) -> Result<String> {
        let path = self.source.join(file);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let before = text.lines().take_while(|line| *line != old).count();
        let found = text.lines().nth(before);
        found.with_context(|| format!("{file} has no line {old:?}"))?;
        let (number, length) = (before + 1, new.lines().count());
        let added: String = new.lines().map(|line| format!("+{line}\n")).collect();
        Ok(format!(
            "--- a/{file}\n+++ b/{file}\n@@ -{number} +{number},{length} @@\n-{old}\n{added}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diff_has_the_number_of_the_line_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.c"), "one\n\ttwo\nthree\n\ttwo\n").unwrap();
        let kernel = Kernel {
            source: dir.path().to_owned(),
            config: PathBuf::new(),
        };
        assert_eq!(
            kernel.changed("a.c", "\ttwo", "\t2\n\tII").unwrap(),
            "--- a/a.c\n+++ b/a.c\n@@ -2 +2,2 @@\n-\ttwo\n+\t2\n+\tII\n"
        );
        assert!(kernel.changed("a.c", "two", "").is_err());
    }
}
