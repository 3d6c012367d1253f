//! Changed, new and unchanged functions, and what they refer to.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{
    build_objects, compile, compile_with, named, new_body, nothing, only, own, patch, refusal,
    replaced, sites,
};
use vmpatch_patcher::build::BuildError;
use vmpatch_patcher::patch::{SectionKind, SiteKind};

const SHOW: &str = "int show(int n) { return printk(\"old text\\n\", n); }";

#[test]
fn the_same_source_twice_changes_nothing() {
    let report = nothing(SHOW, SHOW);
    assert_eq!(report.unchanged, 1);
    assert_eq!(report.ignored, []);
}

#[test]
fn a_changed_string_replaces_its_function_and_comes_along() {
    let (patch, report) = patch(SHOW, &SHOW.replace("old text", "new text"));
    assert_eq!(replaced(&patch), ["show"]);
    assert_eq!(report.new.len(), 1);
    let old = &only(&patch).old;
    let names = named(&patch, &old.relocations);
    assert_eq!(names[..2], ["guest __fentry__", "old old text\n"]);
    let new = &new_body(&patch).relocations;
    let section = patch
        .sections
        .iter()
        .position(|it| it.bytes == b"new text\n\0")
        .unwrap();
    assert_eq!(patch.sections[section].kind, SectionKind::ReadOnly);
    assert!(
        named(&patch, new)[1].starts_with("own .rodata"),
        "{:?}",
        named(&patch, new)
    );
}

#[test]
fn the_order_of_strings_in_their_pool_does_not_matter() {
    let other = "int other(void) { return printk(\"first\"); }";
    let late = format!("{SHOW}\n{other}");
    let early = format!("{other}\n{SHOW}");
    let flags = ["-fno-toplevel-reorder"];
    let (one, two) = (compile_with(&late, &flags), compile_with(&early, &flags));
    assert_ne!(one, two);
    assert!(matches!(
        build_objects(&one, &two),
        Err(BuildError::NothingChanged(_))
    ));
}

#[test]
fn a_changed_constant_leaves_other_functions_alone() {
    let source = "int one(int n) { return n * 3 + 1; } int two(int n) { return n + 2; }";
    let (patch, report) = patch(source, &source.replace("* 3", "* 77"));
    assert_eq!(replaced(&patch), ["one"]);
    assert_eq!(report.unchanged, 1);
    assert_eq!(report.new, []);
}

#[test]
fn a_new_static_function_comes_along_and_is_called_where_it_lies() {
    let old = "static noinline int half(int n) { return n / 2; }
        int show(int n) { return half(n) + 1; }";
    let new = "static noinline int half(int n) { return n / 2; }
        static noinline int twice(int n) { return printk(\"%d\", n * 2); }
        int show(int n) { return half(n) + twice(n); }";
    let (patch, report) = patch(old, new);
    assert_eq!(replaced(&patch), ["show"]);
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&"guest half".to_owned()), "{names:?}");
    assert!(names.contains(&"own twice".to_owned()), "{names:?}");
    let twice = own(&patch, "twice");
    assert_eq!(twice.kind, SectionKind::Text);
    assert!(named(&patch, &twice.relocations).contains(&"guest printk".to_owned()));
    assert!(
        report
            .new
            .iter()
            .any(|it| it.name == "twice" && it.kind == "function")
    );
}

#[test]
fn a_new_function_that_nothing_calls_is_reported_and_left_out() {
    let (patch, report) = patch(
        SHOW,
        &format!(
            "{} int unused(int n) {{ return n; }}",
            SHOW.replace("old", "new")
        ),
    );
    assert_eq!(replaced(&patch), ["show"]);
    assert!(patch.sections.iter().all(|it| !it.name.contains("unused")));
    assert!(report.ignored.iter().any(|it| it.what == "unused"));
}

#[test]
fn calls_go_to_the_new_body_but_addresses_stay_the_guests() {
    let old = "noinline int inner(int n) { return n + 1; }
        int outer(int n) { use(inner); return inner(n) + 1; }";
    let (patch, _) = patch(
        old,
        &old.replace("n + 1", "n + 5").replace(") + 1", ") + 9"),
    );
    assert_eq!(replaced(&patch), ["inner", "outer"]);
    let outer = patch.replaced.iter().find(|it| it.name == "outer").unwrap();
    let names = named(
        &patch,
        &patch.sections[outer.new_section as usize].relocations,
    );
    assert!(names.contains(&"guest inner".to_owned()), "{names:?}");
    assert!(names.contains(&"own inner".to_owned()), "{names:?}");
}

#[test]
fn padding_before_a_function_is_not_part_of_it() {
    let flags = ["-fpatchable-function-entry=16,16"];
    let old = compile_with(SHOW, &flags);
    let new = compile_with(&SHOW.replace("old", "new"), &flags);
    let (patch, _) = build_objects(&old, &new).unwrap();
    // endbr64, then the call to __fentry__: the function's own first bytes, not the padding's nops.
    assert_eq!(only(&patch).old.bytes[..5], [0xf3, 0x0f, 0x1e, 0xfa, 0xe8]);
    assert_eq!(only(&patch).new_offset, 0);
    assert_eq!(new_body(&patch).bytes[..5], [0xf3, 0x0f, 0x1e, 0xfa, 0xe8]);
}

