//! Changed layouts of structures, told by debug information.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{build_with, compile_with, pair, replaced};
use vmpatch_patcher::build::{BuildError, BuildOptions, FileReport};

const SOURCE: &str = "\
struct inner { int low : 4; int high : 4; };
struct item { long key; union { int one; char bytes[4]; }; struct inner flags; };
struct holder { struct { int first; int second; } in; long end; };
typedef struct { int left; int right; } pair_t;
struct padded { char kind; long end; };
struct nested { const struct { char within; }; long end; };
typedef char row[3];
struct table { volatile row rows[2]; long end; };
int get(struct item *it) { return it->one + it->flags.high; }
long more(struct padded *p, struct nested *n, struct table *t, struct holder *h, pair_t *q)
{ return p->end + n->end + t->end + h->end + q->left; }
";

fn with_types(source: &str) -> Vec<u8> {
    compile_with(source, &["-g", "-gdwarf-5"])
}

/// What is said of the source after a change.
fn changed(from: &str, to: &str, safe: &[&str]) -> Result<(Vec<String>, FileReport), Vec<String>> {
    assert!(SOURCE.contains(from));
    let (old, new) = (
        with_types(SOURCE),
        with_types(&SOURCE.replacen(from, to, 1)),
    );
    let options = BuildOptions {
        safe_types: safe.iter().map(|it| (*it).to_owned()).collect(),
        ..BuildOptions::default()
    };
    match build_with(&[pair("a.c", &old, &new)], options) {
        Ok((patch, report)) => {
            let names = replaced(&patch).into_iter().map(str::to_owned).collect();
            Ok((names, report.files[0].clone()))
        }
        Err(BuildError::Refused(report)) => Err(report.refused().collect()),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_structure_that_lies_otherwise_is_refused_by_its_name_and_member() {
    for (from, to, said) in [
        (
            "long key;",
            "long key; long more;",
            "struct item: member more has come",
        ),
        ("int low : 4; ", "", "struct inner: member low is gone"),
        (
            "int low : 4; int high : 4;",
            "int high : 4; int low : 4;",
            "struct inner: member high has moved",
        ),
        (
            "char bytes[4];",
            "char bytes[12];",
            "struct item: member flags has moved",
        ),
        (
            "int one;",
            "int two; int one;",
            "struct item: member two has come",
        ),
        (
            "int high : 4;",
            "int high : 7;",
            "struct inner: member high has another width",
        ),
        (
            "char kind;",
            "short kind;",
            "struct padded: member kind has another width",
        ),
        (
            "char within;",
            "short within;",
            "struct nested: member within has another width",
        ),
        (
            "int first; int second;",
            "int second; int first;",
            "struct holder: member in.first has moved",
        ),
        (
            "int left; int right;",
            "int right; int left;",
            "pair_t: member left has moved",
        ),
        (
            "rows[2];",
            "rows[1];",
            "struct table: member rows has another width",
        ),
    ] {
        let refused = changed(from, to, &[]).unwrap_err();
        assert!(
            refused.iter().any(|it| it.contains(said)),
            "{to}: {refused:?}"
        );
    }
}

#[test]
fn a_structure_that_is_said_to_be_safe_is_let_through_and_told() {
    let change = ("long key;", "long key; long more;");
    for safe in ["item", "struct item"] {
        let (names, report) = changed(change.0, change.1, &[safe]).unwrap();
        assert_eq!(names, ["get"]);
        assert!(
            report.ignored.iter().any(|it| it.what == "struct item"),
            "{report}"
        );
    }
    assert!(changed(change.0, change.1, &["inner"]).is_err());
}

#[test]
fn what_lies_as_before_is_no_reason_to_refuse() {
    let whole = "int get(struct item *it) {";
    let with_another = format!("struct other {{ long x; }}; {whole} struct other o; use(&o);");
    let of_rows = "typedef char row[3];\nstruct table { volatile row rows[2]; long end; };
int get(struct item *it) { return it->one +";
    let renamed = of_rows.replace("typedef char", "typedef signed char cell; typedef cell");
    let renamed = renamed.replace("one +", "one -");
    for (from, to) in [
        ("it->one +", "it->one -"),
        (of_rows, &renamed),
        (whole, &with_another),
        (
            "return it",
            "struct inner { long x; } here = { 5 }; use(&here); return it",
        ),
    ] {
        let (_, report) = changed(from, to, &[]).unwrap();
        assert_eq!(report.layouts, Some(7), "{to}");
    }
}

#[test]
fn objects_without_debug_information_are_said_not_to_be_compared() {
    let (_, report) = objects::patch(
        "int f(int n) { return n; }",
        "int f(int n) { return n + 1; }",
    );
    assert!(
        report
            .to_string()
            .contains("layouts of types were not compared"),
        "{report}"
    );
    let (_, report) = changed("it->one +", "it->one -", &[]).unwrap();
    assert!(!report.to_string().contains("not compared"), "{report}");
}
