//! Where the jump to the new function goes. Only at the entry is the state what the new function expects,
//! so there are three places: after ftrace's five bytes, over them, or at the first byte of a function that
//! ftrace does not know.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};
use vmpatch_introspect::{Gva, GvaRange};

use crate::patch::{Code, Site, SiteKind};

/// Length of the jump.
pub const JUMP: u64 = 5;

/// The place chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First byte of the jump.
    pub at: Gva,
    /// Whole instructions it covers.
    pub covered: GvaRange,
}

/// Why a function cannot be entered by a jump.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Fewer bytes than the jump needs.
    #[error("it ends {have} bytes after its entry, a jump needs {JUMP}")]
    TooShort {
        /// Bytes there are.
        have: u64,
    },
    /// A place the kernel rewrites lies there.
    #[error("a {what} at +{offset:#x} lies where the jump must go")]
    Rewritten {
        /// Kind of place.
        what: &'static str,
        /// Its offset.
        offset: u64,
    },
    /// Somebody has put a breakpoint or another jump there.
    #[error("the bytes at its entry are not what was verified")]
    Taken,
    /// A branch leads into the middle of the jump.
    #[error("a branch at {from} leads to {to}, into the middle of the jump")]
    BranchTarget {
        /// The branch.
        from: Gva,
        /// Where to.
        to: Gva,
    },
    /// Bytes that are no instructions.
    #[error("its code cannot be decoded at +{offset:#x}")]
    Undecodable {
        /// Where.
        offset: u64,
    },
    /// The only place left is ftrace's, and ftrace's own records would have to be changed with it.
    #[error("{why}, and over ftrace's own bytes no jump is placed: {ftrace}")]
    OverFtrace {
        /// Why the place after them is not good.
        why: Box<EntryError>,
        /// Why theirs is not.
        ftrace: &'static str,
    },
}

/// A function that runs, with the object's view of it.
#[derive(Clone, Copy)]
pub struct Body<'a> {
    /// The object's code.
    pub code: &'a Code,
    /// Where it runs.
    pub at: Gva,
    /// The bytes that run.
    pub running: &'a [u8],
}

/// Chooses the place. `parts` are split-off parts of the same function, for their branches back.
///
/// # Errors
/// [`EntryError`].
pub fn choose(function: Body<'_>, parts: &[Body<'_>]) -> Result<Entry, EntryError> {
    let Some(fentry) = fentry(function) else {
        return place(function, parts, landing_mark(function.running));
    };
    place(function, parts, fentry.offset + u64::from(fentry.len)).map_err(|why| {
        EntryError::OverFtrace {
            why: Box::new(why),
            ftrace: "the guest's record of that site cannot be shown to be unused",
        }
    })
}

/// The call to ftrace at the head of a function, if it has one.
#[must_use]
pub fn fentry(function: Body<'_>) -> Option<&Site> {
    let after_mark = landing_mark(function.running);
    let at_head = |site: &&Site| site.kind == SiteKind::Fentry && site.offset == after_mark;
    function.code.sites.iter().find(at_head)
}

/// Length of `endbr64`, or of what it is sealed with, at the head of a function.
pub(super) fn landing_mark(running: &[u8]) -> u64 {
    let marked = running.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa])
        || running.starts_with(&[0x66, 0x0f, 0x1f, 0x00]);
    if marked { 4 } else { 0 }
}

