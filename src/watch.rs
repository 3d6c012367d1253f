//! Who watches a change on behalf of the command line: phase times for the report, the busy task for
//! people, and the test hook that ends this process at a chosen phase boundary.

use std::time::Duration;

use indicatif::ProgressBar;
use rustix::process::{Signal, getpid, kill_process};
use vmpatch_patcher::apply::{Boundary, Observer, Setback, Timings};

use crate::exit::Failure;

/// Names the boundary at which this process kills itself: `parsed`, `attached`, … as
/// [`Boundary::name`] gives them. For tests of what a dead tool leaves behind.
const KILL_AT: &str = "VMPATCH_KILL_AT";

/// The command line's observer.
pub(crate) struct Watch {
    timings: Timings,
    kill_at: Option<Boundary>,
    progress: ProgressBar,
}

impl Watch {
    /// Watches with this line of progress.
    pub(crate) fn new(progress: ProgressBar) -> Result<Self, Failure> {
        let kill_at = std::env::var(KILL_AT)
            .ok()
            .map(|name| boundary(&name))
            .transpose()?;
        Ok(Self {
            timings: Timings::default(),
            kill_at,
            progress,
        })
    }

    /// Takes the line of progress away.
    pub(crate) fn finish(&self) {
        self.progress.finish_and_clear();
    }

    /// Microseconds of each phase.
    pub(crate) fn phases_us(&self) -> serde_json::Map<String, serde_json::Value> {
        let phases = self.timings.phases_us().into_iter();
        phases
            .map(|(phase, took)| (phase.to_owned(), took.into()))
            .collect()
    }
}

impl Observer for Watch {
    fn boundary(&self, at: Boundary) {
        self.timings.boundary(at);
        if self.kill_at == Some(at) {
            // Nothing after this line runs, unless the kernel refuses a signal to oneself.
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }

    fn retrying(&self, attempt: u32, why: &Setback<'_>, pause: Duration) {
        self.timings.retrying(attempt, why, pause);
        let what = match why {
            Setback::Busy(busy) => busy.to_string(),
            Setback::Machine(error) => error.to_string(),
        };
        self.progress
            .set_message(format!("attempt {attempt}: {what}"));
        tracing::info!(attempt, %what, "trying again");
    }
}

fn boundary(name: &str) -> Result<Boundary, Failure> {
    Boundary::named(name).ok_or_else(|| {
        let known: Vec<_> = Boundary::ALL.into_iter().map(Boundary::name).collect();
        Failure::Usage(format!(
            "{KILL_AT}={name}: expected one of {}",
            known.join(", ")
        ))
    })
}
