//! What the person at the terminal sees: one line a step, a spinner on a terminal, plain lines elsewhere.
//! Goes to standard error, so that standard output holds results only.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// A step under way.
#[derive(Debug)]
pub(crate) struct Step {
    what: String,
    since: Instant,
    bar: Option<ProgressBar>,
}

/// Begins a step and shows it.
pub(crate) fn step(what: impl Into<String>) -> Step {
    let what = what.into();
    let bar = std::io::stderr().is_terminal().then(|| spinner(&what));
    if bar.is_none() {
        eprintln!("… {what}");
    }
    Step {
        what,
        since: Instant::now(),
        bar,
    }
}

/// Something worth knowing that is not a step.
pub(crate) fn note(text: &str) {
    eprintln!("  {text}");
}

/// Something that went another way than planned; the command goes on.
pub(crate) fn warn(text: &str) {
    eprintln!("! {text}");
}

impl Step {
    /// Ends the step well.
    pub(crate) fn done(self) {
        let line = format!("✓ {} ({})", self.what, human(self.since.elapsed()));
        match &self.bar {
            Some(bar) => bar.finish_with_message(line),
            None => eprintln!("{line}"),
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar
            && !bar.is_finished()
        {
            bar.abandon_with_message(format!("✗ {}", self.what));
        }
    }
}

fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed:.dim}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn human(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{} ms", time.as_millis())
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}
