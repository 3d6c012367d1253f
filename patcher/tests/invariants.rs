//! The invariants of a change, one after the other, against the machine of plain bytes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use common::Bench;
use vmpatch_introspect::target::{Edit, ResumeError, StopError, StopRequest, WriteError};
use vmpatch_introspect::{Gpa, Gva, GvaRange, PhysicalMemory};
use vmpatch_patcher::apply::{
    Attempt, Boundary, Change, Failure, FailureKind, Observer, PlaceError, Schedule, Setback,
    Unobserved, rehearse,
};
use vmpatch_patcher::arena::ModuleClaim;
use vmpatch_patcher::journal::{Ending, Folder, history};
use vmpatch_patcher::link::layers::Stacking;
use vmpatch_patcher::quiescence::{Finding, NotQuiet};
use vmpatch_patcher::status::{State, Verdict};
use vmpatch_patcher::testing::guest::sleeping;
use vmpatch_patcher::testing::sample::{self, COLD, FIRST, SECOND, TEXT};
use vmpatch_patcher::testing::{Fault, ScriptedGuest, WriteSeen};

/// Whether the one open intent on the disk holds old and new value of a write, or, for an undo, the same
/// the other way round.
fn covered_by_an_open_intent(folder: &Folder, seen: &WriteSeen) -> bool {
    let entries = folder.entries().unwrap();
    let Some((_, begun)) = history::open(&entries) else {
        return false;
    };
    let (old, new) = if seen.undo {
        (&seen.new, &seen.old)
    } else {
        (&seen.old, &seen.new)
    };
    let mut edits = begun.map.iter().chain(&begun.edits);
    let edit = edits.any(|it| it.at == seen.at && it.old == *old && it.new == *new);
    let arena = begun.arena.iter().any(|it| {
        it.at == seen.at && (it.old == *old && it.new == *new || it.old == *new && it.new == *old)
    });
    edit || arena
}

#[test]
fn no_guest_byte_is_written_unless_a_durable_intent_holds_its_old_and_new_value() {
    let bench = Bench::new();
    let folder = Folder::at(bench.folder.path());
    let uncovered = Rc::new(RefCell::new(Vec::new()));
    let found = uncovered.clone();
    bench.machine.watch(move |seen| {
        if !covered_by_an_open_intent(&folder, seen) {
            found.borrow_mut().push(seen.clone());
        }
    });
    bench.machine.inject(Fault::ReadBack(1));
    bench.apply("a").unwrap_err();
    bench.apply("a").unwrap();
    bench.rollback("a").unwrap();
    assert_eq!(*uncovered.borrow(), []);
    let writes = bench.machine.writes();
    assert!(
        writes.iter().any(|seen| seen.undo),
        "the failed attempt undid something"
    );
    assert!(writes.len() > 10, "{} writes", writes.len());
}

#[test]
fn without_an_intent_on_the_disk_nothing_is_written() {
    let bench = Bench::new();
    let change = Change::apply(&sample::verified(&bench.machine, "a"), &bench.machine).unwrap();
    let ledger = bench.ledger();
    std::fs::remove_dir_all(bench.folder.path()).unwrap();
    let refused = bench.make(ledger, change, &Unobserved).unwrap_err();
    assert!(matches!(refused, Failure::Journal(_)), "{refused}");
    assert_eq!(bench.machine.writes(), []);
    assert_eq!(bench.machine.stops(), 0);
}

/// Every fault after which the guest is certain to be as before.
const HARMLESS: [Fault; 10] = [
    Fault::StopDeadline,
    Fault::StopUnreachable,
    Fault::ArenaUnreachable,
    Fault::ArenaReadBack,
    Fault::ReadBack(0),
    Fault::ReadBack(1),
    Fault::ReadBack(2),
    Fault::LeaseAtWrite,
    Fault::LeaseAtResume,
    Fault::UnreachableAtWrite,
];

