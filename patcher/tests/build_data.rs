//! Data: what the guest has already stays the guest's, what is new comes along, what has other values is
//! refused.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{named, new_body, nothing, only, own, patch, refusal, refused, replaced};
use vmpatch_patcher::patch::{SectionKind, Symbol};

#[test]
fn state_of_the_guest_is_never_duplicated() {
    let old = "static int count = 5; static int seen;
        int show(int n) { seen += n; return count++ + seen; }";
    let (patch, report) = patch(old, &old.replace("+= n", "+= n * 3"));
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&"guest count".to_owned()), "{names:?}");
    assert!(names.contains(&"guest seen".to_owned()), "{names:?}");
    assert_eq!(patch.sections.len(), 1);
    assert_eq!(report.new, []);
}

#[test]
fn new_variables_come_along_with_their_values() {
    let old = "int show(int n) { return n; }";
    let new = "static int fresh = 0x1234; static long zero[3];
        int show(int n) { zero[n]++; return fresh++ + n; }";
    let (patch, report) = patch(old, new);
    let (fresh, zero) = (own(&patch, "fresh"), own(&patch, "zero"));
    assert_eq!(
        (fresh.kind, &fresh.bytes[..]),
        (SectionKind::Data, &[0x34, 0x12, 0, 0][..])
    );
    assert_eq!(
        (zero.kind, &zero.bytes[..]),
        (SectionKind::Data, &[0; 24][..])
    );
    assert_eq!(
        report.new.iter().filter(|it| it.kind == "variable").count(),
        2
    );
}

#[test]
fn pointers_in_new_data_are_followed() {
    let old = "int old_one(int n) { return n; } int show(int n) { return n; }";
    let new = "int old_one(int n) { return n; }
        static noinline int new_one(int n) { return n + 4; }
        struct op { int (*f)(int); const char *name; };
        static const struct op ops[] = { { old_one, \"one\" }, { new_one, \"two\" } };
        int show(int n) { return ops[n].f(n) + ops[n].name[0]; }";
    let (patch, _) = patch(old, new);
    let ops = own(&patch, "ops");
    assert_eq!(ops.kind, SectionKind::ReadOnly);
    let names = named(&patch, &ops.relocations);
    assert_eq!(names[0], "guest old_one");
    assert_eq!(names[2], "own new_one");
    assert!(names[1].starts_with("own .rodata") && names[3].starts_with("own .rodata"));
}

#[test]
fn static_variables_keep_their_state_when_their_number_changes() {
    let old = "int show(int n) { static int seen; seen += n; return seen; }";
    let new = "noinline int other(int n) { static int seen; return seen++; }
        int show(int n) { static int seen; seen += n * 3; return seen + other(n); }";
    let (patch, _) = patch(old, new);
    assert_eq!(replaced(&patch), ["show"]);
    let old_name = named(&patch, &only(&patch).old.relocations)
        .into_iter()
        .find(|it| it.starts_with("guest seen"))
        .unwrap();
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&old_name), "{names:?}");
}

#[test]
fn numbers_alone_make_no_difference() {
    let show = "int show(int n) { static int seen; seen += n; return printk(__func__) + seen; }";
    let other = "static int extra(void) { static int seen; return printk(__func__) + seen++; }
        int call(void) { return extra(); }";
    let report = nothing(&format!("{show} {other}"), &format!("{other} {show}"));
    assert_eq!(report.unchanged, 2);
}

#[test]
fn a_static_variable_that_may_be_one_of_several_is_refused() {
    let old = "int show(int n) { { static int seen; seen += n; use(&seen); }
        { static int seen; seen ^= n; use(&seen); } return n; }";
    let new = "int show(int n) { { static int seen; seen += n * 3; use(&seen); }
        { static int seen; seen ^= n; use(&seen); }
        { static int seen; seen -= n; use(&seen); } return n; }";
    let report = refused(old, new);
    assert!(
        report
            .refused
            .iter()
            .all(|it| it.reason.contains("may be one of several")),
        "{report}"
    );
    assert!(
        report.refused.iter().all(|it| it.name == "show"),
        "{report}"
    );
}

