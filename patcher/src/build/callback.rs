//! Callbacks: the pointers that the macros of `vmpatch/callbacks.h` leave in sections of their own. Owns the reading of these sections;
//! what is not exactly such a pointer is refused.

use super::collect::{Collector, Thing};
use super::policy::CALLBACKS;
use super::reference::Target;
use super::report::{CalledBack, Refused};
use super::side::Side;
use crate::object::{Kind, Section, SectionId};
use crate::patch::{Callback, CallbackKind};

/// Bytes of a pointer.
const POINTER: u64 = 8;

/// Brings every callback of every file, in the order in which they are called.
pub(super) fn bring(collector: &mut Collector<'_>) -> Vec<Callback> {
    let mut callbacks: Vec<Callback> = Vec::new();
    for at in 0..collector.units.len() {
        let new = &collector.units[at].new;
        for (id, section) in new.object.sections_with_ids() {
            let Some(kind) = section.name.strip_prefix(CALLBACKS) else {
                continue;
            };
            let found = read(new, id, section, kind).and_then(|(kind, function)| {
                match callbacks.iter().find(|it| it.kind == kind) {
                    Some(other) => Err(format!("`{}` is the patch's {kind} already", other.name)),
                    None => Ok((kind, function)),
                }
            });
            match found {
                Ok((kind, function)) => {
                    let name = new.function(function).name.clone();
                    let section = collector.bring(at, Thing::Function(function));
                    let function = name.clone();
                    let report = &mut collector.reports[at];
                    report.callbacks.push(CalledBack { kind, function });
                    callbacks.push(Callback {
                        kind,
                        name,
                        section,
                    });
                }
                Err(reason) => collector.reports[at].refused.push(Refused {
                    name: String::new(),
                    section: section.name.clone(),
                    offset: None,
                    reason,
                }),
            }
        }
    }
    callbacks.sort_by_key(|it| it.kind);
    for report in &mut collector.reports {
        report.callbacks.sort_by_key(|it| it.kind);
    }
    callbacks
}

fn read(
    new: &Side,
    id: SectionId,
    section: &Section,
    kind: &str,
) -> Result<(CallbackKind, usize), String> {
    let kinds = CallbackKind::ALL;
    let Some(kind) = kinds.into_iter().find(|it| it.name() == kind) else {
        let known = kinds.map(CallbackKind::name).join(", ");
        return Err(format!("no such callback; there are {known}"));
    };
    if section.size != POINTER {
        let count = section.size / POINTER;
        return Err(format!("a patch has one {kind}, not {count}"));
    }
    match new.data_references(id, 0, POINTER)[..] {
        [reference] if (reference.offset, reference.kind) == (0, Kind::Absolute64) => {
            match reference.target {
                Target::Function {
                    function,
                    distance: 0,
                } => Ok((kind, function)),
                _ => Err("it does not name a function of its file".to_owned()),
            }
        }
        _ => Err("it does not hold one pointer to a function".to_owned()),
    }
}
