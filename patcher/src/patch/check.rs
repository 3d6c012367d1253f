//! Whether a decoded patch is well formed: every index, offset, alignment, count and name, because a patch
//! file may be hostile. Owns no knowledge of any guest: that names exist and bytes fit is for linking.

use super::{
    Alternative, Code, Patch, Reference, Relocation, RelocationKind, Replacement, Requirement,
    Section, SectionKind, Site, SiteKind, Symbol,
};

/// Longest name of a patch in bytes: it names files too.
pub const MAX_NAME: usize = 100;
/// Longest symbol or section name in bytes: `KSYM_NAME_LEN` (Linux v6.12 include/linux/kallsyms.h).
pub const MAX_SYMBOL_NAME: usize = 512;
/// Most functions, sections or symbols of one patch.
pub const MAX_ITEMS: usize = 1 << 16;
/// Largest alignment of a section in bytes: one page.
pub const MAX_ALIGN: u64 = 4096;

/// What is wrong with a patch's content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Bytes follow the encoded patch.
    #[error("{bytes} bytes follow the content")]
    Leftover {
        /// How many.
        bytes: usize,
    },
    /// A name that is empty, too long or has a character it may not have.
    #[error("{what} is not a valid name: {name:?}")]
    Name {
        /// Which kind of name.
        what: &'static str,
        /// The name, cut to what a message can hold.
        name: String,
    },
    /// More of something than a patch may have, or none where one is needed.
    #[error("{count} {what}, between {least} and {most} are accepted")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// At least.
        least: usize,
        /// At most.
        most: usize,
    },
    /// Two functions to be replaced are the same.
    #[error("{name} is replaced twice")]
    Twice {
        /// The function.
        name: String,
    },
    /// An index that leads nowhere, or to something of the wrong kind.
    #[error("{place}: {what} {index} {problem}")]
    Index {
        /// Where.
        place: String,
        /// Which kind of index.
        what: &'static str,
        /// The index.
        index: u32,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A field or site that is not inside its bytes, or not after the one before.
    #[error("{place}: {what} at {offset:#x} {problem}")]
    Offset {
        /// Where.
        place: String,
        /// Field, site, symbol …
        what: &'static str,
        /// The offset.
        offset: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An alignment that is not a power of two, or too large.
    #[error("{place}: alignment {align} is not a power of two up to {MAX_ALIGN}")]
    Align {
        /// Where.
        place: String,
        /// The alignment.
        align: u64,
    },
    /// A site of a length or with a parameter its kind does not have.
    #[error("{place}: site at {offset:#x} has an impossible {what}")]
    Site {
        /// Where.
        place: String,
        /// The site's offset.
        offset: u64,
        /// What is impossible.
        what: &'static str,
    },
}

/// Checks all of a patch.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(patch: &Patch) -> Result<(), Malformed> {
    patch_name(&patch.name)?;
    requirement(&patch.requires)?;
    count("replaced functions", patch.replaced.len(), 1)?;
    count("sections", patch.sections.len(), 1)?;
    count("symbols", patch.symbols.len(), 0)?;
    patch
        .sections
        .iter()
        .try_for_each(|it| section(patch, it))?;
    patch
        .symbols
        .iter()
        .enumerate()
        .try_for_each(|(index, it)| symbol(patch, index, it))?;
    patch
        .replaced
        .iter()
        .try_for_each(|it| replacement(patch, it))?;
    no_function_twice(&patch.replaced)
}

/// Checks the name of a patch: a letter or digit, then letters, digits, `.`, `_` and `-`; it can stand in
/// a file name and on a command line as it is.
///
/// # Errors
/// [`Malformed::Name`].
pub fn patch_name(name: &str) -> Result<(), Malformed> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    named(
        "patch name",
        name,
        starts_well && name.len() <= MAX_NAME && name.chars().all(allowed),
    )
}

fn named(what: &'static str, name: &str, right: bool) -> Result<(), Malformed> {
    if right {
        return Ok(());
    }
    Err(Malformed::Name {
        what,
        name: name.chars().take(80).collect(),
    })
}

