//! Shadow data: what patches keep beside objects that live already belongs to the boot, not to a patch.

use vmpatch_testkit::{Guest, Side};

use crate::support::{assert_no_trouble, expect, patch, shared};

/// Counts the reads of /proc/loadavg beside the first process.
const COUNTS: &str = "shadow-count";
/// Shows that count in /proc/uptime.
const SHOWS: &str = "shadow-show";
/// Frees it when /proc/cmdline is read.
const FREES: &str = "shadow-free";

fn read(guest: &mut Guest, file: &str) -> String {
    guest.ask(&format!("cat {file}")).unwrap().join("\n")
}

/// Whether the status tells of such data of so many objects.
#[track_caller]
fn tells(guest: &Guest, objects: Option<u64>) {
    let status = expect(guest, 0, &["status"]);
    let told = &status.json["shadow_data"];
    assert_eq!(told[0]["objects"].as_u64(), objects, "{told}");
    let id = told[0]["id"].as_u64();
    assert_eq!(id, objects.map(|_| 0x7265_6164), "{told}");
}

/// Reads /proc/loadavg, which is to count so many reads.
#[track_caller]
fn counts(guest: &mut Guest, reads: Option<u32>) {
    let said = read(guest, "/proc/loadavg");
    let counted = said.split_once("read ").map(|(_, rest)| rest.to_owned());
    assert_eq!(counted, reads.map(|n| format!("{n} times")), "{said}");
}

/// Whether /proc/uptime shows so many reads.
#[track_caller]
fn shows(guest: &mut Guest, reads: Option<u32>) {
    let said = read(guest, "/proc/uptime");
    let shown = said.split_once("loadavg was read ");
    let shown = shown.map(|(_, rest)| rest.to_owned());
    assert_eq!(shown, reads.map(|n| format!("{n} times")), "{said}");
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn data_beside_a_live_object_outlive_the_patch_that_made_them() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let [count, show, free] = [COUNTS, SHOWS, FREES].map(|name| patch(name, Side::Forward));

    counts(guest, None);
    expect(guest, 0, &["apply", count.path()]);
    tells(guest, None);
    for reads in 1..=3 {
        counts(guest, Some(reads));
    }
    expect(guest, 0, &["apply", show.path()]);
    shows(guest, Some(3));
    counts(guest, Some(4));
    shows(guest, Some(4));

    expect(guest, 0, &["rollback", COUNTS]);
    counts(guest, None);
    shows(guest, Some(4));
    tells(guest, Some(1));
    expect(guest, 0, &["apply", count.path()]);
    counts(guest, Some(5));

    expect(guest, 0, &["apply", free.path()]);
    read(guest, "/proc/cmdline");
    shows(guest, None);
    counts(guest, Some(1));
    read(guest, "/proc/cmdline");
    for name in [FREES, SHOWS, COUNTS] {
        expect(guest, 0, &["rollback", name]);
    }
    counts(guest, None);
    shows(guest, None);
    tells(guest, None);
    assert_no_trouble(guest);
}
