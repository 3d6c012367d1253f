//! Structures that lie in memory otherwise in the new version. A running guest is full of those of the old one, and code that is not
//! replaced goes on to use them: such a difference is refused. Owns the comparison.

use std::collections::BTreeMap;

use super::ObjectPair;
use super::report::{FileReport, Ignored, Refused};
use crate::object::types::{self, Layout, Layouts, Member};

/// Where refusals say that they are found.
const PLACE: &str = "type layout";

/// Records every structure that both versions have and that differs, but for those in `safe`.
pub(super) fn compare(pair: &ObjectPair<'_>, safe: &[String], report: &mut FileReport) {
    let (Some(old), Some(new)) = (read(pair.old, report), read(pair.new, report)) else {
        return;
    };
    for (name, before) in &old {
        let difference = new.get(name).and_then(|after| difference(before, after));
        let Some(difference) = difference else {
            continue;
        };
        if safe.iter().any(|it| is_called(name, it)) {
            report.ignored.push(Ignored {
                what: name.clone(),
                reason: format!("{difference}; said to be safe"),
            });
            continue;
        }
        report.refused.push(Refused {
            name: name.clone(),
            section: PLACE.to_owned(),
            offset: None,
            reason: format!("{difference}, and what the guest has of it lies as before"),
        });
    }
    report.layouts = Some(old.len());
}

fn read(object: &[u8], report: &mut FileReport) -> Option<Layouts> {
    types::layouts(object).unwrap_or_else(|why| {
        report.ignored.push(Ignored {
            what: "debug information".to_owned(),
            reason: format!("it cannot be read ({why}), so layouts of types are not compared"),
        });
        None
    })
}

/// `struct NAME` is called so and `NAME` for short.
fn is_called(name: &str, short: &str) -> bool {
    name == short || name.split_once(' ').is_some_and(|(_, it)| it == short)
}

fn difference(old: &Layout, new: &Layout) -> Option<String> {
    let named = |members: &[Member]| -> BTreeMap<String, (u64, Option<u64>)> {
        let place = |it: &Member| (it.name.clone(), (it.at_bit, it.bits));
        members.iter().map(place).collect()
    };
    let (before, after) = (named(&old.members), named(&new.members));
    let gone = before.keys().find(|name| !after.contains_key(*name));
    let come = after.keys().find(|name| !before.contains_key(*name));
    let differs = |what: fn(&(u64, Option<u64>)) -> Option<u64>| {
        let mut both = before.iter();
        let found = both.find(|(name, place)| {
            let now = after.get(*name);
            now.is_some_and(|now| what(now) != what(place))
        });
        found.map(|(name, _)| name)
    };
    let moved = differs(|(at, _)| Some(*at));
    // Of some members the width cannot be told; those are as wide as before.
    let grown = || differs(|(_, bits)| *bits);
    match (come, gone, moved) {
        (Some(come), Some(gone), _) => Some(format!("{gone} is gone and {come} has come")),
        (Some(come), None, _) => Some(format!("member {come} has come")),
        (None, Some(gone), _) => Some(format!("member {gone} is gone")),
        (None, None, Some(name)) => Some(format!("member {name} has moved")),
        (None, None, None) if let Some(name) = grown() => {
            Some(format!("member {name} has another width"))
        }
        (None, None, None) if old.bytes != new.bytes => Some(format!(
            "it has {} bytes instead of {}",
            new.bytes, old.bytes
        )),
        (None, None, None) => None,
    }
}
