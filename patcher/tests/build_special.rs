//! The tables beside the code: entries of new code are brought or refused by name, entries of old code tell
//! run-pre matching what may differ, entries of unchanged functions are no reason for anything.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{named, new_body, nothing, only, patch, refusal, refused, replaced, symbol};
use vmpatch_patcher::patch::{Code, Site, SiteKind, TrapKind};

/// `WARN_ON_ONCE` as x86 makes it, at a line (Linux v6.12 arch/x86/include/asm/bug.h).
fn warn(line: u32) -> String {
    format!(
        "asm volatile(\"1: ud2\\n.pushsection __bug_table,\\\"aw\\\"\\n2: .long 1b - .\\n\
         .long %c0 - .\\n.word %c1\\n.word 2307\\n.org 2b + 12\\n.popsection\" \
         :: \"i\"(__FILE__), \"i\"({line}))"
    )
}

/// `asm goto` of a static key (Linux v6.12 arch/x86/include/asm/jump_label.h), its jump of given form.
fn branch(jump: &str) -> String {
    format!(
        "asm goto(\"1: {jump}\\n.pushsection __jump_table,\\\"aw\\\"\\n.balign 8\\n.long 1b - .\\n\
         .long %l[yes] - .\\n.quad key + 1 - .\\n.popsection\" :::: yes)"
    )
}

/// An alternative with a call as its replacement, its entry of a given size.
fn alternative(entry: &str) -> String {
    format!(
        "asm volatile(\"661: .byte 0x0f,0x1f,0x44,0x00,0x00\\n662:\\n\
         .pushsection .altinstructions,\\\"a\\\"\\n.long 661b - .\\n.long 663f - .\\n{entry}\\n\
         .byte 662b - 661b\\n.byte 664f - 663f\\n.popsection\\n\
         .pushsection .altinstr_replacement,\\\"ax\\\"\\n663: call quick\\n664:\\n.popsection\")"
    )
}

fn site(sites: &[Site], wanted: impl Fn(&SiteKind) -> bool) -> &Site {
    sites
        .iter()
        .find(|it| wanted(&it.kind))
        .unwrap_or_else(|| panic!("{sites:?}"))
}

fn alternative_of(code: &Code) -> &Site {
    site(&code.sites, |it| matches!(it, SiteKind::Alternative { .. }))
}

#[test]
fn a_warning_in_new_code_comes_along_with_its_file_and_line() {
    let old = "int show(int n) { return n; }";
    let new = format!(
        "int show(int n) {{ if (n == 9) {}; return n * 3; }}",
        warn(42)
    );
    let (patch, _) = patch(old, &new);
    let body = new_body(&patch);
    let [trap] = &body.traps[..] else {
        panic!("{:?}", body.traps)
    };
    let bug = TrapKind::Bug {
        file: "drivers/test.c".to_owned(),
        line: 42,
        flags: 2307,
    };
    assert_eq!(trap.kind, bug);
    assert_eq!(body.bytes[trap.offset as usize..][..2], [0x0f, 0x0b]);
}

#[test]
fn a_warning_in_an_unchanged_function_is_no_reason() {
    let source = format!(
        "int calm(int n) {{ return n + 1; }} int tense(int n) {{ if (n) {}; return n; }}",
        warn(7)
    );
    let (patch, report) = patch(&source, &source.replace("n + 1", "n + 2"));
    assert_eq!(replaced(&patch), ["calm"]);
    assert_eq!(report.ignored, []);
}

#[test]
fn a_moved_line_of_a_warning_is_reported_and_changes_nothing() {
    let at = |line| {
        format!(
            "int show(int n) {{ if (n == 9) {}; return n; }}",
            warn(line)
        )
    };
    let report = nothing(&at(42), &at(43));
    assert_eq!(report.ignored.len(), 1);
    assert_eq!(report.ignored[0].what, "show");
    assert!(report.ignored[0].reason.contains("line"));
}

