//! What `status` says and what `rollback` refuses, with each witness missing in turn.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;

use common::Bench;
use vmpatch_introspect::{Gpa, GpaRange};
use vmpatch_patcher::apply::{Change, Unobserved};
use vmpatch_patcher::arena::Loaded;
use vmpatch_patcher::journal::{Ending, Folder, JournalError, LockError};
use vmpatch_patcher::link::layers::Stacking;
use vmpatch_patcher::rollback::{self, RollbackError};
use vmpatch_patcher::status::{self, AdmitError, Ledger, Source, State, Verdict};
use vmpatch_patcher::testing::machine::{SLOT, SLOT_SIZE};
use vmpatch_patcher::testing::sample::{self, BOOT, FIRST};

fn lose_journal(bench: &Bench) {
    for file in fs::read_dir(bench.folder.path()).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
}

fn lose_manifest(bench: &Bench) {
    let pages = usize::try_from(2 * 16 * 4096).unwrap();
    bench.machine.set(SLOT, &vec![0x5a; pages]);
}

#[test]
fn an_applied_patch_is_told_by_text_manifest_and_journal() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    let report = bench.report();
    let patch = &report.patches[0];
    assert_eq!((patch.state, patch.source), (State::Applied, Source::Both));
    assert_eq!(patch.functions, ["first", "second"]);
    let last = patch.last.as_ref().unwrap();
    assert!(matches!(
        last.ending,
        Some(Ending::Committed {
            window_ns: Some(40_000),
            ..
        })
    ));
    assert!(report.notes.is_empty() && !report.needs_attention());
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(
        serde_json::from_str::<status::Report>(&json).unwrap(),
        report
    );
}

#[test]
fn status_and_rollback_work_from_the_manifest_alone() {
    let bench = Bench::new();
    let text = bench.text();
    bench.apply("a").unwrap();
    lose_journal(&bench);
    let report = bench.report();
    assert_eq!(
        (report.patches[0].state, report.patches[0].source),
        (State::Applied, Source::Manifest)
    );
    assert_eq!(
        bench.ledger().admit("a", "a-digest", Stacking::Upon),
        Err(AdmitError::Applied {
            name: "a".to_owned()
        })
    );
    bench.rollback("a").unwrap();
    assert!(bench.text() == text);
}

#[test]
fn status_and_rollback_work_from_the_journal_alone() {
    let bench = Bench::new();
    let text = bench.text();
    bench.apply("a").unwrap();
    lose_manifest(&bench);
    let report = bench.report();
    assert_eq!(
        (report.patches[0].state, report.patches[0].source),
        (State::Applied, Source::Journal)
    );
    assert!(report.notes[0].contains("damaged"), "{:?}", report.notes);
    bench.rollback("a").unwrap();
    assert!(bench.text() == text);
}

#[test]
fn with_manifest_and_journal_lost_nothing_is_claimed() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    lose_journal(&bench);
    lose_manifest(&bench);
    assert!(bench.report().patches.is_empty());
    let refused = rollback::change(&bench.ledger(), "a").unwrap_err();
    assert!(matches!(refused, RollbackError::NoSuchPatch { .. }));
}

#[test]
fn a_patch_rolled_back_and_applied_anew_is_one_line_in_the_report() {
    let bench = Bench::new();
    for _ in 0..3 {
        bench.apply("a").unwrap();
        bench.rollback("a").unwrap();
    }
    assert_eq!(bench.state("a"), Some(State::NotApplied));
    bench.apply("a").unwrap();
    let report = bench.report();
    assert_eq!(report.patches.len(), 1);
    assert_eq!(report.patches[0].state, State::Applied);
}

#[test]
fn a_second_apply_and_another_patch_of_the_same_name_are_refused_each_in_its_own_words() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    let ledger = bench.ledger();
    assert_eq!(
        ledger
            .admit("a", "a-digest", Stacking::Upon)
            .unwrap_err()
            .to_string(),
        "patch a is applied already"
    );
    let taken = ledger
        .admit("a", "other", Stacking::Upon)
        .unwrap_err()
        .to_string();
    assert!(
        taken.contains("another patch named a is applied (digest a-digest)"),
        "{taken}"
    );
    ledger.admit("b", "a-digest", Stacking::Upon).unwrap();
}

#[test]
fn what_is_not_applied_cannot_be_rolled_back_twice() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    bench.rollback("a").unwrap();
    let refused = rollback::change(&bench.ledger(), "a").unwrap_err();
    assert!(
        matches!(refused, RollbackError::NotApplied { .. }),
        "{refused}"
    );
    let unknown = rollback::change(&bench.ledger(), "b").unwrap_err();
    assert!(
        matches!(unknown, RollbackError::NoSuchPatch { .. }),
        "{unknown}"
    );
}

