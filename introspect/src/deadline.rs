//! How long work may last that somebody waits for: a stopped guest, or a stop that is made ready while the guest
//! still runs. Owns the clock; what is done when it has run out is its users' business.

use std::time::{Duration, Instant};

use crate::kernel::AttachError;

/// The clock is looked at once for so many small steps of work.
const BETWEEN_LOOKS: usize = 64;

/// A moment by which work must be done.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    allowed: Duration,
    /// `None`: so far away that no clock reaches it.
    by: Option<Instant>,
}

impl Deadline {
    /// So long from now.
    #[must_use]
    pub fn within(allowed: Duration) -> Self {
        let by = Instant::now().checked_add(allowed);
        Self { allowed, by }
    }

    /// None: for work that nobody stands still for.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            allowed: Duration::MAX,
            by: None,
        }
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.by.is_some_and(|by| Instant::now() >= by)
    }

    /// Lets work go on of which so many steps are done, each of which may take long.
    ///
    /// # Errors
    /// [`AttachError::Late`]: it is over.
    pub fn check(&self, what: &'static str, done: usize) -> Result<(), AttachError> {
        if self.is_over() {
            let allowed = self.allowed;
            return Err(AttachError::Late {
                what,
                done,
                allowed,
            });
        }
        Ok(())
    }

    /// Lets work go on of which so many small steps are done. Called at each of them, it looks at the clock at the
    /// first and then now and again.
    ///
    /// # Errors
    /// [`AttachError::Late`]: it is over.
    pub fn allow(&self, what: &'static str, done: usize) -> Result<(), AttachError> {
        match done.is_multiple_of(BETWEEN_LOOKS) {
            true => self.check(what, done),
            false => Ok(()),
        }
    }

    /// How long it was from the moment it was set.
    #[must_use]
    pub const fn allowed(&self) -> Duration {
        self.allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_at_all_is_over_at_once_and_no_deadline_never() {
        assert!(Deadline::within(Duration::ZERO).is_over());
        assert!(!Deadline::within(Duration::from_secs(3600)).is_over());
        assert!(!Deadline::within(Duration::MAX).is_over());
        assert!(!Deadline::none().is_over());
    }
}