#[test]
fn a_failure_at_any_step_leaves_every_byte_as_it_was_and_the_machine_running() {
    for fault in HARMLESS {
        let bench = Bench::new();
        let before = bench.machine.image();
        bench.machine.inject(fault);
        let failure = bench.apply("a").unwrap_err();
        assert!(bench.machine.is_running(), "{fault:?}");
        if failure.guest_unchanged() {
            assert!(bench.machine.image() == before, "{fault:?}");
        } else {
            assert!(bench.machine.ram_image()[..] == before[..bench.machine.ram_image().len()]);
        }
        assert!(!bench.report().needs_attention(), "{fault:?}");
        bench
            .apply("a")
            .unwrap_or_else(|why| panic!("after {fault:?}: {why}"));
        assert_eq!(bench.state("a"), Some(State::Applied), "{fault:?}");
    }
}

#[test]
fn a_failure_at_any_step_of_a_rollback_leaves_the_patch_applied() {
    for fault in HARMLESS {
        if matches!(
            fault,
            Fault::ArenaUnreachable | Fault::ArenaReadBack | Fault::ReadBack(2)
        ) {
            continue; // a rollback writes nothing to the arena and has two edits
        }
        let bench = Bench::new();
        bench.apply("a").unwrap();
        let before = bench.machine.image();
        bench.machine.inject(fault);
        bench.rollback("a").unwrap_err();
        assert!(bench.machine.is_running(), "{fault:?}");
        assert!(bench.machine.image() == before, "{fault:?}");
        assert_eq!(bench.state("a"), Some(State::Applied), "{fault:?}");
        bench.rollback("a").unwrap();
    }
}

#[test]
fn if_the_undo_fails_the_vm_stays_stopped_and_the_intent_stays_open() {
    let bench = Bench::new();
    bench.machine.inject(Fault::UndoFailed(1));
    let failure = bench.apply("a").unwrap_err();
    assert!(
        matches!(failure, Failure::Write(WriteError::UndoFailed { .. })),
        "{failure}"
    );
    assert!(!bench.machine.is_running());
    let report = bench.report();
    let interrupted = report.interrupted.clone().unwrap();
    assert_eq!(
        (interrupted.verdict, interrupted.recorded),
        (Verdict::Unsettled, false)
    );
    assert!(report.needs_attention());
    assert!(
        bench
            .ledger()
            .admit("a", "a-digest", Stacking::Upon)
            .is_err()
    );
}

#[test]
fn an_answer_lost_at_resume_is_found_out_by_the_next_status() {
    let bench = Bench::new();
    bench.machine.inject(Fault::AnswerLostAtResume);
    let failure = bench.apply("a").unwrap_err();
    assert!(
        matches!(failure, Failure::Resume(ResumeError::Unreachable(_))),
        "{failure}"
    );
    assert_eq!(failure.kind(), FailureKind::Unreachable);
    let interrupted = bench.report().interrupted.unwrap();
    assert_eq!(
        (interrupted.verdict, interrupted.recorded),
        (Verdict::InPlace, true)
    );
    assert_eq!(bench.state("a"), Some(State::Applied));
    bench.rollback("a").unwrap();
}

#[test]
fn a_resume_that_never_came_is_found_out_by_the_next_status() {
    let bench = Bench::new();
    let text = bench.text();
    bench.machine.inject(Fault::UnreachableAtResume);
    bench.apply("a").unwrap_err();
    let interrupted = bench.report().interrupted.unwrap();
    assert_eq!(
        (interrupted.verdict, interrupted.recorded),
        (Verdict::NotWritten, true)
    );
    assert!(bench.text() == text);
    assert_eq!(bench.report().interrupted, None);
}

