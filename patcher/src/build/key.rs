//! What makes two fields of two objects the same: that they refer to the same thing, whatever number or
//! offset it has in each. Owns that form; pairing variables whose names differ is [`super::pair`]'s.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};

use super::inventory::numbered_base;
use super::policy;
use super::reference::{Reference, Target};
use super::side::Side;
use crate::object::{Kind, SectionId};

/// How deep content refers to other content before two are just called different.
const MAX_DEPTH: usize = 8;
/// How many fields content may have, that of what it refers to included, before two are just called different.
const MAX_FIELDS: usize = 1 << 12;

/// A target in a form that means the same in both objects.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// By name, as the old object has it.
    Named(String, i64),
    /// A function or variable that only the new object has, or one of another file whose name means one of its own in the old.
    New(String, i64),
    /// By what is there: strings, constants, what has no name or one that changes.
    Content(Box<Content>, i64),
    /// `.altinstr_aux`: code that only runs until alternatives are applied, and its offset changes with
    /// every change of the object (Linux v6.12 arch/x86/include/asm/cpufeature.h).
    Auxiliary,
    /// Code without a name, by section and offset.
    Nameless(String, i64),
    /// Too deep, too large, or outside of the object: equal to nothing in the other one.
    Unclear {
        /// Of the old object.
        old: bool,
        /// Where.
        section: SectionId,
        /// Bytes from there.
        distance: i64,
    },
}

/// Bytes with fields masked, and what the fields refer to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Content {
    pub(super) bytes: Vec<u8>,
    pub(super) fields: Vec<Field>,
}

/// One field.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Field {
    pub(super) offset: u64,
    pub(super) kind: Kind,
    pub(super) key: Key,
}

/// The names by which one side's functions and variables are known to both.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// For the new side: its functions to the old side's names. Empty on the old side.
    pub(super) functions: HashMap<usize, String>,
    /// For the new side: its variables to the old side's names. `None`: the side is the old one itself.
    pub(super) variables: Option<HashMap<usize, String>>,
    /// For the new side: what the old one defines, to itself alone.
    pub(super) locals: HashSet<String>,
}

/// Whether a variable is compared by content: read-only, and its name has a number that changes.
pub(super) fn is_numbered_constant(side: &Side, variable: usize) -> bool {
    let variable = side.variable(variable);
    numbered_base(&variable.name).is_some() && !side.object.section(variable.section).flags.write
}

/// How far content was followed into what it refers to.
struct Walk<'a> {
    depth: usize,
    /// Fields that may still be looked at.
    left: &'a Cell<usize>,
}

impl Walk<'_> {
    /// One step on, if it may be made.
    fn deeper(&self) -> Option<Self> {
        let may = self.depth < MAX_DEPTH && self.left.get() > 0;
        may.then_some(Self {
            depth: self.depth + 1,
            left: self.left,
        })
    }
}

/// The key of a target.
pub(super) fn key(side: &Side, names: &Names, target: &Target) -> Key {
    let left = &Cell::new(MAX_FIELDS);
    key_at(side, names, target, &Walk { depth: 0, left })
}

fn key_at(side: &Side, names: &Names, target: &Target, walk: &Walk<'_>) -> Key {
    match *target {
        Target::Outside { distance, .. } => match side.name_of(target) {
            name if names.locals.contains(&name) => Key::New(name, distance),
            name => Key::Named(name, distance),
        },
        Target::Function { function, distance } => function_key(side, names, function, distance),
        Target::Variable { variable, distance } | Target::Near { variable, distance }
            if is_numbered_constant(side, variable) =>
        {
            let it = side.variable(variable);
            let end = it.start.saturating_add(it.size);
            content_key(side, names, it.section, (it.start, end), distance, walk)
        }
        Target::Variable { variable, distance } | Target::Near { variable, distance } => {
            variable_key(side, names, variable, distance)
        }
        Target::Text {
            section,
            offset,
            distance,
        } => {
            let bytes = side.text(section, offset).to_vec();
            Key::Content(
                Box::new(Content {
                    bytes,
                    fields: Vec::new(),
                }),
                distance,
            )
        }
        Target::Constant {
            section,
            offset,
            distance,
        } => {
            let size = side.object.section(section).entry_size;
            let start = offset
                .checked_div(size)
                .unwrap_or_default()
                .saturating_mul(size);
            let end = start.saturating_add(size);
            let inside = offset.wrapping_sub(start).cast_signed();
            let inside = inside.wrapping_add(distance);
            content_key(side, names, section, (start, end), inside, walk)
        }
        Target::Place { section, offset } if side.object.section(section).flags.exec => {
            let name = &side.object.section(section).name;
            match name == policy::AUXILIARY {
                true => Key::Auxiliary,
                false => Key::Nameless(name.clone(), offset),
            }
        }
        Target::Place { section, offset } => {
            let size = side.object.section(section).size;
            content_key(side, names, section, (0, size), offset, walk)
        }
    }
}

