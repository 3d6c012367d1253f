//! How a vCPU starts: the first one in 64-bit mode at the kernel's entry, as the boot protocol asks (Linux
//! v6.12 Documentation/arch/x86/boot.rst, "64-bit boot protocol"); the others as KVM makes them, waiting
//! for their start-up IPI. Owns GDT, page tables, segments, control registers, MSRs and the local APIC's
//! interrupt pins.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vmpatch_introspect::address::{Gpa, PAGE_SIZE};
use vmpatch_introspect::target::MemoryError;

use super::map;
use crate::memory::GuestMemory;

/// Why a vCPU cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum RegistersError {
    /// KVM refused.
    #[error("{operation}: {source}")]
    Kvm {
        /// Which ioctl.
        operation: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// KVM took fewer MSRs than given.
    #[error("KVM does not take MSR {msr:#x}")]
    Msr {
        /// The first it refused.
        msr: u32,
    },
}

fn refused(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> RegistersError {
    move |source| RegistersError::Kvm { operation, source }
}

/// `__BOOT_CS` and `__BOOT_DS`: flat segments that the protocol fixes.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of rflags is always one.
const RFLAGS: u64 = 2;

/// Present and writable.
const TABLE: u64 = 0b11;
/// Present, writable, 2 MiB.
const LARGE_PAGE: u64 = 0b1000_0011;
/// Identity-mapped: all that can hold kernel, zero page, command line and initial RAM disk.
const MAPPED_GIB: u64 = 4;

/// Writes GDT and identity-mapping page tables for the first vCPU.
///
/// # Errors
/// [`MemoryError`] where the machine has no low RAM.
pub fn write_tables(memory: &GuestMemory) -> Result<(), MemoryError> {
    let gdt = [0, 0, descriptor(&code()), descriptor(&data())];
    write_words(memory, map::GDT, &gdt)?;
    let level3 = page_table(1);
    write_words(memory, page_table(0), &[level3.0 | TABLE])?;
    let mut level3_entries = Vec::new();
    for gib in 0..MAPPED_GIB {
        let level2 = page_table(2 + gib);
        level3_entries.push(level2.0 | TABLE);
        let entries: Vec<u64> = (0..512)
            .map(|page| gib << 30 | page << 21 | LARGE_PAGE)
            .collect();
        write_words(memory, level2, &entries)?;
    }
    write_words(memory, level3, &level3_entries)
}

const fn page_table(index: u64) -> Gpa {
    Gpa(map::PAGE_TABLES.0 + index * PAGE_SIZE)
}

fn write_words(memory: &GuestMemory, at: Gpa, words: &[u64]) -> Result<(), MemoryError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write(at, &bytes)
}

/// Sets the first vCPU up to start at `entry`.
///
/// # Errors
/// [`RegistersError::Kvm`].
pub fn set_boot_vcpu(vcpu: &VcpuFd, entry: Gpa) -> Result<(), RegistersError> {
    let regs = kvm_regs {
        rip: entry.0,
        rsi: map::BOOT_PARAMS.0,
        rsp: map::BOOT_STACK.0,
        rbp: map::BOOT_STACK.0,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(refused("KVM_SET_REGS"))?;
    let mut sregs = vcpu.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
    long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(refused("KVM_SET_SREGS"))
}

fn long_mode(sregs: &mut kvm_sregs) {
    sregs.cs = code();
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data();
    }
    sregs.gdt.base = map::GDT.0;
    sregs.gdt.limit = 4 * 8 - 1;
    // No handlers: an exception before the kernel's own table is a triple fault, and seen as such.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = map::PAGE_TABLES.0;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
}

fn code() -> kvm_segment {
    // Execute and read, accessed; 64-bit.
    kvm_segment {
        selector: CODE,
        type_: 0xb,
        l: 1,
        db: 0,
        ..flat()
    }
}

fn data() -> kvm_segment {
    // Read and write, accessed.
    kvm_segment {
        selector: DATA,
        type_: 0x3,
        l: 0,
        db: 1,
        ..flat()
    }
}

/// All 4 GiB, in pages of 4 KiB.
fn flat() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// A flat segment as a descriptor of the GDT (Intel SDM vol. 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    let limit_in_pages = u64::from(segment.limit >> 12);
    (limit_in_pages & 0xffff) | access << 40 | (limit_in_pages >> 16) << 48 | flags << 52
}

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
/// `IA32_MISC_ENABLE`: fast string operations.
const FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: with MTRRs off kernels do without PAT too.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// MSRs that firmware would have set, on every vCPU.
///
/// # Errors
/// [`RegistersError`] names the MSR that KVM refused.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), RegistersError> {
    // KVM has set bits of its own there, such as that there is no BTS.
    let misc = get_msr(vcpu, MSR_IA32_MISC_ENABLE)?;
    set_msr(vcpu, MSR_IA32_MISC_ENABLE, misc | FAST_STRINGS)?;
    set_msr(vcpu, MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK)
}

