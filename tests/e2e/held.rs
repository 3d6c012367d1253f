//! A patch for a module that is not loaded waits, and leaves the guest alone until then.

use vmpatch_testkit::objects;

use crate::support::{VERSION, expect, expect_alone, guest_name, shared};

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
