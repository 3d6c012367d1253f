//! Patches of several files: what one file newly defines and another uses, and names that are local to each.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{build_pairs, compile, named, own, pair, replaced};
use vmpatch_patcher::build::{BuildError, BuildReport, ObjectPair};
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

/// As `EXPORT_SYMBOL_GPL` of either kernel has it (Linux v6.12 and v6.1 include/linux/export.h).
fn export(name: &str, licence: &str, since_6_5: bool) -> String {
    let lines = match since_6_5 {
        true => format!(
            ".section .export_symbol,\"a\"\n .asciz \"{licence}\"\n .asciz \"\"\n .balign 8\n .quad {name}"
        ),
        false => format!(
            ".section __ksymtab_strings,\"aMS\",%progbits,1\n __kstrtab_{name}: .asciz \"{name}\"\n \
             __kstrtabns_{name}: .asciz \"\"\n .section ___ksymtab_{licence}+{name},\"a\"\n .balign 4\n \
             .long {name} - .\n .long __kstrtab_{name} - .\n .long __kstrtabns_{name} - ."
        ),
    };
    format!("asm({:?});", format!("{lines}\n .previous"))
}

#[test]
fn what_one_module_newly_exports_is_called_by_another() {
    for since_6_5 in [true, false] {
        let known = export("one", "GPL", since_6_5);
        let fresh = export("both", "GPL", since_6_5);
        let uses = "extern int one(int n); int last(int n) { return one(n); }";
        let old_one = compile(&format!("{ONE} {known}"));
        let [old_two, stranger] = [uses, ""].map(|more| compile(&format!("{TWO} {more}")));
        let both = "int both(int n) { return n * 3; }";
        // The order of the table says nothing.
        let new_one = compile(&format!("{ONE} {both} {fresh} {known}"));
        let calls = "extern int both(int n); int two(int n) { return printk(\"two\", both(n)); }";
        let [new_two, new_stranger] = [uses, ""].map(|more| compile(&format!("{calls} {more}")));
        let built_for = |new_one: &[u8], old_two: &[u8], new_two: &[u8]| {
            let one = pair("a.c", &old_one, new_one);
            let two = pair("b.c", old_two, new_two);
            let of = |object, pair| ObjectPair { object, ..pair };
            build_pairs(&[of("vhost", one), of("vhost_net", two)])
        };
        let built = |new_one: &[u8]| built_for(new_one, &old_two, &new_two);
        let (patch, report) = built(&new_one).unwrap();
        assert_eq!(replaced(&patch), ["two"]);
        assert!(new_body(&patch, "two").contains(&"own both".to_owned()));
        let ignored = &report.files[0].ignored;
        assert_eq!(ignored[0].what, "new export of both");
        // A module that has not used the other before may outlive it.
        let refused = built_for(&new_one, &stranger, &new_stranger).unwrap_err();
        let reason = refused.to_string();
        assert!(reason.contains("newly used of module vhost"), "{reason}");
        // Not what it keeps to itself.
        let kept = compile(&format!("{ONE} {both} {known}"));
        let (patch, _) = built(&kept).unwrap();
        assert!(new_body(&patch, "two").contains(&"guest both".to_owned()));
        for (changed, reason) in [
            (export("one", "", since_6_5), "on other terms"),
            (String::new(), "no longer exported"),
        ] {
            let changed = compile(&format!("{ONE} {both} {changed}"));
            let error = built(&changed).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}

/// The two files before and after something of the first moved to the second.
fn moved(
    (moved, changed): (&str, &str),
    first: [&str; 2],
    second: [&str; 2],
) -> Result<(Patch, BuildReport), BuildError> {
    let old = [format!("{moved} {}", first[0]), second[0].to_owned()];
    let new = [first[1].to_owned(), format!("{changed} {}", second[1])];
    let [old_one, old_two] = old.map(|it| compile(&it));
    let [new_one, new_two] = new.map(|it| compile(&it));
    build_pairs(&[
        pair("a.c", &old_one, &new_one),
        pair("b.c", &old_two, &new_two),
    ])
}

fn reasons(built: Result<(Patch, BuildReport), BuildError>) -> String {
    match built {
        Err(error @ BuildError::Refused(_)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_variable_that_moves_to_another_file_stays_the_guests() {
    let declared = "extern int counter;";
    let bump = "int bump(void) { return ++counter; }";
    let read = "int read(int n) { return counter++ + n * 3; }";
    let first = [bump.to_owned(), format!("{declared} {bump}")];
    let second = [format!("{declared} {read}"), read.replace("* 3", "* 5")];
    let [first, second] = [&first, &second].map(|[old, new]| [old.as_str(), new.as_str()]);
    let counter = "int counter = 7;";
    let (patch, _) = moved((counter, counter), first, second).unwrap();
    assert_eq!(replaced(&patch), ["read"]);
    let names = new_body(&patch, "read");
    assert!(names.contains(&"guest counter".to_owned()), "{names:?}");
    assert_eq!(patch.sections.len(), 1);
    let text = reasons(moved((counter, "int counter = 8;"), first, second));
    assert!(
        text.contains(".data.counter in counter: it was another file's"),
        "{text}"
    );
    // It is the same one if only its own file may name it now.
    let text = reasons(moved(
        (counter, "static int counter = 7;"),
        [ONE, ONE],
        second,
    ));
    assert!(
        text.contains("counter may be a variable that another file"),
        "{text}"
    );
}

#[test]
fn a_function_that_moves_to_another_file_is_replaced_where_it_was() {
    let it = "noinline int moved(int n) { return printk(\"moved\", n); }";
    let fixed = it.replace("return", "if (n < 0) return 0; return");
    let uses = "extern int moved(int n); int user(int n) { return moved(n) + 1; }";
    let [first, second] = [
        ["", ONE],
        [uses, "int user(int n) { return moved(n) + 1; }"],
    ];
    let (patch, report) = moved((it, &fixed), first, second).unwrap();
    assert_eq!(replaced(&patch), ["moved"]);
    assert_eq!(patch.replaced[0].unit, 0);
    assert_eq!(report.files[1].replaced[0].function, "moved");
    assert!(named(&patch, &patch.replaced[0].old.relocations).contains(&"old moved".to_owned()));
    assert!(new_body(&patch, "moved").contains(&"guest printk".to_owned()));
    // What moves and stays as it was is no change.
    let built = moved((it, it), first, second);
    assert!(
        matches!(built, Err(BuildError::NothingChanged(_))),
        "{built:?}"
    );
    // What it alone named in its old file is not what it alone names in its new one.
    let seen = "static int seen; noinline int moved(int n) { return seen += n; }";
    let text = reasons(moved((seen, seen), first, second));
    assert!(
        text.contains("seen may be a variable that another file"),
        "{text}"
    );
}

#[test]
fn a_new_function_that_the_guest_has_from_elsewhere_is_refused() {
    let weak = "__attribute__((weak)) noinline int arch(int n) { return 0; }";
    let caller = "int caller(int n) { return arch(n) + 1; }";
    let strong = "int arch(int n) { return n & 7; }";
    let first = compile(&format!("{weak} {caller}"));
    let (old, new) = (compile(TWO), compile(&format!("{TWO} {strong}")));
    let both = [pair("a.c", &first, &first), pair("b.c", &old, &new)];
    let text = reasons(build_pairs(&both));
    assert!(
        text.contains("b.c: symbols in arch: the guest has one already"),
        "{text}"
    );
    let uses = compile(&format!("extern int arch(int n); {caller}"));
    let text = reasons(build_pairs(&[pair("a.c", &uses, &uses), both[1]]));
    assert!(
        text.contains("b.c: symbols in arch: the guest has one already"),
        "{text}"
    );
    // Two of one name are no better.
    let third = compile(&format!("{ONE} int arch(int n) {{ return n & 15; }}"));
    let one = compile(ONE);
    let text = reasons(build_pairs(&[pair("a.c", &one, &third), both[1]]));
    assert!(text.contains("several files"), "{text}");
}

#[test]
fn every_name_of_a_new_function_leads_other_files_to_it() {
    let new_one = format!(
        "{ONE} int both(int n) {{ return n * 3; }} extern int b2(int n) __attribute__((alias(\"both\")));"
    );
    let new_two = "extern int b2(int n); int two(int n) { return printk(\"two\", b2(n)); }";
    let [old_one, old_two, new_one, new_two] = [ONE, TWO, &new_one, new_two].map(compile);
    let pairs = [
        pair("a.c", &old_one, &new_one),
        pair("b.c", &old_two, &new_two),
    ];
    let (patch, _) = build_pairs(&pairs).unwrap();
    let names = new_body(&patch, "two");
    assert!(!names.contains(&"guest b2".to_owned()), "{names:?}");
}
