//! Where a function that lives on can be left by a jump: whole instructions near its entry that do the same
//! elsewhere. No object is at hand to compare with, so they are known by their form. Owns that judgement.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use vmpatch_introspect::{Gva, GvaRange, ReadError};

use super::super::boot::nops::NOP5;
use super::super::entry::{self, Body, EntryError, JUMP};
use super::super::live::{Guest, Live};
use super::super::tracing::{self, TracingError};
use super::HookError;
use crate::patch::Code;

/// Most bytes of a function looked at; those hooked have a few hundred.
const MOST: u64 = 4096;

/// A place for the jump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// From the jump on, whole instructions.
    pub covered: GvaRange,
    /// Their bytes.
    pub displaced: Vec<u8>,
}

/// Why the head of a function cannot be moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SiteError {
    /// No place for a jump.
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// An instruction that is not known to do the same elsewhere: a breakpoint or jump that somebody placed, or a
    /// place that the kernel rewrites.
    #[error("its instruction {bytes} at {at} cannot be moved")]
    Instruction {
        /// Where.
        at: Gva,
        /// In hex.
        bytes: String,
    },
}

/// A function from its entry to the next symbol.
#[must_use]
pub fn extent(at: Gva, guest: &Guest<'_>) -> GvaRange {
    let next = guest.kernel().symbols.containing(at).map(|(_, next)| next);
    let most = at.wrapping_add(MOST);
    GvaRange {
        start: at,
        end: next.map_or(most, |next| next.min(most)),
    }
}

/// Chooses the place in the function at `at`: after ftrace's five bytes where it has them.
///
/// # Errors
/// [`HookError`].
pub fn choose(at: Gva, guest: &Guest<'_>) -> Result<Site, HookError> {
    let running = read(at, guest)?;
    let start = after_ftrace(at, &running, |site| tracing::check(site, guest))?;
    let (name, _) = guest
        .kernel()
        .symbols
        .containing(at)
        .ok_or(ReadError::NotMapped(at))?;
    let cold = guest.named(&format!("{}.cold", name.name));
    let cold: Vec<_> = cold
        .into_iter()
        .map(|at| Ok((at, read(at, guest)?)))
        .collect::<Result<_, ReadError>>()?;
    Ok(movable(at, &running, start, &cold)?)
}

fn read(at: Gva, guest: &Guest<'_>) -> Result<Vec<u8>, ReadError> {
    guest.bytes(at, extent(at, guest).size() as usize)
}

/// Offset of the first byte after a landing mark and ftrace's call or nop.
fn after_ftrace(
    at: Gva,
    running: &[u8],
    check: impl FnOnce(Gva) -> Result<(), TracingError>,
) -> Result<u64, TracingError> {
    let mark = entry::landing_mark(running);
    let first = running.get(mark as usize..).unwrap_or_default();
    if first.starts_with(&NOP5) || first.starts_with(&[0xe8]) {
        check(at.wrapping_add(mark))?;
        return Ok(mark + JUMP);
    }
    Ok(mark)
}

/// The place at `start`, if what lies there can be moved and nothing of the function or its cold parts leads into it.
fn movable(
    at: Gva,
    running: &[u8],
    start: u64,
    cold: &[(Gva, Vec<u8>)],
) -> Result<Site, SiteError> {
    let code = Code {
        bytes: Vec::new(),
        relocations: Vec::new(),
        sites: Vec::new(),
    };
    let body = |at, running| Body {
        code: &code,
        at,
        running,
        before: &[],
    };
    let parts: Vec<_> = cold
        .iter()
        .map(|(at, running)| body(*at, running))
        .collect();
    let covered = entry::place(body(at, running), &parts, start, entry::JUMP)?.covered;
    let from = (covered.start.0 - at.0) as usize;
    let displaced = running.get(from..from + covered.size() as usize);
    let displaced = displaced.unwrap_or_default().to_vec();
    let decoder = Decoder::with_ip(64, &displaced, covered.start.0, DecoderOptions::NONE);
    for instruction in decoder {
        if !does_the_same_anywhere(&instruction) {
            let at = Gva(instruction.ip());
            let from = (at.0 - covered.start.0) as usize;
            let bytes = displaced.get(from..from + instruction.len());
            let hex = |byte: &u8| format!("{byte:02x}");
            let bytes = bytes.unwrap_or_default().iter().map(hex).collect();
            return Err(SiteError::Instruction { at, bytes });
        }
    }
    Ok(Site { covered, displaced })
}

