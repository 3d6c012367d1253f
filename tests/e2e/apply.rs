//! A patch goes in and comes out while the guest works.

use std::time::Duration;

use vmpatch_testkit::Side;

use crate::support::{CHANGED, VERSION, assert_changed, assert_no_trouble, expect, patch, shared};

const SOON: Duration = Duration::from_secs(30);

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_running_loop_sees_the_change_and_the_way_back() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let patch = patch(VERSION, Side::Forward);
    let before = guest.snapshot().unwrap();

    expect(guest, 0, &["check", patch.path()]);
    assert_eq!(
        guest.snapshot().unwrap(),
        before,
        "check wrote to the guest"
    );

    let applied = expect(guest, 0, &["apply", patch.path()]);
    assert_eq!(applied.json["result"], "applied", "{}", applied.stdout);
    assert_eq!(applied.json["patch"], VERSION, "{}", applied.stdout);
    assert!(applied.json["attempts"].as_u64().unwrap() >= 1);
    assert!(applied.number("stop_window_us").unwrap() > 0.0);
    assert!(applied.json["phases_us"].is_object(), "{}", applied.stdout);
    assert!(
        applied.stdout.contains("version_proc_show"),
        "{}",
        applied.stdout
    );
    let mark = guest.console.mark();
    guest
        .console
        .wait(mark, SOON, |l| {
            l.starts_with("@loop ") && l.contains(CHANGED)
        })
        .unwrap();

    let status = expect(guest, 0, &["status"]);
    assert!(status.stdout.contains(VERSION), "{}", status.stdout);

    let back = expect(guest, 0, &["rollback", VERSION]);
    assert!(back.number("stop_window_us").unwrap() > 0.0);
    let mark = guest.console.mark();
    guest
        .console
        .wait(mark, SOON, |l| l.starts_with("@loop Linux version"))
        .unwrap();
    let after = guest.snapshot().unwrap();
    assert_eq!((after.code, after.rodata), (before.code, before.rodata));
    assert_no_trouble(guest);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_patch_is_applied_once() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let patch = patch(VERSION, Side::Forward);
    expect(guest, 0, &["apply", patch.path()]);
    let before = guest.snapshot().unwrap();
    let again = expect(guest, 3, &["apply", patch.path()]);
    assert!(again.stdout.contains("already"), "{}", again.stdout);
    assert_eq!(guest.snapshot().unwrap(), before);
    assert_changed(guest, true);
    expect(guest, 0, &["rollback", VERSION]);
    // What was taken out can go in again.
    expect(guest, 0, &["apply", patch.path()]);
    assert_changed(guest, true);
    expect(guest, 0, &["rollback", VERSION]);
    assert_no_trouble(guest);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_patch_that_is_not_there_is_not_rolled_back() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let answer = expect(guest, 3, &["rollback", "no-such-patch"]);
    assert!(answer.stdout.contains("no-such-patch"), "{}", answer.stdout);
    assert_changed(guest, false);
}
