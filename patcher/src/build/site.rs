//! The places of a function that a kernel rewrites, as the patch lists them. Found from instructions and
//! relocations where objects have no table for them (a build with objtool delayed to vmlinux.o has no
//! `.return_sites` and the like), from table entries otherwise.

use super::instructions::Flow;
use super::reference::{Reference, Target};
use super::side::Side;
use super::special::{Entry, Special};
use crate::object::Kind;
use crate::patch::{self, Alternative, Fragment, RelocationKind, Site, SiteKind, Trap, TrapKind};

/// Turns targets of one side into symbols of the patch.
pub(super) trait Resolver {
    /// The symbol a target is known by and the distance from it; `None` if it cannot be had, which is then
    /// recorded. `calls`: the place jumps or calls there and does not keep the address.
    fn symbol(&mut self, target: &Target, calls: bool) -> Option<(u32, i64)>;

    /// The symbol of a name that is no symbol of the object.
    fn guest(&mut self, name: &str) -> u32;
}

/// Relocations of the patch for fields of a function or of data; those that cannot be had are left out.
pub(super) fn relocations(
    references: &[Reference],
    calls: impl Fn(&Reference) -> bool,
    resolver: &mut impl Resolver,
) -> Vec<patch::Relocation> {
    let made = references.iter().filter_map(|it| {
        let kind = kind_of(it.kind)?;
        let (symbol, distance) = resolver.symbol(&it.target, calls(it))?;
        let addend = distance.wrapping_sub(it.bias);
        Some(patch::Relocation {
            offset: it.offset,
            kind,
            symbol,
            addend,
        })
    });
    made.collect()
}

/// The patch's form of a relocation kind; `None` if it has none.
pub(super) fn kind_of(kind: Kind) -> Option<RelocationKind> {
    match kind {
        Kind::Relative32 => Some(RelocationKind::Relative32),
        Kind::Absolute64 => Some(RelocationKind::Absolute64),
        Kind::Absolute32 => Some(RelocationKind::Absolute32),
        Kind::Absolute32Signed => Some(RelocationKind::Absolute32Signed),
        Kind::Relative64 | Kind::Other(_) => None,
    }
}

/// Whether a field is the destination of a direct call or jump.
pub(super) fn is_call(side: &Side, function: usize, reference: &Reference) -> bool {
    let instruction = side.code[function].instructions.at(reference.offset);
    instruction.is_some_and(|it| matches!(it.flow, Flow::Call | Flow::Jump | Flow::Branch))
}

/// All sites of a function, sorted.
pub(super) fn sites(side: &Side, function: usize, resolver: &mut impl Resolver) -> Vec<Site> {
    let mut sites = from_instructions(side, function);
    sites.extend(from_references(side, function));
    sites.extend(from_entries(side, function, resolver));
    sites.sort_by_key(|it| it.offset);
    sites
}

fn from_instructions(side: &Side, function: usize) -> Vec<Site> {
    let instructions = side.code[function].instructions.iter();
    let found = instructions.filter_map(|it| {
        let kind = match it.flow {
            Flow::Return => SiteKind::Return,
            Flow::Endbr => SiteKind::Endbr,
            _ => return None,
        };
        Some(Site {
            offset: it.start,
            len: (it.end - it.start) as u8,
            kind,
        })
    });
    found.collect()
}

fn from_references(side: &Side, function: usize) -> Vec<Site> {
    let view = &side.code[function];
    let found = view.references.iter().filter_map(|it| {
        // The trampoline of a static call may be in the same object.
        let is_entry = matches!(
            it.target,
            Target::Outside { distance: 0, .. } | Target::Function { distance: 0, .. }
        );
        let name = is_entry.then(|| side.name_of(&it.target))?;
        let instruction = view.instructions.at(it.offset)?;
        let kind = kind_of_destination(&name, instruction.flow)?;
        let len = u8::try_from(instruction.end - instruction.start).ok()?;
        Some(Site {
            offset: instruction.start,
            len,
            kind,
        })
    });
    found.collect()
}

fn kind_of_destination(name: &str, flow: Flow) -> Option<SiteKind> {
    let calls = flow == Flow::Call;
    if !calls && !matches!(flow, Flow::Jump | Flow::Branch) {
        return None;
    }
    match name {
        "__fentry__" if calls => return Some(SiteKind::Fentry),
        "__x86_return_thunk" if !calls => return Some(SiteKind::Return),
        _ => {}
    }
    if name.starts_with("__SCT__") {
        return Some(SiteKind::StaticCall);
    }
    let register = register_number(name.strip_prefix("__x86_indirect_thunk_")?)?;
    Some(SiteKind::Retpoline {
        register,
        call: calls,
    })
}

/// The number of a register in the x86 encoding (Intel SDM vol. 2, table 2-4 and 3.1.1.1).
fn register_number(name: &str) -> Option<u8> {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    NAMES.iter().position(|it| *it == name).map(|at| at as u8)
}

