//! The host's side of COM1: standard input and output, a file, or a pseudo-terminal. Owns two threads,
//! so that a vCPU never waits for a slow reader: a vCPU stuck in a write could not be stopped.
//!
//! ```text
//! vCPU ─▶ Com1 ─▶ queue ─▶ writer thread ─▶ stdout │ file │ pty
//! vCPU ◀─ Com1 ◀────────── reader thread ◀─ stdin  │  –   │ pty
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::input::{Input, Quit, Reader};
use super::output::{Queue, QueueWriter};
use super::serial::{Com1, Output};
use super::tty::{self, RawMode};
use crate::bus::Shared;
use crate::config::ConsoleKind;

/// How long the end of a machine waits for the last output to be taken.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// The host's side of a guest's console. Dropping it writes the last output and restores the terminal.
#[derive(Debug)]
pub struct Console {
    queue: Arc<Queue>,
    input: Option<Input>,
    path: Option<PathBuf>,
    reader: Option<Reader>,
    /// Last, so that it is dropped after all output is out.
    _raw: Option<RawMode>,
}

/// Why a console cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The console's file cannot be made.
    #[error("console file {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host gives no pseudo-terminal, descriptor or thread.
    #[error("{what} for the console: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

impl Console {
    /// Opens the host's side and starts its writer.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn open(kind: &ConsoleKind) -> Result<Self, ConsoleError> {
        let ends = Ends::open(kind)?;
        let queue = Queue::start(ends.output).map_err(host("a thread"))?;
        Ok(Self {
            queue,
            input: ends.input,
            path: ends.path,
            reader: None,
            _raw: ends.raw,
        })
    }

    /// Where the guest's output is to go.
    #[must_use]
    pub fn output(&self) -> Output {
        Box::new(QueueWriter(Arc::clone(&self.queue)))
    }

    /// The file or terminal that somebody else can open, if there is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Starts to give input to `com1`. Where it is typed at a terminal, Ctrl-] calls `quit`.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn connect(&mut self, com1: Shared<Com1>, quit: Quit) -> Result<(), ConsoleError> {
        if let Some(input) = self.input.take() {
            let reader = Reader::start(input, com1, quit).map_err(host("a thread"))?;
            self.reader = Some(reader);
        }
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reader = None;
        self.queue.close(LAST_OUTPUT);
    }
}

fn host(what: &'static str) -> impl Fn(io::Error) -> ConsoleError {
    move |source| ConsoleError::Host { what, source }
}

/// The host's files behind one kind of console.
struct Ends {
    output: File,
    input: Option<Input>,
    path: Option<PathBuf>,
    raw: Option<RawMode>,
}

impl Ends {
    fn open(kind: &ConsoleKind) -> Result<Self, ConsoleError> {
        match kind {
            ConsoleKind::Stdio => Self::stdio().map_err(host("standard input and output")),
            ConsoleKind::File(path) => Self::file(path),
            ConsoleKind::Pty => Self::pty().map_err(host("a pseudo-terminal")),
        }
    }

    fn stdio() -> io::Result<Self> {
        let duplicate = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned();
        let input: OwnedFd = duplicate(&io::stdin())?;
        let raw = RawMode::enter(input.try_clone()?);
        let input = Some(Input {
            file: File::from(input),
            _far_side: None,
            typed: raw.is_some(),
        });
        Ok(Self {
            output: File::from(duplicate(&io::stdout())?),
            input,
            path: None,
            raw,
        })
    }

    fn file(path: &Path) -> Result<Self, ConsoleError> {
        let output = File::create(path).map_err(|source| ConsoleError::File {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            output,
            input: None,
            path: Some(path.to_owned()),
            raw: None,
        })
    }

    fn pty() -> io::Result<Self> {
        let pty = tty::open_pty()?;
        let output = pty.master.try_clone()?;
        let input = Some(Input {
            file: pty.master,
            _far_side: Some(pty.held),
            typed: false,
        });
        Ok(Self {
            output,
            input,
            path: Some(pty.path),
            raw: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Device;
    use crate::devices::output::QUEUE_LIMIT;
    use std::fs::{self, OpenOptions};
    use std::io::{Read, Write};
    use std::sync::Mutex;
    use std::thread;
    use std::time::Instant;

    #[test]
    fn all_output_is_in_the_file_when_the_console_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let console = Console::open(&ConsoleKind::File(path.clone())).unwrap();
        let text = b"line\n".repeat(1000);
        console.output().write_all(&text).unwrap();
        assert_eq!(console.path(), Some(path.as_path()));
        drop(console);
        assert_eq!(fs::read(path).unwrap(), text);
    }

    #[test]
    fn a_file_that_cannot_be_made_is_named() {
        let path = PathBuf::from("/proc/nowhere/console");
        let error = Console::open(&ConsoleKind::File(path))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/proc/nowhere/console"), "{error}");
    }

    #[test]
    fn a_pseudo_terminal_carries_both_ways() {
        let mut console = Console::open(&ConsoleKind::Pty).unwrap();
        let (com1, _line) = Com1::new(console.output()).unwrap();
        let com1 = Arc::new(Mutex::new(com1));
        console.connect(Arc::clone(&com1), Box::new(|| ())).unwrap();
        let path = console.path().unwrap();
        let mut user = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();

        assert_eq!(
            com1.lock().unwrap().write(0, b"!"),
            crate::bus::Effect::None
        );
        let mut seen = [0];
        user.read_exact(&mut seen).unwrap();
        assert_eq!(seen, *b"!");

        // More than the UART's buffer holds: the rest must wait for the guest to read.
        let typed: Vec<u8> = (b'0'..=b'z').cycle().take(500).collect();
        user.write_all(&typed).unwrap();
        assert_eq!(read_as_guest(&com1, typed.len()), typed);
    }

    fn read_as_guest(com1: &Shared<Com1>, len: usize) -> Vec<u8> {
        let (mut got, until) = (Vec::new(), Instant::now() + Duration::from_secs(10));
        while got.len() < len && Instant::now() < until {
            let (mut status, mut byte) = ([0], [0]);
            let mut uart = com1.lock().unwrap();
            uart.read(5, &mut status);
            if status[0] & 1 != 0 {
                uart.read(0, &mut byte);
                got.push(byte[0]);
            } else {
                drop(uart);
                thread::sleep(Duration::from_millis(1));
            }
        }
        got
    }

    #[test]
    fn output_that_nobody_takes_never_blocks_and_the_end_does_not_wait_for_ever() {
        let console = Console::open(&ConsoleKind::Pty).unwrap();
        console
            .output()
            .write_all(&vec![b'x'; 3 * QUEUE_LIMIT])
            .unwrap();
        let start = Instant::now();
        drop(console);
        assert!(start.elapsed() < LAST_OUTPUT * 5);
    }
}