#[test]
fn a_changed_initial_value_is_refused_even_if_only_unchanged_code_uses_it() {
    let old = "int limit = 5; int show(int n) { return n + limit; }";
    let (section, name, reason) = refusal(old, &old.replace("= 5", "= 6"));
    assert_eq!((section.as_str(), name.as_str()), (".data.limit", "limit"));
    assert!(reason.contains("value"), "{reason}");
}

#[test]
fn a_changed_table_of_functions_is_refused() {
    let old = "int a(int n) { return n; } int b(int n) { return n + 2; }
        int (*const table[])(int) = { a, b };";
    let (section, name, _) = refusal(old, &old.replace("{ a, b }", "{ b, a }"));
    assert_eq!(
        (section.as_str(), name.as_str()),
        (".rodata.table", "table")
    );
}

#[test]
fn a_changed_size_is_refused() {
    let old = "int room[4]; int show(int n) { return room[n]; }";
    let (_, name, _) = refusal(old, &old.replace("[4]", "[8]"));
    assert_eq!(name, "room");
}

#[test]
fn constants_without_identity_are_copied_when_they_change() {
    let old =
        "int show(int n) { switch (n) { case 0: return 11; case 1: return 22; case 2: return 9;
        case 3: return 44; case 4: return 7; case 5: return 66; default: return 0; } }";
    let (patch, _) = patch(old, &old.replace("44", "45"));
    assert_eq!(replaced(&patch), ["show"]);
    let table = patch
        .sections
        .iter()
        .find(|it| it.name.contains("CSWTCH"))
        .unwrap();
    assert!(table.bytes.windows(4).any(|it| it == 45_u32.to_le_bytes()));
}

#[test]
fn new_per_cpu_variables_are_refused_by_name() {
    let old = "int show(int n) { return n; }";
    let new = "section(\".data..percpu\") int mine = 3; int show(int n) { return n + mine; }";
    let (section, name, reason) = refusal(old, new);
    assert_eq!((section.as_str(), name.as_str()), (".data..percpu", "show"));
    assert!(
        reason.contains("per-CPU") && reason.contains("mine"),
        "{reason}"
    );
}

#[test]
fn per_cpu_variables_of_the_guest_are_named() {
    let old = "section(\".data..percpu\") int mine = 3; int show(int n) { return n + mine; }";
    let (patch, _) = patch(old, &old.replace("n + mine", "n - mine"));
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&"guest mine".to_owned()), "{names:?}");
}

#[test]
fn once_variables_of_new_warnings_come_along_and_known_ones_are_the_guests() {
    let once = |text: &str| {
        format!(
            "({{ static section(\".data..once\") _Bool __already_done; if (!__already_done) {{ \
             __already_done = 1; printk(\"{text}\"); }} }})"
        )
    };
    let (first, second) = (once("first"), once("second"));
    let body = |what: &str| format!("int show(int n) {{ {what}; return n; }}");
    let old = body(&first);
    let (same, _) = patch(&old, &old.replace("return n", "return n * 3"));
    let of_show = |patch| named(patch, &new_body(patch).relocations);
    let names = of_show(&same);
    assert!(
        names
            .iter()
            .any(|it| it.starts_with("guest __already_done")),
        "{names:?}"
    );
    let (new, _) = patch("int show(int n) { return n; }", &old);
    let it = own(&new, "__already_done.0");
    assert_eq!((it.kind, &it.bytes[..]), (SectionKind::Data, &[0][..]));
    // Which of two the old one is cannot be told, and a warning may well be told once more.
    let (more, _) = patch(&old, &body(&format!("{second}; {first}")));
    let names = of_show(&more);
    let own = names
        .iter()
        .filter(|it| it.starts_with("own __already_done"));
    assert!(own.count() > 0, "{names:?}");
    let state = |body: &str| body.replace("__already_done", "level");
    let report = refused(&state(&old), &state(&body(&format!("{second}; {first}"))));
    assert!(report.refused[0].reason.contains("one of several"));
}

