//! What a patch of source must be able to change, seen from inside the guest before, while and after: one patch over many files
//! and one of a module, applied to a guest that goes on.

use vmpatch_testkit::{Guest, Side};

use crate::support::{assert_no_trouble, boot_silent, built, expect, patch, shared};

/// Changes a function in each of many files, built from its diff.
const CLASSICS: &str = "classics";
/// Changes every function of a module that has static variables of its own.
const STATICS: &str = "statics";

/// What a command of the guest says, without what the console adds.
#[track_caller]
fn say(guest: &mut Guest, command: &str) -> String {
    let lines = guest.ask(command).unwrap();
    let lines: Vec<_> = lines.iter().map(|line| line.trim()).collect();
    lines.join("\n")
}

/// The number that a command of the guest says last.
#[track_caller]
fn number(guest: &mut Guest, command: &str) -> u64 {
    let said = say(guest, command);
    let last = said.lines().next_back().unwrap_or_default();
    last.parse().unwrap_or_else(|_| panic!("{said}"))
}

/// Something that a program sees otherwise while the patch is applied.
struct Classic {
    what: &'static str,
    command: &'static str,
    old: &'static str,
    new: &'static str,
}

const CHANGES: [Classic; 6] = [
    Classic {
        what: "a changed string",
        command: "grep -o -e '^MemFree: ' -e '^MemLeft: ' /proc/meminfo",
        old: "MemFree:",
        new: "MemLeft:",
    },
    Classic {
        what: "a new function",
        command: "grep -c MemReads: /proc/meminfo || true",
        old: "0",
        new: "1",
    },
    Classic {
        what: "the clone that a compiler made of a function",
        command: "sh -c 'echo 123 > /proc/$$/oom_score_adj; cat /proc/$$/oom_score_adj'",
        old: "123",
        new: "321",
    },
    Classic {
        what: "a function with parts split off as cold, where the compiler does that",
        command: "insmod /extras/statics.ko; stat -c %a /proc/vmpatch_statics; rmmod statics",
        old: "444",
        new: "440",
    },
    Classic {
        what: "a function without a site for ftrace",
        command: "cut -c 15 /proc/sys/kernel/random/uuid",
        old: "4",
        new: "8",
    },
    Classic {
        what: "a message of a function with messages for dynamic debug",
        command: "dmesg -c > /dev/null; dmesg -n 1; insmod /extras/dummy.ko numdummies=many 2> /dev/null; \
                  dmesg | grep -o -e 'is no good for' -e 'invalid for' | sort -u; dmesg -n 5",
        old: "invalid for",
        new: "is no good for",
    },
];

#[track_caller]
fn see(guest: &mut Guest, patched: bool) {
    for change in &CHANGES {
        let expected = if patched { change.new } else { change.old };
        assert_eq!(say(guest, change.command), expected, "{}", change.what);
    }
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn changes_of_many_kinds_are_seen_while_they_are_applied_and_only_then() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let before = guest.snapshot().unwrap();
    see(guest, false);
    let applied = expect(guest, 0, &["apply", &built(CLASSICS)]);
    for assembly in ["clear_page_rep", "clear_page_erms"] {
        assert!(applied.stdout.contains(assembly), "{}", applied.stdout);
    }
    see(guest, true);
    a_new_variable_counts(guest);
    a_static_key_flipped_now_is_seen(guest);
    a_tracepoint_fires(guest);
    dynamic_debug_is_switched_on(guest);
    expect(guest, 0, &["rollback", CLASSICS]);
    see(guest, false);
    let after = guest.snapshot().unwrap();
    assert_eq!((after.code, after.rodata), (before.code, before.rodata));
    assert_no_trouble(guest);
}

/// Whoever else reads it makes it count on.
fn a_new_variable_counts(guest: &mut Guest) {
    let read = "sed -n 's/^MemReads: *//p' /proc/meminfo";
    let first = number(guest, read);
    let second = number(guest, read);
    assert!(first > 0 && second > first, "{first}, {second}");
}

/// It was off when the patch was applied.
fn a_static_key_flipped_now_is_seen(guest: &mut Guest) {
    let read = "grep -c delayacct /proc/loadavg || true";
    for (value, seen) in [("0", 0), ("1", 1), ("0", 0)] {
        let flip = format!("echo {value} > /proc/sys/kernel/task_delayacct");
        guest.ask(&flip).unwrap();
        assert_eq!(number(guest, read), seen, "delayacct_key is {value}");
    }
}

fn a_tracepoint_fires(guest: &mut Guest) {
    let event = "/sys/kernel/tracing/events/oom/oom_score_adj_update/enable";
    let touch = "sh -c 'echo 123 > /proc/$$/oom_score_adj'";
    let fired =
        "grep -c ' oom_score_adj_update: .* oom_score_adj=321$' /sys/kernel/tracing/trace || true";
    guest
        .ask("mount -t tracefs tracefs /sys/kernel/tracing")
        .unwrap();
    for (on, count) in [(0, 0), (1, 1), (0, 1)] {
        guest.ask(&format!("echo {on} > {event}; {touch}")).unwrap();
        assert_eq!(number(guest, fired), count, "the event is {on}");
    }
    guest
        .ask("echo > /sys/kernel/tracing/trace; umount /sys/kernel/tracing")
        .unwrap();
}

