//! `vmpatch inspect stacks`: every kernel stack, as the stack gate sees it. Taken in one stop, so that
//! the stacks are of one moment.

use serde::Serialize;
use vmpatch_introspect::modules::Module;
use vmpatch_introspect::stacks::{self, Stack};
use vmpatch_introspect::target::StopRequest;
use vmpatch_introspect::unwind::{Frame, FrameKind, Unwinder};
use vmpatch_introspect::{Deadline, Gva};

use super::Names;
use crate::cli::Stacks;
use crate::exit::Failure;
use crate::live::{self, Live};
use crate::report::Output;

#[derive(Serialize)]
struct Row {
    pid: Option<i32>,
    comm: Option<String>,
    vcpu: Option<u32>,
    reliable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreliable_because: Option<String>,
    frames: Vec<FrameRow>,
    hidden_returns: Vec<String>,
}

#[derive(Serialize)]
struct FrameRow {
    at: Gva,
    kind: FrameKind,
    function: String,
}

pub(super) fn show(asked: &Stacks, output: &Output) -> Result<(), Failure> {
    let seen = Live::attach(&asked.vm.vm)?;
    let modules = seen.modules()?;
    let places: Vec<_> = modules.iter().map(Module::place).collect();
    let unwinder = seen.unwinder(&places)?;
    let stacks = of_one_moment(&seen, &unwinder)?;
    let names = Names {
        kernel: &seen.kernel,
        modules: &modules,
        placed: &seen.placed(),
    };
    let wanted = stacks
        .iter()
        .filter(|stack| asked.pid.is_none_or(|pid| pid_of(stack) == Some(pid)));
    let rows: Vec<Row> = wanted.map(|stack| row(stack, &names)).collect();
    if let (true, Some(pid)) = (rows.is_empty(), asked.pid) {
        return Err(Failure::refused(format!("no task {pid} in the guest")));
    }
    output.answer(&rows, |rows| {
        rows.iter().map(paragraph).collect::<Vec<_>>().join("\n\n")
    });
    Ok(())
}

fn of_one_moment(seen: &Live, unwinder: &Unwinder) -> Result<Vec<Stack>, Failure> {
    let stopped = live::patient_stop(seen.vm())?;
    let deadline = Deadline::within(StopRequest::default().examination());
    let (memory, vcpus) = (stopped.memory(), stopped.vcpus());
    let stacks = stacks::all(&seen.kernel, unwinder, memory, vcpus, &deadline);
    stopped
        .resume()
        .map_err(|error| Failure::Unreachable(error.to_string()))?;
    Ok(stacks?)
}

fn row(stack: &Stack, names: &Names<'_>) -> Row {
    let frames = stack.trace.frames.iter();
    let unreliable = stack.trace.unreliable.as_ref();
    Row {
        pid: pid_of(stack),
        comm: stack.task.as_ref().map(|task| task.comm.clone()),
        vcpu: stack.vcpu,
        reliable: unreliable.is_none(),
        unreliable_because: unreliable.map(ToString::to_string),
        frames: frames.map(|frame| frame_row(frame, names)).collect(),
        hidden_returns: stack
            .hidden_returns
            .iter()
            .map(|at| names.name(*at))
            .collect(),
    }
}

fn pid_of(stack: &Stack) -> Option<i32> {
    stack.task.as_ref().map(|task| task.pid)
}

fn frame_row(frame: &Frame, names: &Names<'_>) -> FrameRow {
    FrameRow {
        at: frame.at,
        kind: frame.kind,
        function: names.name(frame.at),
    }
}

fn paragraph(row: &Row) -> String {
    let running = row
        .vcpu
        .map(|vcpu| format!(", on vCPU {vcpu}"))
        .unwrap_or_default();
    let reliable = row
        .unreliable_because
        .as_ref()
        .map_or_else(|| "reliable".to_owned(), |why| format!("unreliable: {why}"));
    let task = match (row.pid, &row.comm) {
        (Some(pid), Some(comm)) => format!("{pid} {}", comm.escape_debug()),
        _ => "no task".to_owned(),
    };
    let head = format!("{task}{running} ({reliable})");
    let frames = row
        .frames
        .iter()
        .map(|frame| format!("  {}{}", mark(frame.kind), frame.function));
    let hidden = row
        .hidden_returns
        .iter()
        .map(|name| format!("  hidden return: {name}"));
    std::iter::once(head)
        .chain(frames)
        .chain(hidden)
        .collect::<Vec<_>>()
        .join("\n")
}

fn mark(kind: FrameKind) -> &'static str {
    match kind {
        FrameKind::Call => "",
        FrameKind::Running => "now at ",
        FrameKind::Interrupted => "interrupted at ",
    }
}
