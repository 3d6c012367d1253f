//! The new version as it is compiled with static-key branches of five bytes, beside the one that was compared with the old. New code
//! is taken from it. Owns telling what of the one is what of the other: the source is the same, so names and numbers are, unless
//! the compiler decided otherwise because of the longer branches.

use std::collections::{BTreeMap, BTreeSet};

use super::compare::{self, Verdict};
use super::instructions::{Flow, Instruction};
use super::key::{self, Key, Names};
use super::pair;
use super::reference::{Reference, Target};
use super::side::Side;
use super::special::{Entry, Special};
use super::unit::Unit;
use crate::object::Kind;

/// What of the wide object is what of the new one.
#[derive(Debug)]
pub(super) struct Likeness {
    /// Its functions.
    pub(super) functions: BTreeMap<usize, usize>,
    /// Its variables.
    pub(super) variables: BTreeMap<usize, usize>,
    /// Clones of it that are others than those of their name, and cannot be called as those are.
    apart: BTreeSet<usize>,
}

impl Likeness {
    /// Compares both objects.
    pub(super) fn of((new, names): (&Side, &Names), wide: &Side) -> Self {
        let mut likeness = Self {
            functions: functions(new, wide),
            variables: variables(new, wide),
            apart: BTreeSet::new(),
        };
        likeness.doubt_renumbered(new, wide);
        let ours = likeness.names(names);
        for (function, same) in &likeness.functions {
            let whole = wide.function(*function).parent.unwrap_or(*function);
            // Only a clone may expect its arguments elsewhere than any function of its type.
            let is_clone = wide.function(whole).name.contains('.');
            if is_clone && code((wide, &ours), *function) != code((new, names), *same) {
                likeness.apart.insert(whole);
            }
        }
        likeness
    }

    /// Numbers that do not stand for the same variables in code that is the same.
    fn doubt_renumbered(&mut self, new: &Side, wide: &Side) {
        for (function, same) in &self.functions {
            let (ours, theirs) = (Steps::of(wide, *function), Steps::of(new, *same));
            if ours.shape() != theirs.shape() {
                continue;
            }
            for (ours, theirs) in ours.fields.iter().zip(&theirs.fields) {
                let ours = pair::numbered(wide, &ours.target);
                if ours.is_some_and(|it| {
                    self.variables.get(&it).copied() != pair::numbered(new, &theirs.target)
                }) {
                    self.variables.retain(|it, _| Some(*it) != ours);
                }
            }
        }
    }

    /// The names by which the old object has what the wide one has.
    pub(super) fn names(&self, names: &Names) -> Names {
        let variables = names.variables.as_ref();
        let variable = |(it, same): (&usize, &usize)| Some((*it, variables?.get(same)?.clone()));
        let function =
            |(it, same): (&usize, &usize)| Some((*it, names.functions.get(same)?.clone()));
        Names {
            functions: self.functions.iter().filter_map(function).collect(),
            variables: Some(self.variables.iter().filter_map(variable).collect()),
            locals: names.locals.clone(),
        }
    }

    /// What became of each function of the wide object. A function that the guest has not in this form comes along if anything calls it.
    pub(super) fn verdicts(&self, verdicts: &[Verdict], wide: &Side) -> Vec<Verdict> {
        let of = |function: usize| {
            let whole = wide.function(function).parent.unwrap_or(function);
            let same = self.functions.get(&whole).map(|it| verdicts[*it]);
            match same {
                Some(Verdict::Same | Verdict::LinesOnly) if self.apart.contains(&whole) => None,
                other => other,
            }
        };
        let all = 0..wide.inventory.functions.len();
        all.map(|it| of(it).unwrap_or(Verdict::New)).collect()
    }

    /// Functions of the new object that must be replaced, and cannot be by what the wide object has.
    pub(super) fn unfit(&self, unit: &Unit) -> Vec<(usize, &'static str)> {
        let made: BTreeMap<usize, usize> = self
            .functions
            .iter()
            .map(|(it, same)| (*same, *it))
            .collect();
        let replaced = unit.replacements(0).map(|(function, ..)| function);
        let unfit = replaced.filter_map(|function| match made.get(&function) {
            None => Some((
                function,
                "the compiler leaves it out where static-key branches have five bytes",
            )),
            Some(it) if self.apart.contains(it) => Some((
                function,
                "the compiler makes another clone of it where static-key branches have five bytes",
            )),
            Some(_) => None,
        });
        unfit.collect()
    }
}

fn functions(new: &Side, wide: &Side) -> BTreeMap<usize, usize> {
    let functions = wide.inventory.functions.iter().enumerate();
    let same = functions.filter_map(|(index, it)| {
        let same = new.inventory.function_named(&it.name)?;
        (new.function(same).names == it.names).then_some((index, same))
    });
    same.collect()
}

fn variables(new: &Side, wide: &Side) -> BTreeMap<usize, usize> {
    let variables = wide.inventory.variables.iter().enumerate();
    let same = variables.filter_map(|(index, it)| {
        let same = new.inventory.variable_named(&it.name)?;
        let other = new.variable(same);
        let section = |side: &Side, it| side.object.section(it).name.clone();
        let alike = other.names == it.names
            && other.size == it.size
            && section(new, other.section) == section(wide, it.section);
        alike.then_some((index, same))
    });
    same.collect()
}

/// An instruction without the fields that are filled in, and the number of the one it jumps to.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    bytes: Vec<u8>,
    leads_to: Option<usize>,
}