/// Visible ASCII without spaces: what the names of symbols and sections in kernel objects are made of.
fn printable(what: &'static str, name: &str) -> Result<(), Malformed> {
    let length_fits = (1..=MAX_SYMBOL_NAME).contains(&name.len());
    named(
        what,
        name,
        length_fits && name.bytes().all(|byte| byte.is_ascii_graphic()),
    )
}

fn requirement(requires: &Requirement) -> Result<(), Malformed> {
    printable("patched object", &requires.object)?;
    if let Some(release) = &requires.release {
        printable("kernel release", release)?;
    }
    let Some(id) = &requires.build_id else {
        return Ok(());
    };
    let hex = id
        .bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    named(
        "build id",
        id,
        hex && (16..=128).contains(&id.len()) && id.len() % 2 == 0,
    )
}

fn count(what: &'static str, count: usize, least: usize) -> Result<(), Malformed> {
    if (least..=MAX_ITEMS).contains(&count) {
        return Ok(());
    }
    Err(Malformed::Count {
        what,
        count,
        least,
        most: MAX_ITEMS,
    })
}

fn no_function_twice(replaced: &[Replacement]) -> Result<(), Malformed> {
    let mut keys: Vec<_> = replaced.iter().map(|it| (&it.name, it.sympos)).collect();
    keys.sort_unstable();
    match keys.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Malformed::Twice {
            name: pair[0].0.clone(),
        }),
        None => Ok(()),
    }
}

fn section(patch: &Patch, section: &Section) -> Result<(), Malformed> {
    printable("section", &section.name)?;
    if !section.align.is_power_of_two() || section.align > MAX_ALIGN {
        return Err(Malformed::Align {
            place: section.name.clone(),
            align: section.align,
        });
    }
    let place = Body {
        patch,
        place: &section.name,
        bytes: &section.bytes,
        side: Side::New,
    };
    place.relocations(&section.relocations)?;
    place.sites(&section.sites)
}

fn symbol(patch: &Patch, index: usize, symbol: &Symbol) -> Result<(), Malformed> {
    match symbol {
        Symbol::Own {
            name,
            section,
            offset,
        } => {
            printable("own symbol", name)?;
            let place = || format!("symbol {index} ({name})");
            let home = section_at(patch, *section, place)?;
            // One past the end is where an end marker points to.
            if *offset > home.bytes.len() as u64 {
                let (place, what) = (place(), "symbol");
                return Err(Malformed::Offset {
                    place,
                    what,
                    offset: *offset,
                    problem: OUTSIDE,
                });
            }
            Ok(())
        }
        Symbol::Guest { name, sympos } => {
            printable("guest symbol", name)?;
            sympos_counts_from_one(name, *sympos)
        }
        Symbol::OldBytes { section, .. } => printable("section", section),
    }
}

fn replacement(patch: &Patch, it: &Replacement) -> Result<(), Malformed> {
    printable("function", &it.name)?;
    sympos_counts_from_one(&it.name, it.sympos)?;
    code(patch, &it.name, &it.old)?;
    count("split-off parts", it.old_parts.len(), 0)?;
    for part in &it.old_parts {
        printable("split-off part", &part.name)?;
        code(patch, &part.name, &part.code)?;
    }
    let home = section_at(patch, it.new_section, || it.name.clone())?;
    if home.kind != SectionKind::Text {
        return Err(index(&it.name, "section", it.new_section, "is not code"));
    }
    if it.new_offset >= home.bytes.len() as u64 {
        let (place, what) = (it.name.clone(), "new entry");
        return Err(Malformed::Offset {
            place,
            what,
            offset: it.new_offset,
            problem: OUTSIDE,
        });
    }
    Ok(())
}

fn sympos_counts_from_one(name: &str, sympos: Option<u32>) -> Result<(), Malformed> {
    match sympos {
        Some(0) => Err(index(name, "sympos", 0, "is not counted from 1")),
        _ => Ok(()),
    }
}

