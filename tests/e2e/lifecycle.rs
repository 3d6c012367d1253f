//! Machines come, are listed, pause, go on and go.

use std::time::Duration;

use vmpatch_testkit::Guest;

use crate::support::{boot, shared, tool};

const SOON: Duration = Duration::from_secs(60);

fn listed(id: &str) -> bool {
    tool()
        .call(["list"])
        .unwrap()
        .expect_code(0)
        .unwrap()
        .stdout
        .contains(id)
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
    guest.call(&["pause"]).unwrap().expect_code(0).unwrap();
    // What was on its way to the console when it paused may still come.
    std::thread::sleep(Duration::from_millis(500));
    let mark = guest.console.mark();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(guest.console.since(mark), Vec::<String>::new());
    guest.call(&["resume"]).unwrap().expect_code(0).unwrap();
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
    guest.call(&["stop"]).unwrap().expect_code(0).unwrap();
    guest.wait_end(SOON).unwrap();
    assert!(!listed("stopped"));
    guest.call(&["status"]).unwrap().expect_code(5).unwrap();
}