#[test]
fn a_scribbled_site_is_damage_and_is_not_touched() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    bench.scribble();
    let report = bench.report();
    assert_eq!(report.patches[0].state, State::Damaged);
    assert!(report.needs_attention());
    let damage = &report.patches[0].damage;
    assert_eq!(damage.len(), 1);
    assert_eq!(
        (damage[0].function.as_str(), damage[0].found.as_str()),
        ("first", "aaaaaaaaaa")
    );
    let refused = rollback::change(&bench.ledger(), "a").unwrap_err();
    assert!(
        matches!(refused, RollbackError::Damaged { .. }),
        "{refused}"
    );
}

#[test]
fn a_patch_beneath_another_is_applied_and_cannot_be_rolled_back_first() {
    let bench = Bench::new();
    let text = bench.text();
    bench.apply("a").unwrap();
    bench.apply("b").unwrap();
    assert_eq!(
        (bench.state("a"), bench.state("b")),
        (Some(State::Applied), Some(State::Applied))
    );
    let refused = rollback::change(&bench.ledger(), "a").unwrap_err();
    assert_eq!(
        refused.to_string(),
        "patch a lies beneath b: roll that back first, or all of them with --cascade"
    );
    assert_eq!(bench.report().patches[0].above, ["b"]);
    assert_eq!(rollback::cascade(&bench.ledger(), "a"), ["b", "a"]);
    assert_eq!(rollback::cascade(&bench.ledger(), "b"), ["b"]);
    assert_eq!(rollback::cascade(&bench.ledger(), "c"), ["c"]);
    bench.rollback("b").unwrap();
    bench.rollback("a").unwrap();
    assert!(bench.text() == text);
}

#[test]
fn a_patch_whose_base_is_gone_is_not_applied_and_not_damaged() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    bench.apply("b").unwrap();
    bench.rollback("b").unwrap();
    bench.rollback("a").unwrap();
    assert_eq!(bench.state("b"), Some(State::NotApplied));
    bench.apply("a").unwrap();
    bench.scribble();
    assert_eq!(bench.state("a"), Some(State::Damaged));
}

#[test]
fn a_patch_of_which_half_is_in_place_is_damaged() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    bench.apply("b").unwrap();
    bench.rollback("b").unwrap();
    let record = sample::manifest(&bench.machine).patches[0].clone();
    let edit = &record.sites[1].edits[0];
    bench.machine.set(edit.at, &edit.old);
    assert_eq!(bench.state("a"), Some(State::Damaged));
}

#[test]
fn after_a_reboot_the_patches_of_the_earlier_boot_are_stale() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    let report = status::report(
        bench.folder.path(),
        &bench.machine,
        "b008",
        Loaded::default(),
    );
    assert!(report.patches.is_empty());
    assert_eq!(
        (report.stale[0].name.as_str(), report.stale[0].boot.as_str()),
        ("a", BOOT)
    );
}

#[test]
fn the_manifest_that_an_earlier_boot_left_tells_what_is_stale_without_a_journal() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    lose_journal(&bench);
    let report = status::report(
        bench.folder.path(),
        &bench.machine,
        "b008",
        Loaded::default(),
    );
    assert!(report.patches.is_empty());
    let stale = &report.stale[0];
    assert_eq!(
        (stale.name.as_str(), stale.boot.as_str(), stale.unix_ms),
        ("a", BOOT, None)
    );
}

#[test]
fn an_intent_of_an_earlier_boot_is_stale_and_settled() {
    let bench = Bench::new();
    let change = Change::apply(&sample::verified(&bench.machine, "a"), &bench.machine).unwrap();
    drop(bench.ledger().begin(change, &Unobserved).unwrap());
    let report = status::report(
        bench.folder.path(),
        &bench.machine,
        "b008",
        Loaded::default(),
    );
    assert_eq!(report.interrupted.unwrap().verdict, Verdict::Stale);
    assert_eq!(
        status::report(
            bench.folder.path(),
            &bench.machine,
            "b008",
            Loaded::default()
        )
        .interrupted,
        None
    );
}

