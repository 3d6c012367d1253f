//! What a name means: a thing of the guest or a new one, of this file or of another, one thing or several.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{build_objects, compile, named, new_body, only, own, patch, refused, replaced};
use vmpatch_patcher::build::BuildError;

/// The names that a build refuses.
fn refused_names(old: &str, new: &str) -> Vec<String> {
    let report = refused(old, new);
    report.refused.into_iter().map(|it| it.name).collect()
}

#[test]
fn a_function_of_ones_own_that_takes_the_place_of_another_files_is_a_change_of_its_callers() {
    let caller = "int show(int n) { return helper(n) + 1; }";
    let old = format!("extern int helper(int n); {caller}");
    let new = format!("static noinline int helper(int n) {{ return n & 7; }} {caller}");
    let (patch, _) = patch(&old, &new);
    assert_eq!(replaced(&patch), ["show"]);
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&"own helper".to_owned()), "{names:?}");
    assert_eq!(own(&patch, "helper").name, ".text.helper");
}

#[test]
fn what_was_ones_own_and_is_another_files_now_is_refused() {
    let caller = "int show(int n) { return helper(n) + 1; }";
    let own = "static noinline int helper(int n) { return n & 7; }";
    let report = refused(
        &format!("{own} {caller}"),
        &format!("extern int helper(int n); {caller}"),
    );
    assert_eq!(report.refused[0].name, "show");
    assert_eq!(report.refused[0].section, "helper");
    let get = "int get(void) { return level++; }";
    let report = refused(
        &format!("static int level; {get}"),
        &format!("extern int level; {get}"),
    );
    assert_eq!(report.refused[0].section, "level");
}

#[test]
fn names_that_part_are_refused() {
    let body = "noinline int f(int n) { return printk(\"f\", n); }";
    let alias = "extern int g(int n) __attribute__((alias(\"f\")));";
    let apart = "noinline int g(int n) { return printk(\"f\", n); }";
    let changed = body.replace("\"f\", n", "\"f\", n & 7");
    let split = refused_names(&format!("{body} {alias}"), &format!("{changed} {apart}"));
    assert_eq!(split, ["g"]);
    let joined = refused_names(&format!("{body} {apart}"), &format!("{changed} {alias}"));
    assert_eq!(joined, ["g"]);
    let first = alias.replace(" g(", " a(");
    let renamed = refused_names(body, &format!("{changed} {first}"));
    assert_eq!(renamed, ["a"]);
    let (patch, _) = patch(&format!("{body} {alias}"), &format!("{changed} {alias}"));
    assert_eq!(only(&patch).name, "f");
}

/// As `ld -r` makes one object of several.
fn linked(objects: &[Vec<u8>]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<_> = (0..objects.len()).map(|at| format!("{at}.o")).collect();
    for (name, object) in names.iter().zip(objects) {
        std::fs::write(folder.path().join(name), object).unwrap();
    }
    let mut ld = std::process::Command::new("ld");
    let done = ld
        .current_dir(&folder)
        .args(["-r", "-o", "all.o"])
        .args(&names)
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    std::fs::read(folder.path().join("all.o")).unwrap()
}

#[test]
fn an_object_with_two_things_of_one_name_is_refused() {
    let file = |name: &str, by: u8| {
        compile(&format!(
            "static noinline int tell(int n) {{ return printk(\"{name}\", n + {by}); }} \
             int {name}(int n) {{ return tell(n); }}"
        ))
    };
    let old = linked(&[file("one", 1), file("two", 1)]);
    let new = linked(&[file("one", 2), file("two", 1)]);
    let Err(error @ BuildError::Refused(_)) = build_objects(&old, &new) else {
        panic!("not refused")
    };
    let text = error.to_string();
    assert!(text.contains("symbols in tell: "), "{text}");
    // A local one beside one that all may name.
    let mine = "static int state; int mine(void) { return state++; }";
    let all = "int state; int all(int n) { return state += n; }";
    let old = linked(&[compile(mine), compile(all)]);
    let new = linked(&[compile(mine), compile(&all.replace("+= n", "+= n * 3"))]);
    assert!(
        build_objects(&old, &new)
            .unwrap_err()
            .to_string()
            .contains("symbols in state: ")
    );
    // One file's functions are no hindrance to those of another.
    let [old, new] = [1, 2].map(|by| linked(&[file("one", by), compile(all)]));
    build_objects(&old, &new).unwrap();
}
