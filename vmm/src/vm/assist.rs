//! Help for a KVM without hardware virtualisation (the PVM kind), which hands `int3` back instead of
//! raising #BP. Opt-in; owns nothing else.

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::VcpuFd;

/// The one-byte breakpoint instruction.
const INT3: u8 = 0xcc;
/// Vector of #BP (Intel SDM vol. 3 section 7.3).
const BREAKPOINT: u8 = 3;

/// If the vCPU stands at an `int3` that KVM could not emulate: raises #BP as the CPU would, with RIP past
/// the instruction, for it is a trap. Whether it could help.
pub(super) fn breakpoint(vcpu: &VcpuFd, suberror: u32, code: &[u8]) -> bool {
    if suberror != KVM_INTERNAL_ERROR_EMULATION || code.first() != Some(&INT3) {
        return false;
    }
    inject(vcpu).is_ok()
}

fn inject(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut regs = vcpu.get_regs()?;
    regs.rip = regs.rip.wrapping_add(1);
    vcpu.set_regs(&regs)?;
    let mut events = vcpu.get_vcpu_events()?;
    events.exception.injected = 1;
    events.exception.nr = BREAKPOINT;
    events.exception.has_error_code = 0;
    vcpu.set_vcpu_events(&events)
}
