//! Traces over stacks made by hand, and over stacks and tables made by chance.

use proptest::prelude::*;

use super::hidden::Hooked;
use super::orc::raw::ENTRY_SIZE;
use super::orc::{Base, Entry, Format, Kind, TableError};
use super::*;
use crate::address::GvaRange;
use crate::vcpu::{Vcpu, test_vcpu};

const TEXT: u64 = 0xffff_ffff_8100_0000;
const TASK: u64 = 0xffff_c900_0000_4000;
const IRQ: u64 = 0xffff_c900_0001_0000;
const SIZE: u64 = 0x4000;

/// Stacks made by hand: words by address, zero elsewhere.
struct Words(Vec<(u64, u64)>);

impl StackSource for Words {
    fn copy(&self, at: Gva, into: &mut [u8]) -> Option<()> {
        for &(address, word) in &self.0 {
            if let Some(offset) = address
                .checked_sub(at.0)
                .filter(|&o| (o as usize) < into.len())
            {
                into[offset as usize..][..8].copy_from_slice(&word.to_le_bytes());
            }
        }
        Some(())
    }
}

fn stack(start: u64) -> GvaRange {
    GvaRange {
        start: Gva(start),
        end: Gva(start + SIZE),
    }
}

/// 6.4-format entry.
fn entry(sp: (u16, i16), bp: (u16, i16), flags: u16) -> [u8; ENTRY_SIZE] {
    let flags = sp.0 | bp.0 << 4 | flags << 8;
    let [a, b] = sp.1.to_le_bytes();
    let [c, d] = bp.1.to_le_bytes();
    let [e, f] = flags.to_le_bytes();
    [a, b, c, d, e, f]
}

const SP: u16 = 5;
const BP: u16 = 4;
const CALL: u16 = 2;
const END: u16 = 1;
const REGS: u16 = 3 | 8;
const PARTIAL: u16 = 4 | 8;

/// Functions of 0x100 bytes each, from [`TEXT`] on, one entry a function.
fn kernel(entries: &[[u8; ENTRY_SIZE]]) -> Unwinder {
    let ips: Vec<u64> = (0..entries.len() as u64)
        .map(|i| TEXT + i * 0x100)
        .collect();
    let text = GvaRange {
        start: Gva(TEXT),
        end: Gva(TEXT + entries.len() as u64 * 0x100),
    };
    Unwinder::for_text(text, Format::V6_4, &ips, &entries.concat()).unwrap()
}

fn first_function() -> GvaRange {
    GvaRange {
        start: Gva(TEXT),
        end: Gva(TEXT + 0x100),
    }
}

fn within(function: u64) -> u64 {
    TEXT + function * 0x100 + 0x20
}

fn sleeping(unwinder: &Unwinder, words: &[(u64, u64)], saved_sp: u64) -> Trace {
    let place = (stack(TASK), Gva(saved_sp));
    let source = Words(words.to_vec());
    unwinder.sleeping(
        &source,
        &mut StackPool::default(),
        place,
        &Hidden::default(),
    )
}

fn running(unwinder: &Unwinder, words: &[(u64, u64)], vcpu: &Vcpu) -> Trace {
    let spans = [
        StackSpan {
            kind: StackKind::Task,
            range: stack(TASK),
        },
        StackSpan {
            kind: StackKind::Irq,
            range: stack(IRQ),
        },
    ];
    let source = Words(words.to_vec());
    unwinder.running(
        &source,
        &mut StackPool::default(),
        (&spans, vcpu),
        &Hidden::default(),
    )
}

fn ips(trace: &Trace) -> Vec<u64> {
    trace.frames.iter().map(|frame| frame.at.0).collect()
}