#[test]
fn cold_parts_are_gated_with_their_function() {
    let old = "extern void note(const char *) __attribute__((cold));
        int show(int n) { if (n == 7) { note(\"old end\"); return 5; } return n; }";
    let (patch, _) = patch(old, &old.replace("old end", "new end"));
    assert_eq!(replaced(&patch), ["show"]);
    let [part] = &only(&patch).old_parts[..] else {
        panic!("{:?}", only(&patch).old_parts)
    };
    assert_eq!(part.name, "show.cold");
    assert!(named(&patch, &part.code.relocations).contains(&"old old end".to_owned()));
    // The new body jumps to its own new part, never to the guest's old one.
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&"own show.cold".to_owned()), "{names:?}");
}

#[test]
fn sites_are_found_without_tables() {
    let old = "extern int __SCT__might(void);
        int show(int (*f)(int), int n) { __SCT__might(); return f(n) + 1; }";
    let (patch, _) = patch(old, &old.replace("+ 1", "+ 2"));
    let code = &only(&patch).old;
    let kinds: Vec<_> = sites(code)
        .into_iter()
        .map(|(_, len, kind)| (len, kind))
        .collect();
    let wanted = [
        (4, "Endbr"),
        (5, "Fentry"),
        (5, "StaticCall"),
        (5, "Retpoline"),
        (5, "Return"),
    ];
    assert_eq!(kinds, wanted.map(|(len, kind)| (len, kind.to_owned())));
    assert!(
        code.sites
            .iter()
            .any(|it| matches!(it.kind, SiteKind::Retpoline { call: true, .. }))
    );
    let fentry = code
        .sites
        .iter()
        .find(|it| it.kind == SiteKind::Fentry)
        .unwrap();
    assert_eq!(code.bytes[fentry.offset as usize], 0xe8);
}

#[test]
fn a_static_call_trampoline_of_the_same_object_is_a_site() {
    let old =
        "asm(\".section .static_call.text,\\\"ax\\\"\\n.globl __SCT__own\\n__SCT__own: ret\\n\
        .type __SCT__own, @function\\n.size __SCT__own, . - __SCT__own\\n.previous\");
        extern int __SCT__own(void); int show(int n) { return __SCT__own() + 1 + n; }";
    let (patch, _) = patch(old, &old.replace("+ 1", "+ 2"));
    assert!(
        only(&patch)
            .old
            .sites
            .iter()
            .any(|it| it.kind == SiteKind::StaticCall)
    );
    assert!(
        new_body(&patch)
            .sites
            .iter()
            .any(|it| it.kind == SiteKind::StaticCall)
    );
    assert!(named(&patch, &new_body(&patch).relocations).contains(&"guest __SCT__own".to_owned()));
}

#[test]
fn plain_returns_are_sites_too() {
    let flags = ["-mfunction-return=keep"];
    let source = "int show(int n) { return n ? n * 3 : printk(\"x\"); }";
    let old = compile_with(source, &flags);
    let new = compile_with(&source.replace("3", "5"), &flags);
    let (patch, _) = build_objects(&old, &new).unwrap();
    let returns = only(&patch)
        .old
        .sites
        .iter()
        .filter(|it| it.kind == SiteKind::Return);
    let code = &only(&patch).old;
    let bytes: Vec<_> = returns
        .map(|it| (code.bytes[it.offset as usize], it.len))
        .collect();
    assert!(!bytes.is_empty());
    assert!(bytes.iter().all(|it| *it == (0xc3, 1)), "{bytes:?}");
}

#[test]
fn an_immediate_after_a_relative_field_is_counted() {
    // cmpb $7, there+9(%rip): the field is five bytes from the end of its instruction.
    let old = "extern char there[64]; int show(int n) { return there[9] == 7 ? n : n * 3; }";
    let (patch, _) = patch(old, &old.replace("* 3", "* 5"));
    let there = only(&patch).old.relocations.iter();
    let addends: Vec<_> = there
        .filter(|it| objects::symbol(&patch, it.symbol) == "guest there")
        .map(|it| it.addend)
        .collect();
    assert_eq!(addends, [9 - 5]);
}

#[test]
fn init_code_is_refused_because_it_has_run() {
    let old = "section(\".init.text\") int start(int n) { return n + 1; }";
    let (section, name, reason) = refusal(old, &old.replace("+ 1", "+ 2"));
    assert_eq!((section.as_str(), name.as_str()), (".init.text", "start"));
    assert!(reason.contains("boot"), "{reason}");
}

#[test]
fn entry_and_noinstr_code_is_refused() {
    for section in [".entry.text", ".noinstr.text", ".kprobes.text"] {
        let old = format!("section(\"{section}\") int f(int n) {{ return n + 1; }}");
        let (found, name, _) = refusal(&old, &old.replace("+ 1", "+ 2"));
        assert_eq!((found.as_str(), name.as_str()), (section, "f"));
    }
}

#[test]
fn a_call_within_a_shared_section_is_a_reference_though_it_has_no_relocation() {
    let shared = "static section(\".sched.text\") noinline int inner(int n) { return n ^ 5; }
        section(\".sched.text\") int outer(int n) { return inner(n) + 1; }";
    let (patch, _) = patch(shared, &shared.replace("+ 1", "+ 2"));
    assert_eq!(replaced(&patch), ["outer"]);
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&"guest inner".to_owned()), "{names:?}");
    let old = named(&patch, &only(&patch).old.relocations);
    assert!(old.contains(&"guest inner".to_owned()), "{old:?}");
}