fn one_msr(index: u32, data: u64) -> Result<Msrs, RegistersError> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).map_err(|_| RegistersError::Msr { msr: index })
}

fn get_msr(vcpu: &VcpuFd, index: u32) -> Result<u64, RegistersError> {
    let mut msrs = one_msr(index, 0)?;
    let read = vcpu.get_msrs(&mut msrs).map_err(refused("KVM_GET_MSRS"))?;
    let entry = msrs.as_slice().first().filter(|_| read == 1);
    entry
        .map(|entry| entry.data)
        .ok_or(RegistersError::Msr { msr: index })
}

fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<(), RegistersError> {
    let set = vcpu
        .set_msrs(&one_msr(index, data)?)
        .map_err(refused("KVM_SET_MSRS"))?;
    if set == 1 {
        Ok(())
    } else {
        Err(RegistersError::Msr { msr: index })
    }
}

/// Local APIC registers (Intel SDM vol. 3A, table 11-1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Bits 10:8 of a local vector: the delivery mode.
const DELIVERY_MODE: u32 = 0x700;
const MODE_NMI: u32 = 4 << 8;
const MODE_EXT_INT: u32 = 7 << 8;

/// The local APIC's two pins as a PC has them: the PIC on LINT0, NMI on LINT1.
///
/// # Errors
/// [`RegistersError::Kvm`].
pub fn set_interrupt_pins(vcpu: &VcpuFd) -> Result<(), RegistersError> {
    let mut lapic = vcpu.get_lapic().map_err(refused("KVM_GET_LAPIC"))?;
    set_delivery_mode(&mut lapic, LVT_LINT0, MODE_EXT_INT);
    set_delivery_mode(&mut lapic, LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(refused("KVM_SET_LAPIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let Some(bytes) = lapic.regs.get_mut(register..register + 4) else {
        return;
    };
    let mut value = 0_u32;
    for (index, byte) in bytes.iter().enumerate() {
        value |= u32::from(byte.cast_unsigned()) << (8 * index);
    }
    value = value & !DELIVERY_MODE | mode;
    for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *byte = new.cast_signed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Layout;
    use vmpatch_introspect::target::PhysicalMemory;

    #[test]
    fn the_descriptors_are_those_of_the_boot_protocol() {
        // GDT_ENTRY(0xa09b, 0, 0xfffff) and GDT_ENTRY(0xc093, 0, 0xfffff).
        assert_eq!(descriptor(&code()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn every_address_below_four_gib_is_mapped_to_itself() {
        let memory = GuestMemory::new(Layout::new(32 << 20, 40).unwrap()).unwrap();
        write_tables(&memory).unwrap();
        for at in [
            0,
            0x7000,
            0x1f_ffff,
            0x4000_0000,
            0xbfff_ffff,
            0xffff_ffff_u64,
        ] {
            assert_eq!(walk(&memory, at), Some(at), "{at:#x}");
        }
        assert_eq!(walk(&memory, 1 << 32), None);
        assert_eq!(walk(&memory, 1 << 39), None);
    }

    /// A page walk of three levels that knows nothing of how the tables were made.
    fn walk(memory: &GuestMemory, at: u64) -> Option<u64> {
        let mut table = map::PAGE_TABLES.0;
        for shift in [39, 30, 21] {
            let entry = memory
                .read_u64(Gpa(table + (at >> shift & 511) * 8))
                .unwrap();
            if entry & 1 == 0 {
                return None;
            }
            if entry & 0x80 != 0 {
                return Some((entry & !0x1f_ffff) | (at & 0x1f_ffff));
            }
            table = entry & !0xfff;
        }
        None
    }

    #[test]
    fn a_pins_delivery_mode_is_changed_and_nothing_else() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LVT_LINT0] = 0x55;
        lapic.regs[LVT_LINT0 + 2] = 1;
        set_delivery_mode(&mut lapic, LVT_LINT0, MODE_EXT_INT);
        assert_eq!(lapic.regs[LVT_LINT0..LVT_LINT0 + 4], [0x55, 7, 1, 0]);
        assert!(lapic.regs[LVT_LINT0 + 4..].iter().all(|&byte| byte == 0));
    }
}
