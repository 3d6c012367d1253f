//! Getting a vCPU thread out of `KVM_RUN`, with its registers: its `immediate_exit` byte, its
//! `kvm_valid_regs` mask and a realtime signal whose handler does nothing. Owns the signal number and the
//! pointers into the shared `kvm_run` page.
//!
//! The byte makes the *next* `KVM_RUN` return at once, the signal ends the one under way; together they
//! leave no gap (Linux Documentation/virt/kvm/api.rst, "immediate_exit").
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
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
    exit: ImmediateExit,
    thread: libc::pthread_t,
}

/// The words of a vCPU's `kvm_run` page that make the next `KVM_RUN` return at once, and store registers then.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImmediateExit {
    byte: *const AtomicU8,
    mask: *const AtomicU64,
    /// What KVM shall store on exit; 0 where it cannot.
    wanted_regs: u64,
}

// SAFETY: the pointers are only used as atomics, by the vCPU thread while it has its vCPU, and by others between
// `arm` and `disarm`, during which the vCPU thread keeps the mapping that they point into.
unsafe impl Send for ImmediateExit {}

impl Kicker {
    /// Called by the vCPU thread itself, which keeps the vCPU that `exit` is of until it has called `disarm`.
    pub(super) fn arm(&self, exit: ImmediateExit) {
        // SAFETY: takes nothing and cannot fail.
        let thread = unsafe { libc::pthread_self() };
        *self.lock() = Some(Armed { exit, thread });
    }

    /// After this returns nobody touches the vCPU or signals the thread.
    pub(super) fn disarm(&self) {
        *self.lock() = None;
    }

    /// Makes the thread leave `KVM_RUN`, or return from the next one at once.
    pub(super) fn kick(&self) {
        let armed = self.lock();
        if let Some(armed) = armed.as_ref() {
            armed.exit.ask(true);
            // SAFETY: the thread is alive: it takes this lock to disarm before it ends.
            unsafe { libc::pthread_kill(armed.thread, signal_number()) };
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Armed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ImmediateExit {
    /// Of this vCPU. `wanted_regs` is what KVM stores when a kick makes it leave the guest (KVM_SYNC_X86_*).
    ///
    /// # Safety
    /// The vCPU must outlive every use of the value and of its copies.
    pub(super) unsafe fn of(vcpu: &mut VcpuFd, wanted_regs: u64) -> Self {
        let run = vcpu.get_kvm_run();
        let byte = &raw mut run.immediate_exit;
        let mask = &raw mut run.kvm_valid_regs;
        Self {
            byte: byte.cast_const().cast(),
            mask: mask.cast_const().cast(),
            wanted_regs,
        }
    }

    /// Asks for the next `KVM_RUN` to return at once, or no longer. Without a lock, which a kicker holds while it
    /// sends its signal: the vCPU thread would wait for that. Where both ask at once, KVM may store no registers,
    /// which shows, or store them in vain.
    pub(super) fn ask(&self, exit: bool) {
        // The mask first: whoever sees the byte is to find the mask.
        let mask = if exit { self.wanted_regs } else { 0 };
        self.mask().store(mask, Ordering::SeqCst);
        self.byte().store(u8::from(exit), Ordering::SeqCst);
    }

    fn mask(&self) -> &AtomicU64 {
        // SAFETY: as for the byte below; the kernel reads the mask on its way out of KVM_RUN and takes any
        // change of it (Linux arch/x86/kvm/x86.c, store_regs).
        unsafe { &*self.mask }
    }

    fn byte(&self) -> &AtomicU8 {
        // SAFETY: it points to a byte of the mapped `kvm_run` page, which is kept until `disarm`, and
        // the kernel too treats the byte as one that any thread may change at any time.
        unsafe { &*self.byte }
    }
}
