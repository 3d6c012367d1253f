//! A patch built with a look at the VM that it is for.

use vmpatch_testkit::objects;

use crate::support::{VERSION, expect, guest_name, shared};

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_patch_built_for_a_vm_asks_for_its_kernel() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let pair = objects(&guest_name(), VERSION).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (pair.join("old.o"), pair.join("new.o"));
    let made = dir.path().join("fix.vmpatch");
    let words = |more: &[&str]| {
        let all = [
            "build",
            "--old",
            old.to_str().unwrap(),
            "--new",
            new.to_str().unwrap(),
            "--output",
            made.to_str().unwrap(),
        ];
        [&all, more]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let build = |guest: &vmpatch_testkit::Guest, code, more: &[&str]| {
        let words = words(more);
        expect(
            guest,
            code,
            &words.iter().map(String::as_str).collect::<Vec<_>>(),
        )
    };
    let refused = build(guest, 3, &["--release", "9.9.9-other"]);
    let release = guest.ask("uname -r").unwrap().concat();
    let reason = refused.json["reason"].as_str().unwrap();
    assert!(
        reason.contains("9.9.9-other") && reason.contains(release.trim()),
        "{reason}"
    );
    assert!(!made.exists());
    build(guest, 0, &["--name", "looked-at"]);
    let bytes = std::fs::read(&made).unwrap();
    let names_release = bytes
        .windows(release.trim().len())
        .any(|it| it == release.trim().as_bytes());
    assert!(names_release, "the patch does not name {release}");
    expect(guest, 0, &["check", made.to_str().unwrap()]);
}
