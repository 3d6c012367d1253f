//! A guest for this crate's own tests.

use std::sync::Arc;

use kvm_ioctls::Kvm;
use vmpatch_introspect::address::Gpa;

use super::{Options, Running, Vm};
use crate::bus::Bus;
use crate::memory::{GuestMemory, Layout};

/// One vCPU in 16-bit code that spins; `None`, loudly, where there is no KVM.
pub(crate) fn spinning() -> Option<Arc<Running>> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("SKIPPED: no /dev/kvm on this machine: {error}");
            return None;
        }
    };
    let memory = GuestMemory::new(Layout::new(2 << 20, 40).unwrap()).unwrap();
    // jmp self
    memory.write(Gpa(0x1000), &[0xeb, 0xfe]).unwrap();
    let mut vm = Vm::new(&kvm, memory, Options::default()).unwrap();
    let vcpu = vm.add_vcpu().unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs).unwrap();
    Some(vm.start(Arc::new(Bus::default())).unwrap())
}
