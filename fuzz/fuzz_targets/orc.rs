//! ORC tables and the stacks they are used on, both from the guest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmpatch_fuzz::Bytes;
use vmpatch_introspect::unwind::orc::Format;
use vmpatch_introspect::unwind::{
    Frame, FrameKind, Hidden, MAX_FRAMES, StackKind, StackPool, StackSource, StackSpan, Unwinder,
};
use vmpatch_introspect::vcpu::{Vcpu, vcpu_in_kernel};
use vmpatch_introspect::{Gva, GvaRange};

const TEXT: u64 = 0xffff_ffff_8100_0000;
const TEXT_SIZE: u64 = 0x10000;
const TASK: u64 = 0xffff_c900_0000_4000;
const IRQ: u64 = 0xffff_c900_0001_0000;
const STACK: u64 = 0x4000;
/// Words at the top of each stack that the fuzzer chooses.
const WORDS: u64 = 256;

struct Stacks {
    task: Vec<u64>,
    irq: Vec<u64>,
}

impl Stacks {
    fn word(&self, at: u64) -> u64 {
        let in_stack = |words: &[u64], start: u64| {
            let offset = at.checked_sub(start + STACK - WORDS * 8)?;
            words.get((offset / 8) as usize).copied()
        };
        in_stack(&self.task, TASK)
            .or_else(|| in_stack(&self.irq, IRQ))
            .unwrap_or(0)
    }
}

impl StackSource for Stacks {
    fn copy(&self, at: Gva, into: &mut [u8]) -> Option<()> {
        for (at, byte) in (at.0..).zip(into) {
            *byte = self.word(at & !7).to_le_bytes()[(at & 7) as usize];
        }
        Some(())
    }
}

/// A word that is likely to mean something: text, a stack, or whatever the fuzzer says.
fn likely(bytes: &mut Bytes<'_>) -> u64 {
    let [kind, low, high] = bytes.take();
    let offset = u64::from(u16::from_le_bytes([low, high]));
    match kind & 7 {
        0 | 1 => TEXT + offset,
        2 | 3 => TASK + STACK - (offset & 0xfff),
        4 => IRQ + STACK - (offset & 0xfff),
        5 => offset,
        _ => bytes.word(),
    }
}

fn stack(start: u64) -> GvaRange {
    GvaRange {
        start: Gva(start),
        end: Gva(start + STACK),
    }
}

fn unwinder(bytes: &mut Bytes<'_>) -> Option<Unwinder> {
    let text = GvaRange {
        start: Gva(TEXT),
        end: Gva(TEXT + TEXT_SIZE),
    };
    let [mode, count] = bytes.take();
    let format = match mode & 7 {
        0 => Format::V4_14,
        1 => Format::V6_3,
        2 => Format::V7_1,
        3 => return Some(Unwinder::for_frame_pointers(text)),
        _ => Format::V6_4,
    };
    let (mut ips, mut stored, mut at) = (Vec::new(), Vec::new(), TEXT);
    for _ in 0..count {
        ips.push(at);
        stored.extend_from_slice(&bytes.take::<6>());
        let [gap] = bytes.take();
        at = at.wrapping_add(u64::from(gap) * 16);
    }
    Unwinder::for_text(text, format, &ips, &stored).ok()
}

fn vcpu(bytes: &mut Bytes<'_>) -> Vcpu {
    let general = std::array::from_fn(|_| likely(bytes));
    vcpu_in_kernel(Gva(likely(bytes)), general)
}

fuzz_target!(|input: &[u8]| {
    let mut bytes = Bytes(input);
    let Some(unwinder) = unwinder(&mut bytes) else {
        return;
    };
    let (vcpu, saved_sp) = (vcpu(&mut bytes), Gva(likely(&mut bytes)));
    let mut fill = || (0..WORDS).map(|_| likely(&mut bytes)).collect();
    let stacks = Stacks {
        task: fill(),
        irq: fill(),
    };
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
    let (mut pool, hidden) = (StackPool::default(), Hidden::default());
    let trace = unwinder.running(&stacks, &mut pool, (&spans, &vcpu), &hidden);
    assert!(trace.frames.len() <= MAX_FRAMES);
    let trace = unwinder.sleeping(&stacks, &mut pool, (stack(TASK), saved_sp), &hidden);
    assert!(trace.frames.len() <= MAX_FRAMES);
    // Saved registers may hold any stack pointer; a frame that was walked past does not.
    let on_stack = |frame: &&Frame| stack(TASK).contains(frame.sp);
    let walked = trace.frames.iter().filter(on_stack);
    let walked: Vec<_> = walked
        .filter(|frame| frame.kind != FrameKind::Interrupted)
        .collect();
    for pair in walked.windows(2) {
        assert!(pair[0].sp < pair[1].sp, "on one stack callers lie above");
    }
});
