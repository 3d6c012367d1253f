//! The documents must not drift from the commands there are: every `cargo xtask` and `vmpatch` command line that they quote is one
//! that the program's own help knows.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::CommandFactory;

use crate::{paths, run};

/// Those that tell people what to type.
const DOCUMENTS: [&str; 5] = [
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
];

/// Fails with every quoted command that does not exist, and where it stands.
pub(crate) fn check() -> Result<()> {
    let known = Known {
        tasks: crate::Cli::command()
            .get_subcommands()
            .map(|command| command.get_name().to_owned())
            .collect(),
        verbs: product_verbs()?,
    };
    let mut unknown = Vec::new();
    for name in DOCUMENTS {
        let path = paths::repo().join(name);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let quoted = known.not_there(&text);
        unknown.extend(quoted.iter().map(|command| format!("{command} ({name})")));
    }
    if !unknown.is_empty() {
        bail!(
            "commands are quoted that do not exist: {}",
            unknown.join(", ")
        );
    }
    Ok(())
}

/// The commands there are.
struct Known {
    tasks: BTreeSet<String>,
    verbs: BTreeSet<String>,
}

impl Known {
    /// Commands that a document quotes and that are not among them.
    fn not_there(&self, text: &str) -> Vec<String> {
        let all = [("cargo xtask ", &self.tasks), ("vmpatch ", &self.verbs)];
        let missing = all.into_iter().flat_map(|(program, known)| {
            let words = quoted(text, program);
            words
                .difference(known)
                .map(|word| format!("{program}{word}"))
                .collect::<Vec<_>>()
        });
        missing.collect()
    }
}

/// First words after `program` in code blocks and in back quotes.
fn quoted(text: &str, program: &str) -> BTreeSet<String> {
    let mut words = BTreeSet::new();
    let mut in_block = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            continue;
        }
        let spans: Vec<&str> = if in_block {
            vec![line]
        } else {
            line.split('`').skip(1).step_by(2).collect()
        };
        for span in spans {
            let command = span
                .trim_start()
                .trim_start_matches("$ ")
                .trim_start_matches("# ");
            words.extend(command.strip_prefix(program).and_then(first_word));
        }
    }
    words
}

fn first_word(rest: &str) -> Option<String> {
    let word: String = rest
        .chars()
        .take_while(|c| c.is_ascii_lowercase() || *c == '-')
        .collect();
    (!word.is_empty() && !word.starts_with('-')).then_some(word)
}

fn product_verbs() -> Result<BTreeSet<String>> {
    let help = run::stdout(
        Command::new("cargo")
            .args(["run", "--quiet", "--package", "vmpatch", "--", "--help"])
            .current_dir(paths::repo()),
    )?;
    let list = help
        .lines()
        .skip_while(|l| !l.starts_with("Commands:"))
        .skip(1)
        .take_while(|l| !l.trim().is_empty());
    Ok(list.filter_map(|l| first_word(l.trim_start())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_is_gone_is_named_and_one_that_is_there_is_not() {
        let set = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        let known = Known {
            tasks: set(&["test"]),
            verbs: set(&["apply"]),
        };
        let text = "`cargo xtask test`, `vmpatch apply --vm x`, `cargo xtask tset`, `vmpatch aply`";
        assert_eq!(known.not_there(text), ["cargo xtask tset", "vmpatch aply"]);
    }

    #[test]
    fn commands_are_found_in_blocks_and_in_back_quotes_only() {
        let text = "cargo xtask prose\n```\n$ cargo xtask demo --fast\n# cargo xtask test\n```\nRun `cargo xtask soak`, not more.";
        let found: Vec<String> = quoted(text, "cargo xtask ").into_iter().collect();
        assert_eq!(found, ["demo", "soak", "test"]);
    }
}