/// The place at `start`, an offset in the function.
pub(super) fn place(
    function: Body<'_>,
    parts: &[Body<'_>],
    start: u64,
) -> Result<Entry, EntryError> {
    let length = function.running.len() as u64;
    let end = start + JUMP;
    if end > length {
        return Err(EntryError::TooShort {
            have: length.saturating_sub(start),
        });
    }
    no_site_there(&function.code.sites, start, end)?;
    let at = function.at.wrapping_add(start);
    let middle = GvaRange {
        start: at.wrapping_add(1),
        end: at.wrapping_add(JUMP),
    };
    let covered = covered(function, start, end)?;
    for body in std::iter::once(&function).chain(parts) {
        no_branch_into(*body, middle)?;
    }
    Ok(Entry { at, covered })
}

/// No place that the kernel rewrites while it runs. Returns, retpolines, constants and landing marks are
/// written at boot and never again.
fn no_site_there(sites: &[Site], start: u64, end: u64) -> Result<(), EntryError> {
    for site in sites {
        let what = match site.kind {
            SiteKind::JumpLabel { .. } => "static-key branch",
            SiteKind::StaticCall => "static call",
            SiteKind::Alternative { .. } => "alternative",
            SiteKind::Paravirt { .. } => "paravirt call",
            SiteKind::LockPrefix => "lock prefix",
            SiteKind::Fentry => "call to ftrace",
            SiteKind::Return
            | SiteKind::Retpoline { .. }
            | SiteKind::RuntimeConstant { .. }
            | SiteKind::Endbr => continue,
        };
        if site.offset < end && start < site.offset.saturating_add(site.len.into()) {
            return Err(EntryError::Rewritten {
                what,
                offset: site.offset,
            });
        }
    }
    Ok(())
}

/// From `start` to the end of the last instruction that begins before `end`.
fn covered(function: Body<'_>, start: u64, end: u64) -> Result<GvaRange, EntryError> {
    let mut boundary = None;
    for instruction in instructions(function) {
        let (offset, instruction) = instruction?;
        if offset == start {
            boundary = Some(start);
        }
        if boundary.is_some() && offset < end {
            boundary = Some(offset + instruction.len() as u64);
        }
    }
    let boundary = boundary.ok_or(EntryError::Undecodable { offset: start })?;
    let to = |offset| function.at.wrapping_add(offset);
    Ok(GvaRange {
        start: to(start),
        end: to(boundary),
    })
}

fn no_branch_into(body: Body<'_>, middle: GvaRange) -> Result<(), EntryError> {
    for instruction in instructions(body) {
        let (_, instruction) = instruction?;
        let direct = matches!(
            instruction.flow_control(),
            FlowControl::UnconditionalBranch
                | FlowControl::ConditionalBranch
                | FlowControl::Call
                | FlowControl::XbeginXabortXend
        );
        let to = Gva(instruction.near_branch_target());
        if direct && middle.contains(to) {
            return Err(EntryError::BranchTarget {
                from: Gva(instruction.ip()),
                to,
            });
        }
    }
    Ok(())
}

/// All instructions with their offsets, from the first byte to the last.
fn instructions(
    body: Body<'_>,
) -> impl Iterator<Item = Result<(u64, Instruction), EntryError>> + '_ {
    let mut decoder = Decoder::with_ip(64, body.running, body.at.0, DecoderOptions::NONE);
    std::iter::from_fn(move || {
        if !decoder.can_decode() {
            return None;
        }
        let offset = decoder.position() as u64;
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return Some(Err(EntryError::Undecodable { offset }));
        }
        Some(Ok((offset, instruction)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Gva = Gva(0xffff_ffff_8100_0000);

    fn code(bytes: &[u8], sites: Vec<Site>) -> Code {
        Code {
            bytes: bytes.to_vec(),
            relocations: Vec::new(),
            sites,
        }
    }

    fn site(offset: u64, len: u8, kind: SiteKind) -> Site {
        Site { offset, len, kind }
    }

    fn chosen(code: &Code) -> Result<Entry, EntryError> {
        choose(
            Body {
                code,
                at: AT,
                running: &code.bytes,
            },
            &[],
        )
    }

    const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
    /// push rbp; mov rbp,rsp; xor eax,eax; pop rbp; ret
    const PLAIN: [u8; 8] = [0x55, 0x48, 0x89, 0xe5, 0x31, 0xc0, 0x5d, 0xc3];

    #[test]
    fn the_jump_goes_after_the_bytes_of_ftrace_and_the_landing_mark() {
        let body = [&[0x66, 0x0f, 0x1f, 0x00], &NOP5[..], &PLAIN].concat();
        let entry = chosen(&code(&body, vec![site(4, 5, SiteKind::Fentry)])).unwrap();
        assert_eq!(entry.at, AT.wrapping_add(9));
        assert_eq!(
            entry.covered.end,
            AT.wrapping_add(15),
            "xor is covered whole"
        );
    }

    #[test]
    fn a_function_without_ftrace_is_entered_at_its_first_byte() {
        assert_eq!(chosen(&code(&PLAIN, Vec::new())).unwrap().at, AT);
    }

    #[test]
    fn a_branch_into_the_middle_is_refused_and_one_to_the_start_is_not() {
        // jmp back to offset 1 from the end
        let into = [&PLAIN[..7], &[0xeb, 0xf8]].concat();
        assert_eq!(
            chosen(&code(&into, Vec::new())),
            Err(EntryError::BranchTarget {
                from: AT.wrapping_add(7),
                to: AT.wrapping_add(1)
            })
        );
        let start = [&PLAIN[..7], &[0xeb, 0xf7]].concat();
        assert!(chosen(&code(&start, Vec::new())).is_ok());
    }

    #[test]
    fn a_branch_of_a_split_off_part_counts_too() {
        let function = code(&PLAIN, Vec::new());
        let cold = code(&[0xeb, 0xf2], Vec::new());
        let main = Body {
            code: &function,
            at: AT,
            running: &function.bytes,
        };
        // From AT + 14 to AT + 2.
        let part = Body {
            code: &cold,
            at: AT.wrapping_add(14),
            running: &cold.bytes,
        };
        let entry = choose(main, &[part]);
        assert!(
            matches!(entry, Err(EntryError::BranchTarget { .. })),
            "{entry:?}"
        );
    }

    #[test]
    fn places_that_change_while_the_kernel_runs_are_never_covered() {
        let body = [&NOP5[..], &[0x66, 0x90], &PLAIN].concat();
        let reference = crate::patch::Reference {
            symbol: 0,
            addend: 0,
        };
        let label = SiteKind::JumpLabel {
            key: reference,
            target: reference,
            inverted: false,
        };
        let sites = vec![site(0, 5, SiteKind::Fentry), site(5, 2, label)];
        let entry = chosen(&code(&body, sites));
        assert!(
            matches!(entry, Err(EntryError::OverFtrace { .. })),
            "{entry:?}"
        );
    }

    #[test]
    fn a_function_that_only_returns_is_long_enough_with_its_thunk_and_not_without() {
        let jump = [0xe9, 0, 0, 0, 0];
        let with = code(&[NOP5, jump].concat(), vec![site(0, 5, SiteKind::Fentry)]);
        assert_eq!(chosen(&with).unwrap().at, AT.wrapping_add(5));
        let without = code(&[0xc3], Vec::new());
        assert_eq!(chosen(&without), Err(EntryError::TooShort { have: 1 }));
    }
}
