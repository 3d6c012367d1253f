//! Differences in data. A running guest has its own variables, whose values nobody may set back: changed
//! initial values are refused. Owns that comparison; whether new data can be brought is
//! [`super::policy`]'s, when code asks for it.

use std::collections::{BTreeMap, BTreeSet};

use super::class::Class;
use super::exports;
use super::inventory::numbered_base;
use super::key::{self, Content, Names, is_numbered_constant};
use super::pair::Pairs;
use super::policy;
use super::report::{FileReport, Ignored, Refused};
use super::side::Side;
use crate::object::{Section, SectionId};

/// Records every difference in data.
pub(super) fn compare(old: &Side, new: &Side, pairs: &Pairs, report: &mut FileReport) {
    let names = pairs.names(old);
    let comparison = Comparison {
        old,
        new,
        pairs,
        names: &names,
    };
    comparison.pairs(report);
    comparison.gone(report);
    comparison.come(report);
    comparison.numbered(report);
    comparison.unnamed(report);
}

struct Comparison<'a> {
    old: &'a Side,
    new: &'a Side,
    pairs: &'a Pairs,
    names: &'a Names,
}

impl Comparison<'_> {
    fn pairs(&self, report: &mut FileReport) {
        let mut pairs: Vec<_> = self.pairs.iter().collect();
        pairs.sort_unstable();
        for (ours, theirs) in pairs {
            let (before, after) = (
                self.old.home_of_variable(theirs),
                self.new.home_of_variable(ours),
            );
            let (section, name) = (&after.name, &self.new.variable(ours).name);
            if policy::is_no_data(section) {
                continue;
            }
            if let Some(reason) = Class::of(before).cannot_be(Class::of(after)) {
                record(report, name, section, reason);
                continue;
            }
            if same((self.old, theirs), (self.new, self.names, ours)) {
                continue;
            }
            record(
                report,
                name,
                section,
                "its initial value or size differs, and the guest has its own",
            );
        }
    }

    /// Variables that only the old object has.
    fn gone(&self, report: &mut FileReport) {
        let kept: BTreeSet<usize> = self.pairs.iter().map(|(_, old)| old).collect();
        for (index, variable) in self.old.inventory.variables.iter().enumerate() {
            let section = &self.old.object.section(variable.section).name;
            let by_content = is_numbered_constant(self.old, index);
            if kept.contains(&index) || by_content || policy::is_no_data(section) {
                continue;
            }
            let reason = "only the old object has it; the guest keeps it".to_owned();
            report.ignored.push(Ignored {
                what: variable.name.clone(),
                reason,
            });
        }
    }

    /// Variables that only the new object has, in sections whose entries act by being there.
    fn come(&self, report: &mut FileReport) {
        for (index, variable) in self.new.inventory.variables.iter().enumerate() {
            let section = self.new.object.section(variable.section);
            let known = self.pairs.old_of(index).is_some() || self.pairs.is_uncertain(index);
            let by_content = is_numbered_constant(self.new, index);
            if known
                || by_content
                || policy::is_no_data(&section.name)
                || !acts_by_presence(section)
            {
                continue;
            }
            record(
                report,
                &variable.name,
                &section.name,
                "new entries cannot be registered yet",
            );
        }
    }

    /// Read-only entries of such sections, and what modules say of themselves, whose names have a number that changes: known by
    /// what they hold.
    fn numbered(&self, report: &mut FileReport) {
        let mut before = numbered_entries(self.old, &Names::default());
        for (key, entries) in numbered_entries(self.new, self.names) {
            let mut known = before.remove(&key).unwrap_or_default();
            for (content, index) in entries {
                match known.iter().position(|(it, _)| *it == content) {
                    Some(at) => _ = known.swap_remove(at),
                    None => {
                        let name = Self::entry_name(self.new, index);
                        record(
                            report,
                            &name,
                            &key.0,
                            "new entries cannot be registered yet",
                        );
                    }
                }
            }
            before.insert(key, known);
        }
        for (_, index) in before.into_values().flatten() {
            report.ignored.push(Ignored {
                what: Self::entry_name(self.old, index),
                reason: "only the old object has it; the guest keeps it".to_owned(),
            });
        }
    }

    fn entry_name(side: &Side, index: usize) -> String {
        let it = side.variable(index);
        if side.home_of_variable(index).name != policy::MODULE_INFORMATION {
            return it.name.clone();
        }
        let text = side.text(it.section, it.start);
        String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned()
    }

    /// Sections without variables that are not pools: compared as a whole, by name.
    fn unnamed(&self, report: &mut FileReport) {
        let names: BTreeSet<&str> = [self.old, self.new]
            .iter()
            .flat_map(|side| side.object.sections_with_ids().map(move |it| (side, it)))
            .filter(|(side, (id, section))| is_unnamed(side, *id, section))
            .map(|(_, (_, section))| section.name.as_str())
            .collect();
        let old_names = Names::default();
        for name in names {
            let before = all_of(self.old, &old_names, name);
            if before != all_of(self.new, self.names, name) {
                record(
                    report,
                    "",
                    name,
                    "its entries differ, and the guest has its own",
                );
            }
        }
    }
}

