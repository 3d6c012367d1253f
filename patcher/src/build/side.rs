//! One of the two objects with all that is asked of it: inventory, code and special entries of every
//! function. Owns the tie from a function's fields to what they refer to.

use std::collections::BTreeSet;

use super::BuildError;
use super::instructions::{Instruction, Instructions};
use super::inventory::{Function, Inventory, Variable};
use super::reference::{Reference, Target, place, references_of, target_of};
use super::special::{self, Entry};
use crate::object::homes::{self, Homes};
use crate::object::{Kind, Object, Section, SectionId};

/// One object, looked at from all sides.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) object: Object,
    pub(super) inventory: Inventory,
    /// One for each function.
    pub(super) code: Vec<CodeView>,
    /// One list for each function, by offset.
    pub(super) entries: Vec<Vec<Entry>>,
    /// Whose the static variables of functions are; empty where nothing tells.
    pub(super) homes: Homes,
}

/// The code of a function.
#[derive(Debug, Default)]
pub(super) struct CodeView {
    /// Where its instructions are, offsets from its entry.
    pub(super) instructions: Instructions,
    /// Its fields, by offset.
    pub(super) references: Vec<Reference>,
    /// The first relative jump of one byte that leaves it: no field that could be filled in.
    pub(super) short_exit: Option<u64>,
}

impl Side {
    /// Looks at an object.
    pub(super) fn of(object: Object) -> Result<Self, BuildError> {
        let inventory = Inventory::of(&object);
        let code = inventory
            .functions
            .iter()
            .map(|it| view(&object, &inventory, it))
            .collect();
        let entries = special::read(&object, &inventory)?;
        Ok(Self {
            object,
            inventory,
            code,
            entries,
            homes: Homes::new(),
        })
    }

    /// The same with what debug information tells, if it can be read.
    pub(super) fn with_debug_information(self, bytes: &[u8]) -> Self {
        let homes = homes::homes(bytes).unwrap_or_default();
        Self { homes, ..self }
    }

    /// The functions that a static variable belongs to.
    pub(super) fn owners_of(&self, variable: usize) -> Option<&BTreeSet<String>> {
        let it = self.variable(variable);
        self.homes.get(&(it.section, it.start))
    }

    /// A function.
    pub(super) fn function(&self, index: usize) -> &Function {
        &self.inventory.functions[index]
    }

    /// A variable.
    pub(super) fn variable(&self, index: usize) -> &Variable {
        &self.inventory.variables[index]
    }

    /// The section a function is in.
    pub(super) fn home_of(&self, function: usize) -> &Section {
        self.object.section(self.function(function).section)
    }

    /// The section a variable is in.
    pub(super) fn home_of_variable(&self, variable: usize) -> &Section {
        self.object.section(self.variable(variable).section)
    }

    /// The bytes of a function.
    pub(super) fn function_bytes(&self, index: usize) -> &[u8] {
        bytes_of(&self.object, self.function(index))
    }

    /// The bytes of a part of a section; `None` where it has none in the file or not all.
    pub(super) fn bytes(&self, section: SectionId, start: u64, end: u64) -> Option<&[u8]> {
        self.object.section(section).range(start, end)
    }

    /// The fields of a part of a data section, offsets from its start.
    pub(super) fn data_references(
        &self,
        section: SectionId,
        start: u64,
        end: u64,
    ) -> Vec<Reference> {
        let relocations = self.object.section(section).relocations_in(start, end);
        relocations
            .iter()
            .map(|it| Reference {
                offset: it.offset - start,
                kind: it.kind,
                bias: 0,
                target: target_of(&self.object, &self.inventory, it, 0),
            })
            .collect()
    }

    /// The string at a place, its zero included, of characters as wide as the pool has them.
    pub(super) fn text(&self, section: SectionId, offset: u64) -> &[u8] {
        let pool = self.object.section(section);
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| pool.bytes.get(at..))
            .unwrap_or_default();
        let width = usize::try_from(pool.entry_size).unwrap_or(1).max(1);
        let end = rest
            .chunks(width)
            .position(|character| character.iter().all(|byte| *byte == 0))
            .map_or(rest.len(), |at| (at + 1).saturating_mul(width));
        rest.get(..end).unwrap_or(rest)
    }

    /// The name of what a target is, for messages.
    pub(super) fn name_of(&self, target: &Target) -> String {
        match target {
            Target::Outside { symbol, .. } => self.object.symbol(*symbol).name.clone(),
            Target::Function { function, .. } => self.function(*function).name.clone(),
            Target::Variable { variable, .. } | Target::Near { variable, .. } => {
                self.variable(*variable).name.clone()
            }
            Target::Text {
                section, offset, ..
            }
            | Target::Constant {
                section, offset, ..
            } => {
                format!("{}+{offset:#x}", self.object.section(*section).name)
            }
            Target::Place { section, offset } => {
                format!("{}{offset:+#x}", self.object.section(*section).name)
            }
        }
    }
}

fn bytes_of<'a>(object: &'a Object, function: &Function) -> &'a [u8] {
    object
        .section(function.section)
        .range(function.start, function.end)
        .unwrap_or_default()
}

fn view(object: &Object, inventory: &Inventory, function: &Function) -> CodeView {
    let instructions = Instructions::decode(bytes_of(object, function));
    let section = object.section(function.section);
    let relocations = section.relocations_in(function.start, function.end);
    let references = references_of(
        object,
        inventory,
        relocations,
        (function.start, &instructions),
    );
    let mut view = CodeView {
        instructions,
        references,
        short_exit: None,
    };
    let unrelocated: Vec<_> = view
        .instructions
        .iter()
        .filter(|it| leaves(object, inventory, function, it))
        .filter(|it| is_unrelocated(it, function, section))
        .collect();
    let mut added = Vec::new();
    for instruction in unrelocated {
        match implied(object, inventory, function, instruction) {
            Some(reference) => added.push(reference),
            None => view.short_exit = view.short_exit.or(Some(instruction.start)),
        }
    }
    view.references.extend(added);
    view.references.sort_by_key(|it| it.offset);
    view
}

/// Whether an instruction leads out of its function. What leads to its end stays, for compilers leave jumps there to where code
/// cannot be reached; but not where the next function begins.
fn leaves(
    object: &Object,
    inventory: &Inventory,
    function: &Function,
    instruction: &Instruction,
) -> bool {
    let Some(field) = instruction.relative else {
        return false;
    };
    let len = (function.end - function.start).cast_signed();
    if field.leads_to != len {
        return !(0..len).contains(&field.leads_to);
    }
    let next = place(
        object,
        inventory,
        function.section,
        function.end.cast_signed(),
    );
    matches!(next, Target::Function { distance: 0, .. })
}

/// Whether a relative operand has no relocation: assemblers settle what lies in one section themselves.
fn is_unrelocated(instruction: &Instruction, function: &Function, section: &Section) -> bool {
    instruction.relative.is_some_and(|field| {
        let at = function.start.wrapping_add(field.offset);
        section.relocation_at(at).is_none()
    })
}

fn implied(
    object: &Object,
    inventory: &Inventory,
    function: &Function,
    instruction: &Instruction,
) -> Option<Reference> {
    let field = instruction.relative.filter(|field| field.size == 4)?;
    let offset = function.start.cast_signed().wrapping_add(field.leads_to);
    Some(Reference {
        offset: field.offset,
        kind: Kind::Relative32,
        bias: (instruction.end - field.offset).cast_signed(),
        target: place(object, inventory, function.section, offset),
    })
}