#[test]
fn a_place_that_changed_since_it_was_verified_is_refused_and_nothing_written() {
    let bench = Bench::new();
    let change = Change::apply(&sample::verified(&bench.machine, "a"), &bench.machine).unwrap();
    bench
        .machine
        .set(Gpa(SECOND.0 + 5 - sample::TEXT.0), &[0xcc]);
    let before = bench.machine.image();
    let failure = bench.make(bench.ledger(), change, &Unobserved).unwrap_err();
    assert!(
        matches!(failure, Failure::Write(WriteError::Differs { .. })),
        "{failure}"
    );
    assert_eq!(failure.kind(), FailureKind::Refused);
    assert!(bench.machine.image() == before);
    assert!(bench.machine.is_running());
}

#[test]
fn an_arena_that_changed_since_it_was_looked_at_is_refused_and_nothing_written() {
    let bench = Bench::new();
    let change = Change::apply(&sample::verified(&bench.machine, "a"), &bench.machine).unwrap();
    bench.machine.set(change.arena().last().unwrap().at, &[1]);
    let before = bench.machine.image();
    let failure = bench.make(bench.ledger(), change, &Unobserved).unwrap_err();
    assert!(
        matches!(failure, Failure::Place(PlaceError::Changed { .. })),
        "{failure}"
    );
    assert!(bench.machine.image() == before);
    assert_eq!(bench.machine.stops(), 0);
}

#[test]
fn a_busy_guest_is_left_byte_for_byte_as_it_was_and_the_task_is_named() {
    let mut bench = Bench::new();
    bench.guest = ScriptedGuest::with(vec![sleeping("parked", 77, &[FIRST.0 + 0x20])]);
    let before = bench.machine.image();
    let failure = bench.apply("a").unwrap_err();
    let Failure::Busy { busy, attempts } = &failure else {
        panic!("{failure}")
    };
    assert_eq!(*attempts, 1);
    assert!(bench.machine.image() == before);
    assert!(bench.machine.is_running());
    assert_eq!(failure.kind(), FailureKind::Busy);
    let said = busy.to_string();
    assert_eq!(said, "parked (pid 77) is in first+0x20 (frame 0)");
    assert!(matches!(
        bench.entries()[0].transcript.ending,
        Some(Ending::Abandoned { .. })
    ));
}

#[test]
fn a_rollback_is_gated_on_the_new_functions_and_not_on_the_old() {
    let mut bench = Bench::new();
    bench.apply("a").unwrap();
    let new = sample::manifest(&bench.machine).patches[0]
        .busy_for_rollback()
        .next()
        .unwrap()
        .range;
    bench.guest = ScriptedGuest::with(vec![sleeping("late", 5, &[new.start.0 + 9])]);
    let before = bench.machine.image();
    let failure = bench.rollback("a").unwrap_err();
    let Failure::Busy { busy, .. } = failure else {
        panic!("{failure}")
    };
    assert!(
        matches!(&busy.findings[0], Finding::InFunction { offset: 9, .. }),
        "{busy}"
    );
    assert!(bench.machine.image() == before);
    bench.guest = ScriptedGuest::with(vec![sleeping("old", 5, &[FIRST.0 + 0x20])]);
    bench.rollback("a").unwrap();
}

#[test]
fn rollback_is_an_apply_with_the_edits_reversed_through_the_same_code() {
    let bench = Bench::new();
    let text = bench.text();
    bench.apply("a").unwrap();
    let applied = bench.machine.writes();
    assert!(bench.text() != text);
    bench.rollback("a").unwrap();
    assert!(bench.text() == text);
    let rolled_back = bench.machine.writes()[applied.len()..].to_vec();
    assert_eq!(
        rolled_back.len(),
        2,
        "the two sites, and nothing in the arena"
    );
    for back in &rolled_back {
        let there =
            |seen: &&WriteSeen| seen.at == back.at && seen.old == back.new && seen.new == back.old;
        assert_eq!(applied.iter().filter(there).count(), 1);
    }
}

