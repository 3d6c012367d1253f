//! README must not drift from the commands there are: every `cargo xtask` and `vmpatch` command line that it quotes is one that
//! the program's own help knows.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::CommandFactory;

use crate::{paths, run};

/// Fails with every quoted command that does not exist.
pub(crate) fn check() -> Result<()> {
    let path = paths::repo().join("README.md");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut unknown = quoted(&text, "cargo xtask ");
    for command in crate::Cli::command().get_subcommands() {
        unknown.remove(command.get_name());
    }
    let product = quoted(&text, "vmpatch ");
    if !product.is_empty() {
        let verbs = product_verbs()?;
        unknown.extend(product.difference(&verbs).cloned());
    }
    if !unknown.is_empty() {
        bail!(
            "README quotes commands that do not exist: {}",
            unknown.into_iter().collect::<Vec<_>>().join(", ")
        );
    }
    Ok(())
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
    fn commands_are_found_in_blocks_and_in_back_quotes_only() {
        let text = "cargo xtask prose\n```\n$ cargo xtask demo --fast\n# cargo xtask test\n```\nRun `cargo xtask soak`, not more.";
        let found: Vec<String> = quoted(text, "cargo xtask ").into_iter().collect();
        assert_eq!(found, ["demo", "soak", "test"]);
    }
}
