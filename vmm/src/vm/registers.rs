//! From KVM's register structs to one [`Vcpu`]: what is read, in which order, and how it is named. Does
//! not own when ([`super::vcpu`]).

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED,
    KVM_STATE_NESTED_GUEST_MODE, Msrs, kvm_msr_entry, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd};
use vmpatch_introspect::address::Gva;
use vmpatch_introspect::vcpu::{Activity, Vcpu};

use super::outcome::Fault;

/// IA32_LSTAR (AMD64 Architecture Programmer's Manual vol. 2 section 6.1.1).
const MSR_LSTAR: u32 = 0xc000_0082;
/// IA32_KERNEL_GS_BASE (the same, section 6.1.2).
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
/// EFER.SVME: AMD virtualisation is in use (the same, section 15.4).
const EFER_SVME: u64 = 1 << 12;
/// CR4.VMXE: Intel virtualisation is in use (Intel SDM vol. 3 section 23.7).
const CR4_VMXE: u64 = 1 << 13;

/// CR0.PG: paging is on (Intel SDM vol. 3 section 2.5).
const CR0_PAGING: u64 = 1 << 31;

/// The MSRs that go into a [`Vcpu`], in a buffer that is reused.
#[derive(Debug)]
pub(super) struct MsrReader(Option<Msrs>);

impl MsrReader {
    pub(super) fn new() -> Self {
        let entry = |index| kvm_msr_entry {
            index,
            ..Default::default()
        };
        Self(Msrs::from_entries(&[entry(MSR_LSTAR), entry(MSR_KERNEL_GS_BASE)]).ok())
    }

    /// LSTAR and KERNEL_GS_BASE; KVM reads MSRs in order and stops at the first it does not have.
    fn read(&mut self, vcpu: &VcpuFd) -> [Option<Gva>; 2] {
        let Some(msrs) = self.0.as_mut() else {
            return [None; 2];
        };
        let count = vcpu.get_msrs(msrs).unwrap_or(0);
        let read = msrs.as_slice();
        [0, 1].map(|at| read.get(at).filter(|_| at < count).map(|msr| Gva(msr.data)))
    }
}

/// What KVM stores in one go when a vCPU leaves `KVM_RUN`.
#[derive(Clone, Copy)]
pub(super) struct Core {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) smm: bool,
}

impl Core {
    /// Whether the vCPU is past its start-up, so that it runs or is halted: INIT switches paging off (Intel SDM
    /// vol. 3, "Processor State After Reset").
    pub(super) const fn is_started(&self) -> bool {
        self.sregs.cr0 & CR0_PAGING != 0
    }
}

/// Reads the multiprocessing state. KVM delivers a pending INIT or start-up IPI here, which changes the
/// registers (Linux arch/x86/kvm/x86.c, kvm_arch_vcpu_ioctl_get_mpstate): what was read before is then what
/// the vCPU held when it left the guest, and a vCPU that waits has no use for either.
pub(super) fn activity(vcpu: &VcpuFd) -> Result<Activity, Fault> {
    let state = vcpu
        .get_mp_state()
        .map_err(|source| ioctl("KVM_GET_MP_STATE", source))?;
    Ok(match state.mp_state {
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::WaitingForSipi,
        KVM_MP_STATE_HALTED => Activity::Halted,
        _ => Activity::Running,
    })
}

/// General and system registers by one ioctl each.
pub(super) fn core(vcpu: &mut VcpuFd) -> Result<Core, Fault> {
    Ok(Core {
        regs: vcpu
            .get_regs()
            .map_err(|source| ioctl("KVM_GET_REGS", source))?,
        sregs: vcpu
            .get_sregs()
            .map_err(|source| ioctl("KVM_GET_SREGS", source))?,
        smm: in_smm(vcpu),
    })
}

/// Whether the vCPU was in system-management mode when it last left `KVM_RUN`.
pub(super) fn in_smm(vcpu: &mut VcpuFd) -> bool {
    u32::from(vcpu.get_kvm_run().flags) & kvm_bindings::KVM_RUN_X86_SMM != 0
}

/// Everything together.
pub(super) fn vcpu(
    index: u32,
    activity: Activity,
    core: &Core,
    msrs: &mut MsrReader,
    fd: &VcpuFd,
) -> Vcpu {
    let (regs, sregs) = (&core.regs, &core.sregs);
    let [lstar, kernel_gs_base] = msrs.read(fd);
    Vcpu {
        index,
        activity,
        general: general(regs),
        rip: Gva(regs.rip),
        rflags: regs.rflags,
        cs: sregs.cs.selector,
        ss: sregs.ss.selector,
        cpl: sregs.ss.dpl,
        fs_base: Gva(sregs.fs.base),
        gs_base: Gva(sregs.gs.base),
        kernel_gs_base,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
        idt_base: Gva(sregs.idt.base),
        gdt_base: Gva(sregs.gdt.base),
        tss_base: Gva(sregs.tr.base),
        lstar,
        smm: core.smm,
        nested_guest: runs_nested_guest(fd, sregs),
    }
}

const fn general(regs: &kvm_regs) -> [u64; 16] {
    [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]
}

/// Whether the registers may be those of a guest of the guest. Asked of KVM only where the guest has
/// virtualisation switched on; both bits stay on in the nested guest too. No answer counts as yes.
pub(super) fn runs_nested_guest(vcpu: &VcpuFd, sregs: &kvm_sregs) -> bool {
    if sregs.efer & EFER_SVME == 0 && sregs.cr4 & CR4_VMXE == 0 {
        return false;
    }
    let mut state = Box::new(KvmNestedStateBuffer::empty());
    match vcpu.nested_state(&mut state) {
        Ok(_) => u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0,
        Err(_) => true,
    }
}

pub(super) const fn ioctl(operation: &'static str, source: kvm_ioctls::Error) -> Fault {
    Fault::Ioctl { operation, source }
}