/// 0: schedule, 16 bytes of locals. 1: worker, with a frame pointer. 2: ret_from_fork, the end.
fn kthread() -> (Unwinder, Vec<(u64, u64)>, u64) {
    let unwinder = kernel(&[
        entry((SP, 24), (0, 0), CALL),
        entry((BP, 16), (1, -16), CALL),
        entry((0, 0), (0, 0), END),
    ]);
    let saved = TASK + SIZE - 168 - 96;
    let words = vec![
        (saved + 40, saved + 80),
        (saved + 48, within(0)),
        (saved + 72, within(1)),
        (saved + 80, 7),
        (saved + 88, within(2)),
    ];
    (unwinder, words, saved)
}

const ARENA: u64 = 0xffff_ffff_ff00_3000;

/// Calls with so many bytes between the stack pointer and that of the caller.
fn pushed(bytes: i16) -> Entry {
    Entry {
        sp_offset: bytes,
        ..Entry::FUNCTION_START
    }
}

/// The kernel of [`kthread`], whose worker is not in it but in code of a patch, with 24 bytes pushed.
fn in_a_patch() -> (Unwinder, Vec<(u64, u64)>, u64) {
    let (unwinder, mut words, saved) = kthread();
    words[2].1 = ARENA + 0x20;
    (unwinder, words, saved)
}

#[test]
fn a_frame_in_code_of_a_patch_is_followed_by_the_table_that_came_with_it() {
    let (mut unwinder, words, saved) = in_a_patch();
    let before = sleeping(&unwinder, &words, saved);
    let unknown = Unreliable::NoUnwindData(Gva(ARENA + 0x20));
    assert_eq!(before.unreliable, Some(unknown));
    let rows = [
        (Gva(ARENA), Entry::FUNCTION_START),
        (Gva(ARENA + 4), pushed(16)),
        (Gva(ARENA + 0x40), Entry::UNDEFINED),
    ];
    unwinder.cover(&rows).unwrap();
    let trace = sleeping(&unwinder, &words, saved);
    assert_eq!(ips(&trace), [within(0), ARENA + 0x20, within(2)]);
    assert_eq!(trace.unreliable, None);
}

#[test]
fn where_the_table_of_a_patch_knows_nothing_its_code_is_as_without() {
    let (mut unwinder, words, saved) = in_a_patch();
    let rows = [
        (Gva(ARENA), pushed(16)),
        (Gva(ARENA + 0x10), Entry::UNDEFINED),
        (Gva(ARENA + 0x30), pushed(16)),
    ];
    unwinder.cover(&rows).unwrap();
    let trace = sleeping(&unwinder, &words, saved);
    let unknown = Unreliable::NoUnwindData(Gva(ARENA + 0x20));
    assert_eq!(trace.unreliable, Some(unknown));
    assert_eq!(
        unwinder.cover(&[rows[2], rows[0]]),
        Err(TableError::Unsorted(1))
    );
}

#[test]
fn no_table_of_a_patch_says_anything_of_the_kernels_own_text() {
    let (mut unwinder, words, saved) = kthread();
    let before = sleeping(&unwinder, &words, saved);
    let rows = [
        (Gva(TEXT + 0x100), pushed(64)),
        (Gva(TEXT + 0x1000), Entry::UNDEFINED),
    ];
    unwinder.cover(&rows).unwrap();
    assert_eq!(sleeping(&unwinder, &words, saved), before);
}

#[test]
fn a_sleeping_thread_is_traced_to_the_first_function_it_ran() {
    let (unwinder, words, saved) = kthread();
    let trace = sleeping(&unwinder, &words, saved);
    assert_eq!(ips(&trace), [within(0), within(1), within(2)]);
    assert_eq!(trace.unreliable, None);
    assert_eq!(trace.frames[2].sp, Gva(TASK + SIZE - 168));
    assert!(
        trace
            .frames
            .iter()
            .all(|frame| frame.kind == FrameKind::Call)
    );
}

