//! The KVM of this host: whether it is there, what it can, and whether it runs unmodified kernels. Owns
//! the `/dev/kvm` handle; makes no VM.

use std::arch::x86_64::__cpuid;
use std::io;

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

/// The physical address width where CPUID does not tell (Intel SDM vol. 3A, 4.1.4).
const DEFAULT_ADDRESS_BITS: u8 = 36;
/// CPUID 1 ECX bit 5 (Intel SDM vol. 2A, CPUID).
const VMX: u32 = 1 << 5;
/// CPUID 80000001 ECX bit 2 (AMD APM vol. 3, appendix E).
const SVM: u32 = 1 << 2;

/// How this KVM runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By the CPU's own virtualisation (VMX or SVM): unmodified kernels run at full speed.
    Hardware,
    /// Without it, as the PVM kind of KVM does: every instruction that an unmodified kernel executes is
    /// emulated, some cannot be, and CPUID cannot be shaped. Code fragments run; stock kernels do not.
    /// A lean kernel boots slowly when its command line keeps it from instructions that the emulator does
    /// not know (`clearcpuid=smap,smep,umip,fsgsbase,pcid,popcnt,rdrand,rdseed,cx16,xsave,erms,fsrm,…`,
    /// `noxsave`) and from parsing its own BTF (`initcall_blacklist=kfunc_init,bpf_map_iter_init,…`).
    Software,
}

/// An opened `/dev/kvm`.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    kind: Kind,
    cpuid: CpuId,
    tsc_deadline: bool,
}

/// Why no machine can be run here.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No `/dev/kvm`, or no right to it.
    #[error("/dev/kvm: {source}; {}", open_hint(source.errno()))]
    Open {
        /// What the host kernel said.
        source: kvm_ioctls::Error,
    },
    /// Not the interface this program is built for.
    #[error("/dev/kvm speaks KVM API version {found}, not {KVM_API_VERSION}")]
    ApiVersion {
        /// The version found.
        found: i32,
    },
    /// KVM does not tell what CPU it offers.
    #[error("KVM_GET_SUPPORTED_CPUID: {source}")]
    Cpuid {
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// This KVM cannot run what was asked for.
    #[error(
        "this host's KVM works without hardware virtualisation (its CPU shows neither svm nor vmx), so it \
         cannot run unmodified kernels: use a host that has svm or vmx, or run inside a test host with \
         emulated AMD-V (`cargo xtask host -- COMMAND`); a lean kernel made for it can be booted, slowly, with \
         --assist-emulation"
    )]
    NoHardware,
}

impl Host {
    /// Opens `/dev/kvm` and looks at what it is.
    ///
    /// # Errors
    /// [`HostError`] where it cannot be used at all; a software KVM can.
    pub fn open() -> Result<Self, HostError> {
        let kvm = Kvm::new().map_err(|source| HostError::Open { source })?;
        let found = kvm.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(HostError::ApiVersion { found });
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| HostError::Cpuid { source })?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self {
            kvm,
            kind: kind(),
            cpuid,
            tsc_deadline,
        })
    }

    /// Refuses a KVM that cannot run unmodified kernels, unless the user asked for help with it.
    ///
    /// # Errors
    /// [`HostError::NoHardware`] says what to do instead.
    pub fn require_hardware(&self, assisted: bool) -> Result<(), HostError> {
        if self.kind == Kind::Hardware || assisted {
            Ok(())
        } else {
            Err(HostError::NoHardware)
        }
    }

    /// The handle that makes VMs.
    #[must_use]
    pub const fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// How it runs guests.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The CPU that KVM can offer, before it is shaped for one vCPU.
    #[must_use]
    pub const fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Whether the in-kernel local APIC has a TSC-deadline timer, which the offered CPUID does not tell
    /// (Linux Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID).
    #[must_use]
    pub const fn has_tsc_deadline(&self) -> bool {
        self.tsc_deadline
    }

    /// The guest's physical address width in bits: CPUID 80000008 EAX bits 7:0.
    #[must_use]
    pub fn address_bits(&self) -> u8 {
        let leaf = self
            .cpuid
            .as_slice()
            .iter()
            .find(|leaf| leaf.function == 0x8000_0008);
        leaf.map_or(DEFAULT_ADDRESS_BITS, |leaf| leaf.eax.to_le_bytes()[0])
    }
}

/// What this CPU says of itself. Under a hypervisor that offers nested virtualisation the bits are set
/// too, and KVM works.
fn kind() -> Kind {
    let vmx = __cpuid(1).ecx & VMX != 0;
    let has_extended = __cpuid(0x8000_0000).eax >= 0x8000_0001;
    let svm = has_extended && __cpuid(0x8000_0001).ecx & SVM != 0;
    if vmx || svm {
        Kind::Hardware
    } else {
        Kind::Software
    }
}

fn open_hint(errno: i32) -> &'static str {
    match io::Error::from_raw_os_error(errno).kind() {
        io::ErrorKind::NotFound => {
            "load the kvm_intel or kvm_amd module, and see that virtualisation is enabled in the firmware"
        }
        io::ErrorKind::PermissionDenied => "become root or a member of the group that owns it",
        _ => "is KVM in use by another hypervisor?",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_agrees_with_what_the_kernel_lists() {
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let hardware = flags
            .split_whitespace()
            .any(|flag| flag == "svm" || flag == "vmx");
        assert_eq!(kind() == Kind::Hardware, hardware);
    }

    #[test]
    fn a_software_kvm_is_refused_with_what_to_do_instead() {
        let Ok(mut host) = Host::open() else {
            return eprintln!("SKIPPED: no /dev/kvm");
        };
        host.kind = Kind::Software;
        let error = host.require_hardware(false).unwrap_err().to_string();
        assert!(
            error.contains("test host") && error.contains("--assist-emulation"),
            "{error}"
        );
        assert!(host.require_hardware(true).is_ok());
        host.kind = Kind::Hardware;
        assert!(host.require_hardware(false).is_ok());
    }
}