#[test]
fn an_interrupted_change_whose_site_is_neither_stays_open_and_blocks_the_next() {
    let bench = Bench::new();
    let change = Change::apply(&sample::verified(&bench.machine, "a"), &bench.machine).unwrap();
    drop(bench.ledger().begin(change, &Unobserved).unwrap());
    bench.scribble();
    for _ in 0..2 {
        let interrupted = bench.report().interrupted.unwrap();
        assert_eq!(
            (interrupted.verdict, interrupted.recorded),
            (Verdict::Damaged, false)
        );
    }
    assert!(matches!(
        bench.ledger().admit("b", "b", Stacking::Upon),
        Err(AdmitError::Open { .. })
    ));
    let change = Change::apply(&sample::verified(&bench.machine, "b"), &bench.machine).unwrap();
    let refused = bench
        .ledger()
        .begin(change, &Unobserved)
        .map(drop)
        .unwrap_err();
    assert!(matches!(refused, JournalError::Open { .. }), "{refused}");
}

#[test]
fn a_second_tool_is_locked_out_of_changes_and_still_told_the_status() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    let first = bench.ledger();
    let second =
        Ledger::open(bench.folder.path(), &bench.machine, BOOT, Loaded::default()).unwrap_err();
    assert!(
        matches!(second, JournalError::Lock(LockError::Held { .. })),
        "{second}"
    );
    let report = bench.report();
    assert!(
        report.notes[0].contains("another vmpatch"),
        "{:?}",
        report.notes
    );
    assert_eq!(report.patches[0].state, State::Applied);
    drop(first);
    assert!(bench.report().notes.is_empty());
}

#[test]
fn a_journal_file_cut_at_any_byte_never_hides_an_applied_patch_nor_invents_one() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    let path = bench.folder.path().join("0000000001.intent");
    let whole = fs::read(&path).unwrap();
    for cut in (0..whole.len()).step_by(whole.len() / 97) {
        fs::write(&path, &whole[..cut]).unwrap();
        assert_eq!(bench.state("a"), Some(State::Applied), "cut at {cut}");
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn a_journal_with_a_flipped_bit_blocks_changes_and_leaves_status_to_the_manifest() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    let path = bench.folder.path().join("0000000001.intent");
    let mut bytes = fs::read(&path).unwrap();
    bytes[200] ^= 4;
    fs::write(&path, bytes).unwrap();
    let report = bench.report();
    assert!(
        report.notes[0].contains("0000000001.intent"),
        "{:?}",
        report.notes
    );
    assert_eq!(
        (report.patches[0].state, report.patches[0].source),
        (State::Applied, Source::Manifest)
    );
    assert!(Ledger::open(bench.folder.path(), &bench.machine, BOOT, Loaded::default()).is_err());
}

#[test]
fn strange_things_in_the_folder_are_passed_over_or_refused_but_never_waited_for() {
    let bench = Bench::new();
    bench.apply("a").unwrap();
    let folder = bench.folder.path();
    fs::write(folder.join("README"), "not a journal").unwrap();
    fs::write(folder.join("1.intent"), "not its name").unwrap();
    fs::write(folder.join("0000000002.new"), "half of an intent").unwrap();
    assert_eq!(Folder::at(folder).entries().unwrap().len(), 1);
    let pipe = std::ffi::CString::new(folder.join("0000000003.intent").to_str().unwrap()).unwrap();
    make_pipe(&pipe);
    assert!(
        Folder::at(folder)
            .entries()
            .unwrap_err()
            .to_string()
            .contains("not a regular file")
    );
    fs::remove_file(folder.join("0000000003.intent")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", folder.join("0000000003.intent")).unwrap();
    assert!(Folder::at(folder).entries().is_err());
}

fn make_pipe(path: &std::ffi::CStr) {
    let status = std::process::Command::new("mkfifo")
        .arg(path.to_str().unwrap())
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_manifest_that_points_outside_the_ram_is_damage_and_not_an_error() {
    let bench = Bench::new();
    let mut verified = sample::verified(&bench.machine, "a");
    verified.record.sites[0].edits[0].at = Gpa(1 << 60);
    let mut manifest = sample::manifest(&bench.machine);
    manifest.generation += 1;
    manifest.next_page += 1;
    manifest.patches.push(verified.record);
    let bytes = vmpatch_patcher::arena::codec::encode(&manifest).unwrap();
    let slot = GpaRange {
        start: SLOT,
        end: Gpa(SLOT.0 + SLOT_SIZE),
    };
    let place = vmpatch_patcher::arena::codec::place(slot, manifest.generation);
    bench.machine.set(place, &bytes);
    let report = bench.report();
    assert_eq!(report.patches[0].state, State::Damaged);
    assert!(report.patches[0].damage[0].found.contains("not guest RAM"));
}

#[test]
fn the_sample_lies_where_the_tests_think() {
    assert_eq!(FIRST.0 - sample::TEXT.0, 0x1000);
}
