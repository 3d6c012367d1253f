//! One file in both its versions, with what was found out about it: which things are the same, and what became of every
//! function. Owns the order in which that is found out.

use std::collections::BTreeSet;

use super::compare::{self, Verdict};
use super::exports::Exports;
use super::key::Names;
use super::pair::{self, Pairs};
use super::report::{FileReport, Ignored, Refused};
use super::side::Side;
use super::unwind::Tables;
use super::{BuildError, ObjectPair, Version, data, layout, residue};
use crate::object;
use crate::patch;

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
    /// The names of the new one's things on the old side.
    pub(super) names: Names,
    /// What became of each function of the new version.
    pub(super) verdicts: Vec<Verdict>,
    /// What it offers to other objects.
    pub(super) exports: Exports,
    /// How to unwind from the new one's code.
    pub(super) unwind: Tables,
}

impl Unit {
    /// Compares both versions. What differs and cannot be patched, or does not matter, is reported.
    ///
    /// # Errors
    /// An unreadable object.
    pub(super) fn of(
        pair: &ObjectPair<'_>,
        safe_types: &[String],
    ) -> Result<(Self, FileReport), BuildError> {
        let (old, new) = (side(pair, Version::Old)?, side(pair, Version::New)?);
        let pairs = pair::pair(&old, &new);
        let names = pairs.names(&old);
        let verdicts = compare::verdicts(&old, &new, &pairs, &names);
        let mut report = FileReport::new(pair);
        refuse_ambiguous(&[&old, &new], &mut report);
        refuse_split(&old, &new, &pairs, &mut report);
        layout::compare(pair, safe_types, &mut report);
        data::compare(&old, &new, &pairs, &mut report);
        residue::compare(&old, &new, &names, &mut report);
        let exports = Exports::compare(&old, &new, &mut report);
        list_functions((&old, &new), &pairs, &verdicts, &mut report);
        let unit = Self {
            object: pair.object.to_owned(),
            old,
            new,
            pairs,
            names,
            verdicts,
            exports,
            unwind: Tables::default(),
        };
        let (unit, report) = match pair.wide {
            Some(_) => unit.widened(pair, report)?,
            None => (unit, report),
        };
        Ok(unit.with_unwind_data(pair, report))
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
        let verdict = |function: usize| {
            let name = &wide.function(function).name;
            let same = self.new.inventory.function_named(name)?;
            self.verdicts.get(same).copied()
        };
        for (function, verdict) in self.verdicts.iter().enumerate() {
            let it = self.new.function(function);
            let is_brought = matches!(verdict, Verdict::Changed(_) | Verdict::New);
            if is_brought && wide.inventory.function_named(&it.name).is_none() {
                report.refused.push(Refused {
                    name: it.name.clone(),
                    section: self.new.home_of(function).name.clone(),
                    offset: None,
                    reason: "the compiler leaves it out where static-key branches have five bytes"
                        .to_owned(),
                });
            }
        }
        let functions = 0..wide.inventory.functions.len();
        let known: Vec<_> = functions.map(verdict).collect();
        for function in known.iter().enumerate().filter(|(_, it)| it.is_none()) {
            report.refused.push(Refused {
                name: wide.function(function.0).name.clone(),
                section: wide.home_of(function.0).name.clone(),
                offset: None,
                reason: "the compiler makes it only where static-key branches have five bytes"
                    .to_owned(),
            });
        }
        let verdicts = known.into_iter().map(|it| it.unwrap_or(Verdict::New));
        let pairs = pair::pair(&self.old, &wide);
        Ok((
            Self {
                object: self.object,
                names: pairs.names(&self.old),
                verdicts: verdicts.collect(),
                unwind: self.unwind,
                old: self.old,
                new: wide,
                pairs,
                exports: self.exports,
            },
            report,
        ))
    }

    /// A changed function is entered by a jump from the old one; its split-off parts come along with it.
    pub(super) fn replacements(&self) -> impl Iterator<Item = (usize, usize, &'static str)> + '_ {
        self.verdicts
            .iter()
            .enumerate()
            .filter_map(|(function, verdict)| {
                let Verdict::Changed(difference) = *verdict else {
                    return None;
                };
                let is_whole = self.new.function(function).parent.is_none();
                let before = self.pairs.old_function_of(function).filter(|_| is_whole)?;
                Some((function, before, difference))
            })
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
    Side::of(object)
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
