//! Terminal plumbing: raw mode that is put back, a pseudo-terminal, waiting for input. The only `unsafe`
//! of the devices.
#![allow(unsafe_code)]

use std::ffi::{CStr, OsStr};
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// A terminal in raw mode; dropping it restores what was there.
#[derive(Debug)]
pub(super) struct RawMode {
    tty: OwnedFd,
    before: libc::termios,
}

impl RawMode {
    /// Puts `tty` into raw mode; `None` if it is no terminal.
    pub(super) fn enter(tty: OwnedFd) -> Option<Self> {
        let before = attributes(&tty)?;
        let mut raw = before;
        // SAFETY: takes a valid termios that nobody else refers to.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // The console's output is the guest's own terminal stream, but our own messages still want
        // carriage returns.
        raw.c_oflag = before.c_oflag;
        set_attributes(&tty, &raw).ok()?;
        Some(Self { tty, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing to be done if the terminal has gone.
        let _gone = set_attributes(&self.tty, &self.before);
    }
}

/// A pseudo-terminal: our side, the other side held open (else reads fail while nobody is connected),
/// and the path by which somebody connects.
pub(super) struct Pty {
    pub(super) master: File,
    pub(super) held: File,
    pub(super) path: PathBuf,
}

/// Opens a new pseudo-terminal in raw mode.
pub(super) fn open_pty() -> io::Result<Pty> {
    // SAFETY: takes flags only.
    let fd = unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    check(fd)?;
    // SAFETY: the descriptor is new and owned by nobody else.
    let master = unsafe { File::from_raw_fd(fd) };
    // SAFETY: the descriptor is open.
    check(unsafe { libc::grantpt(fd) })?;
    // SAFETY: the descriptor is open.
    check(unsafe { libc::unlockpt(fd) })?;
    let mut name = [0_u8; 128];
    // SAFETY: the buffer is as long as said, and lives through the call.
    let failed = unsafe { libc::ptsname_r(fd, name.as_mut_ptr().cast(), name.len()) };
    if failed != 0 {
        return Err(io::Error::from_raw_os_error(failed));
    }
    let name = CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
    let path = PathBuf::from(OsStr::from_bytes(name.to_bytes()));
    let held = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(&path)?;
    make_raw(&held)?;
    Ok(Pty { master, held, path })
}

fn make_raw(tty: &File) -> io::Result<()> {
    let mut raw = attributes(tty).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: takes a valid termios that nobody else refers to.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    set_attributes(tty, &raw)
}

/// Waits until one of the two descriptors can be read or has hung up; whether it is the first.
pub(super) fn wait_readable(first: RawFd, second: RawFd) -> io::Result<(bool, bool)> {
    let wait = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds = [wait(first), wait(second)];
    // SAFETY: two entries are passed and two are there.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        let interrupted = error.kind() == io::ErrorKind::Interrupted;
        return if interrupted {
            Ok((false, false))
        } else {
            Err(error)
        };
    }
    let [first, second] = fds;
    Ok((first.revents != 0, second.revents != 0))
}

fn attributes(tty: &impl AsRawFd) -> Option<libc::termios> {
    let mut termios = MaybeUninit::uninit();
    // SAFETY: the pointer is to room for one termios.
    let failed = unsafe { libc::tcgetattr(tty.as_raw_fd(), termios.as_mut_ptr()) };
    // SAFETY: tcgetattr filled it in when it says so.
    (failed == 0).then(|| unsafe { termios.assume_init() })
}

fn set_attributes(tty: &impl AsRawFd, termios: &libc::termios) -> io::Result<()> {
    // SAFETY: the reference is to a valid termios.
    check(unsafe { libc::tcsetattr(tty.as_raw_fd(), libc::TCSANOW, termios) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echoes(tty: &File) -> bool {
        attributes(tty).unwrap().c_lflag & libc::ECHO != 0
    }

    #[test]
    fn raw_mode_ends_with_its_guard() {
        let pty = open_pty().unwrap();
        let mut cooked = attributes(&pty.held).unwrap();
        cooked.c_lflag |= libc::ECHO | libc::ICANON | libc::ISIG;
        set_attributes(&pty.held, &cooked).unwrap();
        let raw = RawMode::enter(pty.held.try_clone().unwrap().into()).unwrap();
        assert!(!echoes(&pty.held));
        drop(raw);
        assert!(echoes(&pty.held));
        assert_eq!(
            attributes(&pty.held).unwrap().c_lflag,
            cooked.c_lflag,
            "everything else is as before too"
        );
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let null = File::open("/dev/null").unwrap();
        assert!(RawMode::enter(null.into()).is_none());
    }
}
