//! The stack gate: does anything stand in the code that is to change? A pure judgement over stacks and
//! registers already read, with the reasons. Takes no lock, stops nothing, knows no hypervisor.
//!
//! ```text
//!               ┌ a frame or a hidden return address in a busy range ─────────────▶ busy
//!   each stack ─┤ reliable to its end ────────────────────────────────────────────▶ free
//!               └ unreliable ── can a scan settle it? ─ no ───────────────────────▶ busy
//!                                 │ yes: every word of its memory
//!                                 ├─ one points into a busy range, or unreadable ─▶ busy
//!                                 └─ none does ───────────────────────────────────▶ free
//! ```
//!
//! A frame is tested as livepatch does (Linux v6.12 kernel/livepatch/transition.c,
//! `klp_check_stack_func`), but for return addresses by the byte before them: a call that never returns
//! is the last instruction of its function, so its return address lies in the next.

use vmpatch_introspect::stacks::Stack;
use vmpatch_introspect::unwind::{Frame, Unreliable};
use vmpatch_introspect::vcpu::{Activity, Vcpu};
use vmpatch_introspect::{AttachError, Deadline, Gva, GvaRange, ReadError};

use super::busy::{Busy, Evidence, Finding, Who};
use super::ranges::{BusyRanges, Hit};

/// Reads guest-virtual memory of a stopped guest.
pub type ReadStack<'a> = dyn Fn(Gva, &mut [u8]) -> Result<(), ReadError> + 'a;

/// More than all stacks of one task and its CPU: Linux v6.12 arch/x86/include/asm/page_64_types.h has
/// at most 32 KiB for each of them (KASAN), and there are eight kinds.
const MAX_SCAN: u64 = 1 << 20;
/// Bytes read at a time.
const CHUNK: usize = 4096;
const WORD: u64 = 8;

/// Tests every stack.
///
/// # Errors
/// [`AttachError::Late`]: not all were tested before `deadline`.
pub fn examine_stacks(
    stacks: &[Stack],
    ranges: &BusyRanges,
    read: &ReadStack<'_>,
    deadline: &Deadline,
    busy: &mut Busy,
) -> Result<(), AttachError> {
    for (done, stack) in stacks.iter().enumerate() {
        match stack.trace.unreliable {
            None => deadline.allow("stacks", done)?,
            // It may be searched word by word.
            Some(_) => deadline.check("stacks", done)?,
        }
        if let Err(finding) = examine(stack, ranges, read) {
            busy.add(*finding);
        }
    }
    Ok(())
}

/// Tests the instruction pointer of every vCPU, and that each one in the kernel has a stack among `stacks`.
pub fn examine_vcpus(vcpus: &[Vcpu], stacks: &[Stack], ranges: &BusyRanges, busy: &mut Busy) {
    for vcpu in vcpus.iter().filter(|vcpu| has_kernel_stack(vcpu)) {
        if let Some(finding) = examine_vcpu(vcpu, stacks, ranges) {
            busy.add(finding);
        }
    }
}

fn has_kernel_stack(vcpu: &Vcpu) -> bool {
    vcpu.activity != Activity::WaitingForSipi && vcpu.in_kernel()
}

fn examine_vcpu(vcpu: &Vcpu, stacks: &[Stack], ranges: &BusyRanges) -> Option<Finding> {
    let hit = ranges
        .holding(vcpu.rip)
        .or_else(|| ranges.covering(vcpu.rip));
    if let Some(hit) = hit {
        return Some(Finding::VcpuInFunction {
            vcpu: vcpu.index,
            function: hit.function.to_owned(),
            offset: hit.offset_of(vcpu.rip),
            at: vcpu.rip,
        });
    }
    let known = stacks.iter().any(|stack| stack.vcpu == Some(vcpu.index));
    (!known).then_some(Finding::NoStack {
        vcpu: vcpu.index,
        at: vcpu.rip,
    })
}

fn examine(stack: &Stack, ranges: &BusyRanges, read: &ReadStack<'_>) -> Result<(), Box<Finding>> {
    for (depth, frame) in stack.trace.frames.iter().enumerate() {
        if let Some(hit) = frame_hit(frame, ranges) {
            let evidence = Evidence::Frame {
                depth,
                kind: frame.kind,
            };
            return Err(in_function(stack, hit, frame.at, evidence));
        }
    }
    for &at in &stack.hidden_returns {
        if let Some(hit) = hidden_hit(stack, at, ranges) {
            return Err(in_function(stack, hit, at, Evidence::HiddenReturn));
        }
    }
    match &stack.trace.unreliable {
        None => Ok(()),
        Some(why) => settle(stack, why, ranges, read),
    }
}