#[test]
fn an_end_in_the_middle_of_a_stack_is_not_believed() {
    let (unwinder, mut words, saved) = kthread();
    words[2].1 = within(2);
    let trace = sleeping(&unwinder, &words, saved);
    assert_eq!(ips(&trace), [within(0), within(2)]);
    assert_eq!(
        trace.unreliable, None,
        "80 bytes below the top is still its end"
    );
    let deep: Vec<_> = words
        .iter()
        .map(|&(at, word)| (at - 0x1000, word))
        .collect();
    let trace = sleeping(&unwinder, &deep, saved - 0x1000);
    assert_eq!(
        trace.unreliable,
        Some(Unreliable::EndsEarly(Gva(saved - 0x1000 + 80)))
    );
}

#[test]
fn a_return_address_in_unknown_text_makes_the_trace_unreliable() {
    let (unwinder, mut words, saved) = kthread();
    words[2].1 = TEXT - 0x10_0000;
    let trace = sleeping(&unwinder, &words, saved);
    assert_eq!(
        trace.unreliable,
        Some(Unreliable::NoUnwindData(Gva(TEXT - 0x10_0000)))
    );
    assert_eq!(ips(&trace)[2], within(2), "guessed on by the frame pointer");
}

#[test]
fn a_frame_that_leads_down_the_stack_ends_the_trace() {
    let unwinder = kernel(&[entry((BP, 16), (1, -16), CALL)]);
    let saved = TASK + 0x1000;
    let words = [
        (saved + 40, saved),
        (saved + 48, within(0)),
        (saved + 8, within(0)),
    ];
    let trace = sleeping(&unwinder, &words, saved);
    assert_eq!(
        trace.unreliable,
        Some(Unreliable::StrayStackPointer(Gva(saved + 16)))
    );
}

#[test]
fn a_saved_stack_pointer_outside_the_stack_gives_no_frame() {
    let (unwinder, words, _) = kthread();
    let trace = sleeping(&unwinder, &words, TASK + SIZE - 40);
    assert_eq!(trace.frames, []);
    assert!(matches!(
        trace.unreliable,
        Some(Unreliable::StrayStackPointer(_))
    ));
}

/// 0: handler. 1: the switch to the IRQ stack. 2: entry code, whole registers. 3: interrupted. 4: the end.
#[test]
fn a_cpu_in_an_interrupt_is_traced_over_both_stacks() {
    let unwinder = kernel(&[
        entry((SP, 8), (0, 0), CALL),
        entry((9, 8), (0, 0), CALL),
        entry((SP, 0), (0, 0), REGS),
        entry((SP, 8), (0, 0), CALL),
        entry((0, 0), (0, 0), END),
    ]);
    let (top, regs) = (IRQ + SIZE - 8, TASK + SIZE - 0x400);
    let words = [
        (top - 8, within(1)),
        (top, regs - 8),
        (regs - 8, within(2)),
        (regs + 128, TEXT + 0x300),
        (regs + 136, 0x10),
        (regs + 152, TASK + SIZE - 176),
        (TASK + SIZE - 176, within(4)),
    ];
    let trace = running(&unwinder, &words, &test_vcpu(within(0), top - 8, 0));
    assert_eq!(
        ips(&trace),
        [within(0), within(1), within(2), TEXT + 0x300, within(4)]
    );
    assert_eq!(trace.unreliable, None);
    let kinds: Vec<_> = trace.frames.iter().map(|frame| frame.kind).collect();
    use FrameKind::{Call, Interrupted, Running};
    assert_eq!(kinds, [Running, Call, Call, Interrupted, Call]);
}

#[test]
fn registers_of_user_mode_end_a_trace_only_at_the_top_of_a_stack() {
    let unwinder = kernel(&[entry((SP, 0), (0, 0), PARTIAL)]);
    let at_top = TASK + SIZE - 40;
    let user = |at: u64| vec![(at, 0x40_1000), (at + 8, 0x33), (at + 24, 0x7fff_0000)];
    let trace = running(&unwinder, &user(at_top), &test_vcpu(within(0), at_top, 0));
    assert_eq!((ips(&trace), trace.unreliable), (vec![within(0)], None));
    let low = TASK + 0x800;
    let trace = running(&unwinder, &user(low), &test_vcpu(within(0), low, 0));
    assert!(matches!(trace.unreliable, Some(Unreliable::EndsEarly(_))));
}

