//! Trying again until the guest is quiet: pauses that grow, up to a timeout. Owns the schedule; each attempt
//! is a whole stop and the caller's.

use std::thread;
use std::time::{Duration, Instant};

use super::Attempted;
use super::failure::{Attempt, Failure};
use super::observer::{Observer, Setback};
use crate::quiescence::NotQuiet;

/// When to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Pause after the first attempt.
    pub first: Duration,
    /// No pause is longer.
    pub longest: Duration,
    /// No attempt begins later than this after the first.
    pub timeout: Duration,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(5),
            longest: Duration::from_millis(500),
            timeout: Duration::from_secs(10),
        }
    }
}

impl Schedule {
    /// The default pauses, up to `timeout`.
    #[must_use]
    pub fn until(timeout: Duration) -> Self {
        Self {
            timeout,
            ..Self::default()
        }
    }

    /// The pause after attempt `attempt` (from 1), which ended `spent` after the first began; `None`
    /// where there is to be no other. Pauses double, and the last is cut short so that the timeout is used.
    #[must_use]
    pub fn pause(&self, attempt: u32, spent: Duration) -> Option<Duration> {
        let left = self
            .timeout
            .checked_sub(spent)
            .filter(|left| !left.is_zero())?;
        let doubled = 1_u32
            .checked_shl(attempt.saturating_sub(1))
            .unwrap_or(u32::MAX);
        Some(
            self.first
                .saturating_mul(doubled)
                .min(self.longest)
                .min(left),
        )
    }

    /// Makes attempts until one succeeds, one fails for good, or the time is over.
    ///
    /// # Errors
    /// The last attempt's failure.
    pub fn run<T>(
        &self,
        observer: &dyn Observer,
        mut attempt: impl FnMut() -> Result<T, Attempt>,
    ) -> Result<Attempted<T>, Failure> {
        let began = Instant::now();
        let (mut attempts, mut was_late) = (0_u32, false);
        loop {
            attempts = attempts.saturating_add(1);
            let setback = match attempt() {
                Ok(applied) => return Ok(Attempted { applied, attempts }),
                // A guest that is too large to be looked at in one stop is so in the next: one more only, for a
                // host that was busy, since each of these stops is a long one.
                Err(setback) if setback.passes() && !(was_late && setback.is_late()) => setback,
                Err(failure) => return Err(failure.after(attempts)),
            };
            was_late = setback.is_late();
            let Some(pause) = self.pause(attempts, began.elapsed()) else {
                return Err(setback.after(attempts));
            };
            observer.retrying(attempts, &describe(&setback), pause);
            thread::sleep(pause);
        }
    }
}

fn describe(setback: &Attempt) -> Setback<'_> {
    match setback {
        Attempt::NotQuiet(NotQuiet::Busy(busy)) => Setback::Busy(busy),
        other => Setback::Machine(other),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmpatch_introspect::AttachError;

    use super::super::observer::Unobserved;
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn schedule() -> Schedule {
        Schedule {
            first: MS(10),
            longest: MS(100),
            timeout: MS(1000),
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let pauses: Vec<_> = (1..=6)
            .map(|attempt| schedule().pause(attempt, Duration::ZERO).unwrap())
            .collect();
        assert_eq!(pauses, [10, 20, 40, 80, 100, 100].map(MS));
    }

    #[test]
    fn the_last_pause_is_cut_short_and_then_there_is_none() {
        assert_eq!(schedule().pause(9, MS(993)), Some(MS(7)));
        assert_eq!(schedule().pause(9, MS(1000)), None);
        assert_eq!(schedule().pause(9, MS(2000)), None);
    }

    #[test]
    fn without_time_there_is_one_attempt() {
        assert_eq!(
            Schedule::until(Duration::ZERO).pause(1, Duration::ZERO),
            None
        );
    }

    #[test]
    fn a_guest_too_large_for_one_stop_is_stopped_twice_and_no_more() {
        let late = || {
            let allowed = MS(375);
            let (what, done) = ("stacks", 9);
            Attempt::from(NotQuiet::Unknown(AttachError::Late {
                what,
                done,
                allowed,
            }))
        };
        let mut stops = 0;
        let given_up = schedule().run(&Unobserved, || {
            stops += 1;
            Err::<(), _>(late())
        });
        assert!(matches!(given_up, Err(Failure::Unknown(_))), "{given_up:?}");
        assert_eq!(stops, 2);
    }

    proptest! {
        #[test]
        fn no_pause_passes_the_timeout_and_none_is_zero(attempt in 1_u32.., spent in 0_u64..2000) {
            if let Some(pause) = schedule().pause(attempt, MS(spent)) {
                prop_assert!(pause + MS(spent) <= schedule().timeout);
                prop_assert!(pause > Duration::ZERO);
            }
        }
    }
}
