//! Getting a vCPU thread out of `KVM_RUN`: its `immediate_exit` byte and a realtime signal whose
//! handler does nothing. Owns the signal number and the pointer into the shared `kvm_run` page.
//!
//! The byte makes the *next* `KVM_RUN` return at once, the signal ends the one under way; together they
//! leave no gap (Linux Documentation/virt/kvm/api.rst, "immediate_exit").
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

extern "C" fn do_nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The signal that ends a `KVM_RUN`. Not the first realtime signal: C libraries take from the low end.
fn signal_number() -> libc::c_int {
    SIGRTMIN() + 5
}

/// Installs the handler, once a process: without one the signal would end it.
///
/// # Errors
/// What sigaction said.
pub(super) fn install_handler() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    DONE.get_or_init(|| {
        register_signal_handler(signal_number(), do_nothing).map_err(|error| error.errno())
    })
    .map_err(io::Error::from_raw_os_error)
}

/// How to reach one vCPU thread from any other. Reaches nobody before [`arm`](Self::arm) and after
/// [`disarm`](Self::disarm).
#[derive(Debug, Default)]
pub(super) struct Kicker(Mutex<Option<Armed>>);

#[derive(Debug)]
struct Armed {
    immediate_exit: *const AtomicU8,
    thread: libc::pthread_t,
}

// SAFETY: the pointer is only used as an atomic byte, and only between `arm` and `disarm`, while the
// mapping it points into is kept by the vCPU thread.
unsafe impl Send for Armed {}

impl Kicker {
    /// Called by the vCPU thread itself, which keeps `vcpu` until it has called `disarm`.
    pub(super) fn arm(&self, vcpu: &mut VcpuFd) {
        let byte = &raw mut vcpu.get_kvm_run().immediate_exit;
        // SAFETY: takes nothing and cannot fail.
        let thread = unsafe { libc::pthread_self() };
        *self.lock() = Some(Armed {
            immediate_exit: byte.cast_const().cast(),
            thread,
        });
    }

    /// After this returns nobody touches the vCPU or signals the thread.
    pub(super) fn disarm(&self) {
        *self.lock() = None;
    }

    /// Makes the thread leave `KVM_RUN`, or return from the next one at once.
    pub(super) fn kick(&self) {
        let armed = self.lock();
        if let Some(armed) = armed.as_ref() {
            armed.byte().store(1, Ordering::SeqCst);
            // SAFETY: the thread is alive: it takes this lock to disarm before it ends.
            unsafe { libc::pthread_kill(armed.thread, signal_number()) };
        }
    }

    /// Sets or clears the byte without a signal: the vCPU thread's own use.
    pub(super) fn set_immediate_exit(&self, exit: bool) {
        if let Some(armed) = self.lock().as_ref() {
            armed.byte().store(u8::from(exit), Ordering::SeqCst);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Armed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Armed {
    fn byte(&self) -> &AtomicU8 {
        // SAFETY: it points to a byte of the mapped `kvm_run` page, which is kept until `disarm`, and
        // the kernel too treats the byte as one that any thread may change at any time.
        unsafe { &*self.immediate_exit }
    }
}
