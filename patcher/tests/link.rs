//! Real patches placed for real guests, from memory dumps: linked, carried out on a copy of the guest's
//! memory, taken back, and refused where they must be.

#![allow(clippy::unwrap_used, reason = "only tests are here")]

mod guests;

use guests::{Guest, samples};
use iced_x86::{Decoder, DecoderOptions};
use vmpatch_introspect::target::Edit;
use vmpatch_introspect::{Gpa, Gva, PhysicalMemory};
use vmpatch_patcher::arena::fixed::Table;
use vmpatch_patcher::arena::window::WINDOW_START;
use vmpatch_patcher::arena::{Arena, ArenaError, PatchRecord};
use vmpatch_patcher::link::hooks;
use vmpatch_patcher::link::layers::{LayerError, Layers, Stacking};
use vmpatch_patcher::link::region::RegionError;
use vmpatch_patcher::link::tracing::{self, TracingError};
use vmpatch_patcher::link::{self, LinkError, Live, Plan};
use vmpatch_patcher::patch::file::PatchFile;
use vmpatch_patcher::status::Known;
use vmpatch_patcher::verify::locate::LocateError;
use vmpatch_patcher::verify::{Verified, verify};

/// The kernel that the samples are built for.
const SAMPLED: &str = "6.12";

fn each(check: impl Fn(&Guest, &PatchFile)) {
    for (name, guest) in Guest::all(SAMPLED) {
        for sample in samples() {
            eprintln!("{name}: {}", sample.patch().name);
            check(&guest, sample);
            guest.forget();
        }
    }
}

/// Any one guest of that kernel.
fn first() -> Option<Guest> {
    Guest::all(SAMPLED)
        .into_iter()
        .map(|(_, guest)| guest)
        .next()
}

fn verified(guest: &Guest, sample: &PatchFile) -> Result<Verified, LinkError> {
    let view = guest.view();
    let arena = Arena::open(&guest.kernel, guest, guest.slot())?;
    let layers = layers(&view, &arena);
    let plan = Plan::link(sample, &view, &arena, &layers)?;
    Ok(verify(plan, &view, &arena).unwrap())
}

/// The patches that are there, by the manifest alone.
fn layers(guest: &link::Guest<'_>, arena: &Arena) -> Layers {
    let boot = &guest.kernel().identity.boot;
    let memory = guest.memory().physical;
    let known = Known::judge(Some(arena.manifest()), &[], boot, memory, guest.loaded());
    Layers::of(&known, Stacking::Upon).unwrap()
}

fn all_in_place(record: &PatchRecord, guest: &Guest) -> bool {
    let mut sites = record.sites.iter();
    sites.all(|site| site.is_in_place(guest).unwrap())
}

fn apply(guest: &Guest, sample: &PatchFile) -> Verified {
    let verified = verified(guest, sample).unwrap();
    guest.carry_out(&verified.arena_writes, &verified.batch());
    verified
}

/// A sample with its content changed.
fn changed(sample: &PatchFile, change: impl Fn(&mut vmpatch_patcher::patch::Patch)) -> PatchFile {
    let mut patch = sample.patch().clone();
    change(&mut patch);
    PatchFile::new(patch).unwrap()
}

#[test]
fn every_old_function_enters_its_new_one_after_the_patch() {
    each(|guest, sample| {
        let verified = apply(guest, sample);
        let view = guest.view();
        assert_eq!(verified.functions.len(), sample.patch().replaced.len());
        for function in &verified.functions {
            // From the entry on: a landing mark and ftrace's nop at most, then the jump.
            let entry = view.bytes(function.old.start, 16).unwrap();
            let at = function.old.start.0;
            let jump = Decoder::with_ip(64, &entry, at, DecoderOptions::NONE)
                .iter()
                .take(3)
                .find(|instruction| instruction.near_branch_target() != 0)
                .unwrap();
            assert_eq!(jump.ip(), function.site.0);
            assert_eq!(jump.near_branch_target(), function.new.start.0);
            assert_eq!(
                function.site.0 - at,
                9,
                "after the landing mark and ftrace's nop"
            );
        }
    });
}

#[test]
fn new_code_is_mapped_to_run_and_not_to_be_written_and_only_calls_what_has_a_name() {
    each(|guest, sample| {
        let verified = apply(guest, sample);
        let view = guest.view();
        for function in &verified.functions {
            let space = guest.kernel.layout.space;
            let page = space.translate(guest, function.new.start).unwrap().unwrap();
            assert!(page.executable && !page.writable && !page.user);
            let code = view
                .bytes(function.new.start, function.new.size() as usize)
                .unwrap();
            let decoder = Decoder::with_ip(64, &code, function.new.start.0, DecoderOptions::NONE);
            for instruction in decoder {
                assert!(
                    !instruction.is_invalid(),
                    "{}",
                    view.describe(Gva(instruction.ip()))
                );
                let to = Gva(instruction.near_branch_target());
                if to != Gva(0) && !function.new.contains(to) && to < WINDOW_START {
                    let name = view.describe(to);
                    assert!(!name.contains('+') && !name.starts_with("0x"), "{name}");
                }
            }
        }
    });
}

