//! Patches of several files: what one file newly defines and another uses, and names that are local to each.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{build_pairs, compile, named, own, pair, replaced};
use vmpatch_patcher::build::{BuildError, ObjectPair};
use vmpatch_patcher::patch::{Patch, Symbol};

const ONE: &str = "int one(int n) { return printk(\"one\", n); }";
const TWO: &str = "int two(int n) { return printk(\"two\", n); }";

fn new_body(patch: &Patch, function: &str) -> Vec<String> {
    let found = patch.replaced.iter().find(|it| it.name == function);
    let section = &patch.sections[found.unwrap().new_section as usize];
    named(patch, &section.relocations)
}

#[test]
fn a_function_that_one_file_newly_has_for_all_is_called_by_the_others() {
    let (old_one, old_two) = (compile(ONE), compile(TWO));
    let new_one = compile(&format!("{ONE} int both(int n) {{ return n * 3; }}"));
    let new_two =
        compile("extern int both(int n); int two(int n) { return printk(\"two\", both(n)); }");
    let (patch, report) = build_pairs(&[
        pair("a.c", &old_one, &new_one),
        pair("b.c", &old_two, &new_two),
    ])
    .unwrap();
    assert_eq!(replaced(&patch), ["two"]);
    assert_eq!(patch.replaced[0].unit, 1);
    assert!(new_body(&patch, "two").contains(&"own both".to_owned()));
    assert_eq!(own(&patch, "both").name, ".text.both");
    assert_eq!(report.files[0].new[0].name, "both");
    assert!(report.files[0].ignored.is_empty());
    let files: Vec<_> = patch.units.iter().map(|unit| unit.file.as_str()).collect();
    assert_eq!(files, ["a.c", "b.c"]);
}

#[test]
fn equal_names_that_are_local_to_two_files_stay_two_symbols() {
    let file = |name: &str, by: u8| {
        format!(
            "static int seen; static noinline int tell(int n) {{ return printk(\"{name}\", n); }} \
             int {name}(int n) {{ seen += {by}; return tell(n + seen); }}"
        )
    };
    let objects = ["one", "two"].map(|name| (compile(&file(name, 1)), compile(&file(name, 2))));
    let [one, two] = &objects;
    let (patch, _) =
        build_pairs(&[pair("a.c", &one.0, &one.1), pair("b.c", &two.0, &two.1)]).unwrap();
    assert_eq!(replaced(&patch), ["one", "two"]);
    let units: Vec<_> = patch
        .symbols
        .iter()
        .filter_map(|it| match it {
            Symbol::Guest { unit, name, .. } if name == "tell" => Some(*unit),
            _ => None,
        })
        .collect();
    assert_eq!(units, [0, 1]);
}

#[test]
fn a_refusal_names_its_file_where_there_are_several() {
    let state = |value: u8| {
        compile(&format!(
            "int level = {value}; int get(void) {{ return level; }}"
        ))
    };
    let (old, new) = (state(1), state(2));
    let (other_old, other_new) = (compile(ONE), compile(&ONE.replace("one\"", "uno\"")));
    let pairs = [pair("a.c", &other_old, &other_new), pair("b.c", &old, &new)];
    let Err(error @ BuildError::Refused(_)) = build_pairs(&pairs) else {
        panic!("not refused")
    };
    assert!(
        error.to_string().contains("b.c: .data.level in level: "),
        "{error}"
    );
    let module = ObjectPair {
        object: "loop",
        ..pairs[0]
    };
    let (patch, _) = build_pairs(&[module]).unwrap();
    assert_eq!(patch.modules().into_iter().collect::<Vec<_>>(), ["loop"]);
}

#[test]
fn a_new_function_of_one_module_is_not_that_of_another_which_has_its_name() {
    let calls =
        |n: u8| format!("extern int both(int n); int two(int n) {{ return both(n) + {n}; }}");
    let (old_one, old_two) = (compile(ONE), compile(TWO));
    let defines = [3, 4].map(|n| compile(&format!("{ONE} int both(int n) {{ return n * {n}; }}")));
    let callers = [5, 6].map(|n| compile(&calls(n)));
    let pairs: Vec<_> = ["first", "second"]
        .into_iter()
        .zip(defines.iter().zip(&callers))
        .flat_map(|(object, (defines, calls))| {
            [
                ObjectPair {
                    object,
                    ..pair("a.c", &old_one, defines)
                },
                ObjectPair {
                    object,
                    ..pair("b.c", &old_two, calls)
                },
            ]
        })
        .collect();
    let (patch, _) = build_pairs(&pairs).unwrap();
    let brought = |unit: u32| {
        let replaced = patch.replaced.iter().find(|it| it.unit == unit).unwrap();
        let body = &patch.sections[replaced.new_section as usize];
        let mut own =
            body.relocations
                .iter()
                .filter_map(|it| match &patch.symbols[it.symbol as usize] {
                    Symbol::Own { name, section, .. } if name == "both" => Some(*section),
                    _ => None,
                });
        own.next().unwrap()
    };
    assert_ne!(brought(1), brought(3));
}
