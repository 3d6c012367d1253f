//! A virtual machine that does nothing, open as long as the test host runs.
//!
//! The host kernel rewrites its own scheduler when the first VM comes and when the last one goes (a static key, Linux v6.12
//! virt/kvm/kvm_main.c, `preempt_notifier_inc`), by way of a breakpoint. QEMU 7.2's emulation of several CPUs loses that
//! breakpoint now and then, and the host dies with "Oops: int3" in `finish_task_switch`. With one VM always open it never
//! rewrites.

use anyhow::{Context, Result};
use kvm_ioctls::Kvm;

/// Opens it and never returns.
pub(super) fn run() -> Result<i32> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let _vm = kvm.create_vm().context("cannot make a VM")?;
    loop {
        std::thread::park();
    }
}
