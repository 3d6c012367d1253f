//! Callbacks in a source: what the macros of `vmpatch/callbacks.h` leave in an object.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{build_pairs, compile, pair, patch, refusal};
use vmpatch_patcher::build::BuildError;
use vmpatch_patcher::patch::{CallbackKind, Patch};

const OLD: &str = "int show(int n) { return n; }";
const NEW: &str = "int show(int n) { return n + ready; }";

/// A new source with these lines after a function and a variable that callbacks use.
fn with(lines: &str) -> String {
    let header = include_str!("../../include/vmpatch/callbacks.h");
    // What the kernel's own headers define.
    let kernel = "#define __used __attribute__((__used__))\n\
                  #define __section(s) __attribute__((__section__(s)))\n";
    format!("{kernel}{header}\nstatic int ready;\n{NEW}\n{lines}")
}

/// Kind, name and the section's name of each callback.
fn callbacks(patch: &Patch) -> Vec<(CallbackKind, &str, &str)> {
    let all = patch.callbacks.iter();
    all.map(|it| {
        let section = &patch.sections[it.section as usize];
        (it.kind, it.name.as_str(), section.name.as_str())
    })
    .collect()
}

#[test]
fn a_callback_comes_along_with_what_it_needs_though_nothing_refers_to_it() {
    let lines = "static int prepare(void) { ready = 7; return printk(\"preparing\"); }\n\
                 VMPATCH_PRE_APPLY(prepare);";
    let (patch, report) = patch(OLD, &with(lines));
    assert_eq!(
        callbacks(&patch),
        [(CallbackKind::PreApply, "prepare", ".text.prepare")]
    );
    let new: Vec<_> = report.new.iter().map(|it| it.name.as_str()).collect();
    assert!(
        new.contains(&"prepare") && new.contains(&"ready"),
        "{new:?}"
    );
    let told = report.to_string();
    assert!(told.contains("callback  pre_apply: prepare"), "{told}");
    assert_eq!(
        (report.ignored.len(), report.refused.len()),
        (0, 0),
        "{told}"
    );
}

#[test]
fn every_kind_has_its_macro() {
    let lines = "static int a(void) { return ready; } VMPATCH_PRE_APPLY(a);\n\
                 static void b(void) { ready = 2; } VMPATCH_POST_APPLY(b);\n\
                 static int c(void) { return -ready; } VMPATCH_PRE_ROLLBACK(c);\n\
                 static void d(void) { ready = 4; } VMPATCH_POST_ROLLBACK(d);";
    let (patch, _) = patch(OLD, &with(lines));
    let found = callbacks(&patch);
    let names: Vec<_> = found.iter().map(|(kind, name, _)| (*kind, *name)).collect();
    let kinds = CallbackKind::ALL.into_iter().zip(["a", "b", "c", "d"]);
    assert_eq!(names, kinds.collect::<Vec<_>>());
}

#[test]
fn a_section_that_is_no_callback_as_the_macros_make_it_is_refused_by_name() {
    let pointer = |section: &str, value: &str| {
        format!(
            "static int f(void) {{ return 0; }}\n\
             static void *const p __used __section(\"{section}\") = {value};"
        )
    };
    for (section, value, reason) in [
        (
            "pre_aply",
            "f",
            "no such callback; there are pre_apply, post_apply",
        ),
        ("pre_apply", "(void *)8", "does not hold one pointer"),
        ("pre_apply", "(void *)f + 1", "does not name a function"),
        ("pre_apply", "&ready", "does not name a function"),
        ("pre_apply", "printk", "does not name a function"),
    ] {
        let section = format!(".vmpatch.callbacks.{section}");
        let (at, _, said) = refusal(OLD, &with(&pointer(&section, value)));
        assert!(at == section && said.contains(reason), "{at}: {said}");
    }
}

#[test]
fn a_patch_has_one_callback_of_a_kind() {
    let two = "static int f(void) { return 0; } static int g(void) { return 1; }\n\
               static void *const p[2] __used __section(\".vmpatch.callbacks.pre_apply\") = { f, g };";
    let (_, _, said) = refusal(OLD, &with(two));
    assert_eq!(said, "a patch has one pre_apply, not 2");
    let one = |name: &str| {
        let lines = format!("static int {name}(void) {{ return 0; }} VMPATCH_PRE_APPLY({name});");
        compile(&with(&lines))
    };
    let (old, a, b) = (compile(OLD), one("a"), one("b"));
    let pairs = [pair("a.c", &old, &a), pair("b.c", &old, &b)];
    let Err(BuildError::Refused(report)) = build_pairs(&pairs) else {
        panic!("two callbacks of one kind");
    };
    let refused: Vec<_> = report.refused().collect();
    assert!(
        refused[0].contains("`a` is the patch's pre_apply already"),
        "{refused:?}"
    );
}
