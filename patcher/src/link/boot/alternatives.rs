//! Alternative sites and paravirt calls, as the kernel leaves them (Linux v6.12 and v6.1
//! arch/x86/kernel/alternative.c, `apply_alternatives`, `apply_paravirt`).

use iced_x86::{Code, Decoder, DecoderOptions};
use vmpatch_introspect::Gva;

use super::{BootError, Facts, Image, Resolve, Rules, nops};
use crate::link::live::Live;
use crate::link::relocate::branch;
use crate::patch::{Alternative, Site};

const WHAT: &str = "alternative";

/// Runs the kernel's loop over the entries of one site: each whose condition holds overwrites the site,
/// later ones win; each whose condition does not hold only has the site's nops joined.
///
/// # Errors
/// [`BootError`].
pub fn apply(
    image: &mut Image,
    site: &Site,
    replacements: &[Alternative],
    facts: &Facts,
    live: &dyn Live,
    resolve: Resolve<'_>,
) -> Result<(), BootError> {
    let original = image.site(site)?.to_vec();
    let mut now = original.clone();
    let at = image.address(site.offset);
    for entry in replacements {
        let unknown = BootError::UnknownFeature {
            what: WHAT,
            offset: site.offset,
        };
        if facts.has(entry.feature).ok_or(unknown)? == entry.negated {
            nops::optimise(facts.rules, &mut now);
            continue;
        }
        now = if entry.direct_call {
            direct_call(site, at, &original, facts, live)?
        } else {
            replaced(site, at, entry, facts.rules, resolve)?
        };
        now.resize(original.len(), 0x90);
        nops::optimise(facts.rules, &mut now);
    }
    image.write(site.offset, &now)
}

/// The replacement at the site's place, its branches as the kernel shortens them.
fn replaced(
    site: &Site,
    at: Gva,
    entry: &Alternative,
    rules: Rules,
    resolve: Resolve<'_>,
) -> Result<Vec<u8>, BootError> {
    if entry.code.bytes.len() > usize::from(site.len) {
        let why = "replacement is longer than the site".to_owned();
        return Err(BootError::Site {
            what: WHAT,
            offset: site.offset,
            why,
        });
    }
    let mut text = Image {
        at,
        bytes: entry.code.bytes.clone(),
    };
    if !text.relocate(&entry.code.relocations, resolve)?.is_empty() {
        return Err(BootError::Unresolved {
            what: WHAT,
            offset: site.offset,
        });
    }
    match rules {
        Rules::Single => shorten_every_jump(&mut text.bytes),
        Rules::Rows => shorten_lone_forward_jump(&mut text.bytes),
    }
    Ok(text.bytes)
}

/// 6.12 `__apply_relocation`: every `jmp rel32` whose target is near becomes `jmp rel8` and `int3`.
fn shorten_every_jump(bytes: &mut [u8]) {
    for (offset, distance) in long_jumps(bytes) {
        // From the end of the short form, which is three bytes shorter.
        let Ok(short) = i8::try_from(i64::from(distance) + 3) else {
            continue;
        };
        let form = [0xeb, short.to_le_bytes()[0], 0xcc, 0xcc, 0xcc];
        bytes
            .iter_mut()
            .skip(offset)
            .zip(form)
            .for_each(|(into, byte)| *into = byte);
    }
}

fn long_jumps(bytes: &[u8]) -> Vec<(usize, i32)> {
    let mut decoder = Decoder::new(64, bytes, DecoderOptions::NONE);
    let mut found = Vec::new();
    while decoder.can_decode() {
        let offset = decoder.position();
        let instruction = decoder.decode();
        let field = bytes.get(offset + 1..).and_then(|rest| rest.first_chunk());
        if let (Code::Jmp_rel32_64, Some(field), 5) = (instruction.code(), field, instruction.len())
        {
            found.push((offset, i32::from_le_bytes(*field)));
        }
    }
    found
}

/// 6.1 `recompute_jump`: only a replacement that is nothing but one jump, only forwards, and filled with a
/// nop.
fn shorten_lone_forward_jump(bytes: &mut [u8]) {
    let &mut [0xe9, ref field @ ..] = bytes else {
        return;
    };
    let Ok(field) = <[u8; 4]>::try_from(field) else {
        return;
    };
    let from_start = i64::from(i32::from_le_bytes(field)) + 5;
    if (0..=129).contains(&from_start) {
        // As there: one below two bytes wraps into the byte and cannot occur in real code.
        let form = [0xeb, (from_start - 2) as u8, 0x0f, 0x1f, 0x00];
        bytes
            .iter_mut()
            .zip(form)
            .for_each(|(into, byte)| *into = byte);
    }
}

/// 6.12 `alt_replace_call`: `call *pv_ops+N(%rip)` becomes a call to what is there, or nothing.
fn direct_call(
    site: &Site,
    at: Gva,
    original: &[u8],
    facts: &Facts,
    live: &dyn Live,
) -> Result<Vec<u8>, BootError> {
    let &[0xff, 0x15, ref field @ ..] = original else {
        let why = format!("{original:02x?} is no indirect call");
        return Err(BootError::Site {
            what: WHAT,
            offset: site.offset,
            why,
        });
    };
    let field = field
        .first_chunk()
        .map_or(0, |field| i32::from_le_bytes(*field));
    let pointer = at
        .wrapping_add(6)
        .wrapping_add(i64::from(field).cast_unsigned());
    call_of(Gva(live.read_u64(pointer)?), at, site, facts)
}

