//! Tasks equal the guest's own `/proc/*/task/*/stat`.

#![allow(clippy::unwrap_used, reason = "only tests are here")]

mod common;

use std::collections::BTreeMap;

use common::each_guest;
use vmpatch_introspect::tasks::TaskKind;

/// Thread id to command name, state letter and parent.
fn processes(answer: &str) -> BTreeMap<i32, (String, char, i32)> {
    let line = |line: &str| {
        let (pid, rest) = line.split_once(" (").unwrap();
        let (comm, rest) = rest.rsplit_once(") ").unwrap();
        let mut rest = rest.split(' ');
        let state = rest.next().unwrap().chars().next().unwrap();
        let parent = rest.next().unwrap().parse().unwrap();
        (pid.parse().unwrap(), (comm.to_owned(), state, parent))
    };
    answer.lines().map(line).collect()
}

#[test]
fn tasks_equal_what_proc_lists() {
    each_guest(|guest| {
        let expected = processes(&guest.answer("tasks.txt").unwrap());
        let tasks = guest.kernel.tasks(&guest.dump).unwrap();
        let listed: Vec<_> = tasks
            .iter()
            .filter(|task| task.kind == TaskKind::Listed)
            .collect();
        let pids: Vec<i32> = listed.iter().map(|task| task.pid).collect();
        let mut sorted = pids;
        sorted.sort_unstable();
        assert_eq!(sorted, expected.keys().copied().collect::<Vec<_>>());
        for task in listed {
            // /proc appends what a worker does to its name.
            let (comm, state, parent) = &expected[&task.pid];
            assert!(comm.starts_with(&task.comm), "{comm}: {task:?}");
            let now = match task.state & 0xfff {
                0 => 'R',
                1 => 'S',
                state if state & 0x400 != 0 => 'I',
                _ => '?',
            };
            // What ran while it was listed may have slept, or left its CPU, by the stop.
            assert!(*state == 'R' || now == *state, "{comm}: {now}, was {state}");
            // All kernel threads are children of kthreadd.
            assert_eq!(task.kernel_thread, task.pid == 2 || *parent == 2);
        }
    });
}

#[test]
fn every_cpu_has_an_idle_task_and_every_sleeper_a_stack_that_holds_its_pointer() {
    each_guest(|guest| {
        let tasks = guest.kernel.tasks(&guest.dump).unwrap();
        let idle = tasks.iter().filter(|task| task.kind == TaskKind::Idle);
        let names: Vec<_> = idle.map(|task| task.comm.as_str()).collect();
        assert_eq!(names, ["swapper/0", "swapper/1"]);
        for task in &tasks {
            let stack = task.stack.unwrap();
            assert!(stack.contains(task.saved_sp), "{task:?}");
        }
        let running: Vec<_> = tasks
            .iter()
            .filter(|task| task.on_cpu)
            .map(|task| task.cpu)
            .collect();
        assert_eq!(running.len(), guest.dump.vcpus().len());
    });
}
