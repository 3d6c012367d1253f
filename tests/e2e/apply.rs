//! A patch goes in and comes out while the guest works.

use std::time::Duration;

use vmpatch_testkit::Side;

use crate::support::{CHANGED, VERSION, assert_changed, assert_no_trouble, patch, shared};

const SOON: Duration = Duration::from_secs(30);

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_running_loop_sees_the_change_and_the_way_back() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let patch = patch(VERSION, Side::Forward);
    let before = guest.snapshot().unwrap();

    guest
        .call(&["check", patch.path()])
        .unwrap()
        .expect_code(0)
        .unwrap();
    assert_eq!(
        guest.snapshot().unwrap(),
        before,
        "check wrote to the guest"
    );

    let applied = guest
        .call(&["apply", patch.path()])
        .unwrap()
        .expect_code(0)
        .unwrap();
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

    let status = guest.call(&["status"]).unwrap().expect_code(0).unwrap();
    assert!(status.stdout.contains(VERSION), "{}", status.stdout);

    let back = guest
        .call(&["rollback", VERSION])
        .unwrap()
        .expect_code(0)
        .unwrap();
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
    guest
        .call(&["apply", patch.path()])
        .unwrap()
        .expect_code(0)
        .unwrap();
    let before = guest.snapshot().unwrap();
    let again = guest
        .call(&["apply", patch.path()])
        .unwrap()
        .expect_code(3)
        .unwrap();
    assert!(again.stdout.contains("already"), "{}", again.stdout);
    assert_eq!(guest.snapshot().unwrap(), before);
    assert_changed(guest, true);
    guest
        .call(&["rollback", VERSION])
        .unwrap()
        .expect_code(0)
        .unwrap();
    // What was taken out can go in again.
    guest
        .call(&["apply", patch.path()])
        .unwrap()
        .expect_code(0)
        .unwrap();
    assert_changed(guest, true);
    guest
        .call(&["rollback", VERSION])
        .unwrap()
        .expect_code(0)
        .unwrap();
    assert_no_trouble(guest);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_patch_that_is_not_there_is_not_rolled_back() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let answer = guest
        .call(&["rollback", "no-such-patch"])
        .unwrap()
        .expect_code(3)
        .unwrap();
    assert!(answer.stdout.contains("no-such-patch"), "{}", answer.stdout);
    assert_changed(guest, false);
}