fn from_entries(side: &Side, function: usize, resolver: &mut impl Resolver) -> Vec<Site> {
    let entries = &side.entries[function];
    let mut sites = Vec::new();
    for entry in entries {
        match &entry.special {
            Special::Alternative { .. } => {
                let Some(replacement) = alternative(entry, resolver) else {
                    continue;
                };
                add_alternative(&mut sites, entry, replacement);
            }
            _ => sites.extend(simple(side, function, entry, resolver)),
        }
    }
    sites
}

fn simple(
    side: &Side,
    function: usize,
    entry: &Entry,
    resolver: &mut impl Resolver,
) -> Option<Site> {
    let site = |len, kind| {
        Some(Site {
            offset: entry.offset,
            len,
            kind,
        })
    };
    match &entry.special {
        Special::LockPrefix => site(1, SiteKind::LockPrefix),
        Special::JumpLabel {
            key,
            target,
            inverted,
        } => {
            let instruction = side.code[function].instructions.at(entry.offset)?;
            let key = reference(resolver.symbol(key, false)?);
            let target = reference(resolver.symbol(target, true)?);
            let kind = SiteKind::JumpLabel {
                key,
                target,
                inverted: *inverted,
            };
            site(
                u8::try_from(instruction.end - instruction.start).ok()?,
                kind,
            )
        }
        Special::Paravirt { slot, len } => site(*len, SiteKind::Paravirt { slot: *slot }),
        Special::RuntimeConstant { name, shift } => {
            let symbol = resolver.guest(name);
            let kind = SiteKind::RuntimeConstant {
                symbol,
                shift: *shift,
            };
            site(if *shift { 1 } else { 8 }, kind)
        }
        // These do not rewrite their place.
        Special::Bug { .. } | Special::Exception { .. } | Special::Unknown => None,
        Special::Alternative { .. } => None,
    }
}

/// All places of a function where the CPU may trap, sorted.
pub(super) fn traps(side: &Side, function: usize, resolver: &mut impl Resolver) -> Vec<Trap> {
    let entries = side.entries[function].iter();
    let made = entries.filter_map(|entry| {
        let kind = match &entry.special {
            Special::Bug { file, line, flags } => TrapKind::Bug {
                file: file.clone(),
                line: *line,
                flags: *flags,
            },
            Special::Exception { fixup, data } => TrapKind::Fault {
                fixup: reference(resolver.symbol(fixup, true)?),
                data: *data,
            },
            _ => return None,
        };
        Some(Trap {
            offset: entry.offset,
            kind,
        })
    });
    made.collect()
}

fn reference((symbol, addend): (u32, i64)) -> patch::Reference {
    patch::Reference { symbol, addend }
}

fn alternative(entry: &Entry, resolver: &mut impl Resolver) -> Option<Alternative> {
    let Special::Alternative {
        feature,
        negated,
        direct_call,
        bytes,
        references,
        ..
    } = &entry.special
    else {
        return None;
    };
    let relocations = relocations(references, |_| true, resolver);
    if relocations.len() != references.len() {
        return None;
    }
    let code = Fragment {
        bytes: bytes.clone(),
        relocations,
    };
    Some(Alternative {
        feature: *feature,
        negated: *negated,
        direct_call: *direct_call,
        code,
    })
}

/// Entries for one place are one site, as long as the longest of them (Linux v6.12
/// arch/x86/kernel/alternative.c, apply_alternatives).
fn add_alternative(sites: &mut Vec<Site>, entry: &Entry, replacement: Alternative) {
    let Special::Alternative { len, .. } = entry.special else {
        return;
    };
    if let Some(Site {
        offset,
        len: longest,
        kind: SiteKind::Alternative { replacements },
    }) = sites.last_mut()
        && *offset == entry.offset
    {
        *longest = (*longest).max(len);
        replacements.push(replacement);
        return;
    }
    let kind = SiteKind::Alternative {
        replacements: vec![replacement],
    };
    sites.push(Site {
        offset: entry.offset,
        len,
        kind,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_tell_the_kind_of_site() {
        let thunk = |register, call| Some(SiteKind::Retpoline { register, call });
        assert_eq!(
            kind_of_destination("__fentry__", Flow::Call),
            Some(SiteKind::Fentry)
        );
        assert_eq!(
            kind_of_destination("__x86_return_thunk", Flow::Jump),
            Some(SiteKind::Return)
        );
        assert_eq!(
            kind_of_destination("__x86_indirect_thunk_rax", Flow::Call),
            thunk(0, true)
        );
        assert_eq!(
            kind_of_destination("__x86_indirect_thunk_r11", Flow::Jump),
            thunk(11, false)
        );
        assert_eq!(
            kind_of_destination("__SCT__x", Flow::Call),
            Some(SiteKind::StaticCall)
        );
        assert_eq!(kind_of_destination("__x86_return_thunk", Flow::Other), None);
        assert_eq!(
            kind_of_destination("__x86_indirect_thunk_array", Flow::Other),
            None
        );
        assert_eq!(kind_of_destination("printk", Flow::Call), None);
    }
}
