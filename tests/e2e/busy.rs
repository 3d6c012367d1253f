//! A function that some kthread never leaves is not replaced.

use vmpatch_testkit::Side;

use crate::support::{PARKED, assert_no_trouble, expect, patch, shared};

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_parked_kthread_is_named_and_nothing_is_written() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let patch = patch(PARKED, Side::Forward);
    let pid = guest.planted("vmp_park").unwrap();
    let before = guest.snapshot().unwrap();

    let answer = expect(guest, 4, &["apply", patch.path(), "--timeout", "2s"]);

    assert_eq!(answer.json["result"], "busy", "{}", answer.stdout);
    let busy = answer.json["busy"].to_string();
    assert!(busy.contains("vmp_park"), "{busy}");
    assert!(busy.contains("msleep_interruptible"), "{busy}");
    assert!(
        busy.contains(&pid.to_string()),
        "{busy} names no task {pid}"
    );
    assert!(
        answer.json["attempts"].as_u64().unwrap() >= 2,
        "not retried: {}",
        answer.stdout
    );
    assert_eq!(guest.snapshot().unwrap(), before);
    assert_no_trouble(guest);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn once_nobody_is_parked_there_it_is_replaced() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    guest
        .ask("rmmod planted && insmod /planted.ko park=0")
        .unwrap();
    let patch = patch(PARKED, Side::Forward);
    expect(guest, 0, &["apply", patch.path()]);
    expect(guest, 0, &["rollback", PARKED]);
    guest.ask("rmmod planted && insmod /planted.ko").unwrap();
    assert_no_trouble(guest);
}
