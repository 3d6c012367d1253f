//! What a guest finds when its first vCPU starts: kernel, initial RAM disk, command line, zero page, ACPI
//! tables, CPUID and registers. Owns the layout of the first MiB ([`map`]); runs nothing.
//!
//! ```text
//! 0     500   7000      9000         20000    9fc00   e0000  100000        pref_address        top of low RAM
//! │     GDT   zero page page tables  cmdline  reserved ACPI   │  RAM ...   kernel + init_size ... initrd │
//! ```

pub mod acpi;
pub mod cpuid;
pub mod image;
pub mod initrd;
pub mod map;
pub mod params;
pub mod registers;
#[cfg(test)]
pub(crate) mod testing;

use std::path::Path;

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use vmpatch_introspect::target::MemoryError;

use crate::host::Host;
use crate::memory::GuestMemory;

use cpuid::Place;
use image::{ImageError, Loaded};
use initrd::InitrdError;
use params::ParamsError;
use registers::RegistersError;

/// Why a guest cannot be made ready to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The initial RAM disk.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// Zero page and command line.
    #[error(transparent)]
    Params(#[from] ParamsError),
    /// A vCPU's registers.
    #[error("vCPU {vcpu}: {source}")]
    Registers {
        /// Which vCPU.
        vcpu: u8,
        /// What was refused.
        source: RegistersError,
    },
    /// The tables of ACPI or of the first vCPU.
    #[error("writing the boot tables: {0}")]
    Tables(#[from] MemoryError),
    /// KVM does not take the CPU that a vCPU is to show.
    #[error("vCPU {vcpu}: KVM_SET_CPUID2: {source}")]
    Cpuid {
        /// Which vCPU.
        vcpu: u8,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

/// A guest whose memory is ready; its vCPUs are not.
#[derive(Clone, Debug)]
#[must_use]
pub struct Ready {
    kernel: Loaded,
    vcpus: u8,
}

/// Fills guest memory for a kernel to boot with `vcpus` vCPUs.
///
/// # Errors
/// [`BootError`]: the first thing that does not fit.
pub fn prepare(
    memory: &GuestMemory,
    kernel: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
    vcpus: u8,
) -> Result<Ready, BootError> {
    let kernel = image::load(memory, kernel)?;
    let initrd = initrd
        .map(|path| initrd::load(memory, &kernel, path))
        .transpose()?;
    let rsdp = acpi::write(memory, vcpus)?;
    params::write(memory, &kernel, initrd, cmdline, rsdp)?;
    registers::write_tables(memory)?;
    Ok(Ready { kernel, vcpus })
}

impl Ready {
    /// The kernel as loaded.
    #[must_use]
    pub const fn kernel(&self) -> &Loaded {
        &self.kernel
    }

    /// Sets vCPU `index` up; number 0 is the one that boots.
    ///
    /// # Errors
    /// [`BootError::Cpuid`] and [`BootError::Registers`] name what KVM refused.
    pub fn set_vcpu(&self, host: &Host, vcpu: &VcpuFd, index: u8) -> Result<(), BootError> {
        let place = Place {
            index,
            count: self.vcpus,
        };
        let shaped = cpuid::shape(host.cpuid().as_slice(), place, host.has_tsc_deadline());
        let refused = |source| BootError::Cpuid {
            vcpu: index,
            source,
        };
        let too_many = |_| refused(kvm_ioctls::Error::new(libc::E2BIG));
        let shaped = CpuId::from_entries(&shaped).map_err(too_many)?;
        vcpu.set_cpuid2(&shaped).map_err(refused)?;
        self.set_registers(vcpu, index)
            .map_err(|source| BootError::Registers {
                vcpu: index,
                source,
            })
    }

    fn set_registers(&self, vcpu: &VcpuFd, index: u8) -> Result<(), RegistersError> {
        registers::set_msrs(vcpu)?;
        registers::set_interrupt_pins(vcpu)?;
        if index == 0 {
            registers::set_boot_vcpu(vcpu, self.kernel.entry)
        } else {
            Ok(())
        }
    }
}
