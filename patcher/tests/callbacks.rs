//! Callbacks of a patch, against the machine of plain bytes: when they are called, and what is left when one fails.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use common::Bench;
use vmpatch_introspect::target::StopRequest;
use vmpatch_introspect::{Call, CallError, Called, Gva};
use vmpatch_patcher::apply::{
    Attempted, CallbackError, Change, Failure, FailureKind, Unobserved, rehearse,
};
use vmpatch_patcher::arena::window;
use vmpatch_patcher::link::layers::{Layers, Stacking};
use vmpatch_patcher::patch::CallbackKind;
use vmpatch_patcher::status::{Known, State};
use vmpatch_patcher::testing::Fault;
use vmpatch_patcher::testing::sample;

const ALL: [CallbackKind; 4] = CallbackKind::ALL;

/// A bench whose calls are answered one after the other, the last for ever, and what was called.
fn bench(answers: Vec<Called>) -> (Bench, Rc<RefCell<Vec<Call>>>) {
    let bench = Bench::new();
    let calls = Rc::new(RefCell::new(Vec::new()));
    let seen = calls.clone();
    bench.machine.let_call(move |call| {
        let mut seen = seen.borrow_mut();
        seen.push(*call);
        let answer = answers.get(seen.len() - 1).or(answers.last());
        Ok(answer.unwrap().clone())
    });
    (bench, calls)
}

fn apply(bench: &Bench, callbacks: &[CallbackKind]) -> Result<Attempted, Failure> {
    let change = change(bench, callbacks).calling(sample::caller());
    bench.make(bench.ledger(), change, &Unobserved)
}

fn change(bench: &Bench, callbacks: &[CallbackKind]) -> Change {
    let none = Layers::of(&Known::default(), Stacking::Upon).unwrap();
    let verified = sample::verified_calling(&bench.machine, "a", &none, callbacks);
    Change::apply(&verified, &bench.machine).unwrap()
}

fn roll_back(bench: &Bench, skip: bool) -> Result<Attempted, Failure> {
    let ledger = bench.ledger();
    let change = vmpatch_patcher::rollback::change(&ledger, "a").unwrap();
    let change = match skip {
        true => change.without_callbacks(),
        false => change.calling(sample::caller()),
    };
    bench.make(ledger, change, &Unobserved)
}

fn returned(value: i32) -> Called {
    Called::Returned(u64::from(value.cast_unsigned()))
}

#[test]
fn two_are_called_when_a_patch_is_applied_and_two_when_it_is_rolled_back() {
    let (bench, calls) = bench(vec![returned(0)]);
    apply(&bench, &ALL).unwrap();
    assert_eq!(calls.borrow().len(), 2);
    assert_eq!(bench.state("a"), Some(State::Applied));
    let call = calls.borrow()[0];
    let caller = sample::caller();
    assert_eq!(
        (call.page_tables, call.forbidden, call.budget, call.vcpu),
        (caller.page_tables.0, caller.scheduler, caller.budget, 0)
    );
    assert!(window::window().contains(call.function) && window::window().contains(call.stack));
    roll_back(&bench, false).unwrap();
    assert_eq!(calls.borrow().len(), 4);
    assert_eq!(bench.state("a"), Some(State::NotApplied));
}

#[test]
fn what_a_callback_returns_counts_only_before_the_switch() {
    let (bench, calls) = bench(vec![returned(0), returned(-16), returned(0), returned(7)]);
    apply(&bench, &ALL).unwrap();
    roll_back(&bench, false).unwrap();
    assert_eq!(calls.borrow().len(), 4);
}

#[test]
fn a_pre_apply_that_refuses_leaves_the_text_as_it_was_and_the_arena_mapped() {
    let (bench, calls) = bench(vec![returned(-16)]);
    let before = bench.text();
    let failure = apply(&bench, &ALL).unwrap_err();
    assert_eq!(failure.kind(), FailureKind::Refused);
    let said = failure.to_string();
    assert!(
        said.contains("pre_apply (`my_pre_apply`) refused"),
        "{said}"
    );
    assert!(said.contains("-EBUSY (-16)"), "{said}");
    assert!(bench.text() == before && bench.machine.is_running());
    assert_eq!(calls.borrow().len(), 1);
    // What it may have left in the guest still finds its code.
    assert_eq!(bench.state("a"), Some(State::NotApplied));
    let manifest = sample::manifest(&bench.machine);
    assert_eq!(manifest.patches.len(), 1);
    assert!(!bench.report().needs_attention());
    let verified = sample::verified(&bench.machine, "b");
    assert!(verified.map.is_empty(), "the arena is mapped");
}

#[test]
fn a_post_apply_that_fails_takes_the_new_text_back() {
    for failed in [
        Called::Late { at: Gva(1) },
        Called::Stuck {
            at: Gva(1),
            what: "triple fault".into(),
        },
        Called::Trapped {
            vector: 6,
            frame: Gva(0),
            cr2: 0,
        },
    ] {
        let (bench, _) = bench(vec![returned(0), failed.clone()]);
        let before = bench.text();
        let failure = apply(&bench, &ALL).unwrap_err();
        assert!(failure.to_string().contains("post_apply"), "{failure}");
        assert!(bench.text() == before, "{failed:?}");
        assert_eq!(bench.state("a"), Some(State::NotApplied), "{failed:?}");
        assert!(failure.guest_unchanged() && failure.callback_has_run());
    }
}

