//! Any sequence of changes, deaths and losses against a model: a stack of names.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use common::Bench;
use proptest::prelude::*;
use vmpatch_patcher::apply::{Boundary, Observer};
use vmpatch_patcher::link::layers::Stacking;
use vmpatch_patcher::rollback::{self, RollbackError};
use vmpatch_patcher::status::State;

const NAMES: [&str; 3] = ["a", "b", "c"];

#[derive(Clone, Copy, Debug)]
enum Step {
    Apply(usize, Stacking),
    Rollback(usize),
    ApplyAndDie(usize, Stacking, Boundary),
    RollbackAndDie(usize, Boundary),
    LoseJournal,
}

fn step() -> impl Strategy<Value = Step> {
    let of_stop = Boundary::ALL
        .into_iter()
        .filter(|at| *at >= Boundary::Begun)
        .collect::<Vec<_>>();
    let boundary = prop::sample::select(of_stop);
    let name = 0..NAMES.len();
    let stacking = prop::sample::select(vec![Stacking::Upon, Stacking::Upon, Stacking::Replace]);
    prop_oneof![
        4 => (name.clone(), stacking.clone()).prop_map(|(name, how)| Step::Apply(name, how)),
        4 => name.clone().prop_map(Step::Rollback),
        2 => (name.clone(), stacking, boundary.clone())
            .prop_map(|(name, how, at)| Step::ApplyAndDie(name, how, at)),
        2 => (name, boundary).prop_map(|(name, at)| Step::RollbackAndDie(name, at)),
        1 => Just(Step::LoseJournal),
    ]
}

struct KillAt(Option<Boundary>);

impl Observer for KillAt {
    fn boundary(&self, at: Boundary) {
        if self.0 == Some(at) {
            resume_unwind(Box::new(()));
        }
    }
}

/// What is applied, the lowest first. All samples change the same two functions, so they lie upon each other.
struct Model {
    bench: Bench,
    applied: Vec<&'static str>,
    text: Vec<u8>,
}

impl Model {
    fn apply(&mut self, name: &'static str, stacking: Stacking, die_at: Option<Boundary>) {
        if self.applied.contains(&name) {
            let digest = format!("{name}-digest");
            let refused = self.bench.ledger().admit(name, &digest, stacking);
            assert!(refused.is_err(), "{name} is applied already");
            return;
        }
        let killer = KillAt(die_at);
        let change = || self.bench.apply_watched(name, stacking, &killer).unwrap();
        let died = catch_unwind(AssertUnwindSafe(change)).is_err();
        assert_eq!(died, die_at.is_some());
        if die_at.is_none_or(|at| at >= Boundary::Resumed) {
            if stacking == Stacking::Replace {
                self.applied.clear();
            }
            self.applied.push(name);
        }
    }

    fn rollback(&mut self, name: &'static str, die_at: Option<Boundary>) {
        let place = self.applied.iter().position(|applied| *applied == name);
        let is_top = place.is_some_and(|place| place + 1 == self.applied.len());
        if !is_top {
            let refused = rollback::change(&self.bench.ledger(), name).unwrap_err();
            let beneath = matches!(refused, RollbackError::Beneath { .. });
            assert_eq!(beneath, place.is_some(), "{name}: {refused}");
            return;
        }
        let change = || self.bench.rollback_watched(name, &KillAt(die_at)).unwrap();
        let died = catch_unwind(AssertUnwindSafe(change)).is_err();
        assert_eq!(died, die_at.is_some());
        if die_at.is_none_or(|at| at >= Boundary::Resumed) {
            self.applied.pop();
        }
    }

    fn lose_journal(&self) {
        for file in std::fs::read_dir(self.bench.folder.path()).unwrap() {
            std::fs::remove_file(file.unwrap().path()).unwrap();
        }
    }

    fn check(&self) {
        let report = self.bench.report();
        for name in NAMES {
            let patch = report.patches.iter().find(|patch| patch.name == name);
            let applied = patch.is_some_and(|patch| patch.state == State::Applied);
            assert_eq!(applied, self.applied.contains(&name), "{name}");
            assert!(
                patch.is_none_or(|patch| patch.state != State::Damaged),
                "{name}"
            );
        }
        assert_eq!(self.bench.text() == self.text, self.applied.is_empty());
        assert!(self.bench.machine.is_running());
        assert!(!report.needs_attention());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_any_sequence_of_changes_and_deaths_status_tells_what_holds(
        steps in prop::collection::vec(step(), 1..14)
    ) {
        let bench = Bench::new();
        let text = bench.text();
        let mut model = Model { bench, applied: Vec::new(), text };
        for step in steps {
            match step {
                Step::Apply(name, how) => model.apply(NAMES[name], how, None),
                Step::Rollback(name) => model.rollback(NAMES[name], None),
                Step::ApplyAndDie(name, how, at) => model.apply(NAMES[name], how, Some(at)),
                Step::RollbackAndDie(name, at) => model.rollback(NAMES[name], Some(at)),
                Step::LoseJournal => model.lose_journal(),
            }
            model.check();
        }
    }
}
