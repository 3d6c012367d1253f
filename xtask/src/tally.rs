//! Counts results in the output of Rust's test runner, run with `--show-output`, and tells which of its lines are worth showing.
//! Does not run anything.

use std::ops::AddAssign;

/// How a test that could not be done begins to say why. It returns then, and counts as skipped, not as passed.
const SKIPPED: &str = "SKIPPED: ";
/// Why a test is ignored that is run by other means: by the second half of `cargo xtask test`, or by another test.
const RUN_ELSEWHERE: [&str; 2] = ["needs guests: cargo xtask test", "the process "];

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests that passed.
    pub passed: u32,
    /// Tests that failed.
    pub failed: u32,
    /// Tests that were not run, or could not do what they are for.
    pub skipped: u32,
    /// Test programs that came to their end.
    pub finished: u32,
}

impl Tally {
    /// Counts all of an output.
    pub(crate) fn of(output: &str) -> Self {
        let mut reader = Reader::default();
        for line in output.lines() {
            reader.take(line);
        }
        reader.tally
    }
}

/// Reads an output line by line.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// What was counted up to the last summary.
    pub tally: Tally,
    /// Within the list of what passing tests printed.
    passing: bool,
    /// The passing test whose output this is, until it says that it skipped.
    test: Option<String>,
    /// Of the program that runs: tests that said so.
    said_skipped: u32,
    /// Of the program that runs: ignored tests that do not count.
    elsewhere: u32,
}

impl Reader {
    /// Counts a line and returns it if it is to be shown: of what a passing test printed, only why it was skipped.
    pub(crate) fn take(&mut self, line: &str) -> Option<String> {
        let line = line.trim_end();
        if let Some(summary) = line.strip_prefix("test result: ") {
            self.passing = false;
            self.take_summary(summary);
        } else if line == "successes:" {
            self.passing = true;
        } else if line == "failures:" {
            self.passing = false;
        } else if let Some((_, reason)) = line.split_once(" ... ignored, ") {
            let elsewhere = RUN_ELSEWHERE.iter().any(|known| reason.starts_with(known));
            self.elsewhere += u32::from(elsewhere);
        }
        if self.passing {
            return self.take_printed(line);
        }
        Some(line.to_owned())
    }

    /// A line that a passing test printed.
    fn take_printed(&mut self, line: &str) -> Option<String> {
        let heading = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"));
        if heading.is_some() {
            self.test = heading.map(str::to_owned);
        }
        let why = line.strip_prefix(SKIPPED)?;
        let test = self.test.take()?;
        self.said_skipped += 1;
        Some(format!("{SKIPPED}{test}: {why}"))
    }

    /// "ok. 3 passed; 0 failed; 1 ignored; …"
    fn take_summary(&mut self, summary: &str) {
        self.tally.finished += 1;
        for part in summary.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let (Some(count), Some(what)) = (
                words.next().and_then(|w| w.parse::<u32>().ok()),
                words.next(),
            ) else {
                continue;
            };
            match what {
                "passed" => self.tally.passed += count.saturating_sub(self.said_skipped),
                "failed" => self.tally.failed += count,
                "ignored" => self.tally.skipped += count.saturating_sub(self.elsewhere),
                _ => {}
            }
        }
        self.tally.skipped += self.said_skipped;
        (self.said_skipped, self.elsewhere) = (0, 0);
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.finished += other.finished;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_several_programs_are_added_up() {
        let output = "test a ... ok\ntest result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 5 filtered out; finished in 0.10s\r\n\
                      test result: FAILED. 0 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s\n";
        let tally = Tally::of(output);
        assert_eq!(
            tally,
            Tally {
                passed: 3,
                failed: 2,
                skipped: 1,
                finished: 2
            }
        );
        assert_eq!(tally.to_string(), "3 passed, 2 failed, 1 skipped");
    }

    const SHOWN: &str = "running 4 tests\ntest a ... ok\ntest b ... ok\ntest c ... FAILED\n\
        test d ... ignored, needs guests: cargo xtask test\n\nsuccesses:\n\n---- a stdout ----\nchatter\n\
        SKIPPED: no such device\nSKIPPED: no such device\n\n---- b stdout ----\nmore\n\nsuccesses:\n    a\n    b\n\n\
        failures:\n\n---- c stdout ----\nSKIPPED: half of it\npanicked\n\n\
        test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";

    #[test]
    fn a_passing_test_that_says_it_skipped_counts_once_and_as_skipped() {
        let tally = Tally::of(SHOWN);
        assert_eq!(tally.to_string(), "1 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn of_passing_tests_only_the_reason_for_a_skip_is_shown() {
        let mut reader = Reader::default();
        let shown: Vec<String> = SHOWN.lines().filter_map(|l| reader.take(l)).collect();
        assert!(shown.contains(&"SKIPPED: a: no such device".to_owned()));
        assert!(shown.contains(&"panicked".to_owned()));
        assert!(
            !shown
                .iter()
                .any(|l| l.contains("chatter") || l.contains("more"))
        );
    }

    #[test]
    fn an_ignored_test_that_nobody_else_runs_counts_as_skipped() {
        let output = "test a ... ignored, takes a day\ntest result: ok. 0 passed; 0 failed; 1 ignored; 0 measured\n";
        assert_eq!(Tally::of(output).skipped, 1);
    }
}
