//! What moves from one file of a patch to another: the guest has it, by the name that all files know it by, wherever its source stands.
//! Owns finding that, and refusing names that would then mean two things.

use std::collections::{BTreeMap, BTreeSet};

use super::class::Class;
use super::compare::{self, Verdict};
use super::data;
use super::inventory::{Function, Inventory, Variable, numbered_base};
use super::key::Names;
use super::reference::Target;
use super::report::{FileReport, Refused};
use super::side::Side;
use super::unit::Draft;
use crate::object::Home;
use crate::patch::VMLINUX;

/// Something of an old object: its file's index, and its own there.
pub(super) type Before = (usize, usize);

/// What one file has in its new version and another had in its old.
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// New functions to what they were.
    pub(super) functions: BTreeMap<usize, Before>,
    /// New variables to what they were.
    pub(super) variables: BTreeMap<usize, Before>,
    /// New variables that may be another file's.
    pub(super) doubtful: BTreeSet<usize>,
}

impl Moves {
    /// What moved to a file. Names that the guest has already for something that does not go are refused.
    pub(super) fn to(drafts: &[Draft], at: usize, report: &mut FileReport) -> Self {
        let mut moves = Self::default();
        let draft = &drafts[at];
        let unpaired = |index: &usize| draft.pairs.old_function_of(*index).is_none();
        for index in (0..draft.new.inventory.functions.len()).filter(unpaired) {
            let globals = &draft.new.function(index).globals;
            match before::<Function>(drafts, at, globals) {
                Ok(Some(before)) => _ = moves.functions.insert(index, before),
                Ok(None) => {}
                Err((name, reason)) => refuse(report, &name, "symbols", reason),
            }
        }
        let unpaired = |index: &usize| draft.pairs.old_of(*index).is_none();
        for index in (0..draft.new.inventory.variables.len()).filter(unpaired) {
            let globals = &draft.new.variable(index).globals;
            match before::<Variable>(drafts, at, globals) {
                Ok(Some(before)) => _ = moves.variables.insert(index, before),
                Ok(None) if may_be_anothers(drafts, at, index) => _ = moves.doubtful.insert(index),
                Ok(None) => {}
                Err((name, reason)) => refuse(report, &name, "symbols", reason),
            }
        }
        moves
    }

    /// Adds the names that the guest has for what moved.
    pub(super) fn add_to(&self, names: &mut Names, drafts: &[Draft]) {
        for (index, (of, before)) in &self.functions {
            let name = drafts[*of].old.function(*before).name.clone();
            names.functions.insert(*index, name);
        }
        for (index, (of, before)) in &self.variables {
            let name = drafts[*of].old.variable(*before).name.clone();
            names.variables.get_or_insert_default().insert(*index, name);
        }
    }

    /// The same for an object of other indices: its functions and variables to those of the new one.
    pub(super) fn seen_by(
        &self,
        functions: &BTreeMap<usize, usize>,
        variables: &BTreeMap<usize, usize>,
    ) -> Self {
        let function = |(it, new): (&usize, &usize)| Some((*it, *self.functions.get(new)?));
        let variable = |(it, new): (&usize, &usize)| Some((*it, *self.variables.get(new)?));
        let doubtful = variables
            .iter()
            .filter(|(_, new)| self.doubtful.contains(new));
        Self {
            functions: functions.iter().filter_map(function).collect(),
            variables: variables.iter().filter_map(variable).collect(),
            doubtful: doubtful.map(|(it, _)| *it).collect(),
        }
    }

    /// What became of a function that moved.
    pub(super) fn verdict(&self, drafts: &[Draft], new: (&Side, &Names, usize)) -> Option<Verdict> {
        let (of, before) = *self.functions.get(&new.2)?;
        let old = &drafts[of].old;
        // Another file's own name is not that of this file.
        Some(match uses_its_own(old, before) {
            true => Verdict::Changed("the file it is in"),
            false => compare::compare((old, &Names::default(), before), new),
        })
    }

    /// Refuses variables that moved and are not as they were.
    pub(super) fn refuse_changed(
        &self,
        drafts: &[Draft],
        (new, names): (&Side, &Names),
        report: &mut FileReport,
    ) {
        for (index, (of, before)) in &self.variables {
            let old = &drafts[*of].old;
            let (was, home) = (old.home_of_variable(*before), new.home_of_variable(*index));
            let reason = match Class::of(was).cannot_be(Class::of(home)) {
                Some(reason) => reason,
                None if data::same((old, *before), (new, names, *index)) => continue,
                None => "it was another file's, and its initial value or size differs",
            };
            refuse(report, &new.variable(*index).name, &home.name, reason);
        }
    }
}

fn refuse(report: &mut FileReport, name: &str, section: &str, reason: &str) {
    report.refused.push(Refused {
        name: name.to_owned(),
        section: section.to_owned(),
        offset: None,
        reason: reason.to_owned(),
    });
}

