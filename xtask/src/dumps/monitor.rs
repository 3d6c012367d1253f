//! QEMU's machine protocol (QMP, docs/interop/qmp-spec.rst), as much of it as a dump needs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection in command mode.
pub(super) struct Monitor {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Monitor {
    /// Connects, reads the greeting and leaves negotiation mode.
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let writer = UnixStream::connect(socket).context("cannot reach QEMU's monitor")?;
        writer.set_read_timeout(Some(Duration::from_secs(30)))?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut monitor = Self { reader, writer };
        monitor.line()?;
        monitor.call("qmp_capabilities", Value::Null)?;
        Ok(monitor)
    }

    /// One command and its answer; events in between are passed over.
    pub(super) fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        writeln!(self.writer, "{request}").context("cannot write to QEMU's monitor")?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }

    /// A command of the monitor for people.
    pub(super) fn human(&mut self, line: &str) -> Result<String> {
        let answer = self.call("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer
            .as_str()
            .context("QEMU's answer is no text")?
            .to_owned())
    }

    fn line(&mut self) -> Result<Value> {
        let mut text = String::new();
        if self
            .reader
            .read_line(&mut text)
            .context("QEMU's monitor does not answer")?
            == 0
        {
            bail!("QEMU closed its monitor");
        }
        serde_json::from_str(&text).context("QEMU's monitor does not speak JSON")
    }
}
