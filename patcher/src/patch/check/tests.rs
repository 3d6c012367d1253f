use super::super::sample;
use super::*;
use vmpatch_introspect::unwind::orc::{Base, Entry, Kind};

use crate::patch::{Alternative, Reference, SiteKind, TrapKind, Unwind};

/// What is said of the sample after a change.
fn after(change: impl FnOnce(&mut Patch)) -> String {
    let mut patch = sample::patch();
    change(&mut patch);
    check(&patch)
        .expect_err("the change must be refused")
        .to_string()
}

#[test]
fn the_sample_is_well_formed() {
    assert_eq!(check(&sample::patch()), Ok(()));
}

#[test]
fn a_patch_name_can_never_be_a_path_or_an_option() {
    for name in [
        "",
        ".",
        "..",
        "-a",
        "a/b",
        "a b",
        "a\0",
        "é",
        &"a".repeat(101),
    ] {
        assert!(patch_name(name).is_err(), "{name:?}");
    }
    for name in ["a", "CVE-2026-1234", "fix_1.2", &"a".repeat(100)] {
        assert_eq!(patch_name(name), Ok(()), "{name:?}");
    }
    assert!(after(|p| p.name = "../x".to_owned()).contains("patch name"));
}

#[test]
fn names_with_control_characters_are_refused() {
    assert!(after(|p| p.replaced[0].name = "a\x1b[2J".to_owned()).contains("function"));
    assert!(after(|p| p.sections[0].name.clear()).contains("section"));
    assert!(after(|p| p.units[0].object = "a b".to_owned()).contains("object"));
    assert!(after(|p| p.requires.release = Some("\n".to_owned())).contains("release"));
    assert!(after(|p| p.requires.build_id = Some("ABCD".repeat(8))).contains("build id"));
    assert!(after(|p| p.replaced[0].old_parts[0].name = "x".repeat(513)).contains("split-off"));
}

#[test]
fn unwind_data_that_no_function_can_have_is_refused() {
    let rows = |change: fn(&mut Vec<Unwind>)| after(|p| change(&mut p.sections[0].unwind));
    assert!(rows(|rows| rows.swap(0, 1)).contains("not after the one before"));
    assert!(rows(|rows| rows[1].offset = 0).contains("not after the one before"));
    assert!(rows(|rows| rows[2].offset += 1).contains("outside"));
    let of_entry_code: [fn(&mut Entry); 5] = [
        |it| it.kind = Kind::EndOfStack,
        |it| it.kind = Kind::Regs,
        |it| it.signal = true,
        |it| it.sp = Base::Unknown,
        |it| it.bp = Base::Dx,
    ];
    for change in of_entry_code {
        let said = after(|p| change(&mut p.sections[0].unwind[1].entry));
        assert!(said.contains("no kind that functions have"), "{said}");
    }
    let said = after(|p| {
        let rows = p.sections[0].unwind.clone();
        p.sections[1].unwind = rows;
    });
    assert!(said.contains("not of code"), "{said}");
}

#[test]
fn a_patch_that_replaces_nothing_is_refused() {
    assert!(after(|p| p.replaced.clear()).contains("0 replaced functions"));
    assert!(after(|p| p.sections.clear()).contains("0 sections"));
}

#[test]
fn a_function_replaced_twice_is_refused() {
    let said = after(|p| {
        let again = p.replaced[0].clone();
        p.replaced.push(again);
    });
    assert_eq!(said, "sample is replaced twice");
}

#[test]
fn indices_that_lead_nowhere_are_refused() {
    assert!(after(|p| p.replaced[0].new_section = 2).contains("section 2 does not exist"));
    assert!(after(|p| p.replaced[0].new_section = 1).contains("section 1 is not code"));
    assert!(after(|p| p.sections[0].relocations[0].symbol = 5).contains("symbol 5 does not exist"));
    assert!(after(|p| p.replaced[0].old.relocations[0].symbol = u32::MAX).contains("not exist"));
    assert!(after(|p| p.replaced[0].sympos = Some(0)).contains("counted from 1"));
    assert!(
        after(|p| {
            p.symbols[4] = Symbol::Own {
                name: "x".to_owned(),
                section: 7,
                offset: 0,
            };
        })
        .contains("section 7 does not exist")
    );
}

#[test]
fn old_code_cannot_name_new_sections_nor_new_code_old_bytes() {
    assert!(after(|p| p.replaced[0].old.relocations[0].symbol = 4).contains("by old code"));
    assert!(after(|p| p.sections[0].relocations[0].symbol = 2).contains("by new code"));
}

