//! What introspection reads equals what the guest's own kernel says.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use sha2::{Digest, Sha256};
use vmpatch_testkit::{Guest, Oracle};

use crate::support::{expect, shared};

fn inspect(guest: &Guest, what: &[&str]) -> Vec<Value> {
    let words: Vec<&str> = ["inspect"].iter().chain(what).copied().collect();
    let answer = expect(guest, 0, &words);
    answer
        .json
        .as_array()
        .cloned()
        .unwrap_or_else(|| panic!("not a list: {}", answer.stdout))
}

/// Addresses are hexadecimal strings in JSON.
fn address(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}

fn symbol_line(row: &Value) -> String {
    format!(
        "{:016x} {} {}",
        address(&row["at"]),
        row["kind"].as_str().unwrap(),
        row["name"].as_str().unwrap()
    )
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn all_symbols_equal_proc_kallsyms() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let oracle = guest.oracle("symbols").unwrap();
    let rows = inspect(guest, &["symbols", "--modules"]);
    let (modules, own): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row["module"].is_string());

    let mut lines: Vec<String> = own.into_iter().map(symbol_line).collect();
    lines.sort();
    assert_eq!(lines.len() as u64, oracle.symbols);
    let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
    let digest: String = Sha256::digest(text.as_bytes())
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(digest, oracle.symbols_digest);

    let planted: BTreeSet<String> = modules
        .into_iter()
        .filter(|r| r["module"] == "planted")
        .map(symbol_line)
        .collect();
    assert_eq!(planted, oracle.module_symbols);
}

/// Names by thread id. A kworker's name in /proc has its workqueue added (Linux v6.12 kernel/workqueue.c, `wq_worker_comm`).
fn names(oracle: &Oracle) -> BTreeMap<i64, String> {
    let plain = |name: &str| match name
        .strip_prefix("kworker/")
        .and_then(|rest| rest.find(['-', '+']))
    {
        Some(at) if !name.starts_with("kworker/R-") => name["kworker/".len()..][..at].to_owned(),
        _ => name
            .strip_prefix("kworker/")
            .unwrap_or(name)
            .chars()
            .take(15)
            .collect(),
    };
    oracle
        .tasks
        .iter()
        .map(|(tid, name)| (*tid, plain(name)))
        .collect()
}

/// More thread ids than a guest at rest gives out while its tasks are listed.
const BORN_MEANWHILE: i64 = 1000;

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn tasks_equal_those_in_proc() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    // Workers come and go: what was there before and after must be seen, and nothing that was at neither time.
    for attempt in 0.. {
        let before = guest.oracle("tasks").unwrap();
        let rows = inspect(guest, &["tasks"]);
        let after = guest.oracle("tasks").unwrap();
        let seen: BTreeMap<i64, String> = rows
            .iter()
            .filter(|row| row["pid"].as_i64() != Some(0))
            .map(|row| {
                (
                    row["pid"].as_i64().unwrap(),
                    row["comm"].as_str().unwrap().to_owned(),
                )
            })
            .collect();
        let (before, after) = (names(&before), names(&after));
        let lost: Vec<_> = before
            .keys()
            .filter(|tid| after.contains_key(tid) && !seen.contains_key(tid))
            .collect();
        // Thread ids are given out in order: one born after the first list, and perhaps gone before the second, is greater than all
        // of the first.
        let newest = |names: &BTreeMap<i64, String>| names.keys().next_back().copied().unwrap_or(0);
        let (first, last) = (
            newest(&before),
            newest(&after).max(newest(&before)) + BORN_MEANWHILE,
        );
        let born_since = |tid: &i64| (first + 1..=last).contains(tid);
        let invented: Vec<_> = seen
            .keys()
            .filter(|tid| !before.contains_key(tid) && !after.contains_key(tid) && !born_since(tid))
            .collect();
        if (!lost.is_empty() || !invented.is_empty()) && attempt < 3 {
            continue;
        }
        assert!(
            lost.is_empty() && invented.is_empty(),
            "lost {lost:?}, invented {invented:?}"
        );
        for (tid, name) in &before {
            if let Some(seen) = seen.get(tid) {
                let seen = seen.strip_prefix("kworker/").unwrap_or(seen);
                assert!(
                    name.starts_with(seen) || seen.starts_with(name.as_str()),
                    "task {tid}: {seen} is {name} in /proc"
                );
            }
        }
        assert!(seen.len() > 20, "only {} tasks", seen.len());
        return;
    }
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn planted_stacks_equal_proc_pid_stack() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let oracle = guest.oracle("places; stacks").unwrap();
    let rows = inspect(guest, &["stacks"]);
    let ticking = guest.planted("vmp_tick").unwrap();
    let mut compared = 0;
    for (tid, expected) in oracle.stacks.iter().filter(|(tid, _)| **tid != ticking) {
        let row = rows
            .iter()
            .find(|row| row["pid"].as_i64() == Some(*tid))
            .unwrap_or_else(|| panic!("no stack of {tid}"));
        assert_eq!(row["reliable"], true, "{row}");
        assert_eq!(
            &own_frames(row, &oracle),
            expected,
            "task {tid} ({})",
            row["comm"]
        );
        compared += 1;
    }
    assert!(compared >= 7, "only {compared} stacks");
}

/// Frames as /proc/PID/stack shows them: without those in the sections of the scheduler and of locks
/// (Linux v6.12 kernel/stacktrace.c, `stack_trace_consume_entry_nosched`).
fn own_frames(row: &Value, places: &Oracle) -> Vec<String> {
    let frames = row["frames"].as_array().unwrap().iter();
    frames
        .filter(|frame| !places.is_sleeping_code(address(&frame["at"])))
        .map(|frame| {
            let name = frame["function"].as_str().unwrap();
            name.split(['/', ' ']).next().unwrap().to_owned()
        })
        .collect()
}