/// Found by fuzzing: from a stray stack pointer the frame pointer led back down the stack.
#[test]
fn a_stray_stack_pointer_in_saved_registers_ends_the_trace() {
    let unwinder = kernel(&[
        entry((SP, 0), (0, 0), REGS),
        entry((BP, 16), (1, -16), CALL),
    ]);
    let regs = TASK + 0x2000;
    let words = [
        (regs + 32, TASK + 0x1000),
        (regs + 128, within(1)),
        (regs + 136, 0x10),
        (regs + 152, 5),
        (TASK + 0x1008, within(1)),
    ];
    let trace = running(&unwinder, &words, &test_vcpu(within(0), regs, 0));
    assert_eq!(ips(&trace), [within(0), within(1)]);
    assert_eq!(
        trace.unreliable,
        Some(Unreliable::StrayStackPointer(Gva(5)))
    );
}

#[test]
fn a_graph_traced_call_is_traced_through_its_hidden_return_address() {
    let (mut unwinder, mut words, saved) = kthread();
    let trampoline = GvaRange {
        start: Gva(within(0)),
        end: Gva(within(0) + 1),
    };
    unwinder.hooks_mut().set_graph(trampoline);
    words[2].1 = within(0);
    words[1].1 = within(0) + 8;
    let place = (stack(TASK), Gva(saved));
    let source = Words(words);
    let mut hidden = Hidden::default();
    let trace = unwinder.sleeping(&source, &mut StackPool::default(), place, &hidden);
    assert_eq!(
        trace.unreliable,
        Some(Unreliable::HiddenReturn(Gva(within(0))))
    );
    hidden.graph.push(Hooked {
        slot: saved + 72,
        real: within(1),
    });
    let trace = unwinder.sleeping(&source, &mut StackPool::default(), place, &hidden);
    assert_eq!(ips(&trace), [within(0) + 8, within(1), within(2)]);
    assert_eq!(trace.unreliable, None);
}

#[test]
fn frame_pointers_are_followed_to_the_registers_at_the_top() {
    let unwinder = Unwinder::for_frame_pointers(first_function());
    let (saved, last) = (TASK + 0x3000, TASK + SIZE - 168 - 16);
    let words = [
        (saved + 40, last),
        (saved + 48, within(0)),
        (last, (TASK + SIZE - 168) | 1),
        (last + 8, within(0) + 1),
    ];
    let trace = sleeping(&unwinder, &words, saved);
    assert_eq!(
        (ips(&trace), trace.unreliable),
        (vec![within(0), within(0) + 1], None)
    );
}

#[test]
fn frame_pointers_are_followed_through_code_of_a_patch_where_it_is_known_to_keep_them() {
    let (saved, last) = (TASK + 0x3000, TASK + SIZE - 168 - 16);
    let words = [
        (saved + 40, saved + 0x100),
        (saved + 48, within(0)),
        (saved + 0x100, last),
        (saved + 0x108, ARENA + 0x20),
        (last, (TASK + SIZE - 168) | 1),
        (last + 8, within(0) + 1),
    ];
    let doubt = |entry| {
        let mut unwinder = Unwinder::for_frame_pointers(first_function());
        let rows = [(Gva(ARENA), entry), (Gva(ARENA + 0x40), Entry::UNDEFINED)];
        unwinder.cover(&rows).unwrap();
        let trace = sleeping(&unwinder, &words, saved);
        assert_eq!(ips(&trace), [within(0), ARENA + 0x20, within(0) + 1]);
        trace.unreliable
    };
    assert_eq!(doubt(Entry::FRAME_POINTER_GUESS), None);
    let unknown = Some(Unreliable::NoUnwindData(Gva(ARENA + 0x20)));
    for entry in [Entry::FUNCTION_START, Entry::UNDEFINED] {
        assert_eq!(doubt(entry), unknown);
    }
}