#[test]
fn arena_pages_are_never_used_again_within_one_boot() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    bench.rollback("a").unwrap();
    bench.apply("a").unwrap();
    let manifest = sample::manifest(&bench.machine);
    let pages: Vec<_> = manifest
        .patches
        .iter()
        .map(|patch| patch.extents[0].page)
        .collect();
    assert_eq!(pages.len(), 2);
    assert_ne!(pages[0], pages[1]);
}

#[test]
fn many_cycles_leave_the_text_as_it_was_and_the_journal_small() {
    let bench = Bench::new();
    let text = bench.text();
    for _ in 0..60 {
        bench.apply("a").unwrap();
        bench.rollback("a").unwrap();
    }
    assert!(bench.text() == text);
    assert_eq!(bench.state("a"), Some(State::NotApplied));
    assert!(
        bench.entries().len() < 40,
        "closed changes are forgotten in time"
    );
}

#[test]
fn all_work_that_can_be_done_while_the_guest_runs_is_done_while_it_runs() {
    struct InStop<'a>(&'a Bench, RefCell<Vec<usize>>);
    impl Observer for InStop<'_> {
        fn boundary(&self, at: Boundary) {
            let running = self.0.machine.is_running();
            assert_eq!(
                running,
                !(Boundary::Stopped..=Boundary::Checked).contains(&at),
                "{at:?}"
            );
            self.1.borrow_mut().push(self.0.machine.writes().len());
        }
    }
    let bench = Bench::new();
    let watch = InStop(&bench, RefCell::default());
    bench.apply_watched("a", Stacking::Upon, &watch).unwrap();
    // begun, placed, stopped, checked, resumed, committed
    let writes = watch.1.into_inner();
    assert_eq!(writes, [0, 2, 2, 2, 5, 5]);
}

#[derive(Default)]
struct Setbacks(RefCell<Vec<(u32, String)>>);

impl Observer for Setbacks {
    fn retrying(&self, attempt: u32, why: &Setback<'_>, _pause: Duration) {
        let why = match why {
            Setback::Busy(busy) => busy.to_string(),
            Setback::Machine(why) => why.to_string(),
        };
        self.0.borrow_mut().push((attempt, why));
    }
}

fn quick(timeout: Duration) -> Schedule {
    Schedule {
        first: Duration::from_micros(10),
        longest: Duration::from_micros(10),
        timeout,
    }
}

#[test]
fn a_guest_that_was_busy_is_tried_again_in_a_stop_of_its_own() {
    let mut bench = Bench::new();
    let parked = || vec![sleeping("parked", 77, &[FIRST.0 + 0x20])];
    bench.guest = ScriptedGuest::with_each(vec![parked(), parked(), Vec::new()]);
    bench.schedule = quick(Duration::from_secs(60));
    let setbacks = Setbacks::default();
    let attempted = bench.apply_watched("a", Stacking::Upon, &setbacks).unwrap();
    assert_eq!(attempted.attempts, 3);
    assert_eq!(bench.machine.stops(), 3);
    let told = setbacks.0.into_inner();
    assert_eq!(
        told.iter().map(|(attempt, _)| *attempt).collect::<Vec<_>>(),
        [1, 2]
    );
    assert!(told[0].1.contains("parked (pid 77)"), "{}", told[0].1);
}

#[test]
fn a_vcpu_that_was_late_and_a_lease_that_ran_out_are_tried_again() {
    let mut bench = Bench::new();
    bench.schedule = quick(Duration::from_secs(60));
    for fault in [
        Fault::StopDeadline,
        Fault::LeaseAtWrite,
        Fault::LeaseAtResume,
    ] {
        bench.machine.inject(fault);
    }
    assert_eq!(bench.apply("a").unwrap().attempts, 4);
}

