//! Input on its way from the host to COM1: a thread that reads, waits for the guest to take it, and ends
//! when told. Owns the thread; what file it reads is [`super::console`]'s.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::serial::Com1;
use super::tty;
use crate::bus::Shared;

/// How often a guest that reads no input is offered it again.
const RETRY: Duration = Duration::from_millis(50);
/// Ctrl-]: ends the machine when typed at a terminal in raw mode, where Ctrl-C goes to the guest.
const QUIT_KEY: u8 = 0x1d;

/// What the user's wish to end the machine calls.
pub type Quit = Box<dyn Fn() + Send>;

/// What input comes from.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) file: File,
    /// Keeps the far side of a pseudo-terminal open: else reads fail while nobody is connected.
    pub(super) _far_side: Option<File>,
    /// Whether somebody types at it in raw mode, so that the quit key counts.
    pub(super) typed: bool,
}

/// The thread that gives input to COM1; dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Reader {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    pub(super) fn start(input: Input, com1: Shared<Com1>, quit: Quit) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("console-in".into())
            .spawn(move || feed_all(input, &com1, &stopped, &*quit))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // A reader that cannot be told is left alone rather than waited for.
        let told = self.stop.write(1).is_ok();
        if let Some(thread) = self.thread.take()
            && told
        {
            drop(thread.join());
        }
    }
}

/// Gives all input to `com1` until the input ends, the user quits, or `stopped` is written to.
fn feed_all(mut input: Input, com1: &Shared<Com1>, stopped: &EventFd, quit: &dyn Fn()) {
    let mut room = [0; 64];
    while let Some(bytes) = next(&mut input.file, stopped, &mut room) {
        if input.typed && bytes.contains(&QUIT_KEY) {
            return quit();
        }
        if !feed(bytes, com1, stopped) {
            return;
        }
    }
}

/// The next input; `None` at its end, or when told to stop.
fn next<'a>(file: &mut File, stopped: &EventFd, room: &'a mut [u8]) -> Option<&'a [u8]> {
    loop {
        match tty::wait_readable(file.as_raw_fd(), stopped.as_raw_fd()) {
            Ok((_, true)) | Err(_) => return None,
            Ok((false, _)) => continue,
            Ok((true, _)) => {}
        }
        match file.read(room) {
            Ok(0) => return None,
            Ok(read) => return room.get(..read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

/// Gives all of `bytes`, waiting for the guest to read; `false` when told to stop before.
fn feed(mut bytes: &[u8], com1: &Shared<Com1>, stopped: &EventFd) -> bool {
    while !bytes.is_empty() {
        let mut uart = com1.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = uart.feed(bytes);
        let drained = uart.drained();
        drop(uart);
        bytes = bytes.get(taken..).unwrap_or_default();
        if taken == 0 {
            drained.wait(RETRY);
            if stopped.read().is_ok() {
                return false;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Device;
    use std::io::Write;
    use std::sync::Mutex;
    use std::sync::mpsc;

    /// Input that is a pipe: its writing end, and whether the user quit.
    fn piped(typed: bool) -> (io::PipeWriter, Reader, Shared<Com1>, mpsc::Receiver<()>) {
        let (reader, writer) = io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(reader));
        let (com1, _line) = Com1::new(Box::new(io::sink())).unwrap();
        let com1 = Arc::new(Mutex::new(com1));
        let (quit, quitted) = mpsc::channel();
        let input = Input {
            file,
            _far_side: None,
            typed,
        };
        let quit = Box::new(move || quit.send(()).unwrap());
        let reader = Reader::start(input, Arc::clone(&com1), quit).unwrap();
        (writer, reader, com1, quitted)
    }

    #[test]
    fn the_quit_key_typed_at_a_terminal_ends_the_machine() {
        let (mut writer, _reader, _, quitted) = piped(true);
        writer.write_all(b"ls\x1d").unwrap();
        assert_eq!(quitted.recv_timeout(Duration::from_secs(10)), Ok(()));
    }

    #[test]
    fn piped_input_holds_any_byte() {
        let (mut writer, reader, com1, quitted) = piped(false);
        writer.write_all(b"\x1d").unwrap();
        drop(writer);
        let mut byte = [0];
        for _ in 0..1000 {
            com1.lock().unwrap().read(0, &mut byte);
            if byte == [QUIT_KEY] {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(byte, [QUIT_KEY]);
        drop(reader);
        assert!(quitted.try_recv().is_err());
    }

    #[test]
    fn a_guest_that_never_reads_does_not_hold_the_end() {
        let (mut writer, reader, _com1, _quitted) = piped(false);
        writer.write_all(&[b'x'; 4096]).unwrap();
        let (done, ended) = mpsc::channel();
        thread::spawn(move || {
            drop(reader);
            done.send(()).unwrap();
        });
        assert_eq!(ended.recv_timeout(Duration::from_secs(10)), Ok(()));
    }
}