/// Only what compilers begin functions with: a nop may be a place that the kernel rewrites.
fn does_the_same_anywhere(instruction: &Instruction) -> bool {
    let plain = matches!(
        instruction.mnemonic(),
        Mnemonic::Mov
            | Mnemonic::Movzx
            | Mnemonic::Movsx
            | Mnemonic::Movsxd
            | Mnemonic::Lea
            | Mnemonic::Push
            | Mnemonic::Add
            | Mnemonic::Sub
            | Mnemonic::And
            | Mnemonic::Or
            | Mnemonic::Xor
            | Mnemonic::Cmp
            | Mnemonic::Test
    );
    plain
        && instruction.flow_control() == FlowControl::Next
        && !instruction.is_ip_rel_memory_operand()
        && !instruction.has_lock_prefix()
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Gva = Gva(0xffff_ffff_8100_0000);
    /// mov $table,%rax; mov %rdi,%rcx; ret
    const HEAD: [u8; 11] = [
        0x48, 0xc7, 0xc0, 0xc0, 0x2a, 0xe7, 0x82, 0x48, 0x89, 0xf9, 0xc3,
    ];
    const MARK: [u8; 4] = [0x66, 0x0f, 0x1f, 0x00];

    fn chosen(running: &[u8]) -> Result<Site, SiteError> {
        let start = after_ftrace(AT, running, |_| Ok(())).unwrap();
        movable(AT, running, start, &[])
    }

    #[test]
    fn whole_instructions_are_taken_after_the_mark_and_the_bytes_of_ftrace() {
        let site = chosen(&HEAD).unwrap();
        assert_eq!(site.displaced, HEAD[..7]);
        assert_eq!((site.covered.start, site.covered.size()), (AT, 7));
        for ftrace in [NOP5, [0xe8, 1, 2, 3, 4]] {
            let site = chosen(&[&MARK[..], &ftrace, &HEAD].concat()).unwrap();
            assert_eq!(site.covered.start, AT.wrapping_add(9));
            assert_eq!(site.displaced, HEAD[..7]);
        }
    }

    #[test]
    fn the_record_of_ftrace_is_asked_wherever_its_bytes_are() {
        let running = [&MARK[..], &NOP5, &HEAD].concat();
        let why = || TracingError::Diverted { by: "a livepatch" };
        let asked = after_ftrace(AT, &running, |site| {
            assert_eq!(site, AT.wrapping_add(4));
            Err(why())
        });
        assert!(matches!(asked, Err(TracingError::Diverted { .. })));
        assert_eq!(after_ftrace(AT, &HEAD, |_| Err(why())).unwrap(), 0);
    }

    #[test]
    fn what_somebody_else_may_have_put_there_is_refused() {
        let rip_relative = [0x48, 0x63, 0x05, 0xe3, 0xb0, 0x21, 0x01];
        let locked = [0xf0, 0x48, 0x01, 0x07, 0x90, 0x90];
        let jump = [0xe9, 0, 0, 0, 0];
        let breakpoint = [0xcc, 0xc7, 0xc0, 0xc0, 0x2a, 0xe7, 0x82];
        let nop = [0x66, 0x90, 0x48, 0x89, 0xf9];
        for head in [&rip_relative[..], &locked, &jump, &breakpoint, &nop] {
            let refused = chosen(&[head, &HEAD].concat());
            assert!(
                matches!(refused, Err(SiteError::Instruction { at: AT, .. })),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn a_branch_back_into_the_moved_instructions_is_refused_also_from_the_cold_part() {
        // jmp to AT + 3
        let into = [&HEAD[..10], &[0xeb, 0xf7]].concat();
        let refused = chosen(&into);
        assert!(
            matches!(
                refused,
                Err(SiteError::Entry(EntryError::BranchTarget { .. }))
            ),
            "{refused:?}"
        );
        let cold = (AT.wrapping_add(0x20), vec![0xeb, 0xe1]);
        let refused = movable(AT, &HEAD, 0, &[cold]);
        assert!(
            matches!(
                refused,
                Err(SiteError::Entry(EntryError::BranchTarget { .. }))
            ),
            "{refused:?}"
        );
    }
}
