//! Where the jump to the new function goes. Only at the entry is the state what the new function expects: after ftrace's five
//! bytes, or at the first byte of a function that ftrace does not know. Where something that the kernel rewrites leaves no room
//! for five bytes there, a short jump of two leads back to a long one in the padding before the function, which kernels
//! have that can track the depth of calls and do not (Linux v6.12 arch/x86/Kconfig, CALL_PADDING). Never over ftrace's
//! bytes: its own records would have to change with them.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};
use vmpatch_introspect::{Gva, GvaRange};

use crate::patch::{Code, Site, SiteKind};

/// Length of the jump.
pub const JUMP: u64 = 5;
/// Length of a jump that reaches 128 bytes.
pub const SHORT_JUMP: u64 = 2;
/// Bytes before a function that may be padding.
pub const PADDING: usize = 16;

/// The place chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First byte of the jump.
    pub at: Gva,
    /// Whole instructions it covers.
    pub covered: GvaRange,
    /// Where the long jump lies that it leads to, if it is a short one.
    pub by: Option<Gva>,
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
    /// There is room for a short jump only, or not even for that, and no padding for the long one.
    #[error("{why}, and {short}")]
    NoRoom {
        /// Why a long jump has no place.
        why: Box<EntryError>,
        /// Why a short one has none.
        short: ShortError,
    },
}

/// Why a function cannot be entered by a short jump either.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShortError {
    /// No room for two bytes.
    #[error("no short jump fits: {0}")]
    Place(Box<EntryError>),
    /// What stands before the function is no padding, or in use.
    #[error("before the function is no padding that a long jump could take")]
    NoPadding,
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
    /// What stands before it, up to [`PADDING`] bytes.
    pub before: &'a [u8],
}

/// Chooses the place. `parts` are split-off parts of the same function, for their branches back.
///
/// # Errors
/// [`EntryError`].
pub fn choose(function: Body<'_>, parts: &[Body<'_>]) -> Result<Entry, EntryError> {
    let start = match fentry(function) {
        Some(fentry) => fentry.offset + u64::from(fentry.len),
        None => landing_mark(function.running),
    };
    place(function, parts, start, JUMP).or_else(|why| {
        short(function, parts, start).map_err(|short| match short {
            ShortError::Place(same) if *same == why => why,
            short => EntryError::NoRoom {
                why: Box::new(why),
                short,
            },
        })
    })
}

/// A short jump at `start` that leads to the last bytes of the padding.
fn short(function: Body<'_>, parts: &[Body<'_>], start: u64) -> Result<Entry, ShortError> {
    let entry = place(function, parts, start, SHORT_JUMP)
        .map_err(|why| ShortError::Place(Box::new(why)))?;
    let unused = function.before.len() == PADDING && function.before.iter().all(|it| *it == 0x90);
    let by = function.at.wrapping_sub(JUMP);
    match unused {
        true => Ok(Entry {
            by: Some(by),
            ..entry
        }),
        false => Err(ShortError::NoPadding),
    }
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

/// The place for a jump of `len` bytes at `start`, an offset in the function.
pub(super) fn place(
    function: Body<'_>,
    parts: &[Body<'_>],
    start: u64,
    len: u64,
) -> Result<Entry, EntryError> {
    let length = function.running.len() as u64;
    let end = start + len;
    if end > length {
        return Err(EntryError::TooShort {
            have: length.saturating_sub(start),
        });
    }
    no_site_there(function, start, end)?;
    let at = function.at.wrapping_add(start);
    let middle = GvaRange {
        start: at.wrapping_add(1),
        end: at.wrapping_add(len),
    };
    let covered = covered(function, start, end)?;
    for body in std::iter::once(&function).chain(parts) {
        no_branch_into(*body, middle)?;
    }
    Ok(Entry {
        at,
        covered,
        by: None,
    })
}

/// No place that the kernel rewrites while it runs. Returns, retpolines, constants and landing marks are
/// written at boot and never again; so are lock prefixes, but for those that a kernel took out because it booted with one CPU
/// (Linux v6.12 arch/x86/kernel/alternative.c, `alternatives_enable_smp`).
fn no_site_there(function: Body<'_>, start: u64, end: u64) -> Result<(), EntryError> {
    for site in &function.code.sites {
        let running = function.running.get(site.offset as usize);
        let what = match site.kind {
            SiteKind::JumpLabel { .. } => "static-key branch",
            SiteKind::StaticCall => "static call",
            SiteKind::Alternative { .. } => "alternative",
            SiteKind::Paravirt { .. } => "paravirt call",
            SiteKind::LockPrefix if running == Some(&0xf0) => continue,
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
                before: &[0x90; PADDING],
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
            before: &[],
        };
        // From AT + 14 to AT + 2.
        let part = Body {
            code: &cold,
            at: AT.wrapping_add(14),
            running: &cold.bytes,
            before: &[],
        };
        let entry = choose(main, &[part]);
        assert!(
            matches!(&entry, Err(EntryError::NoRoom { why, .. }) if matches!(**why, EntryError::BranchTarget { .. })),
            "{entry:?}"
        );
    }

    /// A nop of ftrace and, after `first`, a static-key branch.
    fn branching(first: &[u8]) -> Code {
        let body = [&NOP5[..], first, &[0x66, 0x90], &PLAIN].concat();
        let reference = crate::patch::Reference {
            symbol: 0,
            addend: 0,
        };
        let label = SiteKind::JumpLabel {
            key: reference,
            target: reference,
            inverted: false,
        };
        let at = 5 + first.len() as u64;
        code(
            &body,
            vec![site(0, 5, SiteKind::Fentry), site(at, 2, label)],
        )
    }

    #[test]
    fn places_that_change_while_the_kernel_runs_are_never_covered() {
        // Nothing, or `push rbp`, before the branch: no room even for a short jump.
        for first in [&[][..], &[0x55]] {
            let entry = chosen(&branching(first));
            assert!(
                matches!(entry, Err(EntryError::Rewritten { .. })),
                "{entry:?}"
            );
        }
    }

    #[test]
    fn a_lock_prefix_is_covered_if_it_is_there_and_not_if_it_may_come_back() {
        // lock inc dword [rdi]; ret; nops
        let with = |prefix| {
            let body = [prefix, 0xff, 0x07, 0xc3, 0x90, 0x90];
            chosen(&code(&body, vec![site(0, 1, SiteKind::LockPrefix)]))
        };
        assert_eq!(with(0xf0).unwrap().at, AT);
        assert!(matches!(with(0x3e), Err(EntryError::Rewritten { .. })));
    }

    #[test]
    fn where_a_long_jump_has_no_place_a_short_one_leads_to_the_padding() {
        // push rbp; push rbx
        let code = branching(&[0x55, 0x53]);
        let entry = chosen(&code).unwrap();
        assert_eq!(entry.at, AT.wrapping_add(5));
        assert_eq!(entry.covered.end, AT.wrapping_add(7));
        assert_eq!(entry.by, Some(AT.wrapping_sub(5)));
        let body = |before| Body {
            code: &code,
            at: AT,
            running: &code.bytes,
            before,
        };
        let mut used = [0x90; PADDING];
        used[3] = 0xe8;
        for before in [&used[..], &[0x90; 3], &[]] {
            let entry = choose(body(before), &[]);
            assert!(
                matches!(
                    entry,
                    Err(EntryError::NoRoom {
                        short: ShortError::NoPadding,
                        ..
                    })
                ),
                "{entry:?}"
            );
        }
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