fn section_at(
    patch: &Patch,
    section: u32,
    place: impl Fn() -> String,
) -> Result<&Section, Malformed> {
    let found = patch.sections.get(section as usize);
    found.ok_or_else(|| index(&place(), "section", section, ABSENT))
}

fn index(place: &str, what: &'static str, index: u32, problem: &'static str) -> Malformed {
    Malformed::Index {
        place: place.to_owned(),
        what,
        index,
        problem,
    }
}

fn code(patch: &Patch, place: &str, code: &Code) -> Result<(), Malformed> {
    if code.bytes.is_empty() {
        let (place, what) = (place.to_owned(), "code");
        return Err(Malformed::Offset {
            place,
            what,
            offset: 0,
            problem: "is empty",
        });
    }
    let body = Body {
        patch,
        place,
        bytes: &code.bytes,
        side: Side::Old,
    };
    body.relocations(&code.relocations)?;
    body.sites(&code.sites)
}

const OUTSIDE: &str = "is outside";
const ABSENT: &str = "does not exist";

/// Which code may name what: old code knows nothing of the patch, new code nothing of the old object.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Old,
    New,
}

/// Bytes with what refers into them.
struct Body<'a> {
    patch: &'a Patch,
    place: &'a str,
    bytes: &'a [u8],
    side: Side,
}

impl Body<'_> {
    fn relocations(&self, relocations: &[Relocation]) -> Result<(), Malformed> {
        let mut free_from = 0;
        for relocation in relocations {
            let offset = relocation.offset;
            if offset < free_from {
                return Err(self.offset("field", offset, "overlaps the one before"));
            }
            free_from = self.end("field", offset, field_bytes(relocation.kind))?;
            self.symbol(relocation.symbol)?;
        }
        Ok(())
    }

    fn sites(&self, sites: &[Site]) -> Result<(), Malformed> {
        let mut last = 0;
        for site in sites {
            if site.offset < last {
                return Err(self.offset("site", site.offset, "is before the one before it"));
            }
            last = site.offset;
            self.end("site", site.offset, u64::from(site.len))?;
            self.site(site)?;
        }
        Ok(())
    }

    fn site(&self, site: &Site) -> Result<(), Malformed> {
        let lengths = possible_lengths(&site.kind);
        if !lengths.contains(&site.len) {
            return Err(self.impossible(site, "length"));
        }
        match &site.kind {
            SiteKind::Retpoline { register: 16.., .. } => Err(self.impossible(site, "register")),
            SiteKind::JumpLabel { key, target, .. } => {
                self.reference(*key)?;
                self.reference(*target)
            }
            SiteKind::Alternative { replacements } => self.alternatives(site, replacements),
            SiteKind::RuntimeConstant { symbol, shift } => {
                if site.len != if *shift { 1 } else { 8 } {
                    return Err(self.impossible(site, "length"));
                }
                self.symbol(*symbol)
            }
            _ => Ok(()),
        }
    }

    fn alternatives(&self, site: &Site, replacements: &[Alternative]) -> Result<(), Malformed> {
        count("alternatives of one site", replacements.len(), 1)?;
        for replacement in replacements {
            let code = &replacement.code;
            if code.bytes.len() > usize::from(site.len) {
                return Err(self.impossible(site, "replacement length"));
            }
            let text = Body {
                bytes: &code.bytes,
                ..*self
            };
            text.relocations(&code.relocations)?;
        }
        Ok(())
    }

    fn reference(&self, reference: Reference) -> Result<(), Malformed> {
        self.symbol(reference.symbol)
    }

    fn symbol(&self, at: u32) -> Result<(), Malformed> {
        match (self.patch.symbols.get(at as usize), self.side) {
            (None, _) => Err(index(self.place, "symbol", at, ABSENT)),
            (Some(Symbol::Own { .. }), Side::Old) => Err(index(
                self.place,
                "symbol",
                at,
                "is new but named by old code",
            )),
            (Some(Symbol::OldBytes { .. }), Side::New) => Err(index(
                self.place,
                "symbol",
                at,
                "is old but named by new code",
            )),
            _ => Ok(()),
        }
    }

    /// The end of something inside the bytes.
    fn end(&self, what: &'static str, offset: u64, len: u64) -> Result<u64, Malformed> {
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= self.bytes.len() as u64);
        end.ok_or_else(|| self.offset(what, offset, OUTSIDE))
    }

    fn offset(&self, what: &'static str, offset: u64, problem: &'static str) -> Malformed {
        Malformed::Offset {
            place: self.place.to_owned(),
            what,
            offset,
            problem,
        }
    }

    fn impossible(&self, site: &Site, what: &'static str) -> Malformed {
        Malformed::Site {
            place: self.place.to_owned(),
            offset: site.offset,
            what,
        }
    }
}