#[test]
fn a_machine_that_is_gone_is_not_tried_again() {
    let mut bench = Bench::new();
    bench.schedule = quick(Duration::from_secs(60));
    bench.machine.inject(Fault::StopUnreachable);
    let failure = bench.apply("a").unwrap_err();
    assert!(
        matches!(failure, Failure::Stop(StopError::Unreachable(_))),
        "{failure}"
    );
    assert_eq!(failure.kind(), FailureKind::Unreachable);
}

#[test]
fn a_guest_that_booted_anew_is_refused() {
    let bench = Bench::new();
    bench.guest.reboot();
    let before = bench.machine.image();
    let failure = bench.apply("a").unwrap_err();
    assert!(matches!(failure, Failure::OtherBoot), "{failure}");
    assert_eq!(failure.kind(), FailureKind::Refused);
    assert!(bench.machine.image() == before);
}

#[test]
fn a_guest_whose_tasks_cannot_be_read_is_refused() {
    let bench = Bench::new();
    bench.guest.lose_tasks();
    let failure = bench.apply("a").unwrap_err();
    assert!(matches!(failure, Failure::Unknown(_)), "{failure}");
    assert!(bench.machine.is_running());
}

#[test]
fn a_look_that_would_outlast_the_lease_is_given_up_and_the_guest_runs_on() {
    let bench = Bench::new();
    bench.guest.be_slow();
    let failure = bench.apply("a").unwrap_err();
    let said = failure.to_string();
    assert!(said.contains("only 0 stacks were read in 375ms"), "{said}");
    assert_eq!(failure.kind(), FailureKind::Refused);
    assert!(bench.machine.is_running());
    for edit in sample::verified(&bench.machine, "a").batch() {
        let mut now = vec![0; edit.old.len()];
        bench.machine.read(edit.at, &mut now).unwrap();
        assert!(now == edit.old, "{}", edit.at);
    }
}

#[test]
fn what_is_read_back_is_what_the_change_says() {
    let bench = Bench::new();
    let verified = sample::verified(&bench.machine, "a");
    bench.apply("a").unwrap();
    for edit in verified.batch() {
        let mut now = vec![0; edit.new.len()];
        bench.machine.read(edit.at, &mut now).unwrap();
        assert_eq!(now, edit.new);
    }
}

#[test]
fn a_rehearsal_goes_through_every_gate_and_writes_nothing() {
    let bench = Bench::new();
    let change = Change::apply(&sample::verified(&bench.machine, "a"), &bench.machine).unwrap();
    let busy = ScriptedGuest::with(vec![sleeping("parked", 77, &[FIRST.0 + 0x20])]);
    let rehearse_with = |guest| rehearse(&change, &bench.machine, guest, StopRequest::default());
    assert_eq!(rehearse_with(&bench.guest).unwrap().examined.stacks, 0);
    assert!(matches!(
        rehearse_with(&busy),
        Err(Attempt::NotQuiet(NotQuiet::Busy(_)))
    ));
    bench
        .machine
        .set(Gpa(SECOND.0 + 5 - sample::TEXT.0), &[0xcc]);
    assert!(matches!(
        rehearse_with(&bench.guest),
        Err(Attempt::Write(WriteError::Differs { .. }))
    ));
    assert_eq!(bench.machine.writes(), []);
    assert_eq!(bench.machine.stops(), 3);
    assert!(bench.machine.is_running());
}

#[test]
fn a_change_whose_edits_could_not_be_one_batch_is_refused_before_the_intent() {
    let bench = Bench::new();
    let broken = |spoil: &dyn Fn(&mut Edit)| {
        let mut verified = sample::verified(&bench.machine, "a");
        spoil(&mut verified.switch.edits[0]);
        Change::apply(&verified, &bench.machine)
            .map(drop)
            .unwrap_err()
            .to_string()
    };
    assert!(broken(&|edit| edit.old.truncate(4)).contains("differ in length"));
    assert!(broken(&|edit| (edit.old.clear(), edit.new.clear()).1).contains("empty"));
    assert!(broken(&|edit| edit.at = Gpa(0x1ffe)).contains("crosses a page"));
}

