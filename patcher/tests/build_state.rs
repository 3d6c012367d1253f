//! State: what the guest has is taken for its own in the new version only where that is certain.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{
    build_objects, build_pairs, compile_with, named, new_body, nothing, pair, patch, refused,
};
use vmpatch_patcher::build::BuildError;
use vmpatch_patcher::patch::Symbol;

const INIT: &str = "static section(\".init.data\") int table[2] = { 3, 4 };
    static noinline section(\".init.text\") int helper(int n) { return n * 5; }
    section(\".init.text\") int setup(int n) { return helper(n) + table[n]; }";

#[test]
fn init_code_that_becomes_plain_comes_along() {
    let old = format!("{INIT} int run(int n) {{ return n; }}");
    let new = INIT.replace("noinline section(\".init.text\")", "noinline");
    let (patch, _) = patch(
        &old,
        &format!("{new} int run(int n) {{ return helper(n); }}"),
    );
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&"own helper".to_owned()), "{names:?}");
}

#[test]
fn data_that_the_guest_keeps_otherwise_than_the_new_version_does_is_refused() {
    let run = |body: &str| format!("int run(int n) {{ return {body}; }}");
    let init = format!("{INIT} {}", run("n"));
    let kept = INIT.replace("static section(\".init.data\")", "static");
    let kept = format!("{kept} {}", run("n + table[n]"));
    let plain = format!("int cnt = 1; {}", run("cnt += n"));
    let in_section = |name: &str| plain.replace("int cnt", &format!("section(\"{name}\") int cnt"));
    let (per_cpu, sealed) = (
        in_section(".data..percpu"),
        in_section(".data..ro_after_init"),
    );
    for (old, new, name, reason) in [
        (&init, &kept, "table", "freed"),
        (&plain, &per_cpu, "cnt", "per-CPU"),
        (&per_cpu, &plain, "cnt", "per-CPU"),
        (&sealed, &plain, "cnt", "no longer write"),
    ] {
        let report = refused(old, new);
        let mut said = report.refused.iter();
        assert!(
            said.any(|it| it.name == name && it.reason.contains(reason)),
            "{report}"
        );
    }
    nothing(&plain, &sealed);
}

const MOSTLY: &str = "#define __read_mostly section(\".data..read_mostly\")\n";

#[test]
fn an_address_that_may_be_the_end_of_an_array_or_what_follows_it_is_refused_if_that_changed() {
    let old = format!(
        "{MOSTLY} static int arr[4] __read_mostly = {{ 1 }}, next __read_mostly = 2;
        int run(int n) {{ for (int *p = arr; p < arr + 4; p++) n += *p; return n + next; }}
        void set(int n) {{ arr[n] = n; next = n; }}"
    );
    let (kept, _) = patch(&old, &old.replace("n += *p", "n ^= *p"));
    assert!(
        kept.symbols
            .iter()
            .all(|it| !matches!(it, Symbol::Own { name, .. } if name != "run"))
    );
    let comes = |before: &str, at: &str| {
        old.replace(at, &format!("{before}{at}"))
            .replace("return n", "return n + inserted")
    };
    let inserted = "inserted __read_mostly = 7, ";
    let report = refused(&old, &comes(inserted, "next __"));
    let reason = &report.refused[0].reason;
    assert!(reason.contains("several variables"), "{report}");
    let report = refused(
        &old,
        &comes(&inserted.replace(",", "; static int"), "arr[4] __"),
    );
    assert!(
        report.refused[0].reason.contains("several variables"),
        "{report}"
    );
}

#[test]
fn what_is_plainly_read_or_written_is_found_whatever_lies_beside_it() {
    let old = format!(
        "{MOSTLY} static int one __read_mostly = 1, two __read_mostly = 2;
        int run(int n) {{ return n + one * two; }} void set(int n) {{ one = n; two = n; }}"
    );
    let new = old
        .replace("two __", "fresh __read_mostly = 3, two __")
        .replace("return n", "return n - fresh")
        .replace("two = n", "two = n; fresh = n");
    let (patch, _) = patch(&old, &new);
    let at = patch
        .replaced
        .iter()
        .find(|it| it.name == "run")
        .unwrap()
        .new_section;
    let names = named(&patch, &patch.sections[at as usize].relocations);
    for name in ["guest one", "guest two", "own fresh"] {
        assert!(names.iter().any(|it| it == name), "{names:?}");
    }
}

#[test]
fn a_static_variable_that_changes_its_scope_or_type_is_refused() {
    let within = "int run(int n) { static int count; count += n; use(&count); return count; }";
    let file = "static int count; int run(int n) { count += n; use(&count); return count; }";
    let wide = within.replace("static int", "static long");
    for (old, new) in [(within, file), (file, within), (within, &wide)] {
        let report = refused(old, new);
        let said = report
            .refused
            .iter()
            .all(|it| it.reason.contains("one of several"));
        assert!(said && report.refused[0].name == "run", "{report}");
    }
}

#[test]
fn static_variables_of_one_name_in_a_changed_function_are_refused() {
    let block = |what: &str| format!("{{ static int seen; seen {what} n; use(&seen); }}");
    let run = |blocks: [&str; 2]| {
        format!(
            "int run(int n) {{ {} return n; }}",
            blocks.map(block).concat()
        )
    };
    let report = refused(&run(["+=", "^="]), &run(["^=", "-="]));
    assert!(
        report.refused[0].reason.contains("one of several"),
        "{report}"
    );
}

