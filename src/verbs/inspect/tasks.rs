//! `vmpatch inspect tasks`: what `ps` shows, and the idle and exiting tasks it does not.

use vmpatch_introspect::tasks::{Task, TaskKind};

use crate::exit::Failure;
use crate::live::Live;
use crate::report::{Output, table};

pub(super) fn show(vm: &str, output: &Output) -> Result<(), Failure> {
    let seen = Live::attach(vm)?;
    let tasks = seen.kernel.tasks(seen.vm())?;
    output.answer(&tasks, |tasks| {
        table::table(
            &["pid", "tgid", "state", "cpu", "kind", "name"],
            tasks.iter().map(row),
        )
    });
    Ok(())
}

fn row(task: &Task) -> [String; 6] {
    [
        task.pid.to_string(),
        task.tgid.to_string(),
        state(task).to_owned(),
        task.cpu.to_string(),
        kind(task.kind).to_owned(),
        if task.kernel_thread {
            format!("[{}]", task.comm)
        } else {
            task.comm.clone()
        },
    ]
}

/// The letters of `ps`, after `task_state_array` (Linux v6.12 fs/proc/array.c).
pub(super) fn state(task: &Task) -> &'static str {
    match task.state {
        0 if task.on_cpu => "R+",
        0 => "R",
        state if state & 0x400 != 0 && state & 0x2 != 0 => "I",
        state if state & 0x1 != 0 => "S",
        state if state & 0x2 != 0 => "D",
        state if state & 0x4 != 0 => "T",
        state if state & 0x8 != 0 => "t",
        state if state & 0x10 != 0 => "X",
        state if state & 0x20 != 0 => "Z",
        _ => "?",
    }
}

fn kind(kind: TaskKind) -> &'static str {
    match kind {
        TaskKind::Listed => "task",
        TaskKind::Idle => "idle",
        TaskKind::Exiting => "exiting",
    }
}