#[test]
fn a_rollback_that_is_refused_tells_the_way_out_which_works() {
    let (bench, calls) = bench(vec![returned(0), returned(0), returned(-11)]);
    apply(&bench, &ALL).unwrap();
    let said = roll_back(&bench, false).unwrap_err().to_string();
    assert!(said.contains("-EAGAIN (-11)"), "{said}");
    assert!(said.contains("--skip-callbacks"), "{said}");
    assert_eq!(bench.state("a"), Some(State::Applied));
    roll_back(&bench, true).unwrap();
    assert_eq!(bench.state("a"), Some(State::NotApplied));
    assert_eq!(calls.borrow().len(), 3);
}

#[test]
fn a_place_in_the_patchs_own_code_is_told_by_name() {
    let at = window::page_address(sample::manifest(&Bench::new().machine).next_page);
    let (bench, _) = bench(vec![Called::Late {
        at: at.wrapping_add(0x12),
    }]);
    let said = apply(&bench, &ALL).unwrap_err().to_string();
    assert!(said.contains("first+0x12"), "{said}");
    assert!(said.contains("10ms"), "{said}");
}

#[test]
fn a_vcpu_that_is_unfit_leaves_it_to_another_and_if_all_are_nothing_is_changed() {
    let bench = Bench::new();
    bench.machine.let_call(|call| match call.vcpu {
        0 => Err(CallError::Unfit {
            vcpu: 0,
            why: "busy".into(),
        }),
        _ => Ok(Called::Returned(0)),
    });
    apply(&bench, &ALL).unwrap();

    let bench = Bench::new();
    let before = bench.machine.image();
    let calls = Rc::new(RefCell::new(0));
    let seen = calls.clone();
    bench.machine.let_call(move |call| {
        *seen.borrow_mut() += 1;
        Err(CallError::Unfit {
            vcpu: call.vcpu,
            why: "it handles an NMI".into(),
        })
    });
    let failure = apply(&bench, &ALL).unwrap_err();
    assert_eq!(failure.kind(), FailureKind::Busy);
    assert!(
        failure.to_string().contains("it handles an NMI"),
        "{failure}"
    );
    assert_eq!(*calls.borrow(), 2);
    assert!(bench.machine.image() == before);
}

#[test]
fn after_a_callback_there_is_no_second_attempt() {
    for fault in [Fault::LeaseAtResume, Fault::ReadBack(0)] {
        let (mut bench, calls) = bench(vec![returned(0)]);
        bench.schedule.timeout = Duration::from_secs(1);
        // The arena is mapped, so that the first write is one of the text.
        apply(&bench, &[]).unwrap();
        roll_back(&bench, true).unwrap();
        bench.machine.inject(fault);
        let failure = apply(&bench, &[CallbackKind::PreApply]).unwrap_err();
        assert!(failure.to_string().contains("had been called"), "{failure}");
        assert_eq!(calls.borrow().len(), 1, "{fault:?}");
        assert!(failure.callback_has_run());
        assert_eq!(bench.state("a"), Some(State::NotApplied), "{fault:?}");
    }
}

#[test]
fn a_stage_that_the_guest_has_changed_is_not_used() {
    let (bench, calls) = bench(vec![returned(0)]);
    apply(&bench, &ALL).unwrap();
    // A gate.
    bench
        .machine
        .set(window::page_frame(sample::slot(), 4), &[0x90]);
    let failure = roll_back(&bench, false).unwrap_err();
    assert!(
        failure.to_string().contains("not as they were written"),
        "{failure}"
    );
    assert_eq!(calls.borrow().len(), 2);
    assert_eq!(bench.state("a"), Some(State::Applied));
}

#[test]
fn a_check_calls_nothing_and_says_if_no_vcpu_would_do() {
    let (bench, calls) = bench(vec![returned(0)]);
    let plain = change(&bench, &ALL);
    let ready = plain.clone().calling(sample::caller());
    let request = StopRequest::default();
    rehearse(&ready, &bench.machine, &bench.guest, request).unwrap();
    let unprepared = rehearse(&plain, &bench.machine, &bench.guest, request).unwrap_err();
    assert!(
        unprepared.to_string().contains("nothing is known"),
        "{unprepared}"
    );
    let mut caller = sample::caller();
    caller.per_cpu.clear();
    let nobody = plain.clone().calling(caller);
    let nobody = rehearse(&nobody, &bench.machine, &bench.guest, request).unwrap_err();
    assert!(nobody.to_string().contains("no vCPU"), "{nobody}");
    assert_eq!(calls.borrow().len(), 0);
    assert_eq!(bench.machine.writes(), []);
    let unprepared = bench.make(bench.ledger(), plain, &Unobserved).unwrap_err();
    let unprepared = matches!(
        unprepared,
        Failure::Callback(CallbackError::Unprepared { .. })
    );
    assert!(unprepared);
}

#[test]
fn a_machine_that_loses_registers_leaves_the_intent_open() {
    let bench = Bench::new();
    bench.machine.let_call(|call| {
        Err(CallError::NotRestored {
            vcpu: call.vcpu,
            why: "no".into(),
        })
    });
    let failure = apply(&bench, &ALL).unwrap_err();
    assert!(!failure.guest_unchanged());
    assert_eq!(failure.kind(), FailureKind::Other);
}
