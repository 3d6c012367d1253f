//! How a machine ended, and the report of what could not go on. Owns the text of it.

use std::fmt;

use vmpatch_introspect::address::Gva;
use vmpatch_introspect::vcpu::Vcpu;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked to be reset.
    Reset,
    /// Somebody on this side ended it.
    Terminated,
    /// A vCPU could not go on.
    Crashed(Box<Crash>),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest switched itself off"),
            Self::Reset => f.write_str("the guest asked to be reset"),
            Self::Terminated => f.write_str("terminated"),
            Self::Crashed(crash) => crash.fmt(f),
        }
    }
}

/// Where a CPU begins after a reset (AMD64 Architecture Programmer's Manual vol. 2 section 14.1.5). On AMD
/// hosts KVM resets a vCPU whose shutdown it sees: the hardware leaves nothing defined (Linux v6.12
/// arch/x86/kvm/svm/svm.c, shutdown_interception).
const RESET_RIP: Gva = Gva(0xfff0);

/// Why a vCPU could not go on, with what it held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// Which vCPU.
    pub vcpu: u32,
    /// What KVM handed back.
    pub fault: Fault,
    /// Its registers, where they could be read.
    pub registers: Option<Vcpu>,
    /// Up to 16 bytes of code from RIP on, where they could be read.
    pub code: Vec<u8>,
}

/// What KVM hands back when a vCPU cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// KVM_EXIT_SHUTDOWN.
    #[error("triple fault (the guest took an exception it had no handler for)")]
    TripleFault,
    /// KVM_EXIT_INTERNAL_ERROR.
    #[error("KVM internal error {suberror} ({})", suberror_name(*suberror))]
    Internal {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
    },
    /// KVM_EXIT_FAIL_ENTRY.
    #[error("the CPU refused to enter the guest, hardware reason {reason:#x}, on host CPU {cpu}")]
    FailEntry {
        /// The hardware's reason.
        reason: u64,
        /// Where.
        cpu: u32,
    },
    /// KVM_EXIT_MEMORY_FAULT.
    #[error("KVM could not resolve guest-physical {gpa:#x}, {size} bytes, flags {flags:#x}")]
    Memory {
        /// First byte.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// KVM's flags.
        flags: u64,
    },
    /// KVM_EXIT_SYSTEM_EVENT of a kind that is no power-off or reset.
    #[error("KVM system event {0}")]
    SystemEvent(u32),
    /// An exit that this VMM has not asked KVM for.
    #[error("unexpected exit from the guest: {0}")]
    Unexpected(String),
    /// An ioctl on the vCPU failed.
    #[error("{operation} failed: {source}")]
    Ioctl {
        /// Which.
        operation: &'static str,
        /// What the host kernel said.
        source: kvm_ioctls::Error,
    },
    /// The vCPU's thread itself failed.
    #[error("the vCPU's thread: {0}")]
    Thread(String),
}

/// Names of KVM_INTERNAL_ERROR_* (Linux include/uapi/linux/kvm.h).
const fn suberror_name(suberror: u32) -> &'static str {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "cannot emulate the instruction",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "exit while delivering an event",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "unexpected exit reason",
        _ => "unknown kind",
    }
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}: {}", self.vcpu, self.fault)?;
        match &self.registers {
            Some(registers) => {
                if self.fault == Fault::TripleFault && registers.rip == RESET_RIP {
                    let why =
                        "an AMD CPU loses the registers of a triple fault; these are a reset CPU's";
                    write!(f, "\n  ({why})")?;
                }
                write_registers(f, registers)?;
            }
            None => write!(f, "\n  (its registers could not be read)")?,
        }
        match self.code.is_empty() {
            true => write!(f, "\n  code at rip: not readable"),
            false => write!(f, "\n  code at rip: {:02x?}", self.code),
        }
    }
}

fn write_registers(f: &mut fmt::Formatter<'_>, vcpu: &Vcpu) -> fmt::Result {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    write!(f, "\n  rip {} rflags {:#x}", vcpu.rip, vcpu.rflags)?;
    write!(f, " cs {:#x} ss {:#x} cpl {}", vcpu.cs, vcpu.ss, vcpu.cpl)?;
    for (index, (name, value)) in NAMES.iter().zip(vcpu.general).enumerate() {
        let gap = if index % 4 == 0 { "\n  " } else { " " };
        write!(f, "{gap}{name:3} {value:016x}")?;
    }
    write!(f, "\n  cr0 {:#x} cr2 {:#x}", vcpu.cr0, vcpu.cr2)?;
    write!(
        f,
        " cr3 {:#x} cr4 {:#x} efer {:#x}",
        vcpu.cr3, vcpu.cr4, vcpu.efer
    )?;
    write!(
        f,
        "\n  idt {} gdt {} tss {}",
        vcpu.idt_base, vcpu.gdt_base, vcpu.tss_base
    )?;
    write!(f, "\n  fs {} gs {}", vcpu.fs_base, vcpu.gs_base)
}
