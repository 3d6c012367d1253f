//! What a field of an object refers to, as a thing and a distance rather than as a section and an offset.
//! Owns that translation.

use super::instructions::Instructions;
use super::inventory::Inventory;
use super::policy;
use crate::object::{Home, Kind, Object, Relocation, SectionId, SymbolId, SymbolKind};

/// A thing and, where it can be addressed inside or outside, the distance from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Something that another object defines.
    Outside {
        /// Its symbol.
        symbol: SymbolId,
        /// Bytes from it.
        distance: i64,
    },
    /// A function of this object.
    Function {
        /// Index in the inventory.
        function: usize,
        /// Bytes from its entry.
        distance: i64,
    },
    /// A variable of this object.
    Variable {
        /// Index in the inventory.
        variable: usize,
        /// Bytes from its start.
        distance: i64,
    },
    /// A variable, or one beside it: the address was computed, it is told by the section alone, and there are several in it. The
    /// end of one is the start of the next, and compilers address arrays from outside of them.
    Near {
        /// Index in the inventory: the one that has the address.
        variable: usize,
        /// Bytes from its start.
        distance: i64,
    },
    /// A string of a pool, from here to its zero.
    Text {
        /// The pool.
        section: SectionId,
        /// Offset in it.
        offset: u64,
        /// Bytes from there; compilers address the end of a string, which is not the next one.
        distance: i64,
    },
    /// An entry of a pool of constants of equal size.
    Constant {
        /// The pool.
        section: SectionId,
        /// Offset in it.
        offset: u64,
        /// Bytes from there.
        distance: i64,
    },
    /// A place that has no name.
    Place {
        /// Its section.
        section: SectionId,
        /// Offset in it; compilers address outside of arrays too.
        offset: i64,
    },
}

impl Target {
    /// The same where it is known that what has the address is meant.
    pub(super) const fn exact(self) -> Self {
        match self {
            Self::Near { variable, distance } => Self::Variable { variable, distance },
            other => other,
        }
    }
}

/// A field in a function's code or in a piece of data that refers to something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    /// Offset of the field from the start of the function or piece.
    pub(super) offset: u64,
    /// How it is filled in.
    pub(super) kind: Kind,
    /// What the CPU adds for a relative field: the distance from the field to the end of its instruction.
    /// 0 for absolute fields and for data.
    pub(super) bias: i64,
    /// What it refers to.
    pub(super) target: Target,
}

/// What a relocation refers to, `bias` as in [`Reference`].
pub(super) fn target_of(
    object: &Object,
    inventory: &Inventory,
    relocation: &Relocation,
    bias: i64,
) -> Target {
    let symbol = object.symbol(relocation.symbol);
    let distance = relocation.addend.wrapping_add(bias);
    let Home::In { section, offset } = symbol.home else {
        return Target::Outside {
            symbol: relocation.symbol,
            distance,
        };
    };
    if let Some(variable) = inventory.variable_of(relocation.symbol) {
        return Target::Variable { variable, distance };
    }
    if symbol.kind == SymbolKind::Function
        && let Some(function) = inventory.function_named(&symbol.name)
    {
        return Target::Function { function, distance };
    }
    // The assembler keeps a local label where it must not fold the addend: the linker then moves the
    // string at the label, and the addend counts from there.
    if symbol.kind != SymbolKind::Section && object.section(section).flags.merge {
        return pooled(object, section, offset, distance);
    }
    let at = offset.cast_signed().wrapping_add(distance);
    place(object, inventory, section, at)
}

/// An entry of a pool that the linker merges.
fn pooled(object: &Object, section: SectionId, offset: u64, distance: i64) -> Target {
    if object.section(section).flags.strings {
        return Target::Text {
            section,
            offset,
            distance,
        };
    }
    Target::Constant {
        section,
        offset,
        distance,
    }
}

/// What is at an offset of a section.
pub(super) fn place(
    object: &Object,
    inventory: &Inventory,
    section: SectionId,
    offset: i64,
) -> Target {
    let home = object.section(section);
    if home.flags.exec {
        if let Some(function) = inventory.function_at(section, offset) {
            let start = inventory.functions[function].start.cast_signed();
            return Target::Function {
                function,
                distance: offset.wrapping_sub(start),
            };
        }
        return Target::Place { section, offset };
    }
    if let (true, Ok(inside)) = (home.flags.merge, u64::try_from(offset)) {
        return pooled(object, section, inside, 0);
    }
    let variable = inventory.variable_at(section, offset);
    let is_alone = inventory.variables_in(section).len() == 1;
    // What is read-only may have no name and be copied.
    let is_its = |it: &usize| is_alone || home.flags.write || inventory.covers(*it, offset);
    if let Some(variable) = variable.filter(is_its) {
        let start = inventory.variables[variable].start.cast_signed();
        let distance = offset.wrapping_sub(start);
        return match is_alone || policy::is_addressed_exactly(&home.name) {
            true => Target::Variable { variable, distance },
            false => Target::Near { variable, distance },
        };
    }
    Target::Place { section, offset }
}

/// Relative fields count from the end of their instruction, which an immediate may keep apart from the
/// field.
pub(super) fn bias_of(instructions: &Instructions, offset: u64, kind: Kind) -> i64 {
    if !kind.is_relative() {
        return 0;
    }
    let end = instructions.at(offset).map(|it| it.end);
    end.and_then(|end| end.checked_sub(offset))
        .map_or(4, u64::cast_signed)
}

/// The relocated fields of code in a part of a section, offsets from its start.
pub(super) fn references_in_code(
    object: &Object,
    inventory: &Inventory,
    section: SectionId,
    (start, end): (u64, u64),
) -> Vec<Reference> {
    let home = object.section(section);
    let instructions = Instructions::decode(home.range(start, end).unwrap_or_default());
    references_of(
        object,
        inventory,
        home.relocations_in(start, end),
        (start, &instructions),
    )
}

fn is_inside(inventory: &Inventory, target: &Target) -> bool {
    let Target::Near { variable, distance } = *target else {
        return false;
    };
    u64::try_from(distance).is_ok_and(|distance| distance < inventory.variables[variable].size)
}

/// Relocations as references, offsets from `start`, where the instructions begin.
pub(super) fn references_of(
    object: &Object,
    inventory: &Inventory,
    relocations: &[Relocation],
    (start, instructions): (u64, &Instructions),
) -> Vec<Reference> {
    let made = relocations.iter().map(|it| {
        let offset = it.offset.wrapping_sub(start);
        let bias = bias_of(instructions, offset, it.kind);
        let mut target = target_of(object, inventory, it, bias);
        if instructions.accesses(offset) && is_inside(inventory, &target) {
            target = target.exact();
        }
        Reference {
            offset,
            kind: it.kind,
            bias,
            target,
        }
    });
    made.collect()
}