#[test]
fn frame_pointers_over_an_interrupt_are_not_reliable() {
    let unwinder = Unwinder::for_frame_pointers(first_function());
    let (saved, regs, last) = (TASK + 0x2000, TASK + 0x3000, TASK + SIZE - 168 - 16);
    let words = [
        (saved + 40, regs | 1),
        (saved + 48, within(0)),
        (regs + 32, last),
        (regs + 128, within(0) + 2),
        (regs + 136, 0x10),
        (last + 8, within(0) + 1),
    ];
    let trace = sleeping(&unwinder, &words, saved);
    assert_eq!(ips(&trace), [within(0), within(0) + 2, within(0) + 1]);
    assert_eq!(
        trace.unreliable,
        Some(Unreliable::Preempted(Gva(within(0) + 2)))
    );
}

/// A stack of words that look like something: text, stacks, small numbers, noise.
fn likely_word() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0_u64..0x800).prop_map(|offset| TEXT + offset),
        (0_u64..SIZE + 64).prop_map(|offset| TASK + offset),
        (0_u64..SIZE + 64).prop_map(|offset| IRQ + offset),
        0_u64..0x100,
        any::<u64>(),
    ]
}

proptest! {
    #[test]
    fn no_stack_and_no_table_makes_a_trace_endless(
        entries in proptest::collection::vec(any::<[u8; ENTRY_SIZE]>(), 8),
        words in proptest::collection::vec(likely_word(), 512),
        start in (likely_word(), likely_word(), likely_word()),
        by_chain in any::<bool>(),
    ) {
        let unwinder = if by_chain {
            Unwinder::for_frame_pointers(first_function())
        } else {
            kernel(&entries)
        };
        let both = [TASK + SIZE - 2048, IRQ + SIZE - 2048];
        let words: Vec<_> = words.iter().enumerate()
            .map(|(i, &word)| (both[i / 256] + (i as u64 % 256) * 8, word)).collect();
        let trace = running(&unwinder, &words, &test_vcpu(start.0, start.1 & !7, start.2));
        prop_assert!(trace.frames.len() <= MAX_FRAMES);
        let trace = sleeping(&unwinder, &words, start.1);
        prop_assert!(trace.frames.len() <= MAX_FRAMES);
    }

    #[test]
    fn a_complete_trace_never_holds_a_frame_of_unknown_text(
        entries in proptest::collection::vec(any::<[u8; ENTRY_SIZE]>(), 8),
        words in proptest::collection::vec(likely_word(), 256),
        saved in 0_u64..240,
    ) {
        let unwinder = kernel(&entries);
        let base = TASK + SIZE - 2048;
        let words: Vec<_> =
            words.iter().enumerate().map(|(i, &word)| (base + i as u64 * 8, word)).collect();
        let trace = sleeping(&unwinder, &words, base + saved * 8);
        if trace.unreliable.is_none() {
            prop_assert!(trace.frames.iter().all(|frame| unwinder.knows(frame.lookup())));
        }
    }
}

#[test]
fn every_stored_entry_decodes_in_every_format() {
    for format in [Format::V4_14, Format::V6_3, Format::V6_4, Format::V7_1] {
        for flags in 0..=u16::MAX {
            let [low, high] = flags.to_le_bytes();
            let entry = format.decode([0, 0, 0, 0, low, high]);
            assert!(
                entry.sp != Base::Unknown || flags & 0xf > 9,
                "{format:?} {flags:#x}"
            );
            assert!(
                entry.kind != Kind::Unknown || flags & 0x700 > 0x200,
                "{format:?} {flags:#x}"
            );
        }
    }
}