#[test]
fn a_function_that_is_gone_is_reported() {
    let gone = format!("{SHOW} int gone(int n) {{ return n * 9; }}");
    let (patch, report) = patch(&gone, &SHOW.replace("old", "new"));
    assert_eq!(replaced(&patch), ["show"]);
    assert!(report.ignored.iter().any(|it| it.what == "gone"));
}

#[test]
fn what_is_no_object_is_told_from_what_is_one() {
    let good = compile(SHOW);
    let error = build_objects(b"#!/bin/sh", &good).unwrap_err().to_string();
    assert!(
        error.starts_with("old object of drivers/test.c: not a readable ELF file"),
        "{error}"
    );
    let mut program = good.clone();
    program[16] = 2;
    let error = build_objects(&good, &program).unwrap_err().to_string();
    assert!(
        error.starts_with("new object of drivers/test.c: not a relocatable"),
        "{error}"
    );
}

#[test]
fn damaged_objects_end_in_an_error_or_a_patch_never_in_a_panic() {
    let good = compile(SHOW);
    let new = compile(&SHOW.replace("old", "new"));
    for len in (0..good.len()).step_by(7) {
        let _ = build_objects(&good[..len], &new);
    }
    for at in 0..good.len() {
        for value in [0x00, 0x7f, 0xff] {
            let mut damaged = good.clone();
            damaged[at] = value;
            let _ = build_objects(&damaged, &new);
            let _ = build_objects(&new, &damaged);
        }
    }
}

#[test]
fn a_clone_that_is_numbered_otherwise_is_the_same_clone() {
    let source = |asm: &str| {
        format!(
            "static noinline int helper(int n) __asm__(\"{asm}\"); \
             static noinline int helper(int n) {{ return printk(\"n\", n) + 1; }} \
             int show(int n) {{ return helper(n); }}"
        )
    };
    let report = nothing(&source("helper.isra.0"), &source("helper.isra.1"));
    assert_eq!(report.unchanged, 2);
    let changed = source("helper.isra.1").replace("+ 1", "+ 2");
    let (patch, _) = patch(&source("helper.isra.0"), &changed);
    assert_eq!(replaced(&patch), ["helper.isra.0"]);
}

/// Two functions side by side in one section, the first of which ends in a call of the second.
fn side_by_side(number: u32) -> String {
    format!(
        "asm(\".pushsection .sched.text,\\\"ax\\\"\\n\
         .globl first\\n.type first,@function\\nfirst: mov ${number},%edi\\n\
         .byte 0xe8\\n.long second - . - 4\\n.size first, . - first\\n\
         .globl second\\n.type second,@function\\nsecond: mov $1,%eax\\nret\\n.size second, . - second\\n\
         .popsection\");"
    )
}

#[test]
fn a_call_of_the_function_that_follows_is_no_place_of_its_own() {
    let (patch, _) = patch(&side_by_side(1), &side_by_side(2));
    assert_eq!(replaced(&patch), ["first"]);
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(
        names.iter().any(|name| name.contains("second")),
        "{names:?}"
    );
}

/// Assembly beside a function in C that is changed too.
fn with_assembly(code: &str, number: u32) -> String {
    format!(
        "asm(\".pushsection .entry,\\\"ax\\\"\\n{code}\\n.popsection\");
         int run(int n) {{ return n + {number}; }}"
    )
}

#[test]
fn code_at_plain_labels_is_compared_and_a_difference_refused() {
    let body = "here: mov $1,%eax\\njmp other\\nnop\\nint3";
    for (from, to) in [
        ("$1", "$2"),
        ("jmp other", "jmp another"),
        ("here:", ".type here,@function\\nhere: xor %eax,%eax\\n"),
    ] {
        let new = body.replace(from, to);
        let (section, _, reason) = refusal(&with_assembly(body, 1), &with_assembly(&new, 2));
        assert!(
            section == ".entry" && reason.contains("plain labels"),
            "{section}: {reason}"
        );
    }
    let (patch, _) = patch(&with_assembly(body, 1), &with_assembly(body, 2));
    assert_eq!(replaced(&patch), ["run"]);
}
