//! A virtual CPU as read while it stands outside guest mode: plain numbers, no hypervisor types.

use serde::{Deserialize, Serialize};

use crate::address::Gva;

/// What the vCPU was doing when it was stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activity {
    /// Executing instructions.
    Running,
    /// In HLT, waiting for an interrupt.
    Halted,
    /// An application processor that has not had its start-up IPI: it has no kernel stack.
    WaitingForSipi,
}

/// Registers of one vCPU, consistent with each other (pending I/O completed).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Vcpu {
    /// The hypervisor's number of it, from 0. Not the guest's CPU number, though usually equal.
    pub index: u32,
    /// What it was doing.
    pub activity: Activity,
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15: the order of the x86 encoding.
    pub general: [u64; 16],
    /// Instruction pointer.
    pub rip: Gva,
    /// Flags.
    pub rflags: u64,
    /// Code segment selector; its low two bits are the privilege level (but see `cpl`).
    pub cs: u16,
    /// Stack segment selector.
    pub ss: u16,
    /// Current privilege level, 0 to 3 (DPL of SS, Intel SDM vol. 3 section 5.5).
    pub cpl: u8,
    /// Base of FS: the thread pointer in user mode.
    pub fs_base: Gva,
    /// Base of GS now.
    pub gs_base: Gva,
    /// The base that SWAPGS would load, where the hypervisor tells it.
    pub kernel_gs_base: Option<Gva>,
    /// CR0.
    pub cr0: u64,
    /// CR2: address of the last page fault.
    pub cr2: u64,
    /// CR3: page-table root, PCID and, under KPTI, the user-half bit 12.
    pub cr3: u64,
    /// CR4; bit 12 is LA57.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// Base of the interrupt descriptor table.
    pub idt_base: Gva,
    /// Base of the global descriptor table.
    pub gdt_base: Gva,
    /// Base of the task state segment.
    pub tss_base: Gva,
    /// IA32_LSTAR, the SYSCALL entry, where the hypervisor tells it.
    pub lstar: Option<Gva>,
    /// In system-management mode: the registers are not the kernel's.
    pub smm: bool,
    /// Running a nested guest: the registers may be that guest's.
    pub nested_guest: bool,
}

impl Vcpu {
    /// Stack pointer.
    #[must_use]
    pub const fn rsp(&self) -> Gva {
        Gva(self.general[4])
    }

    /// Frame pointer.
    #[must_use]
    pub const fn rbp(&self) -> Gva {
        Gva(self.general[5])
    }

    /// Whether five-level paging is on (CR4.LA57, Intel SDM vol. 3 section 2.5).
    #[must_use]
    pub const fn five_level_paging(&self) -> bool {
        self.cr4 & (1 << 12) != 0
    }

    /// Whether it stands in kernel mode.
    #[must_use]
    pub const fn in_kernel(&self) -> bool {
        self.cpl == 0
    }
}

/// A vCPU in the kernel with these three registers, for tests.
#[cfg(test)]
pub(crate) fn test_vcpu(rip: u64, rsp: u64, rbp: u64) -> Vcpu {
    let mut general = [0; 16];
    (general[4], general[5]) = (rsp, rbp);
    vcpu_in_kernel(Gva(rip), general)
}

/// A vCPU in the kernel with these registers and no others, for tests and fuzz targets.
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
#[must_use]
pub fn vcpu_in_kernel(rip: Gva, general: [u64; 16]) -> Vcpu {
    Vcpu {
        index: 0,
        activity: Activity::Running,
        general,
        rip,
        rflags: 2,
        cs: 0x10,
        ss: 0x18,
        cpl: 0,
        fs_base: Gva(0),
        gs_base: Gva(0),
        kernel_gs_base: None,
        cr0: 0,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        efer: 0,
        idt_base: Gva(0),
        gdt_base: Gva(0),
        tss_base: Gva(0),
        lstar: None,
        smm: false,
        nested_guest: false,
    }
}