#[test]
fn parameters_that_come_are_refused() {
    let old = "int level; int show(int n) { return n + level; }";
    let new = format!("{old} section(\"__param\") void *param_level = &level;");
    let (section, name, _) = refusal(old, &new);
    assert_eq!(
        (section.as_str(), name.as_str()),
        ("__param", "param_level")
    );
}

/// A `pr_debug` (`struct _ddebug`, Linux v6.12 include/linux/dynamic_debug.h).
fn debug(line: u32, text: &str) -> String {
    format!(
        "({{ static section(\"__dyndbg\") struct d __UNIQUE_ID_ddebug{line} = \
         {{ \"mod\", __func__, \"a.c\", \"{text}\", {line} }}; \
         if (__UNIQUE_ID_ddebug{line}.on) printk(\"{text}\", &__UNIQUE_ID_ddebug{line}); }})"
    )
}

/// A source whose function `show` does so.
fn debugging(what: &[String]) -> String {
    let what = what.join("; ");
    format!(
        "struct d {{ const char *module, *function, *file, *text; unsigned line; int on; }};
         int show(int n) {{ {what}; return n; }} int keep(int n) {{ {}; return n; }}",
        debug(90, "kept")
    )
}

#[test]
fn new_pr_debug_descriptors_come_along_and_moved_lines_are_ignored() {
    let report = nothing(
        &debugging(&[debug(5, "text")]),
        &debugging(&[debug(6, "text")]),
    );
    assert_eq!(report.ignored.len(), 1);
    let (patch, _) = patch(&debugging(&[]), &debugging(&[debug(5, "text")]));
    assert_eq!(replaced(&patch), ["show"]);
    let it = patch.sections.iter().find(|it| it.name == "__dyndbg");
    let it = it.unwrap();
    assert_eq!((it.kind, it.bytes.len()), (SectionKind::Data, 40));
    assert_eq!(it.relocations.len(), 4);
}

#[test]
fn pr_debug_descriptors_are_known_by_what_they_say_among_others() {
    let old = debugging(&[debug(5, "one"), debug(6, "two"), debug(7, "two")]);
    let new = debugging(&[
        debug(15, "two"),
        debug(16, "new"),
        debug(17, "two"),
        debug(18, "newer"),
        debug(19, "one"),
    ]);
    let (patch, _) = patch(&old, &new);
    assert_eq!(replaced(&patch), ["show"]);
    let names = named(&patch, &new_body(&patch).relocations);
    let base = |it: &String| {
        Some(
            it.split_once("__UNIQUE_ID_ddebug")?
                .1
                .split_once('.')?
                .0
                .to_owned(),
        )
    };
    let mut order: Vec<_> = names.iter().filter_map(base).collect();
    order.dedup();
    order.sort();
    order.dedup();
    assert_eq!(order, ["16", "18", "5", "6", "7"], "{names:?}");
    let own = names.iter().filter(|it| it.starts_with("own __UNIQUE"));
    assert!(own.clone().all(|it| it.contains("16") || it.contains("18")));
    assert!(own.count() > 0);
}

#[test]
fn init_data_is_of_no_account() {
    let old = "section(\".init.data\") int early = 5; int show(int n) { return n; }";
    let report = nothing(old, &old.replace("= 5", "= 6"));
    assert_eq!(report.ignored.len(), 1);
    assert!(report.ignored[0].reason.contains("boot"));
}

#[test]
fn a_variable_that_is_gone_is_reported() {
    let old = "int kept; int gone; int show(int n) { return n + kept; }";
    let report = nothing(old, &old.replace("int gone;", ""));
    assert_eq!(report.ignored.len(), 1);
    assert_eq!(report.ignored[0].what, "gone");
}