/// The instructions of a function but for static-key branches, padding, and the lengths of jumps: what is left when only branches
/// differ.
struct Steps<'a> {
    side: &'a Side,
    steps: Vec<Step>,
    fields: Vec<&'a Reference>,
    /// For each field the step that has it, and where.
    places: Vec<(usize, u64, Kind)>,
}

impl<'a> Steps<'a> {
    fn of(side: &'a Side, function: usize) -> Self {
        let view = &side.code[function];
        let kept = kept(side, function);
        let mut steps = Vec::new();
        let (mut fields, mut places) = (Vec::new(), Vec::new());
        for instruction in &kept {
            let inside = instruction.start..instruction.end;
            let own = view.references.iter();
            let own: Vec<_> = own.filter(|it| inside.contains(&it.offset)).collect();
            for it in &own {
                places.push((steps.len(), it.offset - instruction.start, it.kind));
            }
            steps.push(step(side, function, &kept, instruction, &own));
            fields.extend(own);
        }
        Self {
            side,
            steps,
            fields,
            places,
        }
    }

    fn shape(&self) -> (&[Step], &[(usize, u64, Kind)]) {
        (&self.steps, &self.places)
    }

    fn keys(&self, names: &Names) -> Vec<(Key, usize)> {
        let keys = self.fields.iter();
        keys.map(|it| meaning((self.side, names), &it.target))
            .collect()
    }
}

/// The instructions of a function that count, in order.
fn kept(side: &Side, function: usize) -> Vec<&Instruction> {
    let is_branch = |it: &Entry| matches!(it.special, Special::JumpLabel { .. });
    let entries = side.entries[function].iter().filter(|it| is_branch(it));
    let branches: BTreeSet<u64> = entries.map(|it| it.offset).collect();
    let instructions = side.code[function].instructions.iter();
    let kept = instructions.filter(|it| !it.is_nop && !branches.contains(&it.start));
    kept.collect()
}

/// How many of the instructions that count stand before an offset.
fn number_of(kept: &[&Instruction], offset: u64) -> usize {
    kept.partition_point(|it| it.start < offset)
}

fn step(
    side: &Side,
    function: usize,
    kept: &[&Instruction],
    instruction: &Instruction,
    own: &[&Reference],
) -> Step {
    let range = instruction.start as usize..instruction.end as usize;
    let bytes = side.function_bytes(function).get(range);
    let mut bytes = bytes.unwrap_or_default().to_vec();
    let leads_to = instruction.relative.filter(|_| own.is_empty());
    let leads_to = leads_to.and_then(|field| u64::try_from(field.leads_to).ok());
    if let (Some(leads_to), Flow::Jump | Flow::Branch) = (leads_to, instruction.flow) {
        return Step {
            bytes: vec![short_form(&bytes)],
            leads_to: Some(number_of(kept, leads_to)),
        };
    }
    for it in own {
        let start = (it.offset - instruction.start) as usize;
        let end = start.saturating_add(it.kind.field_bytes() as usize);
        if let Some(field) = bytes.get_mut(start..end) {
            field.fill(0);
        }
    }
    Step {
        bytes,
        leads_to: None,
    }
}

/// The opcode of a jump in its form of two bytes (Intel SDM vol. 2, JMP and Jcc: E9 is EB, 0F 80+cc is 70+cc).
fn short_form(bytes: &[u8]) -> u8 {
    match *bytes {
        [0x0f, condition, ..] => condition.wrapping_sub(0x10),
        [0xe9, ..] => 0xeb,
        [opcode, ..] => opcode,
        [] => 0,
    }
}

/// What a target is; a place in a function is counted in instructions.
fn meaning((side, names): (&Side, &Names), target: &Target) -> (Key, usize) {
    match *target {
        Target::Function { function, distance } if distance > 0 => {
            let entry = Target::Function {
                function,
                distance: 0,
            };
            let number = number_of(&kept(side, function), distance.unsigned_abs());
            (key::key(side, names, &entry), number)
        }
        _ => (key::key(side, names, target), 0),
    }
}

/// An entry that counts, by the number of its instruction, and the places it leads to.
type Counted = (usize, String, Vec<(Key, usize)>, Vec<u8>, u16);

/// All of a function that must be the same.
type Code = (
    Vec<Step>,
    Vec<(usize, u64, Kind)>,
    Vec<(Key, usize)>,
    Vec<Counted>,
);

fn code((side, names): (&Side, &Names), function: usize) -> Code {
    let kept = kept(side, function);
    let entries = side.entries[function].iter().map(|entry| {
        let number = number_of(&kept, entry.offset);
        let places = match &entry.special {
            Special::JumpLabel { key, target, .. } => vec![key, target],
            Special::Exception { fixup, .. } => vec![fixup],
            _ => Vec::new(),
        };
        let counted = places.iter().map(|it| meaning((side, names), it));
        let counted: Vec<_> = counted.collect();
        let ((_, table, keys, bytes), line) = compare::comparable(side, names, entry);
        let plain = keys.into_iter().map(|key| (key, 0));
        let keys = match counted.is_empty() {
            true => plain.collect(),
            false => counted,
        };
        (number, table, keys, bytes, line)
    });
    let entries = entries.collect();
    let steps = Steps::of(side, function);
    let keys = steps.keys(names);
    (steps.steps, steps.places, keys, entries)
}
