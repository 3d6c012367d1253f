//! Trouble in a kernel's log: oopses, warnings, stalls, lock-ups. Judged against the guest's own boot, because an emulated
//! processor draws warnings that have nothing to do with us.

use std::collections::BTreeSet;

/// What the kernel begins such reports with (Linux v6.12 kernel/panic.c, lib/bug.c, kernel/watchdog.c, kernel/rcu/tree_stall.h,
/// kernel/hung_task.c, arch/x86/kernel/dumpstack.c, kernel/trace/ftrace.c).
const MARKS: [&str; 13] = [
    "BUG:",
    "WARNING:",
    "Oops",
    "general protection fault",
    "Kernel panic",
    "Call Trace",
    "soft lockup",
    "self-detected stall",
    "detected stalls",
    "blocked for more than",
    "invalid opcode",
    "double fault",
    "cut here",
];

/// Lines that tell of trouble.
#[must_use]
pub fn troubles(lines: &[String]) -> Vec<String> {
    lines
        .iter()
        .filter(|line| MARKS.iter().any(|mark| line.contains(mark)))
        .cloned()
        .collect()
}

/// The troubles of a guest's boot, without their time stamps.
#[derive(Clone, Debug, Default)]
pub struct Baseline(BTreeSet<String>);

impl Baseline {
    /// The troubles of these lines.
    #[must_use]
    pub fn of(lines: &[String]) -> Self {
        Self(
            troubles(lines)
                .iter()
                .map(|line| without_stamp(line))
                .collect(),
        )
    }

    /// Troubles that were not in the boot.
    #[must_use]
    pub fn beyond(&self, lines: &[String]) -> Vec<String> {
        troubles(lines)
            .into_iter()
            .filter(|line| !self.0.contains(&without_stamp(line)))
            .collect()
    }
}

fn without_stamp(line: &str) -> String {
    line.split_once("] ")
        .map_or(line, |(_, rest)| rest)
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn what_the_boot_said_already_is_no_trouble_later() {
        let boot = lines("[    0.1] WARNING: CPU 0 at x\n[    0.2] fine");
        let baseline = Baseline::of(&boot);
        assert!(
            baseline
                .beyond(&lines("[    9.9] WARNING: CPU 0 at x"))
                .is_empty()
        );
    }

    #[test]
    fn an_oops_after_boot_is_trouble() {
        let found =
            Baseline::default().beyond(&lines("ok\n[    7.0] BUG: unable to handle page fault"));
        assert_eq!(found.len(), 1);
    }
}