/// Functions and variables are looked for in the same way.
trait Named {
    fn globals(&self) -> &BTreeSet<String>;
    fn find(inventory: &Inventory, name: &str) -> Option<usize>;
    fn of(inventory: &Inventory, index: usize) -> &Self;
    fn goes(draft: &Draft, old: usize) -> bool;
    fn comes(draft: &Draft, new: usize) -> bool;
}

impl Named for Function {
    fn globals(&self) -> &BTreeSet<String> {
        &self.globals
    }
    fn find(inventory: &Inventory, name: &str) -> Option<usize> {
        inventory.function_named(name)
    }
    fn of(inventory: &Inventory, index: usize) -> &Self {
        &inventory.functions[index]
    }
    fn goes(draft: &Draft, old: usize) -> bool {
        draft.pairs.new_function_of(old).is_none()
    }
    fn comes(draft: &Draft, new: usize) -> bool {
        draft.pairs.old_function_of(new).is_none()
    }
}

impl Named for Variable {
    fn globals(&self) -> &BTreeSet<String> {
        &self.globals
    }
    fn find(inventory: &Inventory, name: &str) -> Option<usize> {
        inventory.variable_named(name)
    }
    fn of(inventory: &Inventory, index: usize) -> &Self {
        &inventory.variables[index]
    }
    fn goes(draft: &Draft, old: usize) -> bool {
        !draft.pairs.iter().any(|(_, it)| it == old)
    }
    fn comes(draft: &Draft, new: usize) -> bool {
        draft.pairs.old_of(new).is_none()
    }
}

/// What had the names of something that is new in its own file.
fn before<T: Named>(
    drafts: &[Draft],
    at: usize,
    globals: &BTreeSet<String>,
) -> Result<Option<Before>, (String, &'static str)> {
    let object = &drafts[at].object;
    let others = || {
        let others = drafts.iter().enumerate();
        others.filter(move |(of, it)| *of != at && it.object == *object)
    };
    let mut found = None;
    for name in globals {
        let is_global = |inventory, index| T::of(inventory, index).globals().contains(name);
        let twice = others().any(|(_, it)| {
            let inventory = &it.new.inventory;
            let index = T::find(inventory, name).filter(|index| is_global(inventory, *index));
            index.is_some_and(|index| T::comes(it, index))
        });
        if twice {
            return Err((name.clone(), "several files of the patch define it anew"));
        }
        let mut had = others().filter_map(|(of, it)| {
            let inventory = &it.old.inventory;
            let index = T::find(inventory, name).filter(|index| is_global(inventory, *index));
            Some((of, index?))
        });
        match (had.next(), had.next()) {
            (Some((of, index)), None)
                if T::goes(&drafts[of], index)
                    && T::of(&drafts[of].old.inventory, index).globals() == globals =>
            {
                found = Some((of, index));
            }
            (None, _) if !is_used(drafts, object, name) => {}
            _ => return Err((name.clone(), "the guest has one already, of another file")),
        }
    }
    Ok(found)
}

/// Whether an old object of the patch refers to a name that it does not define, so that the guest has it.
fn is_used(drafts: &[Draft], object: &str, name: &str) -> bool {
    let mut users = drafts
        .iter()
        .filter(|it| it.object == object || object == VMLINUX);
    users.any(|it| {
        let mut symbols = it.old.object.symbols_with_ids();
        symbols.any(|(_, it)| it.home == Home::Undefined && it.name == name)
    })
}

/// Whether a variable that goes from another file is like one that this file has anew.
fn may_be_anothers(drafts: &[Draft], at: usize, new: usize) -> bool {
    let it = drafts[at].new.variable(new);
    if !drafts[at].new.object.section(it.section).flags.write {
        return false;
    }
    let base = |it: &Variable| numbered_base(&it.name).unwrap_or(&it.name).to_owned();
    let others = drafts.iter().enumerate();
    let mut others = others.filter(|(of, it)| *of != at && it.object == drafts[at].object);
    others.any(|(_, draft)| {
        let mut variables = draft.old.inventory.variables.iter().enumerate();
        variables.any(|(index, other)| {
            base(other) == base(it)
                && other.size == it.size
                && draft.old.object.section(other.section).flags.write
                && Variable::goes(draft, index)
        })
    })
}

/// Whether a function uses what only its own file may name.
fn uses_its_own(old: &Side, function: usize) -> bool {
    let mut references = old.code[function].references.iter();
    references.any(|it| match it.target.exact() {
        Target::Function { function: to, .. } => {
            to != function && old.function(to).globals.is_empty()
        }
        Target::Variable { variable, .. } => old.variable(variable).globals.is_empty(),
        _ => false,
    })
}
