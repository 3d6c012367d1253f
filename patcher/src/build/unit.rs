//! One file in both its versions, with what was found out about it: which things are the same, and what became of every
//! function. Owns the order in which that is found out.

use std::collections::BTreeSet;

use super::compare::{self, Verdict};
use super::exports::Exports;
use super::inventory::numbered_base;
use super::key::{Names, is_numbered_constant};
use super::moves::{Before, Moves};
use super::pair::{self, Pairs};
use super::policy;
use super::reference::Target;
use super::report::{FileReport, Ignored, Refused};
use super::side::Side;
use super::unwind::Tables;
use super::wide::Likeness;
use super::{BuildError, ObjectPair, Version, data, layout, residue};
use crate::object;
use crate::patch::{self, SHADOW_ROOT};

/// See the module.
#[derive(Debug)]
pub(super) struct Unit {
    /// What it is linked into.
    pub(super) object: String,
    /// The old version.
    pub(super) old: Side,
    /// The new version, as its code is brought.
    pub(super) new: Side,
    /// What of the new one is what of the old one.
    pub(super) pairs: Pairs,
    /// What of the new one is what another file had.
    pub(super) moves: Moves,
    /// The names of the new one's things on the old side.
    pub(super) names: Names,
    /// What became of each function of the new version.
    pub(super) verdicts: Vec<Verdict>,
    /// What it offers to other objects.
    pub(super) exports: Exports,
    /// How to unwind from the new one's code.
    pub(super) unwind: Tables,
}

/// A file whose versions were read, before the other files of the patch are looked at.
#[derive(Debug)]
pub(super) struct Draft {
    /// What it is linked into.
    pub(super) object: String,
    /// The old version.
    pub(super) old: Side,
    /// The new version.
    pub(super) new: Side,
    /// What of the new one is what of the old one.
    pub(super) pairs: Pairs,
}

impl Draft {
    fn of(pair: &ObjectPair<'_>) -> Result<Self, BuildError> {
        let (old, new) = (side(pair, Version::Old)?, side(pair, Version::New)?);
        let pairs = pair::pair(&old, &new);
        let object = pair.object.to_owned();
        Ok(Self {
            object,
            old,
            new,
            pairs,
        })
    }
}

/// What a comparison found out.
struct Found {
    moves: Moves,
    names: Names,
    verdicts: Vec<Verdict>,
    exports: Exports,
}

