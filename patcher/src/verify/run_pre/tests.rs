use proptest::prelude::*;

use super::*;
use crate::link::tests::{Fake, facts};
use crate::patch::{Reference, RelocationKind, Symbol, Unit};
use crate::verify::locate::{LocateError, Wanted};

const AT: Gva = Gva(0xffff_ffff_8100_0000);
const CALLED: Gva = Gva(0xffff_ffff_8100_4000);
const OTHER: Gva = Gva(0xffff_ffff_8100_8000);

fn relocation(offset: u64, symbol: u32) -> Relocation {
    let kind = RelocationKind::Relative32;
    Relocation {
        offset,
        kind,
        symbol,
        addend: -4,
    }
}

fn site(offset: u64, len: u8, kind: SiteKind) -> Site {
    Site { offset, len, kind }
}

/// endbr64; call __fentry__; call helper; jmp __x86_return_thunk
fn code() -> Code {
    let bytes = [
        &[0xf3, 0x0f, 0x1e, 0xfa][..],
        &[0xe8, 0, 0, 0, 0],
        &[0xe8, 0, 0, 0, 0],
        &[0xe9, 0, 0, 0, 0],
    ];
    Code {
        bytes: bytes.concat(),
        relocations: vec![relocation(5, 1), relocation(10, 0), relocation(15, 2)],
        sites: vec![
            site(0, 4, SiteKind::Endbr),
            site(4, 5, SiteKind::Fentry),
            site(14, 5, SiteKind::Return),
        ],
    }
}

fn symbols() -> Vec<Symbol> {
    let names = ["helper", "__fentry__", "__x86_return_thunk"];
    let guest = |name: &&str| Symbol::Guest {
        unit: 0,
        name: (*name).into(),
        sympos: None,
    };
    names.iter().map(guest).collect()
}

/// What boot makes of [`code`] at `at`: sealed, untraced, plainly returning.
fn booted(at: Gva, called: Gva) -> Vec<u8> {
    let call = relocate::branch(0xe8, at.wrapping_add(9), called).unwrap();
    let parts = [
        &[0x66, 0x0f, 0x1f, 0x00][..],
        &[0x0f, 0x1f, 0x44, 0, 0],
        &call,
        &[0xc3, 0xcc, 0xcc, 0xcc, 0xcc],
    ];
    parts.concat()
}

fn guest() -> Fake {
    let mut live = Fake::new();
    live.name("init_task", Gva(1));
    live.name("helper", CALLED);
    live.name("f", AT);
    live.put(AT, &booted(AT, CALLED));
    live
}

fn compare(live: &Fake) -> Result<Learned, Reason> {
    let (symbols, facts) = (symbols(), facts());
    let names = Names::look_up(&symbols, &[], live);
    let (facts, names) = (&facts, &names);
    let mut learned = Learned::new();
    let matcher = Matcher { live, facts, names };
    let compared = matcher.compare(&code(), AT, &mut learned);
    compared.map(|()| learned).map_err(|it| it.reason)
}

#[test]
fn what_boot_made_of_the_function_is_the_function() {
    assert_eq!(compare(&guest()), Ok(Learned::new()));
}

#[test]
fn a_call_to_another_function_is_seen_though_its_bytes_are_a_field() {
    let mut live = guest();
    live.put(AT, &booted(AT, OTHER));
    assert!(matches!(compare(&live), Err(Reason::Field(_))));
}

#[test]
fn of_two_functions_of_a_name_the_code_tells_which_is_called() {
    let mut live = guest();
    live.name("helper", OTHER);
    assert_eq!(compare(&live), Ok(Learned::from([(0, CALLED)])));
}

#[test]
fn a_breakpoint_is_never_tolerated() {
    for offset in [0, 4, 9, 14] {
        let mut live = guest();
        live.put(AT.wrapping_add(offset), &[0xcc]);
        assert!(compare(&live).is_err(), "+{offset:#x}");
    }
}

#[test]
fn text_that_ends_in_an_unmapped_page_is_refused() {
    let mut live = Fake::new();
    live.put(AT, &booted(AT, CALLED)[..12]);
    assert!(matches!(compare(&live), Err(Reason::Read(_))));
}

fn locate(live: &Fake, sympos: Option<u32>) -> Result<Gva, LocateError> {
    let (symbols, facts, code) = (symbols(), facts(), code());
    let names = Names::look_up(&symbols, &[], live);
    let (facts, names) = (&facts, &names);
    let wanted = Wanted {
        unit: 0,
        object: "vmlinux",
        name: "f",
        sympos,
        code: &code,
        parts: &[],
    };
    let matcher = Matcher { live, facts, names };
    let found = matcher.locate(wanted, &mut Learned::new());
    found.map(|it| it.range.start)
}

