//! Machines come, are listed, pause, go on and go.

use std::time::Duration;

use vmpatch_testkit::{Guest, Image};

use crate::support::{boot, expect, expect_alone, guest_name, shared};

const SOON: Duration = Duration::from_secs(60);

fn listed(id: &str) -> bool {
    expect_alone(0, &["list"]).stdout.contains(id)
}

fn ticks(guest: &mut Guest) -> u64 {
    let lines = guest.ask("cat /proc/vmpatch_planted").unwrap();
    lines
        .iter()
        .find_map(|l| l.strip_prefix("counter "))
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_paused_guest_stands_still_and_goes_on() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    assert!(listed("shared"));
    expect(guest, 0, &["pause"]);
    // What was on its way to the console when it paused may still come.
    std::thread::sleep(Duration::from_millis(500));
    let mark = guest.console.mark();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(guest.console.since(mark), Vec::<String>::new());
    expect(guest, 0, &["resume"]);
    guest
        .console
        .wait(mark, SOON, |l| l.starts_with("@loop "))
        .unwrap();
    let before = ticks(guest);
    std::thread::sleep(Duration::from_secs(1));
    assert!(ticks(guest) > before);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_guest_that_powers_off_ends_its_process_well() {
    let mut guest = boot("off");
    guest.console.type_line("poweroff -f").unwrap();
    assert_eq!(guest.wait_end(SOON).unwrap(), Some(0));
    assert!(!listed("off"));
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_stopped_machine_is_gone() {
    let mut guest = boot("stopped");
    assert_eq!(
        guest.ask("grep -c ^processor /proc/cpuinfo").unwrap(),
        ["2"]
    );
    expect(&guest, 0, &["stop"]);
    guest.wait_end(SOON).unwrap();
    assert!(!listed("stopped"));
    expect(&guest, 5, &["status"]);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_detached_start_under_an_id_that_is_taken_is_refused_and_names_it() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let image = Image::named(&guest_name()).unwrap();
    let kernel = image.file("vmlinuz");
    let kernel = kernel.to_str().unwrap();
    let start = ["run", "--id", "shared", "--kernel", kernel, "--detach"];
    let answer = expect_alone(3, &start);
    assert_eq!(answer.json["result"], "refused", "{}", answer.stdout);
    let reason = answer.json["reason"].as_str().unwrap();
    assert!(reason.contains("shared"), "{reason}");
    // The one that has the id is not harmed.
    assert!(listed("shared"));
    guest.ask("true").unwrap();
}