#[test]
fn a_patch_of_the_same_function_lies_upon_the_first_and_waits_for_its_code() {
    each(|guest, sample| {
        let first = apply(guest, sample);
        let other = changed(sample, |patch| patch.name.push_str("-2"));
        let second = apply(guest, &other);
        for (lower, upper) in first.functions.iter().zip(&second.functions) {
            assert_eq!(upper.over.as_deref(), Some(first.record.name.as_str()));
            assert_eq!((upper.site, upper.old), (lower.site, lower.old));
            assert!(second.busy().any(|busy| busy.range == lower.new));
        }
        for (lower, upper) in first.switch.edits.iter().zip(&second.switch.edits) {
            assert_eq!((upper.at, &upper.old), (lower.at, &lower.new));
        }
        guest.carry_out(&[], &second.record.rollback_edits(&[]));
        guest.carry_out(&[], &first.record.rollback_edits(&[]));
        for edit in &first.record.apply_edits() {
            let mut now = vec![0; edit.old.len()];
            guest.read(edit.at, &mut now).unwrap();
            assert_eq!(now, guest.original(edit));
        }
    });
}

#[test]
fn a_second_patch_finds_the_window_mapped_and_takes_other_pages() {
    let Some(guest) = first() else {
        return;
    };
    let mut taken: Vec<u32> = Vec::new();
    let mut functions = Vec::new();
    for sample in samples() {
        let name = sample.patch().replaced[0].name.clone();
        if functions.contains(&name) {
            continue;
        }
        let verified = apply(&guest, sample);
        assert_eq!(verified.map.is_empty(), !functions.is_empty());
        for extent in &verified.record.extents {
            for page in extent.page..extent.page + extent.pages {
                assert!(!taken.contains(&page), "page {page} is given twice");
                taken.push(page);
            }
        }
        functions.push(name);
    }
    let arena = Arena::open(&guest.kernel, &guest, guest.slot()).unwrap();
    assert_eq!(arena.manifest().patches.len(), functions.len());
    for record in &arena.manifest().patches {
        assert!(all_in_place(record, &guest));
    }
}

#[test]
fn rolled_back_by_the_manifest_alone_the_text_is_as_before_and_the_same_patch_fits_again() {
    each(|guest, sample| {
        let first = apply(guest, sample);
        let arena = Arena::open(&guest.kernel, guest, guest.slot()).unwrap();
        let record = &arena.manifest().patches[0];
        assert_eq!(record, &first.record);
        guest.carry_out(&[], &record.rollback_edits(&[]));
        assert!(!all_in_place(record, guest));
        for edit in &first.switch.edits {
            assert_eq!(guest.original(edit), edit.old);
        }
        let again = verified(guest, sample).unwrap();
        assert_eq!(again.record, first.record, "nothing is placed anew");
        assert!(again.map.is_empty());
        guest.carry_out(&again.arena_writes, &again.batch());
        let arena = Arena::open(&guest.kernel, guest, guest.slot()).unwrap();
        assert_eq!(arena.manifest().patches.len(), 1);
    });
}

#[test]
fn a_flipped_bit_in_any_byte_of_an_old_function_is_seen_but_where_the_kernel_itself_writes() {
    let Some(guest) = first() else {
        return;
    };
    for sample in samples() {
        let whole = verified(&guest, sample).unwrap();
        let old = whole.functions[0].old;
        let sites = &sample.patch().replaced[0].old.sites;
        let view = guest.view();
        for offset in 0..old.size() {
            let at = view.physical(old.start.wrapping_add(offset)).unwrap();
            let is = view.bytes(old.start.wrapping_add(offset), 1).unwrap()[0];
            guest.write(at, &[is ^ (1 << (offset % 8))]);
            let excused = sites
                .iter()
                .any(|site| (site.offset..site.offset + u64::from(site.len)).contains(&offset));
            match verified(&guest, sample) {
                Err(LinkError::Locate(LocateError::Differs { mismatch, .. })) => {
                    assert!(mismatch.lines.iter().any(|line| line.starts_with('>')));
                }
                Ok(_) => assert!(excused, "+{offset:#x} was not seen"),
                Err(error) => panic!("+{offset:#x}: {error}"),
            }
            guest.write(at, &[is]);
        }
    }
}

