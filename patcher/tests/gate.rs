//! The stack gate: what is busy, what is free, and what it says.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Duration;

use vmpatch_introspect::stacks::Stack;
use vmpatch_introspect::tasks::Missing;
use vmpatch_introspect::unwind::{Frame, FrameKind, Unreliable};
use vmpatch_introspect::{Activity, AttachError, Deadline, Gpa, Gva, GvaRange, Vcpu};
use vmpatch_patcher::quiescence::{
    self, Busy, BusyRanges, Elsewhere, Evidence, Examined, Finding, NotQuiet,
};
use vmpatch_patcher::testing::guest::{DIRECT_MAP, sleeping, task, unreliable};
use vmpatch_patcher::testing::machine::{vcpu_in_kernel, vcpu_in_user_mode};
use vmpatch_patcher::testing::sample::{self, COLD, FIRST, SECOND};
use vmpatch_patcher::testing::{Machine, ScriptedGuest};

const STACK: Gpa = Gpa(0x4_0000);
const STACK_SIZE: u64 = 0x4000;
const FREE: u64 = sample::TEXT.0 + 0x5000;

/// The busy ranges of the sample's apply.
fn ranges() -> BusyRanges {
    let record = sample::verified(&sample::machine(), "a").record;
    BusyRanges::new(record.busy_for_apply(), &record.sites)
}

fn machine() -> Machine {
    let machine = sample::machine();
    machine.set(STACK, &vec![0; usize::try_from(STACK_SIZE).unwrap()]);
    machine
}

fn examine_on(machine: &Machine, stacks: Vec<Stack>, vcpus: &[Vcpu]) -> Result<Examined, NotQuiet> {
    look(&ScriptedGuest::with(stacks), machine, vcpus, &ranges())
}

/// An examination that nothing hurries.
fn look(
    guest: &ScriptedGuest,
    machine: &Machine,
    vcpus: &[Vcpu],
    ranges: &BusyRanges,
) -> Result<Examined, NotQuiet> {
    quiescence::examine(guest, machine, vcpus, ranges, &Deadline::none())
}

fn examine(stacks: Vec<Stack>) -> Result<Examined, NotQuiet> {
    examine_on(&machine(), stacks, &[vcpu_in_user_mode(0)])
}

fn busy(result: Result<Examined, NotQuiet>) -> Busy {
    match result {
        Err(NotQuiet::Busy(busy)) => busy,
        other => panic!("{other:?}"),
    }
}

fn no_data() -> Unreliable {
    Unreliable::NoUnwindData(Gva(FREE))
}

