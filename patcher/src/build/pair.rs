//! Which function and which variable of the new object is which of the old one. Most are by name; static variables of
//! functions and clones of functions have a number in their name that changes with the source around them (`seen.3`
//! becomes `seen.4`). Owns that pairing, and saying where it is not certain: state must never be duplicated by mistake.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::compare;
use super::inventory::{Function, clone_base, numbered_base};
use super::key::{self, Key, Names, is_numbered_constant};
use super::policy;
use super::reference::Target;
use super::side::Side;
use crate::object::Section;

/// The pairs found.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    /// New function to old one.
    old_function_of: HashMap<usize, usize>,
    /// Old function to new one.
    new_function_of: HashMap<usize, usize>,
    /// New variable to old one.
    old_of: HashMap<usize, usize>,
    taken: HashSet<usize>,
    /// New variables that may be one of several old ones.
    uncertain: HashSet<usize>,
}

impl Pairs {
    /// The old function that a new one is.
    pub(super) fn old_function_of(&self, new: usize) -> Option<usize> {
        self.old_function_of.get(&new).copied()
    }

    /// The new function that an old one is.
    pub(super) fn new_function_of(&self, old: usize) -> Option<usize> {
        self.new_function_of.get(&old).copied()
    }

    /// All functions that both objects have, new and old, in the order of the new object.
    pub(super) fn functions(&self) -> Vec<(usize, usize)> {
        let mut functions: Vec<_> = self
            .old_function_of
            .iter()
            .map(|(new, old)| (*new, *old))
            .collect();
        functions.sort_unstable();
        functions
    }

    fn add_function(&mut self, new: usize, old: usize) {
        if !self.old_function_of.contains_key(&new) && !self.new_function_of.contains_key(&old) {
            self.old_function_of.insert(new, old);
            self.new_function_of.insert(old, new);
        }
    }

    /// The old variable a new one is.
    pub(super) fn old_of(&self, new: usize) -> Option<usize> {
        self.old_of.get(&new).copied()
    }

    /// Whether a new variable may or may not be an old one.
    pub(super) fn is_uncertain(&self, new: usize) -> bool {
        self.uncertain.contains(&new) && !self.old_of.contains_key(&new)
    }

    /// All pairs, new and old.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.old_of.iter().map(|(new, old)| (*new, *old))
    }

    /// The names of the new side's functions and variables on the old side.
    pub(super) fn names(&self, old: &Side) -> Names {
        let variable = |(new, it)| (new, old.variable(it).name.clone());
        let function = |(new, it)| (new, old.function(it).name.clone());
        Names {
            functions: self.functions().into_iter().map(function).collect(),
            variables: Some(self.iter().map(variable).collect()),
            locals: old.inventory.locals().map(str::to_owned).collect(),
        }
    }

    /// Whether a variable of the new side and those beside it lie in their section as they did.
    pub(super) fn lies_as_before(&self, old: &Side, new: &Side, variable: usize) -> bool {
        let Some(before) = self.old_of(variable) else {
            return false;
        };
        let beside = |side: &Side, it: usize| {
            let here = side.inventory.variables_in(side.variable(it).section);
            let at = here
                .iter()
                .position(|other| *other == it)
                .unwrap_or_default();
            [at.checked_sub(1), at.checked_add(1)].map(|at| here.get(at?).copied())
        };
        let distance = |side: &Side, it: usize, other: usize| {
            side.variable(other)
                .start
                .wrapping_sub(side.variable(it).start)
        };
        let is_same = |ours: usize, theirs: usize| {
            self.old_of(ours) == Some(theirs)
                && new.variable(ours).size == old.variable(theirs).size
                && distance(new, variable, ours) == distance(old, before, theirs)
        };
        is_same(variable, before)
            && beside(new, variable)
                .into_iter()
                .zip(beside(old, before))
                .all(|it| match it {
                    (Some(ours), Some(theirs)) => is_same(ours, theirs),
                    (ours, theirs) => ours.is_none() && theirs.is_none(),
                })
    }

    /// The same for an object of other indices: its functions and variables to those of the new one. What is no variable of that may
    /// be any.
    pub(super) fn seen_by(
        &self,
        wide: &Side,
        functions: &BTreeMap<usize, usize>,
        variables: &BTreeMap<usize, usize>,
    ) -> Self {
        let mut pairs = Self::default();
        for (it, new) in functions {
            if let Some(old) = self.old_function_of(*new) {
                pairs.add_function(*it, old);
            }
        }
        for it in 0..wide.inventory.variables.len() {
            let new = variables.get(&it);
            match new.and_then(|new| self.old_of(*new)) {
                Some(old) => _ = pairs.add(it, old),
                None if new.is_none_or(|new| self.is_uncertain(*new)) => {
                    pairs.uncertain.insert(it);
                }
                None => {}
            }
        }
        pairs
    }

    fn add(&mut self, new: usize, old: usize) -> bool {
        if self.old_of.contains_key(&new) || !self.taken.insert(old) {
            return false;
        }
        self.old_of.insert(new, old);
        true
    }
}