#[test]
fn debug_information_tells_whose_a_static_variable_is() {
    let own = "int a(int n) { static int state; state += n; use(&state); return n; }";
    let other =
        "static inline __attribute__((always_inline)) int b(int n) { static int state; state ^= n;
        use(&state); return n; } int a(int n) { return b(n) + 1; }";
    let with = |source: &str| compile_with(source, &["-g"]);
    let Err(BuildError::Refused(report)) = build_objects(&with(own), &with(other)) else {
        panic!("not refused");
    };
    let said: Vec<_> = report.refused().collect();
    assert!(said[0].contains("one of several"), "{said:?}");
    let changed = other.replace("+ 1", "+ 2");
    for (old, new) in [(own, own.replace("+=", "-=")), (other, changed)] {
        let (patch, _) = build_objects(&with(old), &with(&new)).unwrap();
        let names = named(&patch, &new_body(&patch).relocations);
        assert!(
            names.iter().any(|it| it.starts_with("guest state")),
            "{names:?}"
        );
    }
}

#[test]
fn empty_variables_are_nobodys_state() {
    let key = "{ static struct {} __key; use(&__key); }";
    let run = |keys: usize| format!("int run(int n) {{ {} return n; }}", key.repeat(keys));
    patch(&run(1), &run(3));
}

#[test]
fn a_variable_that_another_file_cannot_bring_is_refused_where_it_is_used() {
    let old = "int run(int n) { return n; }";
    let user = "extern int mine; int go(int n) { return n + mine; }";
    let (defines, uses) = ("section(\".data..percpu\") int mine = 3;", user);
    let objects = [
        old,
        &format!("{defines} {old}"),
        "int go(int n) { return n; }",
        uses,
    ];
    let objects = objects.map(|it| compile_with(it, &[]));
    let pairs = [
        pair("a.c", &objects[0], &objects[1]),
        pair("b.c", &objects[2], &objects[3]),
    ];
    let Err(BuildError::Refused(report)) = build_pairs(&pairs) else {
        panic!("not refused");
    };
    let said: Vec<_> = report.refused().collect();
    assert!(said[0].contains("per-CPU"), "{said:?}");
}

#[test]
fn tables_of_labels_lead_into_the_new_body() {
    let run = |storage: &str| {
        format!(
            "int run(int n) {{ {storage} void *const tbl[] = {{ &&a, &&b, &&c }}; goto *tbl[n];
            a: return n * 3; b: use(&n); return n + 5; c: return n - 7; }}"
        )
    };
    let old = run("static const");
    let (patch, _) = patch(&old, &old.replace("n + 5", "n + 6"));
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(
        names.iter().any(|it| it.starts_with("own tbl")),
        "{names:?}"
    );
    let table = patch
        .sections
        .iter()
        .find(|it| it.name.contains("tbl"))
        .unwrap();
    assert_eq!(named(&patch, &table.relocations), ["own run"; 3]);

    let old = run("static")
        .replace("*const", "*")
        .replace("goto", "use(tbl); goto");
    let report = refused(&old, &old.replace("n + 5", "n + 6"));
    let mut said = report.refused.iter();
    assert!(
        said.any(|it| it.reason.contains("leads into code that is replaced")),
        "{report}"
    );
}

#[test]
fn a_changed_table_of_functions_is_refused_within_a_function_too() {
    let old = "int a(int n) { return n; } int b(int n) { return n + 2; } struct ops { int (*f)(int), (*g)(int); };
        int run(int n) { static const struct ops ops = { a, b }; use((void *)&ops); return n; }";
    let report = refused(old, &old.replace("{ a, b }", "{ b, a }"));
    let [only] = &report.refused[..] else {
        panic!("{report}")
    };
    assert!(
        only.name == "run" && only.reason.contains("ops.0 holds pointers"),
        "{report}"
    );
    patch(old, &old.replace("return n; }", "return n + 1; }"));
    let text =
        "int run(int n) { static const char *const ops[] = { \"a\", \"b\" }; return *ops[n]; }";
    patch(text, &text.replace("\"b\"", "\"b\", \"c\""));
}

#[test]
fn numbered_entries_of_tables_are_known_by_what_they_hold() {
    let entry = |number: u32, value: u32| {
        format!(
            "static const section(\"__table\") __attribute__((used)) int __UNIQUE_ID_x{number} = {value};"
        )
    };
    let run = "int run(int n) { return n; }";
    let old = format!("{} {run}", entry(4, 7));
    let new = format!(
        "{} {}",
        entry(5, 7),
        run.replace("return n", "return n + 1")
    );
    let (_, report) = patch(&old, &new);
    assert_eq!(report.ignored, []);
    let report = refused(&old, &format!("{} {} {run}", entry(5, 7), entry(6, 8)));
    assert!(report.refused[0].name == "__UNIQUE_ID_x6", "{report}");

    let info = |text: &str| {
        format!(
            "static const section(\".modinfo\") __attribute__((used)) char __UNIQUE_ID_license7[] = \"license={text}\"; {run}"
        )
    };
    let report = nothing(&info("GPL"), &info("GPL v2"));
    let said: Vec<_> = report.ignored.iter().map(|it| &*it.what).collect();
    assert_eq!(said, ["license=GPL v2", "license=GPL"]);
}
