//! New code from objects whose static-key branches have five bytes, and what the compiler does otherwise because of them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{build_pairs, compile, named, new_body, only, own, pair, replaced};
use vmpatch_patcher::build::{BuildError, BuildReport, ObjectPair};
use vmpatch_patcher::patch::{Patch, SiteKind};

/// `if` as `static_branch_unlikely` has it (Linux v6.12 arch/x86/include/asm/jump_label.h), and the header of wide branches.
const BRANCH: &str = r#"
#define on() ({ __label__ yes; int it = 0; \
    asm goto("1: " JUMP " %l[yes]\n .pushsection __jump_table,\"aw\"\n .balign 8\n \
        .long 1b - ., %l[yes] - .\n .quad key + 1 - .\n .popsection" : : : : yes); \
    if (0) yes: it = 1; it; })
extern int key;
"#;

fn object(jump: &str, source: &str) -> Vec<u8> {
    compile(&format!("#define JUMP \"{jump}\"\n{BRANCH}{source}"))
}

/// What is made of an old source, a new one, and what the compiler makes of the new one with wide branches.
fn built(old: &str, new: &str, wide: &str) -> Result<(Patch, BuildReport), BuildError> {
    let [old, new] = [old, new].map(|it| object("jmp", it));
    let wide = object("jmp.d32", wide);
    build_pairs(&[ObjectPair {
        wide: Some(&wide),
        ..pair("drivers/test.c", &old, &new)
    }])
}

fn reasons(built: Result<(Patch, BuildReport), BuildError>) -> String {
    match built {
        Err(error @ BuildError::Refused(_)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// A clone, by the name that the compiler would give it, and who calls it.
const CLONE: &str = "static noinline int helper(int n) __asm__(\"helper.isra.0\");
    static noinline int helper(int n) { if (on()) printk(\"on\"); return n * 3 + printk(\"n\", n); }
    int other(int n) { return helper(n); }
    int show(int n) { if (on()) return printk(\"show\"); return helper(n) + 1; }";

#[test]
fn new_code_has_wide_branches_and_the_rest_is_as_before() {
    let new = CLONE.replace("+ 1", "+ 2");
    let (patch, report) = built(CLONE, &new, &new).unwrap();
    assert_eq!(replaced(&patch), ["show"]);
    assert_eq!(
        report.files[0]
            .new
            .iter()
            .filter(|it| it.kind == "function")
            .count(),
        0
    );
    let sites = new_body(&patch).sites.iter();
    let mut branches = sites.filter(|it| matches!(it.kind, SiteKind::JumpLabel { .. }));
    assert_eq!(branches.next().unwrap().len, 5);
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(
        names.contains(&"guest helper.isra.0".to_owned()),
        "{names:?}"
    );
}

#[test]
fn another_clone_of_one_name_is_not_taken_for_the_guests() {
    let new = CLONE.replace("+ 1", "+ 2");
    let wide = new.replace("n * 3", "n * 3 + (n & 7)");
    let (patch, _) = built(CLONE, &new, &wide).unwrap();
    assert_eq!(replaced(&patch), ["show"]);
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&"own helper.isra.0".to_owned()), "{names:?}");
    // Callers in the guest would call the other one.
    let changed = CLONE.replace("n * 3", "n * 5");
    let (patch, _) = built(CLONE, &changed, &changed).unwrap();
    assert_eq!(only(&patch).name, "helper.isra.0");
    let wide = changed.replace("n * 5", "n * 5 + (n & 7)");
    let text = reasons(built(CLONE, &changed, &wide));
    assert!(
        text.contains("in helper.isra.0: the compiler makes another clone"),
        "{text}"
    );
}

#[test]
fn what_only_wide_branches_make_the_compiler_do_matters_where_it_is_reached() {
    let inline = "static inline __attribute__((always_inline)) int part(int n)";
    let source = "PART { static int seen; return printk(\"part\", seen += n); }
        int show(int n) { if (on()) return part(n); return 1; }";
    let other = " int other(int n) { return part(n & 7); }";
    let of = |part: &str| source.replace("PART", part) + other;
    let (old, new) = (of(inline), of(inline).replace("return 1", "return 2"));
    let wide = of("static noinline int part(int n)").replace("return 1", "return 2");
    let (patch, _) = built(&old, &new, &wide).unwrap();
    assert_eq!(replaced(&patch), ["show"]);
    assert!(named(&patch, &new_body(&patch).relocations).contains(&"own part".to_owned()));
    let names = named(&patch, &own(&patch, "part").relocations);
    assert!(
        names.iter().any(|it| it.starts_with("guest seen.")),
        "{names:?}"
    );
    // Nothing that is brought uses it.
    let unused =
        "int show(int n) { if (on()) return 3; return 1; } PART { return printk(\"n\", n); }";
    let of = |part: &str| unused.replace("PART", part) + other;
    let wide = of("static noinline int part(int n)").replace("return 1", "return 2");
    let (patch, _) = built(
        &of(inline),
        &of(inline).replace("return 1", "return 2"),
        &wide,
    )
    .unwrap();
    assert_eq!(patch.sections.len(), 1);
    // What must be replaced and is not there.
    let shown = of("static noinline int part(int n)");
    let changed = shown.replace("\"n\"", "\"m\"");
    let text = reasons(built(
        &shown,
        &changed,
        &of(inline).replace("\"n\"", "\"m\""),
    ));
    assert!(
        text.contains("in part: the compiler leaves it out"),
        "{text}"
    );
}

#[test]
fn static_variables_that_are_numbered_otherwise_are_not_mixed_up() {
    let source = |one: u8, two: u8| {
        format!(
            "static int one __asm__(\"seen.{one}\"); static int two __asm__(\"seen.{two}\"); \
             int first(int n) {{ return one += n; }} int second(int n) {{ return two += n * 3; }} \
             int show(int n) {{ if (on()) return 1; return one + two; }}"
        )
    };
    let new = source(0, 1).replace("return 1;", "return 2;");
    let (patch, _) = built(&source(0, 1), &new, &new).unwrap();
    assert_eq!(replaced(&patch), ["show"]);
    let wide = source(1, 0).replace("return 1;", "return 2;");
    let text = reasons(built(&source(0, 1), &new, &wide));
    assert!(
        text.contains("may be one of several static variables"),
        "{text}"
    );
}