#[test]
fn a_patch_for_another_kernel_or_function_is_refused() {
    each(|guest, sample| {
        let other = changed(sample, |patch| {
            patch.requires.release = Some("6.12.0-another-cloud-amd64".into());
        });
        assert!(matches!(
            verified(guest, &other),
            Err(LinkError::WrongKernel { .. })
        ));
        let wrong = changed(sample, |patch| {
            patch.replaced[0].name = "vfs_read".into();
            patch.units[0].object = "vmlinux".into();
        });
        assert!(matches!(
            verified(guest, &wrong),
            Err(LinkError::Locate(LocateError::Differs { .. }))
        ));
        let absent = changed(sample, |patch| {
            patch.replaced[0].name = "no_such_function".into();
        });
        assert!(matches!(
            verified(guest, &absent),
            Err(LinkError::Locate(LocateError::Absent { .. }))
        ));
        let module = changed(sample, |patch| patch.units[0].object = "nosuch".into());
        assert!(matches!(
            verified(guest, &module),
            Err(LinkError::Module { .. })
        ));
    });
}

#[test]
fn code_that_no_jump_may_leave_is_refused_by_where_it_lies() {
    each(|guest, sample| {
        for (name, region) in [
            ("futex_init", RegionError::Init),
            ("entry_SYSCALL_64", RegionError::EntryCode),
            ("init_task", RegionError::NotText),
        ] {
            let other = changed(sample, |patch| {
                patch.replaced[0].name = name.into();
                patch.units[0].object = "vmlinux".into();
            });
            match verified(guest, &other) {
                Err(LinkError::Region { why, .. }) => assert_eq!(why, region, "{name}"),
                result => panic!("{name}: {result:?}"),
            }
        }
    });
}

#[test]
fn a_window_that_the_guest_uses_is_left_alone() {
    let Some(guest) = first() else {
        return;
    };
    let Some(sample) = samples().first() else {
        return;
    };
    let Edit { at, .. } = verified(&guest, sample).unwrap().map.remove(0);
    guest.write(at, &0x1234_5067_u64.to_le_bytes());
    assert!(matches!(
        verified(&guest, sample),
        Err(LinkError::Arena(ArenaError::Occupied { .. }))
    ));
}

#[test]
fn every_kernel_tells_what_its_boot_decided_and_leaves_the_window_free() {
    for (name, guest) in Guest::every() {
        let view = guest.view();
        let facts = view.facts().unwrap();
        eprintln!("{name}, {}: {facts:?}", guest.kernel.identity.release);
        let arena = Arena::open(&guest.kernel, &guest, guest.slot()).unwrap();
        assert!(!arena.is_mapped());
    }
}

#[test]
fn the_look_ups_of_every_kernel_can_be_hooked_once_and_for_all() {
    for (name, guest) in Guest::every() {
        let view = link::Guest::new(&guest.kernel, &guest);
        let facts = view.facts().unwrap();
        let arena = Arena::open(&guest.kernel, &guest, guest.slot()).unwrap();
        let layers = layers(&view, &arena);
        let hooks = hooks::choose(&Table::ALL, &view, &facts, &arena, &layers)
            .unwrap_or_else(|(function, why)| panic!("{name}: {function}: {why}"));
        assert_eq!(hooks.stubs.len(), 2);
        for (site, (table, code)) in hooks.sites.iter().zip(&hooks.stubs) {
            let entry = guest
                .kernel
                .symbols
                .unique(hooks::function(*table))
                .unwrap();
            // A landing mark and ftrace's nop at most lie before it; find_bug is built without the latter.
            let most = if *table == Table::Bugs { 4 } else { 9 };
            assert!(
                (entry..=entry.wrapping_add(most)).contains(&site.at),
                "{name}"
            );
            let displaced = view
                .bytes(site.covered.start, site.covered.size() as usize)
                .unwrap();
            let (_, onward) = code.split_at(code.len() - displaced.len() - 5);
            assert_eq!(onward[..displaced.len()], displaced, "{name}");
        }
    }
}

#[test]
fn a_function_that_is_hooked_for_one_patch_is_not_replaced_by_another() {
    let Some(guest) = first() else {
        return;
    };
    if samples().is_empty() {
        return;
    }
    let named = |name: &str| {
        let found = samples().iter().find(|it| it.patch().name == name);
        found.expect("the samples hold it")
    };
    let (warns, other) = (named("loadavg-warn"), named("proc-version"));
    let other = changed(other, |patch| patch.replaced[0].name = "find_bug".into());
    let before = verified(&guest, &other);
    assert!(
        matches!(before, Err(LinkError::Locate(LocateError::Differs { .. }))),
        "{before:?}"
    );
    apply(&guest, warns);
    match verified(&guest, &other) {
        Err(LinkError::Layers(LayerError::Hooked { owner, .. })) => {
            assert_eq!(owner, "loadavg-warn");
        }
        refused => panic!("{refused:?}"),
    }
}