fn function_key(side: &Side, names: &Names, function: usize, distance: i64) -> Key {
    let own = || side.function(function).name.clone();
    match (names.functions.get(&function), &names.variables) {
        (Some(paired), _) => Key::Named(paired.clone(), distance),
        (None, None) => Key::Named(own(), distance),
        (None, Some(_)) => Key::New(own(), distance),
    }
}

fn variable_key(side: &Side, names: &Names, variable: usize, distance: i64) -> Key {
    let own = || side.variable(variable).name.clone();
    match &names.variables {
        None => Key::Named(own(), distance),
        Some(paired) => match paired.get(&variable) {
            Some(name) => Key::Named(name.clone(), distance),
            None => Key::New(own(), distance),
        },
    }
}

fn content_key(
    side: &Side,
    names: &Names,
    section: SectionId,
    (start, end): (u64, u64),
    distance: i64,
    walk: &Walk<'_>,
) -> Key {
    let content = walk
        .deeper()
        .and_then(|walk| content(side, names, section, (start, end), &walk));
    match content {
        Some(content) => Key::Content(Box::new(content), distance),
        None => Key::Unclear {
            old: names.variables.is_none(),
            section,
            distance,
        },
    }
}

/// A part of a data section as content.
pub(super) fn data(side: &Side, names: &Names, section: SectionId, range: (u64, u64)) -> Content {
    let unreadable = Content {
        bytes: Vec::new(),
        fields: Vec::new(),
    };
    let left = &Cell::new(MAX_FIELDS);
    content(side, names, section, range, &Walk { depth: 0, left }).unwrap_or(unreadable)
}

fn content(
    side: &Side,
    names: &Names,
    section: SectionId,
    (start, end): (u64, u64),
    walk: &Walk<'_>,
) -> Option<Content> {
    if side.object.section(section).flags.zeroes {
        return Some(Content {
            bytes: Vec::new(),
            fields: Vec::new(),
        });
    }
    let bytes = side.bytes(section, start, end)?;
    let references = side.data_references(section, start, end);
    Some(assemble(side, names, bytes, &references, walk))
}

/// Code or data with its fields as keys.
pub(super) fn masked(
    side: &Side,
    names: &Names,
    bytes: &[u8],
    references: &[Reference],
) -> Content {
    let left = &Cell::new(MAX_FIELDS);
    assemble(side, names, bytes, references, &Walk { depth: 0, left })
}

fn assemble(
    side: &Side,
    names: &Names,
    bytes: &[u8],
    references: &[Reference],
    walk: &Walk<'_>,
) -> Content {
    let mut bytes = bytes.to_vec();
    let fields = references.iter().map(|it| {
        mask(&mut bytes, it);
        walk.left.set(walk.left.get().saturating_sub(1));
        Field {
            offset: it.offset,
            kind: it.kind,
            key: key_at(side, names, &it.target, walk),
        }
    });
    let fields = fields.collect();
    Content { bytes, fields }
}

fn mask(bytes: &mut [u8], reference: &Reference) {
    let Ok(start) = usize::try_from(reference.offset) else {
        return;
    };
    let end = start
        .saturating_add(reference.kind.field_bytes() as usize)
        .min(bytes.len());
    if let Some(field) = bytes.get_mut(start..end) {
        field.fill(0);
    }
}
