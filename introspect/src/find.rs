//! Which kernel the vCPUs run: its page tables and two of its entry points, from registers alone. Owns
//! the question whether all vCPUs agree; knows nothing of symbols.

use std::fmt;

use crate::address::{Gpa, Gva};
use crate::kernel::{AttachError, Kernel};
use crate::paging::{AddressSpace, KernelMemory, ReadError};
use crate::target::PhysicalMemory;
use crate::vcpu::{Activity, Vcpu};

/// Gate of the page-fault exception (Intel SDM vol. 3 table 6-1).
const PAGE_FAULT_VECTOR: u64 = 14;
/// Size of a gate in long mode (Intel SDM vol. 3 section 6.14.1).
const GATE_SIZE: u64 = 16;
/// KPTI keeps the user half of the tables one page above the kernel half (Linux v6.12
/// arch/x86/entry/calling.h, PTI_USER_PGTABLE_BIT).
const USER_HALF: u64 = 1 << 12;
const CR0_PAGING: u64 = 1 << 31;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;

/// The top-level tables by which [`find`] may look at a vCPU's kernel: those in use and, under KPTI, its kernel half.
pub(crate) const fn roots(vcpu: &Vcpu) -> [Gpa; 2] {
    let root = AddressSpace::of_registers(vcpu.cr3, vcpu.cr4).root;
    [root, Gpa(root.0 & !USER_HALF)]
}

/// What the vCPUs agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Tables that map the whole kernel.
    pub(crate) space: AddressSpace,
    /// The shared interrupt descriptor table.
    pub(crate) idt_base: Gva,
    /// `asm_exc_page_fault`, from IDT gate 14.
    pub(crate) page_fault: Gva,
    /// `entry_SYSCALL_64`, from MSR_LSTAR, where the hypervisor tells it.
    pub(crate) syscall: Option<Gva>,
}

/// Why a vCPU does not show the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForeignVcpu {
    /// System-management mode: the registers are the firmware's.
    #[error("in system-management mode")]
    ManagementMode,
    /// A nested guest: the registers may be that guest's.
    #[error("running a nested guest")]
    NestedGuest,
    /// Paging or long mode is off.
    #[error("not in long mode")]
    NotLongMode,
    /// The page-fault gate cannot be read or leads nowhere.
    #[error("its interrupt table at {0} cannot be read")]
    NoGate(Gva),
    /// The interrupt table is not the kernel's.
    #[error("its interrupt table lies at {found}, the kernel's at {expected}")]
    OtherTable {
        /// Where its own lies.
        found: Gva,
        /// Where the kernel's lies.
        expected: Gva,
    },
    /// Neither GS base is that of a CPU of the kernel.
    #[error("no GS base of its own ({0}) belongs to a CPU of the kernel")]
    OtherCpu(Gva),
    /// The handler is not the kernel's.
    #[error("its page-fault handler is {found}, the others' is {expected}")]
    OtherHandler {
        /// Its own.
        found: Gva,
        /// That of the vCPUs before it.
        expected: Gva,
    },
}

impl ForeignVcpu {
    /// What the registers alone rule out.
    ///
    /// # Errors
    /// Why the vCPU cannot be standing in a kernel of ours.
    pub(crate) const fn check(vcpu: &Vcpu) -> Result<(), Self> {
        if vcpu.smm {
            return Err(Self::ManagementMode);
        }
        if vcpu.nested_guest {
            return Err(Self::NestedGuest);
        }
        if vcpu.cr0 & CR0_PAGING == 0 || vcpu.efer & EFER_LONG_MODE_ACTIVE == 0 {
            return Err(Self::NotLongMode);
        }
        Ok(())
    }
}

impl Kernel {
    /// Checks that a vCPU runs this kernel and nothing else: from registers alone, so that a stop can ask
    /// it of each. One that waits for its start-up IPI runs nothing.
    ///
    /// # Errors
    /// What speaks against it.
    pub fn check_vcpu(&self, vcpu: &Vcpu) -> Result<(), ForeignVcpu> {
        if vcpu.activity == Activity::WaitingForSipi {
            return Ok(());
        }
        ForeignVcpu::check(vcpu)?;
        let (found, expected) = (vcpu.idt_base, self.layout.idt_base);
        if found != expected {
            return Err(ForeignVcpu::OtherTable { found, expected });
        }
        // In kernel mode GS is the CPU's area, but for a few instructions around SWAPGS; the other base is
        // then the one. Where the hypervisor does not tell it, GS proves nothing.
        let areas = &self.layout.per_cpu_offset;
        let known = |base: Gva| areas.contains(&base.0);
        match vcpu.kernel_gs_base {
            Some(other) if !areas.is_empty() && !known(vcpu.gs_base) && !known(other) => {
                Err(ForeignVcpu::OtherCpu(vcpu.gs_base))
            }
            _ => Ok(()),
        }
    }
}