/// 6.1 `apply_paravirt`: the whole site becomes a call to what slot `slot` of `pv_ops` holds.
///
/// # Errors
/// [`BootError`].
pub fn paravirt(
    image: &mut Image,
    site: &Site,
    slot: u8,
    facts: &Facts,
    live: &dyn Live,
) -> Result<(), BootError> {
    let what = "paravirt call";
    let unresolved = BootError::Unresolved {
        what,
        offset: site.offset,
    };
    let pointer = live
        .unique("pv_ops")
        .ok_or(unresolved)?
        .wrapping_add(u64::from(slot) * 8);
    let target = Gva(live.read_u64(pointer)?);
    let at = image.address(site.offset);
    let mut now = call_of(target, at, site, facts)?;
    let used = now.len();
    now.resize(usize::from(site.len), 0x90);
    nops::fill(facts.rules, now.get_mut(used..).unwrap_or_default());
    image.write(site.offset, &now)
}

fn call_of(target: Gva, at: Gva, site: &Site, facts: &Facts) -> Result<Vec<u8>, BootError> {
    if Some(target) == facts.paravirt_nop {
        return Ok(Vec::new());
    }
    let target = if target == Gva(0) {
        let unresolved = BootError::Unresolved {
            what: "paravirt call",
            offset: site.offset,
        };
        facts.paravirt_bug.ok_or(unresolved)?
    } else {
        target
    };
    if site.len < 5 {
        let why = "too short for a call".to_owned();
        return Err(BootError::Site {
            what: "paravirt call",
            offset: site.offset,
            why,
        });
    }
    Ok(branch(0xe8, at, target)?.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::tests::{Fake, facts as plain};
    use crate::patch::{Fragment, Relocation, RelocationKind, SiteKind};
    use vmpatch_introspect::features::CpuFeatures;

    const AT: Gva = Gva(0xffff_ffff_8100_0000);

    fn facts(rules: Rules, features: u32) -> Facts {
        Facts {
            rules,
            features: Some(CpuFeatures::new(vec![features])),
            paravirt_nop: Some(Gva(0xffff_ffff_8200_0000)),
            ..plain()
        }
    }

    fn entry(feature: u16, bytes: &[u8]) -> Alternative {
        Alternative {
            feature,
            negated: false,
            direct_call: false,
            code: Fragment {
                bytes: bytes.to_vec(),
                relocations: Vec::new(),
            },
        }
    }

    fn outcome(
        rules: Rules,
        features: u32,
        original: &[u8],
        entries: &[Alternative],
        live: &Fake,
    ) -> Vec<u8> {
        let mut image = Image {
            at: AT,
            bytes: original.to_vec(),
        };
        let kind = SiteKind::Alternative {
            replacements: entries.to_vec(),
        };
        let site = Site {
            offset: 0,
            len: original.len() as u8,
            kind,
        };
        let target = |_: u32| Some(AT.wrapping_add(0x20));
        apply(
            &mut image,
            &site,
            entries,
            &facts(rules, features),
            live,
            &target,
        )
        .unwrap();
        image.bytes
    }

    #[test]
    fn the_later_of_two_matching_entries_wins() {
        let entries = [entry(0, &[0xfa]), entry(1, &[0xfb])];
        let bytes = |features| outcome(Rules::Single, features, &[0x90; 3], &entries, &Fake::new());
        assert_eq!(bytes(0b00), [0x0f, 0x1f, 0x00]);
        assert_eq!(bytes(0b01), [0xfa, 0x66, 0x90]);
        assert_eq!(bytes(0b11), [0xfb, 0x66, 0x90]);
    }

    #[test]
    fn a_near_jump_is_shortened_in_the_way_of_its_generation() {
        let mut jump = entry(0, &[0xe9, 0, 0, 0, 0]);
        let relocation = Relocation {
            offset: 1,
            kind: RelocationKind::Relative32,
            symbol: 0,
            addend: -4,
        };
        jump.code.relocations.push(relocation);
        let bytes = |rules| outcome(rules, 1, &[0x90; 5], &[jump.clone()], &Fake::new());
        assert_eq!(bytes(Rules::Single), [0xeb, 0x1e, 0xcc, 0xcc, 0xcc]);
        assert_eq!(bytes(Rules::Rows), [0xeb, 0x1e, 0x0f, 0x1f, 0x00]);
    }

    #[test]
    fn a_paravirt_call_becomes_direct_or_nothing() {
        let mut direct = entry(0, &[0xe8, 0, 0, 0, 0]);
        direct.direct_call = true;
        // call *0x100(%rip)
        let original = [0xff, 0x15, 0x00, 0x01, 0x00, 0x00];
        let mut live = Fake::new();
        live.put(
            AT.wrapping_add(0x106),
            &0xffff_ffff_8100_1000_u64.to_le_bytes(),
        );
        let bytes = outcome(Rules::Single, 1, &original, &[direct.clone()], &live);
        assert_eq!(bytes, [0xe8, 0xfb, 0x0f, 0x00, 0x00, 0x90]);
        live.put(
            AT.wrapping_add(0x106),
            &0xffff_ffff_8200_0000_u64.to_le_bytes(),
        );
        let bytes = outcome(Rules::Single, 1, &original, &[direct], &live);
        assert_eq!(bytes, [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00]);
    }

    #[test]
    fn without_feature_words_nothing_is_guessed() {
        let mut image = Image {
            at: AT,
            bytes: vec![0x90; 3],
        };
        let entries = [entry(0, &[0xfa])];
        let kind = SiteKind::Alternative {
            replacements: entries.to_vec(),
        };
        let site = Site {
            offset: 0,
            len: 3,
            kind,
        };
        let mut facts = facts(Rules::Single, 0);
        facts.features = None;
        let done = apply(&mut image, &site, &entries, &facts, &Fake::new(), &|_| None);
        assert!(matches!(done, Err(BootError::UnknownFeature { .. })));
    }
}
