//! Lines and descriptors on a Unix socket, bounded on both sides. Owns reading and writing; knows no
//! message.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The most descriptors beside one line.
const MAX_FDS: usize = 8;
/// Bytes taken from the socket at a time.
const CHUNK: usize = 16 << 10;

/// Lines as they come. Descriptors belong to the first line that is complete when they arrive: whoever sends
/// some waits for its earlier lines to be read, as a server does that answers one request at a time.
#[derive(Debug, Default)]
pub(crate) struct LineReader {
    pending: Vec<u8>,
    files: Vec<File>,
}

/// One line, without its newline.
pub(crate) struct Line {
    pub(crate) text: Vec<u8>,
    pub(crate) files: Vec<File>,
}

impl LineReader {
    /// The next line, or `None` at the end of the stream (an unfinished line is dropped).
    ///
    /// # Errors
    /// A line longer than `max`, or what the host kernel said.
    pub(crate) fn next(&mut self, stream: &UnixStream, max: usize) -> io::Result<Option<Line>> {
        let mut searched = 0;
        loop {
            let fresh = self.pending.get(searched..).unwrap_or_default();
            if let Some(at) = fresh.iter().position(|&byte| byte == b'\n') {
                return Ok(Some(self.take(searched + at)));
            }
            searched = self.pending.len();
            if searched >= max {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if self.receive(stream)? == 0 {
                return Ok(None);
            }
        }
    }

    fn take(&mut self, end: usize) -> Line {
        let rest = self.pending.split_off(end + 1);
        let mut text = std::mem::replace(&mut self.pending, rest);
        text.pop();
        let files = std::mem::take(&mut self.files);
        Line { text, files }
    }

    fn receive(&mut self, stream: &UnixStream) -> io::Result<usize> {
        let mut bytes = vec![0u8; CHUNK];
        let mut fds: [RawFd; MAX_FDS] = [-1; MAX_FDS];
        let (count, received) = receive(stream, &mut bytes, &mut fds)?;
        let fds = fds.iter().take(received);
        // Owned all at once: whatever fails from here on, none stays open.
        let received = fds
            // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
            .map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) })
            .collect();
        self.files.extend(copies(received, OwnedFd::try_clone)?);
        // A peer that sends descriptors without a line gets none kept.
        self.files.truncate(MAX_FDS);
        self.pending
            .extend_from_slice(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// Copies, for they close on exec, which received descriptors do not.
fn copies(
    received: Vec<OwnedFd>,
    copy: impl Fn(&OwnedFd) -> io::Result<OwnedFd>,
) -> io::Result<Vec<File>> {
    received
        .into_iter()
        .map(|fd| Ok(copy(&fd)?.into()))
        .collect()
}

fn receive(stream: &UnixStream, bytes: &mut [u8], fds: &mut [RawFd]) -> io::Result<(usize, usize)> {
    loop {
        let mut into = [libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }];
        // SAFETY: the one buffer is `bytes`, borrowed for the whole call.
        match unsafe { stream.recv_with_fds(&mut into, fds) } {
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(io::Error::from_raw_os_error(error.errno())),
            Ok(counts) => return Ok(counts),
        }
    }
}

/// Sends a line, and the descriptors with its first byte.
///
/// # Errors
/// What the host kernel said; a peer that does not read in the socket's time limit is an error.
pub(crate) fn send(mut stream: &UnixStream, line: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = match raw.is_empty() {
        true => 0,
        false => stream
            .send_with_fds(&[line], &raw)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?,
    };
    stream.write_all(line.get(sent..).unwrap_or_default())?;
    stream.write_all(b"\n")
}

/// Whether the other side has closed the connection.
pub(crate) fn hung_up(stream: &UnixStream) -> bool {
    let mut poll = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one pollfd, borrowed for the whole call, which does not wait.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready == 1 && poll.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// User id of the process at the other end, as it was when it connected.
///
/// # Errors
/// What the host kernel said.
pub(crate) fn peer_uid(stream: &UnixStream) -> io::Result<u32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut len = libc::socklen_t::try_from(size_of_val(&peer)).unwrap_or(0);
    // SAFETY: the option is a `struct ucred`, and `len` is the size of the one given.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(peer.uid),
        _ => Err(io::Error::last_os_error()),
    }
}

/// This process's effective user id.
pub(crate) fn own_uid() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::os::fd::AsFd;

    #[test]
    fn lines_are_told_apart_however_they_arrive() {
        let (mut from, to) = UnixStream::pair().unwrap();
        from.write_all(b"one\ntwo\nthr").unwrap();
        let mut reader = LineReader::default();
        let mut next = || reader.next(&to, 100).unwrap().map(|line| line.text);
        assert_eq!(next().unwrap(), b"one");
        assert_eq!(next().unwrap(), b"two");
        from.write_all(b"ee\nfour").unwrap();
        drop(from);
        assert_eq!(next().unwrap(), b"three");
        assert_eq!(next(), None);
    }

    #[test]
    fn a_line_without_end_is_an_error() {
        let (mut from, to) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || from.write_all(&vec![b'x'; 100_000]));
        assert!(LineReader::default().next(&to, 50_000).is_err());
        drop(to);
        assert!(writer.join().is_ok());
    }

    #[test]
    fn descriptors_arrive_with_their_line() {
        let (from, to) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"inside").unwrap();
        file.rewind().unwrap();
        let mut reader = LineReader::default();
        send(&from, b"plain", &[]).unwrap();
        assert!(reader.next(&to, 100).unwrap().unwrap().files.is_empty());
        send(&from, b"with one", &[file.as_fd()]).unwrap();
        let mut line = reader.next(&to, 100).unwrap().unwrap();
        let mut text = String::new();
        line.files[0].read_to_string(&mut text).unwrap();
        assert_eq!(
            (line.text.as_slice(), text.as_str()),
            (&b"with one"[..], "inside")
        );
    }

    #[test]
    fn no_descriptor_stays_open_when_one_cannot_be_copied() {
        let (here, there) = UnixStream::pair().unwrap();
        let received = (0..3).map(|_| there.as_fd().try_clone_to_owned().unwrap());
        let received: Vec<OwnedFd> = received.collect();
        drop(there);
        let last = received[2].as_raw_fd();
        let copied = copies(received, |fd| {
            let fails = fd.as_raw_fd() == last;
            if fails {
                return Err(io::ErrorKind::Other.into());
            }
            fd.try_clone()
        });
        assert!(copied.is_err());
        assert!(hung_up(&here));
    }

    #[test]
    fn a_closed_peer_is_noticed_and_known() {
        let (from, to) = UnixStream::pair().unwrap();
        assert!(!hung_up(&to));
        assert_eq!(peer_uid(&to).unwrap(), own_uid());
        drop(from);
        assert!(hung_up(&to));
    }
}
