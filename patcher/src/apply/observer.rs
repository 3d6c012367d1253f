//! Who watches a change go by: phase boundaries as values, for timing and for tests that end the program
//! at each of them. Owns no phase.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::quiescence::Busy;

/// The end of one phase of a change, in the order in which they are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Boundary {
    /// The patch file's bytes are well formed.
    Parsed,
    /// The kernel was found.
    Attached,
    /// New code is placed and relocated.
    Linked,
    /// The old functions are what runs.
    Verified,
    /// The intent is on the disk.
    Begun,
    /// New code is in the arena, where nothing executes it.
    Placed,
    /// Every vCPU is out of guest mode.
    Stopped,
    /// Nothing stands in the way.
    Checked,
    /// The batch is written and read back, and the guest runs with it.
    Resumed,
    /// The journal says so.
    Committed,
}

impl Boundary {
    /// All, in order.
    pub const ALL: [Self; 10] = [
        Self::Parsed,
        Self::Attached,
        Self::Linked,
        Self::Verified,
        Self::Begun,
        Self::Placed,
        Self::Stopped,
        Self::Checked,
        Self::Resumed,
        Self::Committed,
    ];

    /// Its name in reports and test hooks.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Parsed => "parsed",
            Self::Attached => "attached",
            Self::Linked => "linked",
            Self::Verified => "verified",
            Self::Begun => "begun",
            Self::Placed => "placed",
            Self::Stopped => "stopped",
            Self::Checked => "checked",
            Self::Resumed => "resumed",
            Self::Committed => "committed",
        }
    }

    /// The boundary of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|boundary| boundary.name() == name)
    }
}

/// Told of what happens. Called inside the stop too, so it must be quick there.
pub trait Observer {
    /// A phase has ended.
    fn boundary(&self, _at: Boundary) {}

    /// An attempt was given up and the guest runs; the next one comes after `pause`.
    fn retrying(&self, _attempt: u32, _why: &Setback<'_>, _pause: Duration) {}
}

/// Why an attempt was given up.
#[derive(Clone, Copy, Debug)]
pub enum Setback<'a> {
    /// Something stood in the way.
    Busy(&'a Busy),
    /// The machine could not be stopped, or not for long enough.
    Machine(&'a dyn std::error::Error),
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {}

/// How long each phase took, in its last attempt; pauses between attempts belong to none.
#[derive(Debug)]
pub struct Timings {
    since: Cell<Instant>,
    phases: RefCell<BTreeMap<Boundary, Duration>>,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            since: Cell::new(Instant::now()),
            phases: RefCell::default(),
        }
    }
}

impl Timings {
    /// Microseconds that each phase took, by the name of the boundary that ended it.
    #[must_use]
    pub fn phases_us(&self) -> Vec<(&'static str, u64)> {
        let phases = self.phases.borrow();
        phases
            .iter()
            .map(|(boundary, took)| (boundary.name(), micros(*took)))
            .collect()
    }
}

impl Observer for Timings {
    fn boundary(&self, at: Boundary) {
        let now = Instant::now();
        let took = now.duration_since(self.since.replace(now));
        self.phases.borrow_mut().insert(at, took);
    }

    fn retrying(&self, _attempt: u32, _why: &Setback<'_>, pause: Duration) {
        let now = Instant::now();
        self.since.set(now.checked_add(pause).unwrap_or(now));
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_boundary_is_found_by_its_name_and_they_stand_in_order() {
        for boundary in Boundary::ALL {
            assert_eq!(Boundary::named(boundary.name()), Some(boundary));
        }
        assert!(Boundary::ALL.is_sorted());
        assert_eq!(Boundary::named("no such"), None);
    }

    #[test]
    fn a_phase_reached_twice_counts_its_last_attempt_once() {
        let timings = Timings::default();
        timings.boundary(Boundary::Stopped);
        timings.boundary(Boundary::Stopped);
        assert_eq!(timings.phases_us().len(), 1);
    }
}
