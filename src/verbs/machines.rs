//! `vmpatch list`, `pause`, `resume` and `stop`: the machines as a whole.

use serde::Serialize;
use serde_json::json;
use vmpatch_vmm::client::{self, CallError, Status};
use vmpatch_vmm::vm::{Holder, State};

use crate::exit::Failure;
use crate::report::{Output, table};

#[derive(Serialize)]
struct Row {
    id: String,
    state: String,
    pid: Option<u32>,
    vcpus: Option<usize>,
    memory: Option<u64>,
    uptime_ms: Option<u64>,
    kernel: Option<String>,
}

/// Lists every VM whose process lives.
pub(crate) fn list(output: &Output) -> Result<(), Failure> {
    let found = client::list()?;
    let rows: Vec<Row> = found
        .iter()
        .map(|vm| row(&vm.id, client::status(&vm.id)))
        .collect();
    output.answer(&rows, |rows| match rows.as_slice() {
        [] => "no VM runs; `vmpatch run` starts one".to_owned(),
        rows => {
            let head = ["id", "state", "pid", "vcpus", "memory", "uptime", "kernel"];
            table::table(&head, rows.iter().map(cells))
        }
    });
    Ok(())
}

/// Holds all vCPUs.
pub(crate) fn pause(vm: &str, output: &Output) -> Result<(), Failure> {
    done(vm, "paused", client::pause(vm), output)
}

/// Lets them run on.
pub(crate) fn resume(vm: &str, output: &Output) -> Result<(), Failure> {
    done(vm, "running", client::resume(vm), output)
}

/// Ends the VM.
pub(crate) fn stop(vm: &str, output: &Output) -> Result<(), Failure> {
    done(vm, "ended", client::terminate(vm), output)
}

fn done(
    vm: &str,
    state: &str,
    asked: Result<(), CallError>,
    output: &Output,
) -> Result<(), Failure> {
    asked?;
    let answer = json!({ "result": "done", "vm": vm, "state": state });
    output.answer(&answer, |_| format!("VM {vm}: {state}"));
    Ok(())
}

fn row(id: &str, status: Result<Status, CallError>) -> Row {
    let id = id.to_owned();
    match status {
        Ok(status) => Row {
            id,
            state: status
                .outcome
                .unwrap_or_else(|| state(status.state).to_owned()),
            pid: Some(status.description.pid),
            vcpus: Some(status.description.vcpus),
            memory: Some(status.description.memory),
            uptime_ms: Some(status.uptime_ms),
            kernel: status.description.kernel,
        },
        Err(error) => Row {
            id,
            state: format!("does not answer: {error}"),
            pid: None,
            vcpus: None,
            memory: None,
            uptime_ms: None,
            kernel: None,
        },
    }
}

fn state(state: State) -> &'static str {
    match state {
        State::Running => "running",
        State::Stopping(Holder::Owner) | State::Stopped(Holder::Owner) => "paused",
        State::Stopping(Holder::Patch) | State::Stopped(Holder::Patch) => "stopped to be patched",
        State::Stuck => "stuck: an undo failed",
    }
}

fn cells(row: &Row) -> [String; 7] {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    [
        row.id.clone(),
        row.state.clone(),
        or_dash(row.pid.map(|pid| pid.to_string())),
        or_dash(row.vcpus.map(|vcpus| vcpus.to_string())),
        or_dash(row.memory.map(|bytes| format!("{}M", bytes >> 20))),
        or_dash(row.uptime_ms.map(|ms| format!("{}s", ms / 1000))),
        or_dash(row.kernel.clone()),
    ]
}
