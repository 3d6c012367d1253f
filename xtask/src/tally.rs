//! Counts results in the output of Rust's test runner. Does not run anything.

use std::ops::AddAssign;

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests that passed.
    pub passed: u32,
    /// Tests that failed.
    pub failed: u32,
    /// Tests that were not run.
    pub skipped: u32,
    /// Test programs that came to their end.
    pub finished: u32,
}

impl Tally {
    /// Counts the lines "test NAME ... RESULT". A line of a test's own output may come between the two halves.
    pub(crate) fn of(output: &str) -> Self {
        let mut tally = Self::default();
        for line in output.lines().map(str::trim_end) {
            if let Some(summary) = line.strip_prefix("test result: ") {
                tally.take_summary(summary);
            }
        }
        tally
    }

    /// "ok. 3 passed; 0 failed; 1 ignored; …"
    fn take_summary(&mut self, summary: &str) {
        self.finished += 1;
        for part in summary.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let (Some(count), Some(what)) = (
                words.next().and_then(|w| w.parse::<u32>().ok()),
                words.next(),
            ) else {
                continue;
            };
            match what {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.skipped += count,
                _ => {}
            }
        }
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
}
