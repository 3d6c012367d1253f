//! A guest's console: every line it printed, and commands typed at it. Knows the guest's init protocol, no more.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Lines that came from a guest, kept for as long as the guest is.
pub struct Console {
    shared: Arc<Shared>,
    input: Box<dyn Write + Send>,
}

#[derive(Default)]
struct Shared {
    lines: Mutex<Lines>,
    more: Condvar,
}

#[derive(Default)]
struct Lines {
    all: Vec<String>,
    ended: bool,
}

impl Console {
    /// Reads from the guest in a thread of its own until it ends.
    pub fn new(output: impl Read + Send + 'static, input: impl Write + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        thread::spawn(move || writer.collect(output));
        Self {
            shared,
            input: Box::new(input),
        }
    }

    /// Starts a process and reads its output. The thread that starts it reads until the end, so a process that asks to die with the
    /// thread that started it (`setpriv --pdeathsig`) dies with this program and not before.
    ///
    /// # Errors
    /// It does not start.
    pub(crate) fn of_process(mut command: Command) -> Result<(Self, Child)> {
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        let (send, receive) = mpsc::channel();
        thread::spawn(move || {
            let (output, started) = match command.spawn() {
                Ok(mut child) => (child.stdout.take(), Ok(child)),
                Err(error) => (None, Err(error)),
            };
            // Whoever waits for the process is still there: it waits below.
            let _ = send.send(started);
            if let Some(output) = output {
                writer.collect(output);
            }
        });
        let started = receive
            .recv()
            .context("the thread that starts the process is gone")?;
        let mut child = started.context("cannot start the process")?;
        let input = child.stdin.take().context("no input pipe")?;
        let input = Box::new(input);
        Ok((Self { shared, input }, child))
    }

    /// How many lines there are by now: a place to wait from.
    #[must_use]
    pub fn mark(&self) -> usize {
        self.shared.lock().all.len()
    }

    /// All lines since `mark`.
    #[must_use]
    pub fn since(&self, mark: usize) -> Vec<String> {
        self.shared.lock().all.iter().skip(mark).cloned().collect()
    }

    /// The first line from `mark` on for which `wanted` holds, with the mark after it.
    ///
    /// # Errors
    /// The time is over or the guest ended; the message holds the last lines.
    pub fn wait(
        &self,
        mark: usize,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(String, usize)> {
        let until = Instant::now() + limit;
        let (mut lines, mut at) = (self.shared.lock(), mark);
        loop {
            while let Some(line) = lines.all.get(at) {
                at += 1;
                if wanted(line) {
                    return Ok((line.clone(), at));
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || lines.ended {
                let why = if lines.ended {
                    "the guest's console ended"
                } else {
                    "the guest did not say it in time"
                };
                bail!(
                    "{why}; its last lines:\n{}",
                    lines.all[lines.all.len().saturating_sub(15)..].join("\n")
                );
            }
            lines = self
                .shared
                .more
                .wait_timeout(lines, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Types a shell command and returns what it printed.
    ///
    /// # Errors
    /// No answer in time, or the command failed.
    pub fn ask(&mut self, command: &str, limit: Duration) -> Result<Vec<String>> {
        let mark = self.mark();
        self.type_line(command)?;
        let (_, begin) = self.wait(mark, limit, |l| l == "@begin")?;
        let (end, after) = self.wait(begin, limit, |l| l.starts_with("@end "))?;
        if end != "@end 0" {
            bail!("`{command}` in the guest ended with {end}");
        }
        let lines = self.since(begin);
        let answered = lines.into_iter().take(after - begin - 1);
        Ok(answered.filter(|l| !l.starts_with("@loop ")).collect())
    }

    /// Types a line and waits for nothing.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.input
            .write_all(format!("{line}\n").as_bytes())
            .context("cannot type at the guest")?;
        self.input.flush().context("cannot type at the guest")
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn collect(&self, output: impl Read) {
        let mut reader = BufReader::new(output);
        let mut bytes = Vec::new();
        while matches!(reader.read_until(b'\n', &mut bytes), Ok(n) if n > 0) {
            let line = String::from_utf8_lossy(&bytes)
                .trim_end_matches(['\r', '\n'])
                .to_owned();
            bytes.clear();
            self.lock().all.push(line);
            self.more.notify_all();
        }
        self.lock().ended = true;
        self.more.notify_all();
    }
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console")
            .field("lines", &self.mark())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, sink};

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn an_answer_is_what_stands_between_begin_and_end() {
        let mut console = Console::new(
            Cursor::new("boot\r\n@begin\r\none\r\n@loop x\r\ntwo\r\n@end 0\r\n"),
            sink(),
        );
        // All lines are there before the question, so ask from the beginning.
        let (_, begin) = console.wait(0, SOON, |l| l == "@begin").unwrap();
        let (end, _) = console
            .wait(begin, SOON, |l| l.starts_with("@end"))
            .unwrap();
        assert_eq!(end, "@end 0");
        assert!(console.type_line("x").is_ok());
    }

    #[test]
    fn a_process_is_typed_at_and_read() {
        use std::process::Stdio;
        let mut cat = Command::new("cat");
        cat.stdin(Stdio::piped()).stdout(Stdio::piped());
        let (mut console, mut child) = Console::of_process(cat).unwrap();
        console.type_line("hello").unwrap();
        console.wait(0, SOON, |l| l == "hello").unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_guest_that_ends_is_not_waited_for() {
        let console = Console::new(Cursor::new("last words\n"), sink());
        let error = console.wait(0, SOON, |_| false).unwrap_err().to_string();
        assert!(
            error.contains("ended") && error.contains("last words"),
            "{error}"
        );
    }
}
