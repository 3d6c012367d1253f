//! The tool is killed at every boundary of its phases. The guest lives on, `status` tells what happened, and what was begun can be
//! ended one way or the other.

use vmpatch_testkit::{Answer, Guest, Side};

use crate::support::{
    CHANGED, VERSION, assert_changed, assert_no_trouble, expect, patch, shared, tool, version,
};

/// The boundaries as the tool itself names them.
fn boundaries(guest: &Guest, patch: &str) -> Vec<String> {
    let answer = at(guest, "no-such-boundary", &["apply", patch])
        .expect_code(2)
        .unwrap();
    let said = format!("{}{}", answer.stdout, answer.stderr);
    let (_, list) = said
        .split_once("expected one of ")
        .expect("the tool lists its boundaries");
    let end = list.find(['"', '\n']).unwrap_or(list.len());
    list[..end].split(", ").map(str::to_owned).collect()
}

fn at(guest: &Guest, boundary: &str, words: &[&str]) -> Answer {
    guest
        .call_with(&tool().with_env("VMPATCH_KILL_AT", boundary), words)
        .unwrap()
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn an_apply_killed_at_any_boundary_leaves_a_consistent_guest() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let patch = patch(VERSION, Side::Forward);
    let boundaries = boundaries(guest, patch.path());
    assert!(boundaries.len() >= 8, "{boundaries:?}");
    for boundary in &boundaries {
        let answer = at(guest, boundary, &["apply", patch.path()]);
        assert_eq!(answer.code, None, "{boundary} was not reached: {answer:?}");
        let status = expect(guest, 0, &["status"]);
        // The guest answers, and it does either the old or the new.
        let changed = version(guest).contains(CHANGED);
        if changed {
            assert!(
                status.stdout.contains(VERSION),
                "{boundary}: {}",
                status.stdout
            );
            expect(guest, 0, &["rollback", VERSION]);
        } else {
            expect(guest, 0, &["apply", patch.path()]);
            assert_changed(guest, true);
            expect(guest, 0, &["rollback", VERSION]);
        }
        assert_changed(guest, false);
        eprintln!(
            "killed at {boundary}: {}",
            if changed { "patched" } else { "not patched" }
        );
    }
    assert_no_trouble(guest);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_rollback_killed_at_any_boundary_leaves_a_consistent_guest() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let patch = patch(VERSION, Side::Forward);
    let boundaries = boundaries(guest, patch.path());
    let mut reached = 0;
    for boundary in &boundaries {
        expect(guest, 0, &["apply", patch.path()]);
        let answer = at(guest, boundary, &["rollback", VERSION]);
        // A rollback has no patch file to open and no code to link.
        if answer.code.is_some() {
            answer.expect_code(0).unwrap();
            assert_changed(guest, false);
            continue;
        }
        reached += 1;
        expect(guest, 0, &["status"]);
        if version(guest).contains(CHANGED) {
            expect(guest, 0, &["rollback", VERSION]);
        }
        assert_changed(guest, false);
    }
    assert!(reached >= 5, "only {reached} of {boundaries:?} reached");
    assert_no_trouble(guest);
}