fn frame_hit<'a>(frame: &Frame, ranges: &'a BusyRanges) -> Option<Hit<'a>> {
    ranges
        .holding(frame.lookup())
        .or_else(|| ranges.covering(frame.at))
}

fn hidden_hit<'a>(stack: &Stack, at: Gva, ranges: &'a BusyRanges) -> Option<Hit<'a>> {
    match stack.trace.unreliable {
        None => ranges
            .holding(at.wrapping_sub(1))
            .or_else(|| ranges.covering(at)),
        // Registers may be among them: as conservative as a scan.
        Some(_) => ranges.touched_by(at.0),
    }
}

/// Invariant 4: unreliable counts as busy unless a scan of every word finds nothing.
fn settle(
    stack: &Stack,
    why: &Unreliable,
    ranges: &BusyRanges,
    read: &ReadStack<'_>,
) -> Result<(), Box<Finding>> {
    let opaque = |scan: String| {
        Box::new(Finding::Opaque {
            who: Who::owns(stack),
            unreliable: why.clone(),
            scan,
        })
    };
    if !scan_can_settle(why) {
        return Err(opaque("it would not show all".to_owned()));
    }
    let size = stack
        .memory
        .iter()
        .map(GvaRange::size)
        .fold(0, u64::saturating_add);
    if size == 0 || size > MAX_SCAN {
        return Err(opaque(format!("{size} bytes of stack")));
    }
    for range in &stack.memory {
        match scan(*range, ranges, read) {
            Ok(None) => {}
            Ok(Some((word_at, word, hit))) => {
                return Err(in_function(stack, hit, word, Evidence::Scan { word_at }));
            }
            Err(unread) => return Err(opaque(unread.to_string())),
        }
    }
    Ok(())
}

/// Whether what a trace may have missed must be a word in the task's stack memory. Not so where the
/// registers or the hidden places themselves are not known, nor whose stack it is.
const fn scan_can_settle(why: &Unreliable) -> bool {
    !matches!(
        why,
        Unreliable::HiddenReturn(_)
            | Unreliable::NoVcpu(_)
            | Unreliable::NoTask(_)
            | Unreliable::ForeignRegisters(_)
            | Unreliable::Unlisted(_)
    )
}

/// The first aligned word of `range` that may point into busy code. The CPU keeps return addresses and
/// exception frames aligned to 8 bytes on kernel stacks (Intel SDM vol. 3 section 6.14.2; System V ABI).
fn scan<'a>(
    range: GvaRange,
    ranges: &'a BusyRanges,
    read: &ReadStack<'_>,
) -> Result<Option<(Gva, Gva, Hit<'a>)>, ReadError> {
    let mut chunk = [0; CHUNK];
    let mut at = Gva(range.start.0 & !(WORD - 1));
    while at < range.end {
        let to_page_end = (CHUNK as u64) - at.page_offset();
        let left = range.end.0.saturating_sub(at.0).next_multiple_of(WORD);
        let size = usize::try_from(left.min(to_page_end))
            .unwrap_or(CHUNK)
            .min(CHUNK);
        let bytes = chunk.get_mut(..size).unwrap_or_default();
        read(at, bytes)?;
        let (words, _) = bytes.as_chunks::<8>();
        for (index, word) in words.iter().enumerate() {
            let word = u64::from_le_bytes(*word);
            if let Some(hit) = ranges.touched_by(word) {
                return Ok(Some((at.wrapping_add(index as u64 * WORD), Gva(word), hit)));
            }
        }
        let Some(next) = at.checked_add(size as u64) else {
            break;
        };
        at = next;
    }
    Ok(None)
}

fn in_function(stack: &Stack, hit: Hit<'_>, at: Gva, evidence: Evidence) -> Box<Finding> {
    Box::new(Finding::InFunction {
        who: Who::owns(stack),
        function: hit.function.to_owned(),
        offset: hit.offset_of(at),
        at,
        evidence,
        unreliable: stack.trace.unreliable.clone(),
    })
}
