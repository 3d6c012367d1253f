//! Unwind data of objects beside that of the kernel they were compiled for: what objtool says of a function by itself and
//! what the distributor's build, which ran it over the whole kernel, says of the same function. Objects as for run-pre
//! matching.

#![allow(clippy::unwrap_used, reason = "only tests are here")]

mod guests;

use std::path::Path;

use guests::Guest;
use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::unwind::orc::{Entry, Kind};
use vmpatch_patcher::build::{self, OldFunction};
use vmpatch_patcher::link::names::{Learned, Names};
use vmpatch_patcher::patch::{Unit, Unwind};
use vmpatch_patcher::verify::locate::Wanted;
use vmpatch_patcher::verify::run_pre::Matcher;

/// What an entry means: nothing more is meant by one that is undefined.
fn meaning(entry: Option<Entry>) -> Option<Entry> {
    entry.filter(|entry| entry.kind != Kind::Undefined)
}

/// What rows say of an offset.
fn said(rows: &[Unwind], offset: u32) -> Option<Entry> {
    let row = rows.iter().rev().find(|row| row.offset <= offset);
    meaning(row.map(|row| row.entry))
}

/// What became of the functions of an object.
#[derive(Default)]
struct Count {
    same: usize,
    known: usize,
    all: usize,
}

fn compare(guest: &Guest, unwinder: &Unwinder, path: &Path, count: &mut Count) {
    let view = guest.view();
    let facts = view.facts().unwrap();
    let home = path.parent().and_then(Path::file_name).unwrap();
    let object = home.to_str().unwrap();
    let units = [Unit {
        file: path.display().to_string(),
        object: object.to_owned(),
    }];
    let (functions, symbols) = build::functions(&std::fs::read(path).unwrap()).unwrap();
    let names = Names::look_up(&symbols, &units, &view);
    let matcher = Matcher {
        live: &view,
        facts: &facts,
        names: &names,
    };
    let is_found = |function: &&OldFunction| !function.code.bytes.is_empty();
    for function in functions.iter().filter(is_found) {
        let wanted = Wanted {
            unit: 0,
            object,
            name: &function.name,
            sympos: None,
            code: &function.code,
            parts: &function.parts,
        };
        let Ok(located) = matcher.locate(wanted, &mut Learned::new()) else {
            continue;
        };
        count.all += 1;
        count.known += usize::from(!function.unwind.is_empty());
        let offsets = 0..function.code.bytes.len() as u32;
        let differing = offsets.into_iter().find(|offset| {
            let at = located.range.start.wrapping_add(u64::from(*offset));
            said(&function.unwind, *offset) != meaning(unwinder.entry_at(at))
        });
        match differing {
            None => count.same += 1,
            Some(offset) => {
                let at = located.range.start.wrapping_add(u64::from(offset));
                eprintln!(
                    "    {}+{offset:#x}: {:?}, the guest has {:?}",
                    function.name,
                    said(&function.unwind, offset),
                    unwinder.entry_at(at)
                );
            }
        }
    }
}

fn compare_all(version: &str, variable: &str) {
    let Some(objects) = std::env::var_os(variable) else {
        eprintln!("SKIPPED: {variable} names no objects; nothing was compared");
        return;
    };
    for (dump, guest) in Guest::all(version) {
        let places: Vec<_> = guest.modules.iter().map(|it| it.place()).collect();
        let unwinder = Unwinder::load(&guest.kernel, &guest, &places).unwrap();
        let mut count = Count::default();
        for path in std::env::split_paths(&objects) {
            compare(&guest, &unwinder, &path, &mut count);
        }
        let Count { same, known, all } = count;
        eprintln!("{dump}: of {all} functions {known} have unwind data, {same} as in the guest");
        assert!(all > 0 && known == all && same == all);
    }
}

#[test]
fn what_objtool_says_of_a_function_by_itself_is_what_6_12_says_of_it() {
    compare_all("6.12", "VMPATCH_WHOLE_OBJECTS");
}

#[test]
fn what_objtool_says_of_a_function_by_itself_is_what_6_1_says_of_it() {
    compare_all("6.1", "VMPATCH_WHOLE_OBJECTS_6_1");
}