/// Whether a variable has the size, place and initial value that it had.
pub(super) fn same(
    (old, theirs): (&Side, usize),
    (new, names, ours): (&Side, &Names, usize),
) -> bool {
    let old_names = Names::default();
    let (a, b) = (new.variable(ours), old.variable(theirs));
    a.size == b.size
        && new.object.section(a.section).flags == old.object.section(b.section).flags
        && content(new, names, ours) == content(old, &old_names, theirs)
}

/// Section and base name of entries to what each holds, and which it is.
type NumberedEntries = BTreeMap<(String, String), Vec<(Content, usize)>>;

fn numbered_entries(side: &Side, names: &Names) -> NumberedEntries {
    let mut found = NumberedEntries::new();
    for (index, it) in side.inventory.variables.iter().enumerate() {
        let section = side.home_of_variable(index);
        let is_entry = acts_by_presence(section) && !policy::is_no_data(&section.name)
            || section.name == policy::MODULE_INFORMATION;
        let base = numbered_base(&it.name).filter(|_| is_numbered_constant(side, index));
        if let Some(base) = base.filter(|_| is_entry) {
            let key = (section.name.clone(), base.to_owned());
            let content = content(side, names, index);
            found.entry(key).or_default().push((content, index));
        }
    }
    found
}

/// What a variable holds.
pub(super) fn content(side: &Side, names: &Names, variable: usize) -> Content {
    let it = side.variable(variable);
    key::data(
        side,
        names,
        it.section,
        (it.start, it.start.saturating_add(it.size)),
    )
}

fn record(report: &mut FileReport, name: &str, section: &str, reason: &str) {
    if let Some(harmless) = policy::ignored_data(section) {
        let what = if name.is_empty() { section } else { name };
        let (what, reason) = (what.to_owned(), harmless.to_owned());
        report.ignored.push(Ignored { what, reason });
        return;
    }
    let (name, section, reason) = (name.to_owned(), section.to_owned(), reason.to_owned());
    report.refused.push(Refused {
        name,
        section,
        offset: None,
        reason,
    });
}

/// Sections that the linker script gathers into tables, or that name what modules may use: an entry needs
/// no one to refer to it. Plain variables that nothing refers to do nothing.
fn acts_by_presence(section: &Section) -> bool {
    let name = &section.name;
    !name.starts_with('.') && name != policy::DYNAMIC_DEBUG || name.starts_with(".initcall")
}

fn is_unnamed(side: &Side, id: SectionId, section: &Section) -> bool {
    let flags = section.flags;
    let pool = flags.merge || section.name.starts_with(".rodata");
    flags.alloc
        && !flags.exec
        && !pool
        && section.size > 0
        && side.inventory.variables_in(id).is_empty()
        && !policy::is_no_data(&section.name)
        && !exports::is_table(&section.name)
}

/// The content of all sections of a name, in order.
fn all_of(side: &Side, names: &Names, name: &str) -> Vec<(u64, Content)> {
    let sections = side
        .object
        .sections_with_ids()
        .filter(|(_, it)| it.name == name);
    sections
        .map(|(id, it)| (it.size, key::data(side, names, id, (0, it.size))))
        .collect()
}