#[test]
fn anonymous_constants_are_compared_and_copied() {
    let old = "struct pair { long a, b; }; extern void take(const struct pair *);
        int show(int n) { static const char big[] = \"0123456789\"; take(&(const struct pair){ 1, 2 });
        return big[n]; }";
    let (patch, _) = patch(old, &old.replace("0123456789", "0123456780"));
    assert_eq!(replaced(&patch), ["show"]);
    assert!(patch.sections.iter().any(|it| it.bytes == b"0123456780\0"));
}

/// Declared as `include/vmpatch/shadow.h` declares it.
#[test]
fn the_root_of_shadow_data_is_nobodys_and_named_once() {
    let declared = "extern struct { unsigned long heads[512]; } vmpatch_shadow_root;";
    let old = "int show(int n) { return n; } int hide(int n) { return n; }";
    let new = "int show(int n) { return n + vmpatch_shadow_root.heads[n & 511]; }
        int hide(int n) { return n + !vmpatch_shadow_root.heads; }";
    let new = format!("{declared} {}", new.replace("!vmp", "(int)(long)&vmp"));
    let (patch, report) = patch(old, &new);
    let root = Symbol::ShadowRoot;
    assert_eq!(patch.symbols.iter().filter(|it| **it == root).count(), 1);
    for section in &patch.sections {
        let names = named(&patch, &section.relocations);
        assert!(names.contains(&"shadow root".to_owned()), "{names:?}");
    }
    assert_eq!((report.replaced.len(), report.new), (2, vec![]));

    let defined = refused(old, &new.replace("extern ", "")).refused;
    assert_eq!(defined.len(), 2);
    let reason = &defined[0].reason;
    assert!(reason.contains("declared, never defined"), "{reason}");
}

/// A string of characters of two bytes, as the firmware's names are.
fn wide(text: &str) -> String {
    format!(
        "typedef unsigned short c16; extern void ask(const c16 *); void run(void) {{ ask(u\"{text}\"); }}"
    )
}

#[test]
fn strings_of_wide_characters_are_compared_and_brought_to_their_end() {
    let (patch, _) = patch(&wide("SetupMode"), &wide("SecureBoot"));
    let text: Vec<u8> = "SecureBoot\0"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    assert!(patch.sections.iter().any(|it| it.bytes == text));
}

/// Tables of pointers to tables, the last of which holds `number`.
fn deep(number: u32) -> String {
    let mut source = format!("void run(int i) {{ static const int t0[] = {{ {number} }};\n");
    for level in 1..12 {
        let below = level - 1;
        source += &format!("static const void *const t{level}[] = {{ t{below}, t{below} }};\n");
    }
    source + "use((void *)t11[i]); }"
}

#[test]
fn tables_too_deep_to_be_followed_are_never_the_same() {
    let (patch, _) = patch(&deep(1), &deep(2));
    assert_eq!(replaced(&patch), ["run"]);
}

#[test]
fn tables_of_tables_are_followed_only_so_far() {
    let mut source = "void run(int i) { static const int t0[] = { 1 };\n".to_owned();
    for level in 1..9 {
        let below = format!("t{}, ", level - 1).repeat(12);
        source += &format!("static const void *const t{level}[] = {{ {below} }};\n");
    }
    let source = source + "use((void *)t8[i]); }";
    let (patch, _) = patch(&source, &source.replace("t8[i]", "t8[i + 1]"));
    assert_eq!(replaced(&patch), ["run"]);
}

#[test]
fn data_that_no_variable_covers_is_compared_and_a_difference_refused() {
    let source = "asm(\".pushsection .data..table,\\\"aw\\\"\\n.type sized,@object\\nsized: .long 1\\n.size sized, 4\\n\
                  .long 7\\n.popsection\"); int run(int n) { return n + 1; }";
    let new = source
        .replace(".long 7", ".long 8")
        .replace("n + 1", "n + 2");
    let (section, _, reason) = refusal(source, &new);
    assert!(
        section == ".data..table" && reason.contains("no variable"),
        "{section}: {reason}"
    );
    let (patch, _) = patch(source, &source.replace("n + 1", "n + 2"));
    assert_eq!(replaced(&patch), ["run"]);
}