/// One vCPU's view: where its page-fault handler lies, virtually and physically.
struct View {
    found: Found,
    handler_at: Gpa,
}

/// Examines every vCPU; those that wait for their start-up IPI have no view and are passed over.
///
/// # Errors
/// No vCPU shows a kernel, or they do not agree; the message names each that stands apart.
pub(crate) fn find(memory: &dyn PhysicalMemory, vcpus: &[Vcpu]) -> Result<Found, AttachError> {
    let mut agreed: Option<View> = None;
    let mut apart = Vec::new();
    for vcpu in vcpus
        .iter()
        .filter(|vcpu| vcpu.activity != Activity::WaitingForSipi)
    {
        match view(memory, vcpu).and_then(|view| agree(agreed.as_mut(), view)) {
            Ok(view) => agreed = view.or(agreed),
            Err(why) => apart.push((vcpu.index, why)),
        }
    }
    if !apart.is_empty() {
        return Err(AttachError::NoKernel(Apart(&apart).to_string()));
    }
    let none = || AttachError::NoKernel("no vCPU has been started".to_owned());
    Ok(agreed.ok_or_else(none)?.found)
}

/// Compares a view with the first one; gives it back only if it is the first.
fn agree(first: Option<&mut View>, view: View) -> Result<Option<View>, ForeignVcpu> {
    let Some(first) = first else {
        return Ok(Some(view));
    };
    let (expected, found) = (first.found.page_fault, view.found.page_fault);
    if expected != found || first.handler_at != view.handler_at {
        return Err(ForeignVcpu::OtherHandler { found, expected });
    }
    first.found.syscall = first.found.syscall.or(view.found.syscall);
    Ok(None)
}

struct Apart<'a>(&'a [(u32, ForeignVcpu)]);

impl fmt::Display for Apart<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, (index, why)) in self.0.iter().enumerate() {
            let comma = if nth == 0 { "" } else { "; " };
            write!(f, "{comma}vCPU {index}: {why}")?;
        }
        Ok(())
    }
}

fn view(memory: &dyn PhysicalMemory, vcpu: &Vcpu) -> Result<View, ForeignVcpu> {
    ForeignVcpu::check(vcpu)?;
    let given = AddressSpace::of_registers(vcpu.cr3, vcpu.cr4);
    let no_gate = |_| ForeignVcpu::NoGate(vcpu.idt_base);
    let page_fault = gate(&KernelMemory::new(memory, given), vcpu.idt_base).map_err(no_gate)?;
    let (space, handler_at) = kernel_half(memory, given, page_fault).map_err(no_gate)?;
    let syscall = vcpu.lstar.filter(|at| at.0 != 0);
    Ok(View {
        found: Found {
            space,
            idt_base: vcpu.idt_base,
            page_fault,
            syscall,
        },
        handler_at,
    })
}

/// The handler that IDT gate 14 names.
fn gate(memory: &KernelMemory<'_>, idt_base: Gva) -> Result<Gva, ReadError> {
    let at = idt_base.wrapping_add(PAGE_FAULT_VECTOR * GATE_SIZE);
    let gate = u128::from_le_bytes(memory.read_array::<16>(at)?);
    let low = gate & 0xffff;
    let middle = (gate >> 48) & 0xffff;
    let high = (gate >> 64) & 0xffff_ffff;
    Ok(Gva(
        u64::try_from(low | middle << 16 | high << 32).unwrap_or(0)
    ))
}

