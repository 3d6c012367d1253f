//! A task that sleeps in new code: its stack is followed through it, by what the patch brought along.

use vmpatch_testkit::Side;

use crate::support::{PARKED, VERSION, assert_changed, assert_no_trouble, expect, patch, shared};

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_task_asleep_in_new_code_is_followed_to_its_end_and_hinders_its_rollback_alone() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    guest
        .ask("rmmod planted && insmod /planted.ko park=0")
        .unwrap();
    let slept_in = patch(PARKED, Side::Forward);
    let other = patch(VERSION, Side::Forward);
    expect(guest, 0, &["apply", slept_in.path()]);
    guest.ask("rmmod planted && insmod /planted.ko").unwrap();
    let pid = guest.planted("vmp_park").unwrap().to_string();

    let answer = expect(guest, 0, &["inspect", "stacks", "--pid", &pid]);
    let row = &answer.json[0];
    assert_eq!(row["reliable"], true, "{row}");
    let frames = row["frames"].as_array().unwrap();
    let functions: Vec<_> = frames
        .iter()
        .map(|frame| frame["function"].as_str().unwrap())
        .collect();
    let new = |function: &&&str| {
        function.starts_with("msleep_interruptible+")
            && function.ends_with(&format!("[patch {PARKED}]"))
    };
    assert_eq!(functions.iter().filter(new).count(), 1, "{row}");
    let beyond = functions.iter().rev().take(3);
    let named = |name: &str| beyond.clone().any(|function| function.starts_with(name));
    assert!(named("kthread+") && named("ret_from_fork"), "{row}");

    let busy = expect(guest, 4, &["rollback", PARKED, "--timeout", "1s"]);
    let busy = busy.json["busy"].to_string();
    assert!(busy.contains("vmp_park") && busy.contains(&pid), "{busy}");
    expect(guest, 0, &["apply", other.path()]);
    assert_changed(guest, true);
    expect(guest, 0, &["rollback", VERSION]);

    guest
        .ask("rmmod planted && insmod /planted.ko park=0")
        .unwrap();
    expect(guest, 0, &["rollback", PARKED]);
    guest.ask("rmmod planted && insmod /planted.ko").unwrap();
    assert_no_trouble(guest);
}
