//! How long work inside a stop may last. Owns the clock; what is done when it has run out is its users'
//! business.

use std::time::{Duration, Instant};

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
