//! Callbacks of a patch in a real kernel: called in the stop, and harmless where they fail.

use std::process::Stdio;
use std::time::{Duration, Instant};

use vmpatch_testkit::{Guest, Side};

use crate::support::{Patch, assert_no_trouble, boot, expect, patch, shared, tool};

/// All four callbacks; the first letter of the guest's domain name tells them what to do.
const CALLBACKS: &str = "callbacks";
/// Time enough where all is emulated.
const LIMIT: [&str; 2] = ["--callback-limit", "500ms"];

/// Tells the callbacks what to do.
fn ask_for(guest: &mut Guest, what: &str) {
    let command = format!("echo {what} > /proc/sys/kernel/domainname");
    guest.ask(&command).unwrap();
}

fn domain(guest: &mut Guest) -> String {
    guest
        .ask("cat /proc/sys/kernel/domainname")
        .unwrap()
        .concat()
}

fn version(guest: &mut Guest) -> String {
    guest.ask("cat /proc/version").unwrap().concat()
}

fn apply(guest: &Guest, code: i32, patch: &Patch) -> serde_json::Value {
    let words = [&["apply", patch.path()][..], &LIMIT].concat();
    expect(guest, code, &words).json
}

/// Kind and function of the callbacks in an answer.
fn callbacks(answer: &serde_json::Value) -> Vec<String> {
    let all = answer["callbacks"].as_array().into_iter().flatten();
    let text = |it: &serde_json::Value, key: &str| it[key].as_str().unwrap().to_owned();
    all.map(|it| format!("{} {}", text(it, "kind"), text(it, "function")))
        .collect()
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn callbacks_see_the_kernel_and_what_they_write_is_seen_by_the_new_code() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let before = guest.snapshot().unwrap();
    let patch = patch(CALLBACKS, Side::Forward);
    ask_for(guest, "nothing");
    let checked = expect(guest, 0, &["check", patch.path()]).json;
    assert_eq!(callbacks(&checked).len(), 4);
    assert!(!version(guest).contains("callbacks saw"));

    let applied = apply(guest, 0, &patch);
    assert_eq!(
        callbacks(&applied),
        ["pre_apply before_apply", "post_apply after_apply"]
    );
    let cpus = guest
        .ask("grep -c ^processor /proc/cpuinfo")
        .unwrap()
        .concat();
    let shown = version(guest);
    let wanted = format!("callbacks saw {} CPUs, applied 1", cpus.trim());
    assert!(shown.contains(&wanted), "{shown}");

    ask_for(guest, "refuse");
    let refused = expect(guest, 3, &[&["rollback", CALLBACKS][..], &LIMIT].concat()).json;
    let reason = refused["reason"].as_str().unwrap();
    assert!(reason.contains("-EAGAIN"), "{reason}");
    assert!(reason.contains("--skip-callbacks"), "{reason}");
    assert!(version(guest).contains("callbacks saw"));
    expect(guest, 0, &["rollback", CALLBACKS, "--skip-callbacks"]);
    assert!(!version(guest).contains("callbacks saw"));
    assert_eq!(domain(guest).trim(), "refuse");

    ask_for(guest, "nothing");
    apply(guest, 0, &patch);
    let rolled_back = expect(guest, 0, &[&["rollback", CALLBACKS][..], &LIMIT].concat()).json;
    assert_eq!(callbacks(&rolled_back).len(), 2);
    assert_eq!(domain(guest).trim(), "rolled-back");
    let after = guest.snapshot().unwrap();
    assert_eq!((after.code, after.rodata), (before.code, before.rodata));
    ask_for(guest, "none");
    assert_no_trouble(guest);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_callback_that_fails_is_told_and_the_guest_goes_on_as_before() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let before = guest.snapshot().unwrap();
    let patch = patch(CALLBACKS, Side::Forward);
    for (what, told) in [
        ("busy", &["pre_apply (`before_apply`)", "-EBUSY (-16)"][..]),
        ("trap", &["page fault (on 0x8)", "before_apply+0x"]),
        ("loop", &["did not return within 500ms", "before_apply+0x"]),
        ("sleep", &["an attempt to sleep", "__schedule+0x0"]),
        ("interrupt", &["which it had let in"]),
        ("post", &["post_apply (`after_apply`)", "page fault"]),
    ] {
        ask_for(guest, what);
        let refused = apply(guest, 3, &patch);
        let reason = refused["reason"].as_str().unwrap();
        for told in told {
            assert!(reason.contains(told), "{what}: {reason}");
        }
        assert!(!version(guest).contains("callbacks saw"), "{what}");
        let after = guest.snapshot().unwrap();
        assert_eq!(
            (&after.code, &after.rodata),
            (&before.code, &before.rodata),
            "{what}"
        );
        // Time goes on, and whoever was interrupted sleeps and wakes.
        guest.ask("sleep 1").unwrap();
        assert_no_trouble(guest);
    }
    // After all that it can still be applied.
    ask_for(guest, "nothing");
    apply(guest, 0, &patch);
    assert!(version(guest).contains("applied 1"));
    expect(guest, 0, &[&["rollback", CALLBACKS][..], &LIMIT].concat());
    ask_for(guest, "none");
    assert_no_trouble(guest);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_tool_that_dies_while_a_callback_runs_leaves_the_guest_on_its_old_text() {
    let mut guest = boot("dies");
    let before = guest.snapshot().unwrap();
    let patch = patch(CALLBACKS, Side::Forward);
    ask_for(&mut guest, "loop");
    let limit = ["--callback-limit", "8s"];
    let words = [&["apply", "--vm", "dies", patch.path()][..], &limit].concat();
    let mut apply = tool()
        .command()
        .args(words)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // It reaches the callback long before, and would be in it for long after.
    std::thread::sleep(Duration::from_secs(5));
    assert!(
        apply.try_wait().unwrap().is_none(),
        "the callback does not loop"
    );
    apply.kill().unwrap();
    apply.wait().unwrap();
    // The VMM ends the call, and the stop with it, when its time is over.
    let until = Instant::now() + Duration::from_secs(30);
    let status = loop {
        let status = guest.call(&["status"]).unwrap();
        if status.code == Some(0) {
            break status.json;
        }
        assert!(Instant::now() < until, "{status:?}");
        std::thread::sleep(Duration::from_millis(200));
    };
    assert_eq!(status["interrupted"]["verdict"], "not-written", "{status}");
    assert!(!version(&mut guest).contains("callbacks saw"));
    let after = guest.snapshot().unwrap();
    assert_eq!((after.code, after.rodata), (before.code, before.rodata));
}