#[test]
fn of_two_functions_of_a_name_the_one_that_matches_is_meant() {
    let mut live = guest();
    live.name("f", OTHER);
    live.put(OTHER, &booted(OTHER, AT));
    assert_eq!(locate(&live, None), Ok(AT));
    assert!(matches!(
        locate(&live, Some(2)),
        Err(LocateError::Differs { at: OTHER, .. })
    ));
}

#[test]
fn two_that_match_alike_are_not_chosen_between_but_by_position() {
    let mut live = guest();
    live.name("f", OTHER);
    live.put(OTHER, &booted(OTHER, CALLED));
    assert!(matches!(
        locate(&live, None),
        Err(LocateError::Several { count: 2, .. })
    ));
    assert_eq!(locate(&live, Some(2)), Ok(OTHER));
    assert!(matches!(
        locate(&live, Some(3)),
        Err(LocateError::Absent { .. })
    ));
}

fn kinds() -> impl Strategy<Value = SiteKind> {
    let reference = Reference {
        symbol: 0,
        addend: 7,
    };
    prop_oneof![
        Just(SiteKind::Fentry),
        Just(SiteKind::Return),
        Just(SiteKind::StaticCall),
        Just(SiteKind::Endbr),
        Just(SiteKind::LockPrefix),
        (0..16_u8, any::<bool>())
            .prop_map(|(register, call)| SiteKind::Retpoline { register, call }),
        any::<bool>().prop_map(|shift| SiteKind::RuntimeConstant { symbol: 0, shift }),
        any::<u8>().prop_map(|slot| SiteKind::Paravirt { slot }),
        any::<bool>().prop_map(move |inverted| SiteKind::JumpLabel {
            key: reference,
            target: reference,
            inverted
        }),
    ]
}

proptest! {
    #[test]
    fn no_code_of_a_patch_and_no_text_of_a_guest_makes_it_panic(
        bytes in proptest::collection::vec(any::<u8>(), 1..64),
        running in proptest::collection::vec(any::<u8>(), 0..64),
        sites in proptest::collection::vec((0..70_u64, any::<u8>(), kinds()), 0..6),
        fields in proptest::collection::vec((0..70_u64, 0..5_u32, any::<i64>()), 0..6),
    ) {
        let mut live = guest();
        live.put(AT, &running);
        let sites = sites.into_iter().map(|(offset, len, kind)| site(offset, len, kind));
        let fields = fields.into_iter().map(|(offset, symbol, addend)| Relocation {
            addend,
            ..relocation(offset, symbol)
        });
        let code = Code { bytes, relocations: fields.collect(), sites: sites.collect() };
        let (symbols, facts) = (symbols(), facts());
        let names = Names::look_up(&symbols, &[], &live);
        let matcher = Matcher { live: &live, facts: &facts, names: &names };
        let _ = matcher.compare(&code, AT, &mut Learned::new());
    }
}

/// A static call of a module to its function, by names that the module alone has.
#[test]
fn a_static_call_of_a_module_is_told_by_the_modules_own_key() {
    const TRAMPOLINE: Gva = Gva(0xffff_ffff_c000_1000);
    const KEY: Gva = Gva(0xffff_ffff_c000_2000);
    let code = Code {
        bytes: vec![0xe8, 0, 0, 0, 0],
        relocations: vec![relocation(1, 0)],
        sites: vec![site(0, 5, SiteKind::StaticCall)],
    };
    let symbols = [Symbol::Guest {
        unit: 0,
        name: "__SCT__key".into(),
        sympos: None,
    }];
    let holds = |object: &str, running: Gva| {
        let mut live = Fake::new();
        live.name("init_task", Gva(1));
        live.name_in("xfs", "__SCT__key", TRAMPOLINE);
        live.name_in("xfs", "__SCK__key", KEY);
        live.put(KEY, &CALLED.0.to_le_bytes());
        live.put(AT, &relocate::branch(0xe8, AT, running).unwrap());
        let units = [Unit {
            file: "fs/xfs.c".into(),
            object: object.into(),
        }];
        let (facts, names) = (&facts(), &Names::look_up(&symbols, &units, &live));
        let live = &live;
        let matcher = Matcher { live, facts, names };
        matcher.compare(&code, AT, &mut Learned::new()).is_ok()
    };
    assert!(holds("xfs", CALLED));
    assert!(holds("xfs", TRAMPOLINE));
    assert!(!holds("xfs", OTHER));
    assert!(!holds("vmlinux", CALLED));
}