#[test]
fn replacing_others_is_one_batch_that_waits_for_their_new_code_and_is_settled_whole() {
    for crash in [false, true] {
        let mut bench = Bench::new();
        let text = bench.text();
        bench.apply("a").unwrap();
        bench.apply("b").unwrap();
        assert_eq!(replacing(&bench).replaced(), ["b", "a"]);
        // The code of either stands on a stack.
        for patch in sample::manifest(&bench.machine).patches {
            let new = patch.busy_for_rollback().next().unwrap().range.start;
            bench.guest = ScriptedGuest::with(vec![sleeping("late", 5, &[new.0 + 9])]);
            let change = replacing(&bench);
            let failed = bench.make(bench.ledger(), change, &Unobserved).unwrap_err();
            assert!(matches!(failed, Failure::Busy { .. }), "{failed}");
            assert_eq!(bench.state("b"), Some(State::Applied));
        }
        bench.guest = ScriptedGuest::default();
        let change = replacing(&bench);
        if crash {
            let intent = bench.ledger().begin(change, &Unobserved).unwrap();
            let placed = intent.place(&bench.machine).unwrap();
            let stopped = placed.stop(StopRequest::default()).unwrap();
            let quiet = stopped.check_stacks(&bench.guest).unwrap();
            quiet.switch().unwrap();
            drop(intent);
        } else {
            bench.make(bench.ledger(), change, &Unobserved).unwrap();
        }
        let states = ["a", "b", "new"].map(|name| bench.state(name).unwrap());
        assert_eq!(
            states,
            [State::NotApplied, State::NotApplied, State::Applied]
        );
        let entries = bench.entries();
        let standing = history::standing(&entries, sample::BOOT);
        let names: Vec<_> = standing.iter().map(|(_, it)| &it.patch.name).collect();
        assert_eq!(names, ["new"]);
        bench.rollback("new").unwrap();
        assert_eq!(bench.text(), text);
    }
}

#[test]
fn a_patch_that_is_damaged_is_not_replaced() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    bench.scribble();
    let refused = bench.ledger().layers(Stacking::Replace).unwrap_err();
    assert!(refused.to_string().contains("patch `a`"), "{refused}");
}

/// The change that applies `new` in the place of all that is there.
fn replacing(bench: &Bench) -> Change {
    let layers = bench.ledger().layers(Stacking::Replace).unwrap();
    let verified = sample::verified_beside(&bench.machine, "new", &layers);
    Change::apply(&verified, &bench.machine).unwrap()
}

#[test]
fn a_hook_that_a_module_has_left_behind_goes_with_the_next_patch() {
    let bench = Bench::new();
    let mut verified = sample::verified(&bench.machine, "a");
    // Known by the journal alone, so that the record can be changed.
    verified.arena_writes.clear();
    let mut hook = verified.record.sites[0].clone();
    hook.edits[0].at = Gpa(COLD.0 - TEXT.0);
    bench
        .machine
        .read(hook.edits[0].at, &mut hook.edits[0].old)
        .unwrap();
    verified.switch.edits.extend(hook.edits.clone());
    verified.record.hooks.push(hook.clone());
    verified.record.modules.push(ModuleClaim {
        name: "gone".into(),
        at: Gva(0x9000),
        text: GvaRange::sized(FIRST, 0x2000).unwrap(),
        frames: Vec::new(),
    });
    let change = Change::apply(&verified, &bench.machine).unwrap();
    bench.make(bench.ledger(), change, &Unobserved).unwrap();
    assert_eq!(bench.state("a"), Some(State::NotApplied));
    assert!(hook.is_in_place(&bench.machine).unwrap());
    bench.apply("b").unwrap();
    assert!(hook.is_in_place(&bench.machine).unwrap());
    bench.rollback("b").unwrap();
    assert!(!hook.is_in_place(&bench.machine).unwrap());
}