/// Pairs the functions and variables of two objects.
pub(super) fn pair(old: &Side, new: &Side) -> Pairs {
    let mut pairs = Pairs::default();
    functions_by_name(old, new, &mut pairs);
    renumbered_clones(old, new, &mut pairs);
    by_name(old, new, &mut pairs);
    by_position_in_equal_code(old, new, &mut pairs);
    by_what_they_describe(old, new, &mut pairs);
    by_use(old, new, &mut pairs);
    what_is_left_is_uncertain(old, new, &mut pairs);
    pairs
}

fn by_name(old: &Side, new: &Side, pairs: &mut Pairs) {
    for (index, variable) in new.inventory.variables.iter().enumerate() {
        if numbered_base(&variable.name).is_some() {
            continue;
        }
        if let Some(found) = old.inventory.variable_named(&variable.name) {
            pairs.add(index, found);
        }
    }
}

fn functions_by_name(old: &Side, new: &Side, pairs: &mut Pairs) {
    for (index, function) in new.inventory.functions.iter().enumerate() {
        for name in [&function.name].into_iter().chain(&function.names) {
            if let Some(found) = old.inventory.function_named(name) {
                pairs.add_function(index, found);
            }
        }
    }
}

/// Names that stand together for one function in one object and not in the other.
pub(super) fn split_names(old: &Side, new: &Side, pairs: &Pairs) -> BTreeSet<String> {
    let mut split = BTreeSet::new();
    for (index, function) in new.inventory.functions.iter().enumerate() {
        let paired = pairs.old_function_of(index);
        let elsewhere = |name: &&String| {
            let before = old.inventory.function_named(name);
            before.is_some() && before != paired
        };
        split.extend(function.names.iter().filter(elsewhere).cloned());
        if let Some(before) = paired {
            split.extend(differing(&function.names, &old.function(before).names));
        }
    }
    split
}

/// A clone may be numbered otherwise.
fn differing(ours: &BTreeSet<String>, theirs: &BTreeSet<String>) -> Vec<String> {
    let alone = ours.len() == 1 && theirs.len() == 1;
    let differing = ours.symmetric_difference(theirs).filter(|_| !alone);
    differing.cloned().collect()
}

/// Clones that only one side has by their name: those of one function and kind, if each side has as many left.
fn renumbered_clones(old: &Side, new: &Side, pairs: &mut Pairs) {
    let before = clones(old, |it| pairs.new_function_of(it).is_none());
    let after = clones(new, |it| pairs.old_function_of(it).is_none());
    for (base, ours) in after {
        let theirs = before
            .get(&base)
            .filter(|theirs| theirs.len() == ours.len());
        for (ours, theirs) in ours.into_iter().zip(theirs.into_iter().flatten()) {
            pairs.add_function(ours, *theirs);
        }
    }
}

fn clones(side: &Side, wanted: impl Fn(usize) -> bool) -> BTreeMap<String, Vec<usize>> {
    let mut clones = BTreeMap::<_, Vec<_>>::new();
    let base = |function: &Function| clone_base(&function.name);
    for (index, function) in side.inventory.functions.iter().enumerate() {
        if let Some(base) = base(function).filter(|_| wanted(index)) {
            clones.entry(base).or_default().push(index);
        }
    }
    clones
}

/// Where the code is the same but for its fields, fields at the same offset refer to the same thing.
fn by_position_in_equal_code(old: &Side, new: &Side, pairs: &mut Pairs) {
    for (new_function, old_function) in pairs.functions() {
        let shape = |side: &Side, function: usize| -> Vec<_> {
            side.code[function]
                .references
                .iter()
                .map(|it| (it.offset, it.kind))
                .collect()
        };
        if shape(old, old_function) != shape(new, new_function)
            || compare::shape(old, old_function) != compare::shape(new, new_function)
        {
            continue;
        }
        let fields = new.code[new_function].references.iter();
        for (ours, theirs) in fields.zip(&old.code[old_function].references) {
            if let (Some(ours), Some(theirs)) =
                (numbered(new, &ours.target), numbered(old, &theirs.target))
                && alike(old, theirs, new, ours)
            {
                pairs.add(ours, theirs);
            }
        }
    }
}

/// A variable with a number in its name that is state, not content.
pub(super) fn numbered(side: &Side, target: &Target) -> Option<usize> {
    let Target::Variable { variable, .. } = target.exact() else {
        return None;
    };
    let named = numbered_base(&side.variable(variable).name).is_some();
    (named && !is_numbered_constant(side, variable)).then_some(variable)
}

fn alike(old: &Side, theirs: usize, new: &Side, ours: usize) -> bool {
    let (theirs, ours) = (old.variable(theirs), new.variable(ours));
    numbered_base(&theirs.name) == numbered_base(&ours.name) && theirs.size == ours.size
}