/// The record of a site in a guest's list of them, found the slow way: wherever in memory its address stands between two
/// others near it. A pointer to the function is the same where the site is its first byte.
fn ftrace_record(guest: &Guest, site: Gva) -> Gpa {
    let mut page = vec![0; 4096];
    let mut found = Vec::new();
    for range in guest.ram() {
        for base in (range.start.0..range.end.0).step_by(page.len()) {
            guest.read(Gpa(base), &mut page).unwrap();
            let places = (0..page.len() as u64).step_by(16);
            let here = places.filter(|at| page[*at as usize..].starts_with(&site.0.to_le_bytes()));
            found.extend(here.map(|at| Gpa(base + at)));
        }
    }
    let word = |at: u64| {
        let mut word = [0; 8];
        guest.read(Gpa(at), &mut word).unwrap();
        u64::from_le_bytes(word)
    };
    found.retain(|at| {
        let (before, after) = (word(at.0 - 16), word(at.0 + 16));
        before < site.0 && site.0 < after && after - before < 0x1_0000
    });
    assert_eq!(found.len(), 1, "{site}: {found:?}");
    found[0]
}

/// A guest with something attached by ftrace to a function that every kernel has.
struct Traced<'a> {
    guest: &'a Guest,
    view: link::Guest<'a>,
    site: Gva,
    record: Gpa,
}

const ENABLED: u64 = 1 << 31 | 1;
const TRAMPOLINE: u64 = 3 << 27;
const LIVEPATCH: u64 = ENABLED | TRAMPOLINE | 1 << 26;
const DIRECT: u64 = ENABLED | 3 << 23;

impl<'a> Traced<'a> {
    fn new(guest: &'a Guest) -> Self {
        let view = guest.view();
        let entry = guest.kernel.symbols.unique("version_proc_show").unwrap();
        let nop = [0x0f, 0x1f, 0x44, 0, 0];
        let marked = view.bytes(entry, 5).unwrap() != nop;
        let site = entry.wrapping_add(if marked { 4 } else { 0 });
        assert_eq!(view.bytes(site, 5).unwrap(), nop);
        let record = ftrace_record(guest, site);
        Self {
            guest,
            view,
            site,
            record,
        }
    }

    fn attach(&self, flags: u64) {
        let call = [0xe8, 1, 2, 3, 4];
        self.guest
            .write(self.view.physical(self.site).unwrap(), &call);
        self.guest
            .write(self.record.wrapping_add(8), &flags.to_le_bytes());
    }
}

#[test]
fn the_record_of_a_function_tells_whether_the_guest_leads_its_calls_elsewhere() {
    for version in ["6.12", "6.1"] {
        for (name, guest) in Guest::all(version) {
            let traced = Traced::new(&guest);
            let with = |flags| {
                traced.attach(flags);
                tracing::check(traced.site, &traced.view)
            };
            let plain = with(ENABLED | TRAMPOLINE);
            assert!(plain.is_ok(), "{name}: {plain:?}");
            for flags in [LIVEPATCH, DIRECT] {
                let refused = with(flags);
                assert!(
                    matches!(refused, Err(TracingError::Diverted { .. })),
                    "{name}: {refused:?}"
                );
            }
        }
    }
}

#[test]
fn a_function_that_the_guest_has_livepatched_itself_is_refused_and_a_traced_one_is_not() {
    let Some(guest) = first() else {
        return;
    };
    if samples().is_empty() {
        return;
    }
    let sample = samples()
        .iter()
        .find(|it| it.patch().name == "proc-version")
        .expect("the samples hold proc-version");
    let traced = Traced::new(&guest);
    traced.attach(ENABLED | TRAMPOLINE);
    verified(&guest, sample).unwrap();
    traced.attach(LIVEPATCH);
    let livepatched = verified(&guest, sample);
    assert!(
        matches!(livepatched, Err(LinkError::Tracing { .. })),
        "{livepatched:?}"
    );
}

#[test]
fn code_of_a_module_may_use_what_stays_as_long_as_it_does_and_no_other_module() {
    for (name, guest) in Guest::all(SAMPLED) {
        let view = guest.view();
        let of = |object: &str| view.named_in(object, "failover_register").len();
        assert_eq!((of("failover"), of("net_failover")), (1, 1), "{name}");
        assert_eq!(of("dummy"), 0, "{name}");
    }
}