#[test]
fn a_line_that_a_warning_prints_may_move_but_no_other_number() {
    let at = |line, number| {
        let warn = warn(line);
        format!(
            "extern void __warn_printk(const char *, ...); extern int limit(int, int);
             int show(int n) {{ if (n == 9) {{ __warn_printk(\"%d\", {line}); {warn}; }} return limit(n, {number}); }}"
        )
    };
    let report = nothing(&at(42, 7), &at(43, 7));
    assert_eq!(report.ignored.len(), 1, "{report}");
    // A number that is loaded for something else counts, also where it is that of the line.
    for (old, new) in [
        (at(42, 42), at(43, 43)),
        (at(42, 43), at(43, 42)),
        (at(42, 7), at(43, 8)),
    ] {
        let (patch, _) = patch(&old, &new);
        assert_eq!(replaced(&patch), ["show"]);
    }
}

#[test]
fn an_access_that_may_fault_comes_along_with_where_it_goes_on() {
    let old = "int show(int *p) { int v = 0; return v + 1; }";
    let new = "int show(int *p) { int v = 0; asm volatile(\"1: movl (%1), %0\\n2:\\n\
        .pushsection __ex_table,\\\"a\\\"\\n.balign 4\\n.long 1b - .\\n.long 2b - .\\n.long 3\\n\
        .popsection\" : \"=r\"(v) : \"r\"(p)); return v + 1; }";
    let (patch, _) = patch(old, new);
    let body = new_body(&patch);
    let [trap] = &body.traps[..] else {
        panic!("{:?}", body.traps)
    };
    let TrapKind::Fault { fixup, data: 3 } = trap.kind else {
        panic!("{trap:?}")
    };
    assert_eq!(symbol(&patch, fixup.symbol), "own show");
    // The access is two bytes, and goes on behind itself.
    assert_eq!(fixup.addend, trap.offset.cast_signed() + 2);
}

#[test]
fn a_short_static_branch_is_refused_in_new_code_and_a_site_in_old() {
    let body = branch("jmp %l[yes]");
    let old = format!(
        "extern int key; int show(int n) {{ {body}; return n; yes: return printk(\"on\") * 3; }}"
    );
    let (section, name, reason) = refusal(&old, &old.replace("* 3", "* 5"));
    assert_eq!((section.as_str(), name.as_str()), ("__jump_table", "show"));
    assert!(reason.contains("five"), "{reason}");
}

#[test]
fn a_long_static_branch_comes_along_with_key_and_target() {
    // A jump that cannot be made short: what a header of one's own would emit.
    let body = branch(".byte 0xe9\\n.long %l[yes] - . - 4");
    let old = format!(
        "extern int key; int show(int n) {{ {body}; return n; yes: return printk(\"on\") * 3; }}"
    );
    let (patch, _) = patch(&old, &old.replace("* 3", "* 5"));
    for (sites, function) in [
        (&only(&patch).old.sites, "guest show"),
        (&new_body(&patch).sites, "own show"),
    ] {
        let found = site(sites, |it| matches!(it, SiteKind::JumpLabel { .. }));
        assert_eq!(found.len, 5);
        let SiteKind::JumpLabel {
            key,
            target,
            inverted,
        } = &found.kind
        else {
            panic!()
        };
        assert_eq!(
            (symbol(&patch, key.symbol), key.addend),
            ("guest key".to_owned(), 0)
        );
        assert!(inverted);
        assert_eq!(symbol(&patch, target.symbol), function);
        assert!(target.addend > 0);
    }
}

#[test]
fn another_key_behind_the_same_instructions_is_a_change() {
    let body = branch(".byte 0x0f,0x1f,0x44,0x00,0x00");
    let old = format!(
        "extern int key, kez; int show(int n) {{ {body}; return n; yes: return printk(\"on\"); }}"
    );
    let (patch, report) = patch(&old, &old.replace(".quad key", ".quad kez"));
    assert_eq!(replaced(&patch), ["show"]);
    assert!(
        report.replaced[0].difference.contains("special"),
        "{report}"
    );
}

#[test]
fn alternatives_come_along_in_both_sizes_of_entry() {
    // 12 bytes with the inverting bit (6.1), 14 with flags (6.12).
    for (entry, feature, negated) in [
        (".word 0x8000 + 3*32 + 21", 117, true),
        (".word 3*32 + 21", 117, false),
        (".word 16*32 + 16\\n.word 1", 528, true),
        (".word 16*32 + 16\\n.word 2", 528, false),
    ] {
        let body = alternative(entry);
        let old = format!("extern void quick(void); int show(int n) {{ {body}; return n + 1; }}");
        let (patch, _) = patch(&old, &old.replace("n + 1", "n + 2"));
        let found = alternative_of(&only(&patch).old);
        assert_eq!(found.len, 5);
        let SiteKind::Alternative { replacements } = &found.kind else {
            panic!()
        };
        let [only] = &replacements[..] else {
            panic!("{replacements:?}")
        };
        assert_eq!((only.feature, only.negated), (feature, negated), "{entry}");
        assert_eq!(only.direct_call, entry.ends_with("word 2"));
        assert_eq!(only.code.bytes.len(), 5);
        assert_eq!(named(&patch, &only.code.relocations), ["guest quick"]);
        assert_eq!(only.code.relocations[0].addend, -4);
    }
}

#[test]
fn a_lock_prefix_stays_and_is_known() {
    let lock = "asm volatile(\".pushsection .smp_locks,\\\"a\\\"\\n.balign 4\\n.long 671f - .\\n\
        .popsection\\n671: lock incl %0\" : \"+m\"(*p))";
    let old = format!("int show(int *p, int n) {{ {lock}; return n + 1; }}");
    let (patch, _) = patch(&old, &old.replace("n + 1", "n + 2"));
    let found = site(&only(&patch).old.sites, |it| *it == SiteKind::LockPrefix);
    assert_eq!(only(&patch).old.bytes[found.offset as usize], 0xf0);
    let found = site(&new_body(&patch).sites, |it| *it == SiteKind::LockPrefix);
    assert_eq!(new_body(&patch).bytes[found.offset as usize], 0xf0);
}

#[test]
fn runtime_constants_are_named_by_their_variable() {
    let constant = "asm(\"movabs $0x0123456789abcdef, %0\\n1:\\n\
        .pushsection runtime_ptr_USER_PTR_MAX,\\\"a\\\"\\n.long 1b - 8 - .\\n.popsection\" \
        : \"=r\"(value))";
    let old = format!("long show(long n) {{ long value; {constant}; return n + value + 1; }}");
    let (patch, _) = patch(&old, &old.replace("+ 1", "+ 2"));
    let found = site(&only(&patch).old.sites, |it| {
        matches!(it, SiteKind::RuntimeConstant { .. })
    });
    assert_eq!(found.len, 8);
    let SiteKind::RuntimeConstant {
        symbol: index,
        shift,
    } = found.kind
    else {
        panic!()
    };
    assert_eq!(
        (symbol(&patch, index), shift),
        ("guest USER_PTR_MAX".to_owned(), false)
    );
    let at = found.offset as usize;
    assert_eq!(
        only(&patch).old.bytes[at..at + 8],
        0x0123_4567_89ab_cdef_u64.to_le_bytes()
    );
}

#[test]
fn paravirt_calls_of_older_kernels_are_sites() {
    let call = "asm volatile(\"771: call *pv_ops+24(%%rip)\\n772:\\n\
        .pushsection .parainstructions,\\\"a\\\"\\n.balign 8\\n.quad 771b\\n.byte 3\\n\
        .byte 772b - 771b\\n.balign 8\\n.popsection\" ::: \"memory\")";
    let old = format!("int show(int n) {{ {call}; return n + 1; }}");
    let (patch, _) = patch(&old, &old.replace("n + 1", "n + 2"));
    let found = site(&only(&patch).old.sites, |it| {
        matches!(it, SiteKind::Paravirt { .. })
    });
    assert_eq!(
        (found.len, &found.kind),
        (6, &SiteKind::Paravirt { slot: 3 })
    );
}

#[test]
fn a_table_nothing_is_known_of_is_refused_by_name() {
    let mark = "asm volatile(\"nop\\n1: nop\\n.pushsection .mystery,\\\"a\\\"\\n.long 1b - .\\n\
        .popsection\")";
    let old = format!("int show(int n) {{ {mark}; return n + 1; }}");
    let report = refused(&old, &old.replace("n + 1", "n + 2"));
    assert!(
        report
            .refused
            .iter()
            .any(|it| it.section == ".mystery" && it.name == "show"),
        "{report}"
    );
    // The same entry in a function that stays is no reason.
    let two = format!("{old} int other(int n) {{ return n + 5; }}");
    let (patch, _) = patch(&two, &two.replace("n + 5", "n + 6"));
    assert_eq!(replaced(&patch), ["other"]);
}

#[test]
fn the_test_of_a_cpu_feature_comes_along_with_its_first_form() {
    let test = "asm goto(\"661: jmp 6f\\n662: .skip -(((665f-664f)-(662b-661b)) > 0) * \
        ((665f-664f)-(662b-661b)),0x90\\n\
        .pushsection .altinstructions,\\\"a\\\"\\n.long 661b - .\\n.long 664f - .\\n.word 117\\n.word 0\\n\
        .byte 662b - 661b\\n.byte 665f - 664f\\n.popsection\\n\
        .pushsection .altinstr_replacement,\\\"ax\\\"\\n664: jmp %l[no]\\n665:\\n.popsection\\n\
        .pushsection .altinstr_aux,\\\"ax\\\"\\n6: testb $1, boot_cpu_data+9(%%rip)\\njnz %l[yes]\\n\
        jmp %l[no]\\n.popsection\" :::: yes, no)";
    let old = format!("int show(int n) {{ {test}; yes: return printk(\"y\") + 1; no: return n; }}");
    let (patch, _) = patch(&old, &old.replace("+ 1", "+ 2"));
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&"own .altinstr_aux".to_owned()), "{names:?}");
    let aux = objects::own(&patch, ".altinstr_aux");
    assert_eq!(
        named(&patch, &aux.relocations),
        ["guest boot_cpu_data", "own show", "own show"]
    );
    // testb with an immediate: the field is five bytes from the end of its instruction.
    assert_eq!(aux.relocations[0].addend, 9 - 5);
}

#[test]
fn an_alternative_with_a_field_of_no_known_kind_is_refused() {
    let entry = r".word 5\n.word 0";
    let with = alternative(entry).replace("call quick", ".quad quick - .");
    let old = "void show(void) { use(0); }";
    let (section, _, reason) = refusal(old, &format!("void show(void) {{ {with}; use(0); }}"));
    assert!(
        section.contains("relocations") && reason.contains("quick"),
        "{section}: {reason}"
    );
}