/// Descriptors of pr_debug: those of the same function, file, module and text, in the order of their lines.
fn by_what_they_describe(old: &Side, new: &Side, pairs: &mut Pairs) {
    let mut before = descriptors(old, |it| !pairs.taken.contains(&it));
    for (place, ours) in descriptors(new, |it| pairs.old_of(it).is_none()) {
        let theirs = before.remove(&place).unwrap_or_default();
        for ((_, ours), (_, theirs)) in ours.into_iter().zip(theirs) {
            pairs.add(ours, theirs);
        }
    }
}

/// What it points to, in the order of its fields, to descriptors by line.
type Descriptors = HashMap<Vec<Key>, Vec<(u32, usize)>>;

fn descriptors(side: &Side, wanted: impl Fn(usize) -> bool) -> Descriptors {
    let mut found = Descriptors::new();
    for (index, it) in side.inventory.variables.iter().enumerate() {
        let section = side.object.section(it.section);
        if section.name != policy::DYNAMIC_DEBUG || !wanted(index) {
            continue;
        }
        let end = it.start.saturating_add(it.size);
        let fields = side.data_references(it.section, it.start, end);
        // Strings are the same on both sides, whatever their names.
        let names = Names::default();
        let place = fields
            .iter()
            .map(|field| key::key(side, &names, &field.target));
        found
            .entry(place.collect())
            .or_default()
            .push((line(section, it.start), index));
    }
    found.values_mut().for_each(|same| same.sort_unstable());
    found
}

/// The line that a descriptor tells (`struct _ddebug`, Linux v6.12 include/linux/dynamic_debug.h: behind four pointers).
fn line(section: &Section, start: u64) -> u32 {
    let field = start.checked_add(32);
    let field = field.and_then(|at| section.range(at, at.checked_add(4)?)?.try_into().ok());
    field.map_or(0, u32::from_le_bytes) & 0x3_ffff
}

/// In functions that are the same: the variable of a base name, where each has just one and it is the function's own in both.
/// For what only messages depend on, those of the same size in the order of their first use, if there are as many.
fn by_use(old: &Side, new: &Side, pairs: &mut Pairs) {
    for (new_function, old_function) in pairs.functions() {
        let before = uses(old, old_function);
        for (base, ours) in uses(new, new_function) {
            let Some(theirs) = before.get(&base) else {
                continue;
            };
            match (&ours[..], &theirs[..]) {
                ([ours], [theirs])
                    if alike(old, *theirs, new, *ours)
                        && old.owners_of(*theirs) == new.owners_of(*ours) =>
                {
                    pairs.add(*ours, *theirs);
                }
                _ if ours.iter().all(|it| is_stateless(new, *it)) => {
                    in_order((old, theirs), (new, &ours), pairs);
                }
                _ => {}
            }
        }
    }
}

fn in_order((old, theirs): (&Side, &[usize]), (new, ours): (&Side, &[usize]), pairs: &mut Pairs) {
    let theirs: Vec<_> = theirs
        .iter()
        .filter(|it| !pairs.taken.contains(it))
        .collect();
    let ours: Vec<_> = ours
        .iter()
        .filter(|it| pairs.old_of(**it).is_none())
        .collect();
    if ours.len() == theirs.len() {
        for (ours, theirs) in ours.into_iter().zip(theirs) {
            if alike(old, *theirs, new, *ours) {
                pairs.add(*ours, *theirs);
            }
        }
    }
}

/// Whether nothing but messages depends on which of several variables this is. Some are empty (`struct lock_class_key`, Linux
/// v6.12 include/linux/lockdep_types.h).
pub(super) fn is_stateless(side: &Side, variable: usize) -> bool {
    let it = side.variable(variable);
    it.size == 0 || policy::is_about_messages(&side.home_of_variable(variable).name, &it.name)
}

/// Variables by base name.
type Bases = BTreeMap<String, Vec<usize>>;

fn uses(side: &Side, function: usize) -> Bases {
    let mut uses = Bases::new();
    for reference in &side.code[function].references {
        let Some(variable) = numbered(side, &reference.target) else {
            continue;
        };
        let base = numbered_base(&side.variable(variable).name).unwrap_or_default();
        let list = uses.entry(base.to_owned()).or_default();
        if !list.contains(&variable) {
            list.push(variable);
        }
    }
    uses
}

/// What is left over on both sides with the same base name may be the same or not: a function may have been renamed, one
/// variable may have gone and another come, or one may have moved into or out of a function or changed its type.
fn what_is_left_is_uncertain(old: &Side, new: &Side, pairs: &mut Pairs) {
    let before = left_over(old, |it| !pairs.taken.contains(&it));
    let after = left_over(new, |it| pairs.old_of(it).is_none());
    for (base, ours) in after {
        if before.contains_key(&base) {
            pairs.uncertain.extend(ours);
        }
    }
}

fn left_over(side: &Side, wanted: impl Fn(usize) -> bool) -> Bases {
    let mut left = Bases::new();
    for (index, it) in side.inventory.variables.iter().enumerate() {
        if side.home_of_variable(index).flags.write && wanted(index) {
            let base = numbered_base(&it.name).unwrap_or(&it.name);
            left.entry(base.to_owned()).or_default().push(index);
        }
    }
    left
}
