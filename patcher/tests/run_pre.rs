//! Run-pre matching over whole objects: every function of objects compiled from the guest's own source must
//! be found running in it, those of modules in the loaded module that an object's folder is named after. `VMPATCH_WHOLE_OBJECTS` lists objects of Debian's 6.12 cloud kernel, separated by
//! colons, `VMPATCH_WHOLE_OBJECTS_6_1` those of 6.1; `cargo xtask test` makes them.

#![allow(clippy::unwrap_used, reason = "only tests are here")]

mod guests;

use std::path::{Path, PathBuf};

use guests::Guest;
use vmpatch_introspect::{Gva, GvaRange};
use vmpatch_patcher::build::{self, OldFunction};
use vmpatch_patcher::link::entry::{self, Body, EntryError};
use vmpatch_patcher::link::live::Live;
use vmpatch_patcher::link::names::{Learned, Names};
use vmpatch_patcher::link::{self};
use vmpatch_patcher::patch::Unit;
use vmpatch_patcher::verify::locate::{LocateError, Located, Wanted};
use vmpatch_patcher::verify::run_pre::Matcher;

fn objects(variable: &str) -> Vec<PathBuf> {
    let Some(list) = std::env::var_os(variable) else {
        eprintln!("SKIPPED: {variable} names no objects; nothing was compared");
        return Vec::new();
    };
    let list: Vec<_> = std::env::split_paths(&list).collect();
    assert!(!list.is_empty(), "{variable} lists no object");
    list
}

/// Why a function of an object need not be found: what the guest runs under that name is something else.
fn explained(
    view: &link::Guest<'_>,
    function: &OldFunction,
    error: &LocateError,
) -> Option<&'static str> {
    let LocateError::Differs { at, mismatch, .. } = error else {
        return Some("copies of an inline function that are alike");
    };
    let layout = &view.kernel().layout;
    if layout.init.is_some_and(|init| init.contains(*at)) {
        return Some("init code, freed since");
    }
    if function.name.starts_with("__SCT__") {
        return Some("the trampoline of a static call, rewritten with each update");
    }
    if is_weak(view, *at) {
        return Some("a weak function that another object overrides");
    }
    // Without a section for each function the assembler shortens jumps to near neighbours.
    let before = view
        .bytes(at.wrapping_add(mismatch.offset as u64), 2)
        .unwrap();
    let jump = view
        .bytes(at.wrapping_add(mismatch.offset as u64 - 1), 1)
        .unwrap();
    (jump == [0xeb] || before[0] == 0xeb).then_some("a tail call that the assembler shortened")
}

/// Whether the bytes at the entry are of another function altogether: known by names, for kallsyms does not
/// tell weak from overridden.
fn is_weak(view: &link::Guest<'_>, at: Gva) -> bool {
    const OVERRIDDEN: [&str; 4] = [
        "sigaction_compat_abi",
        "arch_task_cache_init",
        "arch_release_task_struct",
        "arch_dup_task_struct",
    ];
    OVERRIDDEN.contains(&view.describe(at).as_str())
}

/// Whether a jump to a new function has a place at its entry.
fn entry(
    view: &link::Guest<'_>,
    function: &OldFunction,
    located: &Located,
) -> Result<(), EntryError> {
    let bytes = |range: &GvaRange| view.bytes(range.start, range.size() as usize).unwrap();
    let running = bytes(&located.range);
    let padding = located.range.start.wrapping_sub(entry::PADDING as u64);
    let before = view.bytes(padding, entry::PADDING).unwrap_or_default();
    let parts: Vec<_> = located.parts.iter().map(bytes).collect();
    let bodies: Vec<_> = (function.parts.iter().zip(&located.parts).zip(&parts))
        .map(|((part, range), running)| Body {
            code: &part.code,
            at: range.start,
            running,
            before: &[],
        })
        .collect();
    let main = Body {
        code: &function.code,
        at: located.range.start,
        running: &running,
        before: &before,
    };
    entry::choose(main, &bodies).map(|_| ())
}

fn compare(guest: &Guest, path: &Path) -> (usize, usize) {
    let view = guest.view();
    let facts = view.facts().unwrap();
    let home = path.parent().and_then(Path::file_name).unwrap();
    let object = home.to_str().unwrap();
    let units = [Unit {
        file: path.display().to_string(),
        object: object.to_owned(),
    }];
    let (functions, symbols) = build::functions(&std::fs::read(path).unwrap()).unwrap();
    assert!(!functions.is_empty(), "{} is empty", path.display());
    let names = Names::look_up(&symbols, &units, &view);
    let matcher = Matcher {
        live: &view,
        facts: &facts,
        names: &names,
    };
    let (mut found, mut entered) = (0, 0);
    for function in &functions {
        let wanted = Wanted {
            unit: 0,
            object,
            name: &function.name,
            sympos: None,
            code: &function.code,
            parts: &function.parts,
        };
        match matcher.locate(wanted, &mut Learned::new()) {
            Ok(located) => {
                found += 1;
                match entry(&view, function, &located) {
                    Ok(()) => entered += 1,
                    Err(why) => eprintln!("    {}: no jump: {why}", function.name),
                }
            }
            Err(error) => {
                let why = explained(&view, function, &error);
                eprintln!("    {}: {}", function.name, why.unwrap_or("NOT EXPLAINED"));
                assert!(why.is_some(), "{error}");
            }
        }
    }
    eprintln!(
        "{}: {found} of {} found, {entered} can be entered by a jump",
        path.display(),
        functions.len()
    );
    (found, functions.len())
}

fn compare_all(version: &str, variable: &str) {
    let objects = objects(variable);
    for (dump, guest) in Guest::all(version) {
        if objects.is_empty() {
            return;
        }
        let each: Vec<_> = objects.iter().map(|path| compare(&guest, path)).collect();
        let found: usize = each.iter().map(|(found, _)| found).sum();
        let all: usize = each.iter().map(|(_, all)| all).sum();
        eprintln!("{dump}: {found} of {all}");
        assert!(all > 0, "the objects hold no function");
        assert!(found * 100 >= all * 95, "{found} of {all}");
    }
}

#[test]
fn every_function_of_6_12_is_found_running_or_it_is_known_why_not() {
    compare_all("6.12", "VMPATCH_WHOLE_OBJECTS");
}

#[test]
fn every_function_of_6_1_is_found_running_or_it_is_known_why_not() {
    compare_all("6.1", "VMPATCH_WHOLE_OBJECTS_6_1");
}
