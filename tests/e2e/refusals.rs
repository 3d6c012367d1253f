//! What must not go in does not: each has its own words and exit code, and nothing is written.

use std::fs;
use std::process::Command;

use vmpatch_testkit::{Guest, Side, Snapshot, objects, patch_file};

use crate::support::{
    Patch, VERSION, assert_changed, assert_no_trouble, expect, expect_alone, guest_name, patch,
    patch_for, shared, tool,
};

/// What the guest's memory must stay.
struct Untouched(Snapshot);

impl Untouched {
    fn assert(&self, guest: &mut Guest, after: &str) {
        assert_eq!(guest.snapshot().unwrap(), self.0, "written after {after}");
    }
}

/// Applies, expects a refusal and returns its reason.
fn refused(guest: &Guest, patch: &str) -> String {
    let answer = expect(guest, 3, &["apply", patch]);
    assert_eq!(answer.json["result"], "refused", "{}", answer.stdout);
    answer.json["reason"].as_str().unwrap().to_owned()
}

/// No kernel has a function of this name.
const LACKED: &str = "printed_by_nobody";

/// A patch whose new code calls a function that is not there.
fn calls_what_the_guest_lacks() -> Patch {
    let pair = objects(&guest_name(), VERSION).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for file in ["old.o", "object"] {
        fs::copy(pair.join(file), dir.path().join(file)).unwrap();
    }
    let made = Command::new("objcopy")
        .arg(format!("--redefine-sym=seq_printf={LACKED}"))
        .args([pair.join("new.o"), dir.path().join("new.o")])
        .status();
    assert!(made.unwrap().success());
    let file = patch_file(&tool(), dir.path(), "lacking", Side::Forward, dir.path()).unwrap();
    Patch { dir, file }
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn each_unfit_patch_is_refused_for_its_own_reason() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let good = patch(VERSION, Side::Forward);
    let untouched = Untouched(guest.snapshot().unwrap());
    let mut reasons = Vec::new();

    let backward = patch(VERSION, Side::Backward);
    reasons.push(refused(guest, backward.path()));
    untouched.assert(guest, "a wrong old function");

    let other = if guest_name() == "debian-6.12" {
        "debian-6.1"
    } else {
        "debian-6.12"
    };
    let foreign = patch_for(other, VERSION, Side::Forward);
    reasons.push(refused(guest, foreign.path()));
    untouched.assert(guest, "a patch for another kernel");

    let bytes = fs::read(good.path()).unwrap();
    let damaged = good.dir.path().join("damaged.vmpatch");
    fs::write(&damaged, &bytes[..bytes.len() / 2]).unwrap();
    reasons.push(refused(guest, damaged.to_str().unwrap()));
    untouched.assert(guest, "a truncated file");

    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 0x10;
    fs::write(&damaged, &flipped).unwrap();
    reasons.push(refused(guest, damaged.to_str().unwrap()));
    untouched.assert(guest, "a flipped bit");

    let lacking = calls_what_the_guest_lacks();
    reasons.push(refused(guest, lacking.path()));
    assert!(reasons.last().unwrap().contains(LACKED), "{reasons:#?}");
    untouched.assert(guest, "a symbol that the guest lacks");

    for reason in &reasons {
        eprintln!("refused: {reason}");
    }
    let mut distinct = reasons.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), reasons.len(), "{reasons:#?}");
    // And the good one still goes in.
    expect(guest, 0, &["apply", good.path()]);
    assert_changed(guest, true);
    expect(guest, 0, &["rollback", VERSION]);
    assert_no_trouble(guest);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_machine_that_is_not_there_is_not_reached() {
    let good = patch(VERSION, Side::Forward);
    let answer = expect_alone(5, &["apply", good.path(), "--vm", "nobody"]);
    assert!(answer.stdout.contains("nobody"), "{}", answer.stdout);
}
