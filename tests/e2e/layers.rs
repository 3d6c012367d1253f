//! Several patches at once: one upon another, and one in the place of all others.

use vmpatch_testkit::{Guest, Side, objects, patch_file};

use crate::support::{
    Patch, VERSION, assert_changed, assert_no_trouble, expect, guest_name, patch, shared, tool,
};

/// Another function than that of [`VERSION`], with a WARN, so with a hook.
const WARNS: &str = "loadavg-warn";

/// The content of a sample under another name.
fn named(sample: &str, name: &str) -> Patch {
    let dir = tempfile::tempdir().unwrap();
    let objects = objects(&guest_name(), sample).unwrap();
    let file = patch_file(&tool(), &objects, name, Side::Forward, dir.path()).unwrap();
    Patch { dir, file }
}

/// Name and state of each patch, as `status` has it for people.
fn states(guest: &Guest) -> Vec<(String, String)> {
    let status = expect(guest, 0, &["status"]);
    let rows = status.json["patches"].as_array().unwrap().iter();
    let text = |row: &serde_json::Value, key| row[key].as_str().unwrap().to_owned();
    rows.map(|row| (text(row, "name"), text(row, "state")))
        .collect()
}

fn state(guest: &Guest, name: &str) -> String {
    let states = states(guest);
    let mut states = states.into_iter();
    states.find(|(found, _)| found == name).unwrap().1
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn patches_of_one_function_lie_upon_each_other_and_go_in_order() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let before = guest.snapshot().unwrap();
    let (first, second) = (
        patch(VERSION, Side::Forward),
        named(VERSION, "layers-upper"),
    );
    expect(guest, 0, &["apply", first.path()]);
    let applied = expect(guest, 0, &["apply", second.path()]);
    assert_eq!(applied.json["functions"][0]["over"], VERSION);
    let refused = expect(guest, 3, &["rollback", VERSION]);
    let reason = refused.json["reason"].as_str().unwrap();
    assert!(reason.contains("layers-upper"), "{reason}");
    assert_changed(guest, true);
    let gone = expect(guest, 0, &["rollback", VERSION, "--cascade"]);
    assert_eq!(gone.json["cascaded"][0], "layers-upper");
    assert_changed(guest, false);
    let after = guest.snapshot().unwrap();
    assert_eq!((after.code, after.rodata), (before.code, before.rodata));
    assert_no_trouble(guest);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_patch_takes_the_place_of_all_others_in_one_stop() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    // What the kernel says would stand among the answers.
    guest.ask("dmesg -n 1").unwrap();
    let before = guest.snapshot().unwrap();
    let (version, warns) = (patch(VERSION, Side::Forward), patch(WARNS, Side::Forward));
    let (upper, all) = (named(VERSION, "layers-upper"), named(VERSION, "layers-all"));
    for file in [&version, &warns, &upper] {
        expect(guest, 0, &["apply", file.path()]);
    }
    assert!(
        guest
            .ask("cat /proc/loadavg")
            .unwrap()
            .concat()
            .contains("warned")
    );

    let tried = expect(guest, 0, &["check", "--replace", all.path()]);
    assert_eq!(tried.json["replaced"].as_array().map(Vec::len), Some(3));
    assert_eq!(state(guest, WARNS), "applied");

    let applied = expect(guest, 0, &["apply", "--replace", all.path()]);
    assert_eq!(applied.json["replaced"].as_array().map(Vec::len), Some(3));
    assert_eq!(state(guest, "layers-all"), "applied");
    for name in [VERSION, WARNS, "layers-upper"] {
        assert_eq!(state(guest, name), "not-applied", "{name}");
    }
    assert_changed(guest, true);
    assert!(
        !guest
            .ask("cat /proc/loadavg")
            .unwrap()
            .concat()
            .contains("warned")
    );
    expect(guest, 3, &["rollback", WARNS]);

    // One of the same name with other content, as the next release of a cumulative patch is.
    let again = named(WARNS, "layers-all");
    let refused = expect(guest, 3, &["apply", again.path()]);
    let reason = refused.json["reason"].as_str().unwrap();
    assert!(reason.contains("--replace"), "{reason}");
    expect(guest, 0, &["apply", "--replace", again.path()]);
    assert_changed(guest, false);
    assert!(
        guest
            .ask("cat /proc/loadavg")
            .unwrap()
            .concat()
            .contains("warned")
    );

    expect(guest, 0, &["rollback", "layers-all"]);
    let after = guest.snapshot().unwrap();
    assert_eq!((after.code, after.rodata), (before.code, before.rodata));
}