/// Under KPTI the user half of the tables maps the entry code too, but little else of the kernel. The
/// kernel half is the page below; it is taken if it maps the handler to the same place.
fn kernel_half(
    memory: &dyn PhysicalMemory,
    given: AddressSpace,
    handler: Gva,
) -> Result<(AddressSpace, Gpa), ReadError> {
    let at = KernelMemory::new(memory, given).physical_of(handler)?;
    let below = AddressSpace {
        root: Gpa(given.root.0 & !USER_HALF),
        ..given
    };
    let same = KernelMemory::new(memory, below).physical_of(handler) == Ok(at);
    Ok((if same { below } else { given }, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat::Ram;
    use crate::roots::Roots;
    use crate::vcpu::test_vcpu;

    /// RAM of 1 MiB with words set by hand.
    fn with_words(words: &[(u64, u64)]) -> Ram<Vec<u8>> {
        let mut ram = vec![0; 1 << 20];
        for (at, word) in words {
            ram[*at as usize..][..8].copy_from_slice(&word.to_le_bytes());
        }
        Ram(ram)
    }

    const IDT: Gva = Gva(0xffff_ffff_ffe0_0000);
    const HANDLER: Gva = Gva(0xffff_ffff_ffe0_1230);

    fn vcpu(index: u32, cr3: u64) -> Vcpu {
        Vcpu {
            index,
            cs: 0x33,
            ss: 0x2b,
            cpl: 3,
            cr0: CR0_PAGING,
            cr3,
            efer: EFER_LONG_MODE_ACTIVE,
            idt_base: IDT,
            ..test_vcpu(0, 0, 0)
        }
    }

    /// Two KPTI pairs of roots at 0x2000 and 0x4000, all mapping the IDT and the handler.
    fn guest() -> Ram<Vec<u8>> {
        let handler = HANDLER.0;
        let gate = [
            (handler & 0xffff) | (handler >> 16 & 0xffff) << 48,
            handler >> 32,
        ];
        let mut words = vec![
            (0x1_0000 + 511 * 8, 0x1_1001),
            (0x1_1000 + 511 * 8, 0x1_2001),
        ];
        words.extend([(0x1_2000, 0x2_0001), (0x1_2008, 0x2_1001)]);
        words.extend([(0x2_00e0, gate[0]), (0x2_00e8, gate[1])]);
        words.extend([0x2000, 0x3000, 0x4000, 0x5000].map(|root| (root + 511 * 8, 0x1_0001)));
        with_words(&words)
    }

    #[test]
    fn vcpus_in_user_mode_under_kpti_lead_to_the_kernel_half() {
        let vcpus = [vcpu(0, 0x3801), vcpu(1, 0x4002)];
        let found = find(&guest(), &vcpus).unwrap();
        assert_eq!((found.page_fault, found.space.root), (HANDLER, Gpa(0x2000)));
    }

    /// Found on a guest with short-lived processes: an attach failed by a kernel address that was "not mapped".
    #[test]
    fn tables_that_are_used_for_something_else_meanwhile_are_seen_as_they_were() {
        let vcpus = [vcpu(0, 0x3801), vcpu(1, 0x4002)];
        let mut memory = guest();
        let roots = Roots::copy(&memory, &vcpus);
        memory.0[0x2000..0x6000].fill(0);
        assert!(find(&memory, &vcpus).is_err());
        let found = find(&roots.over(&memory), &vcpus).unwrap();
        assert_eq!((found.page_fault, found.space.root), (HANDLER, Gpa(0x2000)));
    }

    #[test]
    fn a_vcpu_that_was_not_started_has_no_say() {
        let idle = Vcpu {
            activity: Activity::WaitingForSipi,
            cr0: 0,
            ..vcpu(1, 0)
        };
        assert!(find(&guest(), &[vcpu(0, 0x2000), idle]).is_ok());
        assert!(matches!(
            find(&guest(), &[idle]),
            Err(AttachError::NoKernel(_))
        ));
    }

    #[test]
    fn every_vcpu_in_another_world_is_named() {
        let vcpus = [
            vcpu(0, 0x2000),
            Vcpu {
                smm: true,
                ..vcpu(1, 0x2000)
            },
            Vcpu {
                cr0: 0,
                ..vcpu(2, 0x2000)
            },
            Vcpu {
                idt_base: Gva(0x5000),
                ..vcpu(3, 0x2000)
            },
        ];
        let why = find(&guest(), &vcpus).unwrap_err().to_string();
        for part in [
            "vCPU 1: in system-management",
            "vCPU 2: not in long",
            "vCPU 3: its interrupt",
        ] {
            assert!(why.contains(part), "{why}");
        }
        assert!(!why.contains("vCPU 0"), "{why}");
    }
}