/// Size in bytes of a relocated field.
pub(crate) const fn field_bytes(kind: RelocationKind) -> u64 {
    match kind {
        RelocationKind::Absolute64 => 8,
        RelocationKind::Relative32
        | RelocationKind::Absolute32
        | RelocationKind::Absolute32Signed => 4,
    }
}

/// Lengths in bytes as compilers and the kernel's macros make them. A tail call or return can be a
/// conditional jump of 6 bytes; `ret` is 1 byte, `ret imm16` 3, `rep ret` 2.
fn possible_lengths(kind: &SiteKind) -> std::ops::RangeInclusive<u8> {
    match kind {
        SiteKind::Fentry => 5..=5,
        SiteKind::Return => 1..=6,
        SiteKind::Retpoline { .. } | SiteKind::StaticCall => 5..=6,
        SiteKind::JumpLabel { .. } => 2..=5,
        SiteKind::Alternative { .. } | SiteKind::Paravirt { .. } => 1..=u8::MAX,
        SiteKind::RuntimeConstant { .. } => 1..=8,
        SiteKind::Endbr => 4..=4,
        SiteKind::LockPrefix => 1..=1,
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    /// What is said of the sample after a change.
    fn after(change: impl FnOnce(&mut Patch)) -> String {
        let mut patch = sample::patch();
        change(&mut patch);
        check(&patch)
            .expect_err("the change must be refused")
            .to_string()
    }

    #[test]
    fn the_sample_is_well_formed() {
        assert_eq!(check(&sample::patch()), Ok(()));
    }

    #[test]
    fn a_patch_name_can_never_be_a_path_or_an_option() {
        for name in [
            "",
            ".",
            "..",
            "-a",
            "a/b",
            "a b",
            "a\0",
            "é",
            &"a".repeat(101),
        ] {
            assert!(patch_name(name).is_err(), "{name:?}");
        }
        for name in ["a", "CVE-2026-1234", "fix_1.2", &"a".repeat(100)] {
            assert_eq!(patch_name(name), Ok(()), "{name:?}");
        }
        assert!(after(|p| p.name = "../x".to_owned()).contains("patch name"));
    }

    #[test]
    fn names_with_control_characters_are_refused() {
        assert!(after(|p| p.replaced[0].name = "a\x1b[2J".to_owned()).contains("function"));
        assert!(after(|p| p.sections[0].name.clear()).contains("section"));
        assert!(after(|p| p.requires.object = "a b".to_owned()).contains("object"));
        assert!(after(|p| p.requires.release = Some("\n".to_owned())).contains("release"));
        assert!(after(|p| p.requires.build_id = Some("ABCD".repeat(8))).contains("build id"));
        assert!(after(|p| p.replaced[0].old_parts[0].name = "x".repeat(513)).contains("split-off"));
    }

    #[test]
    fn a_patch_that_replaces_nothing_is_refused() {
        assert!(after(|p| p.replaced.clear()).contains("0 replaced functions"));
        assert!(after(|p| p.sections.clear()).contains("0 sections"));
    }

    #[test]
    fn a_function_replaced_twice_is_refused() {
        let said = after(|p| {
            let again = p.replaced[0].clone();
            p.replaced.push(again);
        });
        assert_eq!(said, "sample is replaced twice");
    }

    #[test]
    fn indices_that_lead_nowhere_are_refused() {
        assert!(after(|p| p.replaced[0].new_section = 2).contains("section 2 does not exist"));
        assert!(after(|p| p.replaced[0].new_section = 1).contains("section 1 is not code"));
        assert!(
            after(|p| p.sections[0].relocations[0].symbol = 5).contains("symbol 5 does not exist")
        );
        assert!(
            after(|p| p.replaced[0].old.relocations[0].symbol = u32::MAX).contains("not exist")
        );
        assert!(after(|p| p.replaced[0].sympos = Some(0)).contains("counted from 1"));
        assert!(
            after(|p| {
                p.symbols[4] = Symbol::Own {
                    name: "x".to_owned(),
                    section: 7,
                    offset: 0,
                };
            })
            .contains("section 7 does not exist")
        );
    }

    #[test]
    fn old_code_cannot_name_new_sections_nor_new_code_old_bytes() {
        assert!(after(|p| p.replaced[0].old.relocations[0].symbol = 4).contains("by old code"));
        assert!(after(|p| p.sections[0].relocations[0].symbol = 2).contains("by new code"));
    }

    #[test]
    fn offsets_outside_are_refused_without_overflow() {
        for offset in [43, 46, u64::MAX, u64::MAX - 3] {
            let said = after(|p| p.sections[0].relocations[0].offset = offset);
            assert!(said.contains("is outside"), "{said}");
            let said = after(|p| p.sections[0].sites[0].offset = offset);
            assert!(said.contains("is outside"), "{said}");
        }
        assert!(after(|p| p.replaced[0].new_offset = 46).contains("new entry"));
        assert!(
            after(|p| {
                p.symbols[4] = Symbol::Own {
                    name: "x".to_owned(),
                    section: 1,
                    offset: 5,
                };
            })
            .contains("is outside")
        );
    }

    #[test]
    fn fields_must_be_sorted_and_apart() {
        assert!(after(|p| p.replaced[0].old.relocations.swap(0, 1)).contains("overlaps"));
        assert!(after(|p| p.replaced[0].old.relocations[1].offset = 4).contains("overlaps"));
        assert!(after(|p| p.replaced[0].old.sites.swap(0, 1)).contains("before"));
    }

    #[test]
    fn alignments_must_be_powers_of_two_within_a_page() {
        for align in [0, 3, 8192, u64::MAX] {
            assert!(after(|p| p.sections[0].align = align).contains("alignment"));
        }
    }

    #[test]
    fn impossible_sites_are_refused() {
        assert!(after(|p| p.replaced[0].old.sites[0].len = 4).contains("length"));
        assert!(
            after(|p| {
                p.replaced[0].old.sites[2].kind = SiteKind::Retpoline {
                    register: 16,
                    call: false,
                };
            })
            .contains("register")
        );
        assert!(
            after(|p| {
                let key = Reference {
                    symbol: 77,
                    addend: 0,
                };
                p.replaced[0].old.sites[3].kind = SiteKind::JumpLabel {
                    key,
                    target: key,
                    inverted: false,
                };
            })
            .contains("symbol 77")
        );
        assert!(
            after(|p| {
                p.replaced[0].old.sites[3].kind = SiteKind::RuntimeConstant {
                    symbol: 0,
                    shift: true,
                };
            })
            .contains("length")
        );
        assert!(after(|p| alternative(p).code.bytes.push(0)).contains("replacement length"));
        assert!(after(|p| alternative(p).code.bytes.clear()).contains("is outside"));
    }

    fn alternative(patch: &mut Patch) -> &mut Alternative {
        match &mut patch.replaced[0].old.sites[5].kind {
            SiteKind::Alternative { replacements } => &mut replacements[0],
            other => panic!("{other:?}"),
        }
    }
}
