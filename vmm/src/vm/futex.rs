//! Waiting on a word and waking who waits on it. Owns the futex system calls and the looking before them.
//!
//! Waking a thread on a core that idles costs some 25 us where the host is itself a VM, and a stop window has up to
//! seven such hand-overs. Within one, everybody therefore looks at its word for a moment before it sleeps, as KVM does
//! before it lets a halted vCPU's thread sleep (Linux Documentation/virt/kvm/halt-polling.rst). Unlike there the one
//! waited for may need the very core that the watcher is on, so that this is offered at every look.
#![allow(unsafe_code)]

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long to sleep where only one word can be slept on.
const WITHOUT_WAITV: Duration = Duration::from_millis(5);

/// How long a word is looked at before sleeping: longer than a usual stop.
const LOOKING: Duration = Duration::from_millis(1);

/// Who shares the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Threads of this process only: cheaper.
    Private,
    /// Processes that map the same file.
    Shared,
}

impl Sharing {
    const fn flag(self) -> libc::c_int {
        match self {
            Self::Private => libc::FUTEX_PRIVATE_FLAG,
            Self::Shared => 0,
        }
    }
}

/// Sleeps while `word` holds `seen`, at most `timeout`. Can also return early for no reason: the
/// caller looks at the word again.
pub(crate) fn wait(word: &AtomicU32, seen: u32, timeout: Option<Duration>, sharing: Sharing) {
    let limit = timeout.map(timespec);
    let limit = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
    let operation = libc::FUTEX_WAIT | sharing.flag();
    // SAFETY: the word is borrowed for the whole call, and `limit` is null or points to a timespec
    // that outlives it. Every result (woken, changed, timed out, interrupted) means: look again.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, seen, limit) };
}

/// Looks at `word` while it holds `seen`, for a moment and at most `limit`: for a word that is about to change. The caller
/// sleeps then, if it has not.
pub(crate) fn look(word: &AtomicU32, seen: u32, limit: Duration) {
    let (begin, limit) = (Instant::now(), limit.min(LOOKING));
    while word.load(Ordering::SeqCst) == seen && begin.elapsed() < limit {
        thread::yield_now();
    }
}

/// Sleeps until one word or the other may have changed from what was seen, or `until` has passed (`futex_waitv`, since
/// Linux 5.16).
pub(crate) fn wait_either(words: [(&AtomicU32, u32, Sharing); 2], until: Option<Instant>) {
    let waiters = words.map(|(word, seen, sharing)| waiter(word, seen, sharing));
    let limit = until.map(|until| monotonic_in(until.saturating_duration_since(Instant::now())));
    let limit = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: both words are borrowed for the whole call, the array holds two waiters, and `limit` is
    // null or points to a timespec that outlives the call. Every result but one means: look again.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex_waitv,
            waiters.as_ptr(),
            2u32,
            0u32,
            limit,
            libc::CLOCK_MONOTONIC,
        )
    };
    let missing = io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS);
    if result < 0 && missing {
        // An older host kernel: the second word is noticed late instead.
        let [(word, seen, sharing), _] = words;
        wait(word, seen, Some(WITHOUT_WAITV), sharing);
    }
}

/// Wakes everybody who sleeps on `word`.
pub(crate) fn wake_all(word: &AtomicU32, sharing: Sharing) {
    let operation = libc::FUTEX_WAKE | sharing.flag();
    // SAFETY: FUTEX_WAKE uses the address as a key only; the word is borrowed for the whole call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, i32::MAX) };
}

/// `struct futex_waitv` of Linux include/uapi/linux/futex.h.
#[repr(C)]
struct Waiter {
    value: u64,
    address: u64,
    flags: u32,
    reserved: u32,
}

fn waiter(word: &AtomicU32, seen: u32, sharing: Sharing) -> Waiter {
    /// `FUTEX_32` of Linux include/uapi/linux/futex.h.
    const FUTEX_32: u32 = 2;
    let private = match sharing {
        Sharing::Private => libc::FUTEX_PRIVATE_FLAG.cast_unsigned(),
        Sharing::Shared => 0,
    };
    Waiter {
        value: u64::from(seen),
        address: word.as_ptr() as u64,
        flags: FUTEX_32 | private,
        reserved: 0,
    }
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

/// The monotonic clock `from_now` on: `futex_waitv` takes a point in time, not a span.
fn monotonic_in(from_now: Duration) -> libc::timespec {
    let mut now = timespec(Duration::ZERO);
    // SAFETY: the clock exists on every Linux, and `now` outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let base = Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    );
    timespec(base.saturating_add(from_now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_changed_word_is_not_waited_for() {
        let word = AtomicU32::new(1);
        wait(&word, 0, None, Sharing::Private);
        wait(&word, 0, None, Sharing::Shared);
    }

    #[test]
    fn waiting_ends_at_the_timeout() {
        let (word, other) = (AtomicU32::new(0), AtomicU32::new(0));
        let begin = Instant::now();
        let short = Duration::from_millis(20);
        wait(&word, 0, Some(short), Sharing::Private);
        let words = [(&word, 0, Sharing::Shared), (&other, 0, Sharing::Private)];
        wait_either(words, Some(Instant::now() + short));
        assert!(begin.elapsed() >= Duration::from_millis(40));
    }

    #[test]
    fn a_word_that_does_not_change_is_looked_at_for_a_moment_only() {
        let word = AtomicU32::new(0);
        for (limit, least) in [(Duration::MAX, LOOKING), (LOOKING / 4, LOOKING / 4)] {
            let begin = Instant::now();
            look(&word, 0, limit);
            let looked = begin.elapsed();
            assert!(looked >= least, "{looked:?}");
            assert!(looked < Duration::from_secs(5), "{looked:?}");
        }
        let begin = Instant::now();
        (0..1000).for_each(|_| look(&word, 1, Duration::MAX));
        assert!(begin.elapsed() < 1000 * LOOKING);
    }

    #[test]
    fn either_of_two_words_wakes() {
        for second in [false, true] {
            let words = Arc::new((AtomicU32::new(0), AtomicU32::new(0)));
            let theirs = Arc::clone(&words);
            let waker = std::thread::spawn(move || {
                let (word, sharing) = if second {
                    (&theirs.1, Sharing::Private)
                } else {
                    (&theirs.0, Sharing::Shared)
                };
                std::thread::sleep(Duration::from_millis(20));
                word.store(1, Ordering::SeqCst);
                wake_all(word, sharing);
            });
            while words.0.load(Ordering::SeqCst) + words.1.load(Ordering::SeqCst) == 0 {
                let both = [
                    (&words.0, 0, Sharing::Shared),
                    (&words.1, 0, Sharing::Private),
                ];
                wait_either(both, None);
            }
            waker.join().unwrap();
        }
    }
}
