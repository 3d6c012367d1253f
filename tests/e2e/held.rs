//! A patch for a module that is not loaded waits, leaves the guest alone until then, and goes in when it is asked for.

use vmpatch_testkit::{Guest, Side, objects};

use crate::support::{VERSION, assert_no_trouble, expect, expect_alone, guest_name, patch, shared};

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_patch_for_an_absent_module_is_held_listed_and_let_go_of() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let text = |path: std::path::PathBuf| path.to_str().unwrap().to_owned();
    let pair = objects(&guest_name(), VERSION).unwrap();
    let (old, new) = (text(pair.join("old.o")), text(pair.join("new.o")));
    let file = text(dir.path().join("later.vmpatch"));
    let words = ["build", "--old", &old, "--new", &new, "--object", "later"];
    expect_alone(0, &[&words[..], &["-o", &file]].concat());
    let before = guest.snapshot().unwrap();

    let refused = expect(guest, 3, &["apply", "--strict", &file]);
    let reason = refused.json["reason"].as_str().unwrap();
    assert!(reason.contains("`later`, which is not loaded"), "{reason}");
    let held = expect(guest, 0, &["apply", &file]);
    assert_eq!(held.json["result"], "pending", "{}", held.stdout);
    assert_eq!(held.json["absent"][0], "later", "{}", held.stdout);
    let status = expect(guest, 0, &["status"]);
    assert_eq!(
        status.json["pending"][0]["patch"], "later",
        "{}",
        status.stdout
    );
    let reconciled = expect(guest, 0, &["reconcile"]);
    assert_eq!(reconciled.json["pending"][0]["patch"], "later");
    assert_eq!(
        guest.snapshot().unwrap(),
        before,
        "a held patch was written"
    );

    let withdrawn = expect(guest, 0, &["rollback", "later"]);
    assert_eq!(
        withdrawn.json["result"], "withdrawn",
        "{}",
        withdrawn.stdout
    );
    let status = expect(guest, 0, &["status"]);
    assert_eq!(status.json["pending"].as_array().map(Vec::len), Some(0));
    expect(guest, 3, &["rollback", "later"]);
}

/// Counts each frame that goes out by one byte more.
const LENGTH: &str = "dummy-length";
/// A frame of Ethernet, with an IPv4 header, an ICMP header and as much as `ping` is asked to send.
const FRAME: u64 = 14 + 20 + 8 + 56;

/// By how many bytes the device's count rises with one frame.
fn counted(guest: &mut Guest) -> u64 {
    let ping = "n=/sys/class/net/dummy0/statistics/tx_bytes; a=$(cat $n); \
                ping -c 1 -W 1 -s 56 192.0.2.2 > /dev/null; echo $(($(cat $n) - a))";
    guest.ask(ping).unwrap().concat().trim().parse().unwrap()
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_held_patch_goes_in_when_its_module_is_loaded_and_reconcile_is_called() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let fix = patch(LENGTH, Side::Forward);
    let held = expect(guest, 0, &["apply", fix.path()]);
    assert_eq!(held.json["result"], "pending", "{}", held.stdout);
    assert_eq!(held.json["absent"][0], "dummy", "{}", held.stdout);
    guest
        .ask(
            "insmod /extras/dummy.ko && echo 1 > /proc/sys/net/ipv6/conf/dummy0/disable_ipv6 && \
             ip addr add 192.0.2.1/24 dev dummy0 && ip link set dummy0 up",
        )
        .unwrap();
    assert_eq!(counted(guest), FRAME, "nobody asked for it yet");

    let reconciled = expect(guest, 0, &["reconcile"]);
    assert_eq!(
        reconciled.json["applied"][0], LENGTH,
        "{}",
        reconciled.stdout
    );
    assert_eq!(counted(guest), FRAME + 1);
    let status = expect(guest, 0, &["status"]);
    assert_eq!(status.json["pending"].as_array().map(Vec::len), Some(0));
    assert!(status.stdout.contains(LENGTH), "{}", status.stdout);

    expect(guest, 0, &["rollback", LENGTH]);
    assert_eq!(counted(guest), FRAME);
    guest.ask("rmmod dummy").unwrap();
    assert_no_trouble(guest);
}
