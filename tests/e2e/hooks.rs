//! New code that traps: what it is to find is looked up through hooks that patches share.

use vmpatch_testkit::{Guest, Side};

use crate::support::{assert_no_trouble, boot, expect, patch, shared};

/// Warns each time that /proc/loadavg is read, once in the log.
const WARNS: &str = "loadavg-warn";
/// Reads nothing's address when /proc/uptime is read, then warns.
const FAULTS: &str = "uptime-fault";

/// Warnings in the guest's log about a source file.
fn warnings(guest: &mut Guest, file: &str) -> usize {
    let count = format!("dmesg | grep -c 'WARNING: .* at {file}:' || true");
    let said = guest.ask(&count).unwrap();
    let mut numbers = said.iter().filter_map(|line| line.trim().parse().ok());
    numbers.next_back().unwrap_or_else(|| panic!("{said:?}"))
}

fn read(guest: &mut Guest, file: &str) -> String {
    let read = format!("cat {file} 2>&1 || true");
    guest.ask(&read).unwrap().join("\n")
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn new_code_warns_and_faults_as_if_it_had_been_there_at_boot() {
    let mut guest = boot("hooks");
    // What the kernel says would stand among the answers; its log has it all the same.
    guest.ask("dmesg -n 1").unwrap();
    let before = guest.snapshot().unwrap();
    assert!(!read(&mut guest, "/proc/loadavg").contains("warned"));
    let (warns, faults) = (patch(WARNS, Side::Forward), patch(FAULTS, Side::Forward));

    expect(&guest, 0, &["apply", warns.path()]);
    for _ in 0..3 {
        assert!(read(&mut guest, "/proc/loadavg").contains("warned"));
    }
    assert_eq!(warnings(&mut guest, "fs/proc/loadavg.c"), 1, "once only");

    expect(&guest, 0, &["apply", faults.path()]);
    let bad = "Bad address";
    assert!(read(&mut guest, "/proc/uptime").contains(bad));
    // A program may try twice before it gives up.
    let warned = warnings(&mut guest, "fs/proc/uptime.c");
    assert!(warned > 0);
    let texts = "dmesg | grep -c 'uptime: nothing is at 0*8$' || true";
    assert!(guest.ask(texts).unwrap().contains(&warned.to_string()));

    // One patch goes; the other still needs what they share.
    expect(&guest, 0, &["rollback", WARNS]);
    assert!(!read(&mut guest, "/proc/loadavg").contains("warned"));
    assert!(read(&mut guest, "/proc/uptime").contains(bad));
    assert!(warnings(&mut guest, "fs/proc/uptime.c") > warned);
    let status = expect(&guest, 0, &["status"]);
    assert!(status.stdout.contains(FAULTS), "{}", status.stdout);

    expect(&guest, 0, &["rollback", FAULTS]);
    assert!(!read(&mut guest, "/proc/uptime").contains(bad));
    let after = guest.snapshot().unwrap();
    assert_eq!((after.code, after.rodata), (before.code, before.rodata));

    // The kernel's own warnings and faults are looked up as ever, and the way in is open again.
    expect(&guest, 0, &["apply", warns.path()]);
    assert!(read(&mut guest, "/proc/loadavg").contains("warned"));
    assert_eq!(
        warnings(&mut guest, "fs/proc/loadavg.c"),
        2,
        "a patch that is applied anew warns anew"
    );
    let oops = "dmesg | grep -c -e Oops -e BUG: -e 'invalid opcode' || true";
    assert_eq!(guest.ask(oops).unwrap(), ["0"]);
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_patch_that_needs_hooks_changes_nothing_until_its_code_runs() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let before = guest.snapshot().unwrap();
    let faults = patch(FAULTS, Side::Forward);
    expect(guest, 0, &["check", faults.path()]);
    assert_eq!(
        guest.snapshot().unwrap(),
        before,
        "check wrote to the guest"
    );
    expect(guest, 0, &["apply", faults.path()]);
    // The kernel looks its own accesses up by the hooked function: each of these faults in it.
    let own = "dd if=/proc/self/mem of=/dev/null bs=4096 count=1 2>&1 || true";
    guest.ask(own).unwrap();
    expect(guest, 0, &["rollback", FAULTS]);
    let after = guest.snapshot().unwrap();
    assert_eq!((after.code, after.rodata), (before.code, before.rodata));
    assert_no_trouble(guest);
}