fn dynamic_debug_is_switched_on(guest: &mut Guest) {
    let told = "dmesg -c > /dev/null; dmesg -n 1; insmod /extras/dummy.ko numdummies=many 2> /dev/null; \
                dmesg | grep -q \"doing dummy, parsing ARGS: 'numdummies=many\"; echo $((! $?)); dmesg -n 5";
    for (flag, seen) in [("-p", 0), ("+p", 1), ("-p", 0)] {
        let switch = format!("echo 'func parse_args {flag}' > /proc/dynamic_debug/control");
        guest.ask(&switch).unwrap();
        assert_eq!(number(guest, told), seen, "dynamic debug is {flag}");
    }
}

/// Inode numbers are given out in blocks, whose end is a static variable. The patch takes larger ones: the numbers show where it
/// began, and if that were anew, they would be as small as one.
#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_static_variable_of_the_kernel_goes_on_from_where_it_is() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let pipe = "true | readlink /proc/self/fd/0 | tr -dc 0-9; echo";
    let before = number(guest, pipe);
    expect(guest, 0, &["apply", &built(CLASSICS)]);
    let first = number(guest, pipe);
    let second = number(guest, pipe);
    expect(guest, 0, &["rollback", CLASSICS]);
    const BLOCK: u64 = 1 << 20;
    assert!(before > 1 && before < BLOCK, "{before}");
    assert!(first % BLOCK > before, "{before}, then {first}");
    assert!(second > first, "{first}, then {second}");
    assert_eq!(second % BLOCK, first % BLOCK, "{first}, then {second}");
    assert!(number(guest, pipe) > before);
    assert_no_trouble(guest);
}

/// What `/proc/vmpatch_statics` says when it was read for the nth time in all; `new` times of them while patched.
fn statics_after(n: i64, patched: Option<i64>) -> String {
    let sign = if patched.is_some() { -1 } else { 1 };
    let initialised = match patched {
        Some(times) => -((100 + n) * 100 + 6 + times),
        None => 100 + n,
    };
    let lines = [
        format!("initialised {initialised}"),
        format!("zero {}", sign * 2 * n),
        format!("pointer {}", sign * (49 + 2 * (n % 2))),
        format!("inlined {}", sign * (11 * n - 10)),
        format!("inlined {}", sign * 11 * n),
        format!("named {}", sign * 3 * n),
        format!("named {}", sign * 5 * n),
    ];
    let mut all = lines.join("\n");
    if let Some(times) = patched {
        all.push_str(&format!("\nnew {}", 1000 + times));
    }
    all
}

/// One with an initial value, one without, an array, a pointer to a function, one of a function that is inlined twice, and two of one
/// name that change places; each goes on. One that is new in its function and one of a new function begin.
#[test]
#[ignore = "needs guests: cargo xtask test"]
fn static_variables_of_a_module_go_on_in_every_shape() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let fix = patch(STATICS, Side::Forward);
    let read = "grep -v array /proc/vmpatch_statics";
    let array = "sed -n 's/^array //p' /proc/vmpatch_statics";
    guest.ask("insmod /extras/statics.ko").unwrap();
    assert_eq!(say(guest, read), statics_after(1, None));
    assert_eq!(say(guest, read), statics_after(2, None));
    assert_eq!(say(guest, array), "abbb");
    expect(guest, 0, &["apply", fix.path()]);
    assert_eq!(say(guest, read), statics_after(4, Some(1)));
    assert_eq!(say(guest, read), statics_after(5, Some(2)));
    assert_eq!(say(guest, array), "abbbBBB");
    expect(guest, 0, &["rollback", STATICS]);
    assert_eq!(say(guest, read), statics_after(7, None));
    assert_eq!(say(guest, array), "abbbBBBbb");
    guest.ask("rmmod statics").unwrap();
    assert_no_trouble(guest);
}

/// Where the patch has its BUG.
const BUG: &str = "kernel BUG at fs/proc/loadavg.c:20!";

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_bug_in_new_code_ends_the_task_that_ran_into_it_and_no_other() {
    let mut guest = boot_silent("bug");
    let guest = &mut guest;
    guest
        .ask("printf '#!/bin/sh\\nread line < /proc/loadavg\\necho survived\\n' > /tmp/bug-on-me; chmod +x /tmp/bug-on-me")
        .unwrap();
    let run = "/tmp/bug-on-me 2> /dev/null; echo $?";
    assert_eq!(say(guest, run), "survived\n0");
    expect(guest, 0, &["apply", &built(CLASSICS)]);
    const KILLED_BY_SEGV: u64 = 128 + 11;
    assert_eq!(number(guest, run), KILLED_BY_SEGV);
    let bugs = format!("dmesg | grep -c '{BUG}$' || true");
    assert_eq!(number(guest, &bugs), 1);
    assert_eq!(
        say(guest, "grep -c / /proc/loadavg"),
        "1",
        "another task reads on"
    );
    expect(guest, 0, &["rollback", CLASSICS]);
    assert_eq!(say(guest, run), "survived\n0");
    assert_eq!(number(guest, &bugs), 1);
}
