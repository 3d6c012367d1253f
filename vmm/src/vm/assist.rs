//! Help for a KVM without hardware virtualisation (the PVM kind), whose emulator does not know every
//! instruction that a Linux kernel executes while it boots. Opt-in; owns nothing else.

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::VcpuFd;

/// The one-byte breakpoint instruction: alternatives test themselves with it at boot.
const INT3: u8 = 0xcc;
/// Waits for floating-point exceptions: every thread that ends executes it (Linux v6.12
/// arch/x86/kernel/fpu/core.c, `fpu__drop`).
const FWAIT: u8 = 0x9b;
/// Vector of #BP (Intel SDM vol. 3 section 7.3).
const BREAKPOINT: u8 = 3;
/// CR0.TS: with it set FWAIT faults, to load floating-point state lazily. Linux no longer sets it.
const TASK_SWITCHED: u64 = 1 << 3;

/// If the vCPU stands at an instruction that KVM could not emulate and that we know: does what the CPU
/// would. Whether it could help.
pub(super) fn help(vcpu: &VcpuFd, suberror: u32, code: &[u8]) -> bool {
    if suberror != KVM_INTERNAL_ERROR_EMULATION {
        return false;
    }
    match code.first() {
        Some(&INT3) => breakpoint(vcpu).is_ok(),
        Some(&FWAIT) => wait(vcpu).unwrap_or(false),
        _ => false,
    }
}

/// The kernel itself computes nothing in floating point, so no exception is pending: nothing to wait for.
fn wait(vcpu: &VcpuFd) -> Result<bool, kvm_ioctls::Error> {
    if vcpu.get_sregs()?.cr0 & TASK_SWITCHED != 0 {
        return Ok(false);
    }
    let mut regs = vcpu.get_regs()?;
    regs.rip = regs.rip.wrapping_add(1);
    vcpu.set_regs(&regs)?;
    Ok(true)
}

/// Raises #BP with RIP past the instruction, for it is a trap.
fn breakpoint(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut regs = vcpu.get_regs()?;
    regs.rip = regs.rip.wrapping_add(1);
    vcpu.set_regs(&regs)?;
    let mut events = vcpu.get_vcpu_events()?;
    events.exception.injected = 1;
    events.exception.nr = BREAKPOINT;
    events.exception.has_error_code = 0;
    vcpu.set_vcpu_events(&events)
}
