//! The program dies at each phase boundary: the guest runs on, the next status tells what happened, and the
//! next change works.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use common::Bench;
use vmpatch_patcher::apply::{Boundary, Observer};
use vmpatch_patcher::link::layers::Stacking;
use vmpatch_patcher::status::{State, Verdict};

struct Killed;

/// Ends the program at one boundary. Unwinding lets go of lock and stop, as the death of a process does.
struct KillAt(Boundary);

impl Observer for KillAt {
    fn boundary(&self, at: Boundary) {
        if at == self.0 {
            resume_unwind(Box::new(Killed));
        }
    }
}

fn killed_at(at: Boundary, change: impl FnOnce(&KillAt)) {
    let died = catch_unwind(AssertUnwindSafe(|| change(&KillAt(at))));
    assert!(
        died.is_err_and(|why| why.is::<Killed>()),
        "{at:?} was reached"
    );
}

const OF_APPLY: [Boundary; 6] = [
    Boundary::Begun,
    Boundary::Placed,
    Boundary::Stopped,
    Boundary::Checked,
    Boundary::Resumed,
    Boundary::Committed,
];

/// What the next status finds: what became of the change, and whether it holds.
fn story(at: Boundary) -> (Option<Verdict>, bool) {
    match at {
        Boundary::Resumed => (Some(Verdict::InPlace), true),
        Boundary::Committed => (None, true),
        _ => (Some(Verdict::NotWritten), false),
    }
}

#[test]
fn an_apply_killed_at_any_boundary_leaves_a_running_guest_and_a_true_story() {
    for at in OF_APPLY {
        let bench = Bench::new();
        let text = bench.text();
        killed_at(at, |kill| {
            drop(bench.apply_watched("a", Stacking::Upon, kill));
        });
        assert!(bench.machine.is_running(), "{at:?}");

        let (verdict, holds) = story(at);
        let report = bench.report();
        assert_eq!(
            report.interrupted.map(|open| open.verdict),
            verdict,
            "{at:?}"
        );
        assert_eq!(bench.text() == text, !holds, "{at:?}");
        let applied = report.patches.iter().any(|it| it.state == State::Applied);
        assert_eq!(applied, holds, "{at:?}");
        assert_eq!(bench.report().interrupted, None, "{at:?}: settled once");

        if !holds {
            bench.apply("a").unwrap();
        }
        bench.rollback("a").unwrap();
        assert!(bench.text() == text, "{at:?}");
    }
}

#[test]
fn a_rollback_killed_at_any_boundary_leaves_a_running_guest_and_a_true_story() {
    for at in OF_APPLY {
        let bench = Bench::new();
        let text = bench.text();
        bench.apply("a").unwrap();
        killed_at(at, |kill| drop(bench.rollback_watched("a", kill)));
        assert!(bench.machine.is_running(), "{at:?}");

        let (verdict, holds) = story(at);
        let report = bench.report();
        assert_eq!(
            report.interrupted.map(|open| open.verdict),
            verdict,
            "{at:?}"
        );
        assert_eq!(bench.text() == text, holds, "{at:?}");
        let state = if holds {
            State::NotApplied
        } else {
            State::Applied
        };
        assert_eq!(report.patches[0].state, state, "{at:?}");

        if !holds {
            bench.rollback("a").unwrap();
        }
        assert!(bench.text() == text, "{at:?}");
        bench.apply("a").unwrap();
    }
}

#[test]
fn the_next_change_settles_what_was_interrupted_without_a_status_in_between() {
    for at in OF_APPLY {
        let bench = Bench::new();
        killed_at(at, |kill| {
            drop(bench.apply_watched("a", Stacking::Upon, kill));
        });
        if story(at).1 {
            bench.rollback("a").unwrap();
        } else {
            bench.apply("a").unwrap();
        }
    }
}
