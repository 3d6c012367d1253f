//! What people and programs read: tables and sentences on a terminal, one JSON document under `--json`.
//! Owns the output streams; verbs hand it data.

pub(crate) mod table;

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::exit::{Failure, FailureAnswer};

/// Where answers go and in which form.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    /// JSON or text.
    pub(crate) const fn new(json: bool) -> Self {
        Self { json }
    }

    /// Prints a verb's answer: `text` makes the form for people.
    pub(crate) fn answer<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) {
        let shown = if self.json {
            to_json(value)
        } else {
            printable(&text(value))
        };
        print_line(&shown);
    }

    /// Prints why a verb failed: on standard error for people, on standard output for programs.
    pub(crate) fn failure(&self, failure: &Failure) {
        if self.json {
            print_line(&to_json(&FailureAnswer::from(failure)));
        } else {
            let reason = printable(&failure.reason());
            eprintln!("vmpatch: {}: {reason}", failure.result());
        }
    }

    /// Tells on standard error what has been done on the way to an answer, also where the answer is a failure then.
    pub(crate) fn note(&self, what: &str) {
        eprintln!("vmpatch: {}", printable(what));
    }

    /// A line of progress that goes away, on a terminal only.
    pub(crate) fn progress(&self, what: &str) -> ProgressBar {
        if self.json || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new_spinner().with_message(what.to_owned());
        bar.set_style(ProgressStyle::default_spinner());
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }
}

/// Sends the crates' own log lines to standard error: warnings, or all with `-v`. `RUST_LOG` overrides.
pub(crate) fn start_log(verbose: bool) {
    let usual = if verbose { "debug" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(usual));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second initialisation is the only way this fails, and `main` calls it once.
    drop(log.try_init());
}

/// What a guest says of itself ends up in tables and sentences: none of it may steer the terminal.
fn printable(text: &str) -> String {
    let plain = |c: char| {
        if c.is_control() && c != '\n' && c != '\t' {
            '\u{fffd}'
        } else {
            c
        }
    };
    text.chars().map(plain).collect()
}

fn to_json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value)
        .unwrap_or_else(|error| format!("{{\"result\":\"failed\",\"reason\":\"{error}\"}}"))
}

/// A reader that went away (`vmpatch … | head`) is no error of ours.
fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", line.trim_end());
    let _ = out.flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n\tc"), "a\u{fffd}[2Jb\n\tc");
    }
}