#[test]
fn stacks_are_not_searched_beyond_the_deadline() {
    let guest = ScriptedGuest::with(vec![sleeping("a", 1, &[FREE])]);
    let vcpus = [vcpu_in_user_mode(0)];
    let over = Deadline::within(Duration::ZERO);
    match quiescence::examine(&guest, &machine(), &vcpus, &ranges(), &over) {
        Err(NotQuiet::Unknown(AttachError::Late { done: 0, .. })) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn stacks_that_hold_nothing_of_the_patch_are_quiet() {
    let stacks = vec![sleeping("a", 1, &[FREE, FREE + 8]), sleeping("b", 2, &[])];
    assert_eq!(
        examine(stacks).unwrap(),
        Examined {
            stacks: 2,
            scanned: 0
        }
    );
}

#[test]
fn a_task_in_an_old_function_is_busy_however_deep() {
    let found = busy(examine(vec![sleeping(
        "deep",
        9,
        &[FREE, FREE, SECOND.0 + 0x11],
    )]));
    let Finding::InFunction {
        function,
        offset,
        evidence,
        ..
    } = &found.findings[0]
    else {
        panic!("{found}");
    };
    assert_eq!((function.as_str(), *offset), ("second", 0x11));
    assert_eq!(
        *evidence,
        Evidence::Frame {
            depth: 2,
            kind: FrameKind::Call
        }
    );
}

#[test]
fn a_task_in_a_cold_part_is_busy() {
    let found = busy(examine(vec![sleeping("cold", 9, &[COLD.0 + 4])]));
    assert!(found.to_string().contains("first.cold+0x4"), "{found}");
}

#[test]
fn a_call_that_never_returns_is_found_by_the_byte_before_its_return_address() {
    let end = FIRST.0 + 64;
    busy(examine(vec![sleeping("noreturn", 9, &[end])]));
    examine(vec![sleeping("next", 9, &[FIRST.0])]).unwrap();
}

#[test]
fn a_function_interrupted_at_its_first_byte_is_busy_and_at_its_end_is_not() {
    let interrupted = |at: u64| {
        let mut stack = sleeping("irq", 9, &[]);
        stack.trace.frames.push(Frame {
            at: Gva(at),
            kind: FrameKind::Interrupted,
            sp: Gva(0),
        });
        stack
    };
    busy(examine(vec![interrupted(FIRST.0)]));
    busy(examine(vec![interrupted(FIRST.0 + 63)]));
    examine(vec![interrupted(FIRST.0 + 64)]).unwrap();
}

#[test]
fn a_return_address_that_a_tracer_keeps_is_busy_even_on_a_reliable_stack() {
    let mut stack = sleeping("traced", 9, &[FREE]);
    stack.hidden_returns.push(Gva(FIRST.0 + 0x10));
    let found = busy(examine(vec![stack]));
    assert!(
        found
            .to_string()
            .contains("first+0x10 (a return address that a tracer keeps)")
    );
}

#[test]
fn an_unreliable_stack_whose_every_word_is_clean_is_quiet() {
    let stack = unreliable(sleeping("x", 9, &[FREE]), no_data(), STACK, STACK_SIZE);
    let examined = examine(vec![stack]).unwrap();
    assert_eq!(
        examined,
        Examined {
            stacks: 1,
            scanned: 1
        }
    );
}

#[test]
fn an_unreliable_stack_with_one_word_in_the_patch_is_busy_wherever_the_word_lies() {
    for offset in [0, 8, 0xff8, 0x1000, STACK_SIZE - 8] {
        for word in [FIRST.0, FIRST.0 + 1, FIRST.0 + 64, COLD.0 + 32] {
            let machine = machine();
            machine.set(Gpa(STACK.0 + offset), &word.to_le_bytes());
            let stack = unreliable(sleeping("x", 9, &[FREE]), no_data(), STACK, STACK_SIZE);
            let found = busy(examine_on(&machine, vec![stack], &[]));
            let Finding::InFunction {
                evidence,
                unreliable,
                ..
            } = &found.findings[0]
            else {
                panic!("{found}");
            };
            let word_at = DIRECT_MAP.wrapping_add(STACK.0 + offset);
            assert_eq!(*evidence, Evidence::Scan { word_at });
            assert_eq!(*unreliable, Some(no_data()));
        }
    }
}

#[test]
fn an_unreliable_stack_is_busy_by_a_register_that_points_into_the_patch() {
    let mut stack = unreliable(sleeping("x", 9, &[]), no_data(), STACK, STACK_SIZE);
    stack.hidden_returns.push(Gva(FIRST.0));
    busy(examine(vec![stack.clone()]));
    stack.trace.unreliable = None;
    examine(vec![stack]).unwrap();
}

#[test]
fn an_unreliable_stack_that_cannot_be_searched_is_busy() {
    let unmapped = unreliable(sleeping("x", 9, &[]), no_data(), Gpa(1 << 30), 64);
    assert!(matches!(
        busy(examine(vec![unmapped])).findings[0],
        Finding::Opaque { .. }
    ));
    let nowhere = unreliable(sleeping("x", 9, &[]), no_data(), STACK, 0);
    assert!(matches!(
        busy(examine(vec![nowhere])).findings[0],
        Finding::Opaque { .. }
    ));
    let endless = unreliable(sleeping("x", 9, &[]), no_data(), STACK, 1 << 40);
    assert!(matches!(
        busy(examine(vec![endless])).findings[0],
        Finding::Opaque { .. }
    ));
}

#[test]
fn a_clean_scan_settles_nothing_where_registers_or_hidden_places_are_not_known() {
    let whys = [
        Unreliable::HiddenReturn(Gva(FREE)),
        Unreliable::NoVcpu(3),
        Unreliable::NoTask(0),
        Unreliable::Unlisted(Missing::Deadline(0)),
        Unreliable::ForeignRegisters(0),
    ];
    for why in whys {
        let stack = unreliable(sleeping("x", 9, &[]), why.clone(), STACK, STACK_SIZE);
        let found = busy(examine(vec![stack]));
        assert!(
            matches!(&found.findings[0], Finding::Opaque { .. }),
            "{why}"
        );
    }
}

#[test]
fn a_vcpu_in_a_function_to_be_replaced_is_busy_whatever_its_stack_says() {
    let mut stack = sleeping("runs", 9, &[]);
    stack.vcpu = Some(0);
    let vcpus = [vcpu_in_kernel(0, Gva(FIRST.0 + 2))];
    let found = busy(examine_on(&machine(), vec![stack], &vcpus));
    assert_eq!(found.to_string(), "vCPU 0 is in first+0x2");
}

#[test]
fn a_vcpu_in_the_kernel_on_no_known_stack_is_busy() {
    let vcpus = [vcpu_in_user_mode(0), vcpu_in_kernel(1, Gva(FREE))];
    let found = busy(examine_on(&machine(), Vec::new(), &vcpus));
    assert_eq!(
        found.findings,
        [Finding::NoStack {
            vcpu: 1,
            at: Gva(FREE)
        }]
    );
}

#[test]
fn a_vcpu_that_waits_for_its_start_up_ipi_has_no_stack_and_is_quiet() {
    let mut waiting = vcpu_in_kernel(1, Gva(0xfff0));
    waiting.activity = Activity::WaitingForSipi;
    examine_on(&machine(), Vec::new(), &[vcpu_in_user_mode(0), waiting]).unwrap();
}

#[test]
fn a_vcpu_that_does_not_run_the_kernel_is_busy_and_says_what_it_runs() {
    let mut smm = vcpu_in_kernel(0, Gva(FREE));
    smm.smm = true;
    let mut nested = vcpu_in_user_mode(1);
    nested.nested_guest = true;
    let found = busy(examine_on(&machine(), Vec::new(), &[smm, nested]));
    let expected = |vcpu, what| Finding::Elsewhere { vcpu, what };
    assert_eq!(found.findings[0], expected(0, Elsewhere::Smm));
    assert_eq!(found.findings[1], expected(1, Elsewhere::NestedGuest));

    let guest = ScriptedGuest::default();
    guest.lose_vcpus();
    let found = look(&guest, &machine(), &[vcpu_in_user_mode(0)], &ranges());
    assert_eq!(
        busy(found).findings,
        [expected(0, Elsewhere::NotThatKernel("lost".to_owned()))]
    );
}

#[test]
fn a_guest_that_rewrites_its_own_text_is_busy() {
    let guest = ScriptedGuest::default();
    guest.patch_text("text_mutex is held");
    let found = busy(look(&guest, &machine(), &[], &ranges()));
    assert_eq!(
        found.to_string(),
        "the guest is rewriting its own text: text_mutex is held"
    );
}

#[test]
fn a_guest_whose_modules_are_no_longer_those_of_the_unwind_tables_is_busy() {
    let guest = ScriptedGuest::default();
    guest.change_modules();
    let found = busy(look(&guest, &machine(), &[], &ranges()));
    assert_eq!(found.findings, [Finding::ModulesChanged]);
}

#[test]
fn a_place_to_be_rewritten_outside_any_function_may_be_entered_only_at_its_first_byte() {
    let record = sample::verified(&sample::machine(), "a").record;
    let ranges = BusyRanges::new([].iter(), &record.sites);
    let site = FIRST.0 + 5;
    let at = |returns: u64| {
        let guest = ScriptedGuest::with(vec![sleeping("x", 1, &[returns])]);
        look(&guest, &machine(), &[], &ranges)
    };
    at(site).unwrap();
    busy(at(site + 1));
    busy(at(site + 4));
    at(site + 5).unwrap();
}

#[test]
fn a_flood_of_findings_is_counted_and_not_kept() {
    let stacks = (0..100)
        .map(|pid| sleeping("x", pid, &[FIRST.0 + 9]))
        .collect();
    let found = busy(examine(stacks));
    assert_eq!((found.findings.len(), found.more), (32, 68));
}

#[test]
fn a_name_with_control_characters_does_not_reach_the_terminal() {
    let found = busy(examine(vec![sleeping("\x1b[2J", 1, &[FIRST.0 + 9])]));
    assert!(!found.to_string().contains('\x1b'), "{found:?}");
}

#[test]
fn a_running_task_is_named_with_its_vcpu() {
    let mut stack = sleeping("runs", 9, &[FIRST.0 + 9]);
    stack.vcpu = Some(1);
    stack.task = Some(task("runs", 9));
    let said = busy(examine(vec![stack])).to_string();
    assert_eq!(said, "runs (pid 9) on vCPU 1 is in first+0x9 (frame 0)");
}

#[test]
fn a_stack_range_that_wraps_the_address_space_is_busy_and_ends() {
    let mut stack = sleeping("x", 9, &[]);
    stack.trace.unreliable = Some(no_data());
    stack.memory = vec![GvaRange {
        start: Gva(u64::MAX - 100),
        end: Gva(u64::MAX),
    }];
    assert!(matches!(
        busy(examine(vec![stack])).findings[0],
        Finding::Opaque { .. }
    ));
}