#[test]
fn offsets_outside_are_refused_without_overflow() {
    for offset in [43, 46, u64::MAX, u64::MAX - 3] {
        let said = after(|p| p.sections[0].relocations[0].offset = offset);
        assert!(said.contains("is outside"), "{said}");
        let said = after(|p| p.sections[0].sites[0].offset = offset);
        assert!(said.contains("is outside"), "{said}");
    }
    assert!(after(|p| p.replaced[0].new_offset = 46).contains("new entry"));
    assert!(
        after(|p| {
            p.symbols[4] = Symbol::Own {
                name: "x".to_owned(),
                section: 1,
                offset: 5,
            };
        })
        .contains("is outside")
    );
}

#[test]
fn fields_must_be_sorted_and_apart() {
    assert!(after(|p| p.replaced[0].old.relocations.swap(0, 1)).contains("overlaps"));
    assert!(after(|p| p.replaced[0].old.relocations[1].offset = 4).contains("overlaps"));
    assert!(after(|p| p.replaced[0].old.sites.swap(0, 1)).contains("before"));
}

#[test]
fn alignments_must_be_powers_of_two_within_a_page() {
    for align in [0, 3, 8192, u64::MAX] {
        assert!(after(|p| p.sections[0].align = align).contains("alignment"));
    }
}

#[test]
fn impossible_sites_are_refused() {
    assert!(after(|p| p.replaced[0].old.sites[0].len = 4).contains("length"));
    assert!(
        after(|p| {
            p.replaced[0].old.sites[2].kind = SiteKind::Retpoline {
                register: 16,
                call: false,
            };
        })
        .contains("register")
    );
    assert!(
        after(|p| {
            let key = Reference {
                symbol: 77,
                addend: 0,
            };
            p.replaced[0].old.sites[3].kind = SiteKind::JumpLabel {
                key,
                target: key,
                inverted: false,
            };
        })
        .contains("symbol 77")
    );
    assert!(
        after(|p| {
            p.replaced[0].old.sites[3].kind = SiteKind::RuntimeConstant {
                symbol: 0,
                shift: true,
            };
        })
        .contains("length")
    );
    assert!(after(|p| alternative(p).code.bytes.push(0)).contains("replacement length"));
    assert!(after(|p| alternative(p).code.bytes.clear()).contains("is outside"));
}

#[test]
fn impossible_traps_are_refused() {
    assert!(after(|p| p.sections[0].traps.swap(0, 1)).contains("not after the one before"));
    assert!(after(|p| p.sections[0].traps[0].offset = 24).contains("not after the one before"));
    assert!(after(|p| p.sections[0].traps[1].offset = 25).contains("is no ud2"));
    for offset in [45, 46, u64::MAX] {
        let said = after(|p| p.sections[0].traps[1].offset = offset);
        assert!(said.contains("is outside"), "{said}");
    }
    assert!(after(|p| p.sections[0].kind = SectionKind::ReadOnly).contains("is not in code"));
    let bug = |file: &str| TrapKind::Bug {
        file: file.to_owned(),
        line: 1,
        flags: 1,
    };
    for file in ["", "a\x1b[2J", "a b"] {
        assert!(after(|p| p.sections[0].traps[1].kind = bug(file)).contains("source file"));
    }
    for (symbol, problem) in [(77, "symbol 77"), (2, "is old but named by new code")] {
        let fixup = Reference { symbol, addend: 0 };
        let kind = TrapKind::Fault { fixup, data: 0 };
        let said = after(|p| p.sections[0].traps[0].kind = kind);
        assert!(said.contains(problem), "{said}");
    }
}

fn alternative(patch: &mut Patch) -> &mut Alternative {
    match &mut patch.replaced[0].old.sites[5].kind {
        SiteKind::Alternative { replacements } => &mut replacements[0],
        other => panic!("{other:?}"),
    }
}

#[test]
fn callbacks_are_code_of_the_patch_and_one_of_a_kind() {
    assert!(after(|p| p.callbacks[0].section = 9).contains("section 9"));
    assert!(after(|p| p.callbacks[0].section = 1).contains("is not code"));
    assert!(after(|p| p.callbacks[0].name = "a\n".to_owned()).contains("callback"));
    let twice = after(|p| p.callbacks.push(p.callbacks[0].clone()));
    assert!(twice.contains("two callbacks pre_apply"), "{twice}");
}
