//! Whether a decoded patch is well formed: every index, offset, alignment, count and name, because a patch
//! file may be hostile. Owns no knowledge of any guest: that names exist and bytes fit is for linking.

mod body;

use std::collections::BTreeSet;

use super::{Callback, Code, Patch, Replacement, Requirement, Section, SectionKind, Symbol, Unit};
use body::{Body, Side};

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
    /// Two callbacks of one kind.
    #[error("there are two callbacks {kind}")]
    Callbacks {
        /// Which.
        kind: &'static str,
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
    count("files", patch.units.len(), 1)?;
    patch.units.iter().try_for_each(unit)?;
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
    no_function_twice(&patch.replaced)?;
    callbacks(patch)
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
pub(super) fn printable(what: &'static str, name: &str) -> Result<(), Malformed> {
    let length_fits = (1..=MAX_SYMBOL_NAME).contains(&name.len());
    named(
        what,
        name,
        length_fits && name.bytes().all(|byte| byte.is_ascii_graphic()),
    )
}

fn requirement(requires: &Requirement) -> Result<(), Malformed> {
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

fn unit(unit: &Unit) -> Result<(), Malformed> {
    printable("file", &unit.file)?;
    printable("patched object", &unit.object)
}

fn unit_exists(patch: &Patch, place: &str, at: u32) -> Result<(), Malformed> {
    let found = patch.units.get(at as usize).map(drop);
    found.ok_or_else(|| index(place, "file", at, ABSENT))
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
    let mut keys: Vec<_> = replaced
        .iter()
        .map(|it| (&it.name, it.unit, it.sympos))
        .collect();
    keys.sort_unstable();
    match keys.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Malformed::Twice {
            name: pair[0].0.clone(),
        }),
        None => Ok(()),
    }
}

fn callbacks(patch: &Patch) -> Result<(), Malformed> {
    let mut seen = BTreeSet::new();
    for Callback {
        kind,
        name,
        section,
    } in &patch.callbacks
    {
        printable("callback", name)?;
        let home = section_at(patch, *section, || name.clone())?;
        if home.kind != SectionKind::Text || home.bytes.is_empty() {
            return Err(index(name, "section", *section, "is not code"));
        }
        if !seen.insert(*kind) {
            return Err(Malformed::Callbacks { kind: kind.name() });
        }
    }
    Ok(())
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
    place.sites(&section.sites)?;
    place.traps(section.kind, &section.traps)?;
    place.unwind(section.kind, &section.unwind)
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
        Symbol::Guest { unit, name, sympos } => {
            printable("guest symbol", name)?;
            unit_exists(patch, name, *unit)?;
            sympos_counts_from_one(name, *sympos)
        }
        Symbol::OldBytes { section, .. } => printable("section", section),
        Symbol::ShadowRoot => Ok(()),
    }
}

fn replacement(patch: &Patch, it: &Replacement) -> Result<(), Malformed> {
    printable("function", &it.name)?;
    unit_exists(patch, &it.name, it.unit)?;
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

#[cfg(test)]
mod tests;
