//! What a file offers to modules. A new function is offered to the files of the patch; the guest's own table keeps
//! what it has, so what the guest loads later does not find it. Owns the layout of the tables.
//!
//! Layouts: Linux v6.12 include/linux/export.h (`.export_symbol`: two strings, then a pointer), v6.1
//! include/linux/export.h (`___ksymtab_gpl+NAME`: distances to the symbol, its name and its namespace).

use std::collections::{BTreeMap, BTreeSet};

use super::reference::{Target, target_of};
use super::report::{FileReport, Ignored, Refused};
use super::side::Side;
use crate::object::{Section, SectionId};

/// One table for all, since v6.5.
const TABLE: &str = ".export_symbol";
/// A section for each, before.
const SINGLE: &str = "___ksymtab";

/// What each name is offered for: licence and namespace.
type Terms = BTreeMap<String, Vec<u8>>;

/// The names that a file offers to other objects.
#[derive(Debug)]
pub(super) struct Exports {
    /// In both versions.
    pub(super) known: BTreeSet<String>,
    /// Only in the new one.
    pub(super) new: BTreeSet<String>,
}

/// Whether a section says what is exported.
pub(super) fn is_table(section: &str) -> bool {
    section == TABLE || section.starts_with(SINGLE)
}

impl Exports {
    /// Lists them. What goes or is offered otherwise is refused.
    pub(super) fn compare(old: &Side, new: &Side, report: &mut FileReport) -> Self {
        let (before, after) = (of(old), of(new));
        for (name, terms) in &before {
            let reason = match after.get(name) {
                None => "it is no longer exported, and the guest goes on with it",
                Some(now) if now == terms => continue,
                Some(_) => "it is exported on other terms, and the guest keeps its own",
            };
            report.refused.push(Refused {
                name: name.clone(),
                section: TABLE.to_owned(),
                offset: None,
                reason: reason.to_owned(),
            });
        }
        let fresh = after.into_keys().filter(|name| !before.contains_key(name));
        let new: BTreeSet<_> = fresh.collect();
        for name in &new {
            let reason = "files of the patch may use it, modules that the guest loads later cannot";
            report.ignored.push(Ignored {
                what: format!("new export of {name}"),
                reason: reason.to_owned(),
            });
        }
        let known = before.into_keys().collect();
        Self { known, new }
    }
}

fn of(side: &Side) -> Terms {
    let mut exports = Terms::new();
    for (id, section) in side.object.sections_with_ids() {
        if section.name == TABLE {
            table(side, section, &mut exports);
        } else if let Some(rest) = section.name.strip_prefix(SINGLE) {
            exports.extend(single(side, (id, section), rest));
        }
    }
    exports
}

/// Each entry ends with its only pointer; what stands before it, its padding included, are the terms.
fn table(side: &Side, section: &Section, exports: &mut Terms) {
    let mut start = 0;
    for field in &section.relocations {
        let name = side.object.symbol(field.symbol).name.clone();
        let terms = section.range(start, field.offset).unwrap_or_default();
        exports.insert(name, terms.to_vec());
        start = field.offset.saturating_add(8);
    }
}

fn single(
    side: &Side,
    (id, section): (SectionId, &Section),
    rest: &str,
) -> Option<(String, Vec<u8>)> {
    let (licence, name) = rest.split_once('+')?;
    let mut terms = licence.as_bytes().to_vec();
    let namespace = section.relocation_at(8);
    let target = namespace.map(|it| target_of(&side.object, &side.inventory, it, 0));
    match target {
        Some(Target::Text {
            section, offset, ..
        }) => terms.extend(side.text(section, offset)),
        // Of assembly: a number.
        _ => terms.extend(side.bytes(id, 8, section.size).unwrap_or_default()),
    }
    Some((name.to_owned(), terms))
}
