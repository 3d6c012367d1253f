//! Going to the background: the command starts itself again as the VM's process, waits for its word
//! that the VM runs, and leaves. The child is a session of its own, so that no terminal's end reaches it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::Context;

use crate::exit::Failure;

/// Set in the child's environment: it then says [`READY`] on standard output once the VM runs.
const CHILD: &str = "VMPATCH_DETACHED";
const READY: &str = "ready";
/// Of a child that failed, at most this much of its log is shown.
const SHOWN_LOG: usize = 4096;

/// Whether this process is the child.
pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// In the child: becomes a session of its own.
pub(crate) fn leave_terminal() -> anyhow::Result<()> {
    rustix::process::setsid().context("becoming a session of its own")?;
    Ok(())
}

/// In the child: says that the VM runs, and lets go of the parent's pipe.
pub(crate) fn say_ready() -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{READY}")
        .and_then(|()| out.flush())
        .context("telling the caller")?;
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .context("opening /dev/null")?;
    rustix::stdio::dup2_stdout(&null).context("letting go of standard output")?;
    Ok(())
}

/// In the parent: starts the same command line again and waits until its VM runs. Its messages go to
/// `log`. Returns the child's process id.
pub(crate) fn start_again(log: &Path) -> Result<u32, Failure> {
    let messages = File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let mut child = Command::new(std::env::current_exe().context("finding this program")?)
        .args(std::env::args_os().skip(1))
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(messages)
        .spawn()
        .context("starting the VM's process")?;
    let mut line = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out.take(64))
            .read_line(&mut line)
            .context("waiting for the VM")?;
    }
    if line.trim_end() == READY {
        Ok(child.id())
    } else {
        Err(failed(child, log))
    }
}

/// The ending of a child that did not come to run, told as if it were the parent's own.
fn failed(mut child: Child, log: &Path) -> Failure {
    let ending = child.wait();
    let said = std::fs::read(log).unwrap_or_default();
    let last = said
        .get(said.len().saturating_sub(SHOWN_LOG)..)
        .unwrap_or(&said);
    let said = String::from_utf8_lossy(last);
    let reason = said.trim().trim_start_matches("vmpatch: ");
    let without = |kind: &str| reason.trim_start_matches(kind).to_owned();
    // The log is told whole; it has no other reader.
    let _ = std::fs::remove_file(log);
    match ending
        .as_ref()
        .ok()
        .and_then(std::process::ExitStatus::code)
    {
        Some(2) => Failure::Usage(without("usage: ")),
        Some(3) => Failure::refused(without("refused: ")),
        _ => {
            let ending = ending.map_or_else(|error| error.to_string(), |status| status.to_string());
            Failure::Other(anyhow::anyhow!(
                "the VM did not start ({ending}): {}",
                without("failed: ")
            ))
        }
    }
}
