//! `vmpatch run`: one process, one virtual machine, from its kernel file to its end.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::Context;
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmpatch_vmm::config::{ConsoleKind, MachineConfig};
use vmpatch_vmm::control::ControlServer;
use vmpatch_vmm::control::message::Description;
use vmpatch_vmm::control::rundir::{self, RunDir};
use vmpatch_vmm::machine::Machine;
use vmpatch_vmm::vm::{Outcome, Running};

use crate::cli::Run;
use crate::detach;
use crate::exit::Failure;
use crate::report::Output;

#[derive(Serialize)]
struct Detached {
    result: &'static str,
    vm: String,
    pid: u32,
    log: PathBuf,
}

#[derive(Serialize)]
struct Ended {
    result: &'static str,
    vm: String,
    ending: String,
}

/// Runs the VM to its end, or starts it in the background.
pub(crate) fn run(asked: &Run, output: &Output) -> Result<(), Failure> {
    let config = config(asked)?;
    if asked.detach && !detach::is_child() {
        return background(&config, output);
    }
    foreground(&config, output)
}

fn background(config: &MachineConfig, output: &Output) -> Result<(), Failure> {
    config
        .validate()
        .map_err(|error| Failure::Usage(error.to_string()))?;
    let folder = rundir::base()?;
    std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let log = folder.join(format!("{}.log", config.id));
    let pid = detach::start_again(&log)?;
    let answer = Detached {
        result: "running",
        vm: config.id.clone(),
        pid,
        log,
    };
    output.answer(&answer, |answer| {
        format!("VM {} runs as process {}", answer.vm, answer.pid)
    });
    Ok(())
}

fn foreground(config: &MachineConfig, output: &Output) -> Result<(), Failure> {
    if detach::is_child() {
        detach::leave_terminal()?;
    }
    let run_dir = RunDir::claim(&rundir::base()?, &config.id)?;
    let machine = Machine::build(config)?;
    let running = machine.start().context("starting the vCPUs")?;
    if let Some(path) = running.console_path() {
        eprintln!("vmpatch: console of {} is {}", config.id, path.display());
    }
    let server = ControlServer::start(run_dir, Arc::clone(running.vm()), description(config))
        .context("opening the control socket")?;
    end_on_signal(Arc::clone(running.vm()))?;
    if detach::is_child() {
        detach::say_ready()?;
    }
    let finished = running.wait();
    drop(server);
    ending(config, &finished.outcome, &finished.to_string(), output)
}

fn description(config: &MachineConfig) -> Description {
    Description {
        id: config.id.clone(),
        pid: std::process::id(),
        vcpus: usize::from(config.vcpus),
        memory: config.memory,
        kernel: Some(config.kernel.display().to_string()),
    }
}

/// A signal that asks the process to end ends the VM, so that its folder is cleaned up.
fn end_on_signal(vm: Arc<Running>) -> Result<(), Failure> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("watching for signals")?;
    let watch = move || {
        if signals.forever().next().is_some() {
            vm.terminate();
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(watch)
        .context("starting a thread")?;
    Ok(())
}

fn ending(
    config: &MachineConfig,
    outcome: &Outcome,
    said: &str,
    output: &Output,
) -> Result<(), Failure> {
    if matches!(outcome, Outcome::Crashed(_)) {
        return Err(Failure::Other(anyhow::anyhow!("VM {}: {said}", config.id)));
    }
    let result = match outcome {
        Outcome::PowerOff => "power-off",
        Outcome::Reset => "reset",
        Outcome::Terminated | Outcome::Crashed(_) => "terminated",
    };
    let answer = Ended {
        result,
        vm: config.id.clone(),
        ending: said.to_owned(),
    };
    output.answer(&answer, |answer| {
        format!("VM {}: {}", answer.vm, answer.ending)
    });
    Ok(())
}

fn config(asked: &Run) -> Result<MachineConfig, Failure> {
    Ok(MachineConfig {
        id: asked.id.clone(),
        kernel: asked.kernel.clone(),
        initrd: asked.initrd.clone(),
        cmdline: asked.cmdline.clone(),
        vcpus: asked.vcpus,
        memory: asked.memory,
        console: console(asked)?,
        assist_emulation: asked.assist_emulation,
    })
}

/// Without a terminal to hold, a detached VM's console is a pseudo-terminal.
fn console(asked: &Run) -> Result<ConsoleKind, Failure> {
    match asked.console.as_deref() {
        None if asked.detach => Ok(ConsoleKind::Pty),
        None | Some("stdio") if !asked.detach => Ok(ConsoleKind::Stdio),
        Some("stdio") => Err(Failure::Usage(
            "a detached VM has no standard input and output; use `--console pty` or `file:PATH`"
                .to_owned(),
        )),
        Some("pty") => Ok(ConsoleKind::Pty),
        Some(other) => other
            .strip_prefix("file:")
            .filter(|path| !path.is_empty())
            .map(|path| ConsoleKind::File(path.into()))
            .ok_or_else(|| {
                Failure::Usage(format!(
                    "console `{other}`: expected `stdio`, `pty` or `file:PATH`"
                ))
            }),
        None => Ok(ConsoleKind::Stdio),
    }
}