/// Compares both versions of every file. What differs and cannot be patched, or does not matter, is reported.
///
/// # Errors
/// An unreadable object.
pub(super) fn units(
    pairs: &[ObjectPair<'_>],
    safe_types: &[String],
) -> Result<(Vec<Unit>, Vec<FileReport>), BuildError> {
    let drafts = pairs.iter().map(Draft::of);
    let drafts = drafts.collect::<Result<Vec<_>, _>>()?;
    let found = (0..drafts.len()).zip(pairs);
    let found = found.map(|(at, pair)| Found::of(&drafts, at, pair, safe_types));
    let found: Vec<_> = found.collect();
    let drafts = drafts.into_iter().zip(found).zip(pairs);
    let units = drafts.map(|((draft, (found, report)), pair)| {
        let unit = Unit::of(draft, found);
        let (unit, report) = match pair.wide {
            Some(_) => unit.widened(pair, report)?,
            None => (unit, report),
        };
        Ok(unit.with_unwind_data(pair, report))
    });
    let units = units.collect::<Result<Vec<_>, BuildError>>()?;
    Ok(units.into_iter().unzip())
}

impl Found {
    fn of(
        drafts: &[Draft],
        at: usize,
        pair: &ObjectPair<'_>,
        safe_types: &[String],
    ) -> (Self, FileReport) {
        let Draft {
            old, new, pairs, ..
        } = &drafts[at];
        let mut report = FileReport::new(pair);
        let moves = Moves::to(drafts, at, &mut report);
        let mut names = pairs.names(old);
        moves.add_to(&mut names, drafts);
        let mut verdicts = compare::verdicts(old, new, pairs, &names);
        for (function, verdict) in verdicts.iter_mut().enumerate() {
            if let Some(moved) = moves.verdict(drafts, (new, &names, function)) {
                *verdict = moved;
            }
        }
        refuse_ambiguous(&[old, new], &mut report);
        refuse_split(old, new, pairs, &mut report);
        layout::compare(pair, safe_types, &mut report);
        data::compare(old, new, pairs, &mut report);
        moves.refuse_changed(drafts, (new, &names), &mut report);
        residue::compare(old, new, &names, &mut report);
        let exports = Exports::compare(old, new, &mut report);
        list_functions((old, new), pairs, &verdicts, &mut report);
        let found = Self {
            moves,
            names,
            verdicts,
            exports,
        };
        (found, report)
    }
}

impl Unit {
    fn of(draft: Draft, found: Found) -> Self {
        Self {
            object: draft.object,
            old: draft.old,
            new: draft.new,
            pairs: draft.pairs,
            moves: found.moves,
            names: found.names,
            verdicts: found.verdicts,
            exports: found.exports,
            unwind: Tables::default(),
        }
    }

    fn with_unwind_data(
        mut self,
        pair: &ObjectPair<'_>,
        mut report: FileReport,
    ) -> (Self, FileReport) {
        match Tables::read(&self.new.object, pair.unwind) {
            Ok(tables) => self.unwind = tables,
            Err(why) => report.no_unwind_data = Some(why),
        }
        (self, report)
    }

    /// The same with the new code as it is built with static-key branches of five bytes: the verdicts stay, for the branches
    /// are what differs from the old version everywhere.
    fn widened(
        self,
        pair: &ObjectPair<'_>,
        mut report: FileReport,
    ) -> Result<(Self, FileReport), BuildError> {
        let wide = side(pair, Version::Wide)?;
        refuse_ambiguous(&[&wide], &mut report);
        let likeness = Likeness::of((&self.new, &self.names), &wide);
        for (function, reason) in likeness.unfit(&self) {
            report.refused.push(Refused {
                name: self.new.function(function).name.clone(),
                section: self.new.home_of(function).name.clone(),
                offset: None,
                reason: reason.to_owned(),
            });
        }
        let unit = Self {
            verdicts: likeness.verdicts(&self.verdicts, &wide),
            pairs: self
                .pairs
                .seen_by(&wide, &likeness.functions, &likeness.variables),
            moves: self.moves.seen_by(&likeness.functions, &likeness.variables),
            names: likeness.names(&self.names),
            new: wide,
            ..self
        };
        Ok((unit, report))
    }

    /// Why a variable that only the new version has cannot come along.
    pub(super) fn can_bring(&self, variable: usize) -> Result<(), String> {
        let name = &self.new.variable(variable).name;
        if name == SHADOW_ROOT {
            return Err(format!(
                "{name} is vmpatch's, for all patches: it is declared, never defined"
            ));
        }
        if self.pairs.is_uncertain(variable) && !pair::is_stateless(&self.new, variable) {
            return Err(format!(
                "{name} may be one of several static variables of the old object"
            ));
        }
        if self.moves.doubtful.contains(&variable) && !pair::is_stateless(&self.new, variable) {
            return Err(format!(
                "{name} may be a variable that another file of the patch had"
            ));
        }
        let section = &self.new.home_of_variable(variable).name;
        policy::new_data(section).map_err(|reason| format!("{reason} ({name})"))
    }

    /// Whether a constant that tells by pointers what to do is not as before, and the guest may hold on to how it was: what code
    /// and state it leads to is a matter of identity. Those that the compiler made have none.
    pub(super) fn is_changed_table(&self, variable: usize) -> bool {
        let base =
            |side: &Side, it: usize| numbered_base(&side.variable(it).name).map(str::to_owned);
        let of_compiler = |base: &str| base == "CSWTCH" || base.starts_with("C.");
        let wanted = base(&self.new, variable).filter(|it| !of_compiler(it));
        if wanted.is_none() || !leads_to_identity(&self.new, variable) {
            return false;
        }
        let tables = |side: &Side, names: &Names| -> Vec<_> {
            let all = 0..side.inventory.variables.len();
            let same =
                all.filter(|it| is_numbered_constant(side, *it) && base(side, *it) == wanted);
            same.map(|it| data::content(side, names, it)).collect()
        };
        let after = tables(&self.new, &self.names);
        let before = tables(&self.old, &Names::default());
        before.iter().any(|it| !after.contains(it))
            && !before.contains(&data::content(&self.new, &self.names, variable))
    }

    /// A changed function is entered by a jump from the old one; its split-off parts come along with it. `at`: the file itself.
    pub(super) fn replacements(
        &self,
        at: usize,
    ) -> impl Iterator<Item = (usize, Before, &'static str)> + '_ {
        let verdicts = self.verdicts.iter().enumerate();
        verdicts.filter_map(move |(function, verdict)| {
            let Verdict::Changed(difference) = *verdict else {
                return None;
            };
            let is_whole = self.new.function(function).parent.is_none();
            let before = self.before(at, function).filter(|_| is_whole)?;
            Some((function, before, difference))
        })
    }

    /// The guest's name for a variable, if it has it.
    pub(super) fn guest_variable(&self, variable: usize) -> Option<&str> {
        let known = self.names.variables.as_ref()?;
        known.get(&variable).map(String::as_str)
    }

    /// What a variable was.
    pub(super) fn variable_before(&self, at: usize, variable: usize) -> Option<Before> {
        let here = self.pairs.old_of(variable);
        let elsewhere = || self.moves.variables.get(&variable).copied();
        here.map(|before| (at, before)).or_else(elsewhere)
    }

    /// What a function was.
    pub(super) fn before(&self, at: usize, function: usize) -> Option<Before> {
        let here = self.pairs.old_function_of(function);
        let elsewhere = || self.moves.functions.get(&function).copied();
        here.map(|before| (at, before)).or_else(elsewhere)
    }
}

/// What the patch says of the file.
pub(super) fn record(pair: &ObjectPair<'_>) -> patch::Unit {
    patch::Unit {
        file: pair.file.to_owned(),
        object: pair.object.to_owned(),
    }
}

fn side(pair: &ObjectPair<'_>, version: Version) -> Result<Side, BuildError> {
    let bytes = match version {
        Version::Old => pair.old,
        Version::New => pair.new,
        Version::Wide => pair.wide.unwrap_or(pair.new),
    };
    let object = object::read(bytes).map_err(|why| BuildError::Object {
        file: pair.file.to_owned(),
        version,
        why,
    })?;
    Ok(Side::of(object)?.with_debug_information(bytes))
}

/// What has one name with something else cannot be told from it, in the object or in the guest.
fn refuse_ambiguous(sides: &[&Side], report: &mut FileReport) {
    let names: BTreeSet<_> = sides
        .iter()
        .flat_map(|it| &it.inventory.ambiguous)
        .collect();
    for name in names {
        report.refused.push(Refused {
            name: name.clone(),
            section: "symbols".to_owned(),
            offset: None,
            reason: "the object has several things of this name, as one that was linked of others; give \
                     those"
                .to_owned(),
        });
    }
}

/// What calls an alias by one name cannot be led elsewhere than what calls it by another.
fn refuse_split(old: &Side, new: &Side, pairs: &Pairs, report: &mut FileReport) {
    for name in pair::split_names(old, new, pairs) {
        report.refused.push(Refused {
            name,
            section: "symbols".to_owned(),
            offset: None,
            reason:
                "it shares a function with other names in one of the versions and not in the other"
                    .to_owned(),
        });
    }
}

/// Records what became of every function that is not brought.
fn list_functions(
    (old, new): (&Side, &Side),
    pairs: &Pairs,
    verdicts: &[Verdict],
    report: &mut FileReport,
) {
    let mut ignore = |what: &str, reason: &str| {
        let (what, reason) = (what.to_owned(), reason.to_owned());
        report.ignored.push(Ignored { what, reason });
    };
    for (index, function) in old.inventory.functions.iter().enumerate() {
        if pairs.new_function_of(index).is_none() {
            let reason = "only the old object has it; the guest keeps it";
            ignore(&function.name, reason);
        }
    }
    for (function, verdict) in new.inventory.functions.iter().zip(verdicts) {
        if *verdict == Verdict::LinesOnly {
            let reason = "only line numbers of its WARN or BUG differ";
            ignore(&function.name, reason);
        }
    }
    report.unchanged = verdicts.iter().filter(|it| **it == Verdict::Same).count();
}

/// Whether a constant points to functions, to state, or to what other files define.
fn leads_to_identity(side: &Side, variable: usize) -> bool {
    let it = side.variable(variable);
    let end = it.start.saturating_add(it.size);
    let fields = side.data_references(it.section, it.start, end);
    fields.iter().any(|it| match it.target.exact() {
        Target::Outside { .. } => true,
        Target::Function { distance, .. } => distance == 0,
        Target::Variable { variable, .. } => side.home_of_variable(variable).flags.write,
        _ => false,
    })
}
