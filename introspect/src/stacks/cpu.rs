//! The stacks that belong to a CPU rather than to a task, and which CPU of the guest a vCPU is. Read from the
//! vCPU's own task state segment where the CPU itself keeps them there, so that it works without symbols.

use crate::address::{Gva, GvaRange, PAGE_SIZE};
use crate::kernel::Kernel;
use crate::paging::KernelMemory;
use crate::unwind::{StackKind, StackSpan};
use crate::vcpu::Vcpu;

/// Bytes of the task state segment that hold stack pointers (Intel SDM vol. 3 section 7.7: RSP0 at 4, IST1 at
/// 36, seven of them).
const TSS_SIZE: usize = 92;
const TSS_SP0: usize = 4;
const TSS_IST: usize = 36;

/// `IRQ_STACK_SIZE` where types do not tell it (Linux v6.12 `arch/x86/include/asm/page_64_types.h`).
const IRQ_STACK_SIZE: u64 = 16 << 10;

/// `EXCEPTION_STKSZ` without and with KASAN (the same file).
const EXCEPTION_SIZES: [u64; 2] = [8 << 10, 16 << 10];

/// Where per-CPU data keeps what is not in the task state segment; found once.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct StackPlaces {
    /// Per-CPU address of `hardirq_stack_ptr`, which holds the highest word of the IRQ stack.
    irq_top: Option<Gva>,
    irq_size: Option<u64>,
    /// Per-CPU address of `cea_exception_stacks`.
    exceptions: Option<Gva>,
}

impl StackPlaces {
    /// Looks for the symbol or the member, whichever this kernel has: `hardirq_stack_ptr` was moved into
    /// `struct pcpu_hot` in 6.2 and out again in 6.15.
    pub(crate) fn find(kernel: &Kernel) -> Self {
        let symbol = |name| kernel.place(name).ok();
        let hot = || {
            let member = kernel.types.member("pcpu_hot", "hardirq_stack_ptr").ok()?;
            Some(symbol("pcpu_hot")?.wrapping_add(member.offset))
        };
        Self {
            irq_top: symbol("hardirq_stack_ptr").or_else(hot),
            irq_size: kernel.types.size_of("irq_stack").ok(),
            exceptions: symbol("cea_exception_stacks"),
        }
    }
}

/// The CPU that a vCPU is.
#[derive(Debug, Default)]
pub(crate) struct Cpu {
    /// Its number in the guest, where it can be told.
    pub(crate) number: Option<u32>,
    /// Its IRQ, exception and entry stacks.
    pub(crate) spans: Vec<StackSpan>,
}

impl Cpu {
    pub(crate) fn of(
        kernel: &Kernel,
        places: &StackPlaces,
        memory: &KernelMemory<'_>,
        vcpu: &Vcpu,
    ) -> Self {
        let segment = Segment::read(memory, vcpu.tss_base);
        let number = number(kernel, places, memory, vcpu, segment.as_ref());
        let mut spans = segment.map_or_else(Vec::new, |segment| segment.spans());
        spans.extend(number.and_then(|cpu| irq_stack(kernel, places, memory, cpu)));
        Self { number, spans }
    }
}

/// Stack pointers of a task state segment.
struct Segment {
    sp0: u64,
    ist: [u64; 7],
}

impl Segment {
    fn read(memory: &KernelMemory<'_>, base: Gva) -> Option<Self> {
        let mut bytes = [0; TSS_SIZE];
        memory.read(base, &mut bytes).ok()?;
        let word = |at: usize| {
            bytes
                .get(at..)
                .and_then(|rest| rest.first_chunk())
                .copied()
                .map_or(0, u64::from_le_bytes)
        };
        let ist = std::array::from_fn(|i| word(TSS_IST + i * 8));
        Some(Self {
            sp0: word(TSS_SP0),
            ist,
        })
    }

    /// Whether its first exception stack is the first in `area`, after a guard page. Areas of CPUs adjoin.
    fn begins_at(&self, area: u64) -> bool {
        let [first, ..] = self.ist;
        let size = first.wrapping_sub(area).wrapping_sub(PAGE_SIZE);
        area != 0 && EXCEPTION_SIZES.contains(&size)
    }

    /// Exception stacks lie one guard page apart, in the order #DF, NMI, #DB, #MC, #VC, #VC2 (Linux v6.12
    /// `arch/x86/include/asm/cpu_entry_area.h`, `arch/x86/kernel/cpu/common.c` `tss_setup_ist`); the entry
    /// stack is the page below RSP0.
    fn spans(&self) -> Vec<StackSpan> {
        let [first, second, ..] = self.ist;
        let size = second.wrapping_sub(first).wrapping_sub(PAGE_SIZE);
        let mut spans = Vec::with_capacity(9);
        spans.extend(below(StackKind::Entry, self.sp0, PAGE_SIZE));
        if EXCEPTION_SIZES.contains(&size) {
            let fallback = first.wrapping_add((size + PAGE_SIZE).wrapping_mul(5));
            let tops = self.ist.iter().take(5).copied().chain([fallback]);
            spans.extend(tops.filter_map(|top| below(StackKind::Exception, top, size)));
        }
        spans
    }
}

fn below(kind: StackKind, top: u64, size: u64) -> Option<StackSpan> {
    let start = top.checked_sub(size).filter(|_| top & 7 == 0 && top != 0)?;
    Some(StackSpan {
        kind,
        range: GvaRange {
            start: Gva(start),
            end: Gva(top),
        },
    })
}

/// Which CPU it is: by whose exception stacks its task state segment names, which user mode cannot change;
/// else by its per-CPU base, which GS holds in the kernel and the hidden GS in user mode.
fn number(
    kernel: &Kernel,
    places: &StackPlaces,
    memory: &KernelMemory<'_>,
    vcpu: &Vcpu,
    segment: Option<&Segment>,
) -> Option<u32> {
    let bases = &kernel.layout.per_cpu_offset;
    let by_stacks = || {
        let (variable, segment) = (places.exceptions?, segment?);
        bases.iter().position(|&offset| {
            let area = memory.read_u64(variable.wrapping_add(offset));
            area.is_ok_and(|area| segment.begins_at(area))
        })
    };
    let by_base = |base: Gva| {
        let is = |&offset: &u64| offset != 0 && offset == base.0;
        bases.iter().position(is)
    };
    let kernel_base = || vcpu.kernel_gs_base.and_then(by_base);
    let found = by_stacks().or_else(|| match vcpu.in_kernel() {
        true => by_base(vcpu.gs_base).or_else(kernel_base),
        false => kernel_base(),
    })?;
    u32::try_from(found).ok()
}

/// The pointer is to the highest word, where the stack pointer before the switch is kept.
fn irq_stack(
    kernel: &Kernel,
    places: &StackPlaces,
    memory: &KernelMemory<'_>,
    cpu: u32,
) -> Option<StackSpan> {
    let base = kernel.layout.per_cpu_offset.get(cpu as usize)?;
    let highest = memory
        .read_u64(places.irq_top?.wrapping_add(*base))
        .ok()
        .filter(|&at| at != 0)?;
    let size = places.irq_size.unwrap_or(IRQ_STACK_SIZE);
    below(StackKind::Irq, highest.checked_add(8)?, size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exception_stacks_follow_from_the_task_state_segment_alone() {
        let (area, stride) = (0xffff_fe00_0000_1000_u64, 0x3000);
        let ist = std::array::from_fn(|i| {
            if i < 5 {
                area + (i as u64 + 1) * stride
            } else {
                0
            }
        });
        let spans = Segment {
            sp0: 0xffff_fe00_0000_0000,
            ist,
        }
        .spans();
        assert_eq!(spans.len(), 7);
        let last = spans.last().unwrap();
        assert_eq!(
            (last.range.size(), last.range.end.0),
            (0x2000, area + 6 * stride)
        );
    }

    /// Found on a stock 6.1 guest, where a CPU's area ends 0x28000 bytes before the next one's begins.
    #[test]
    fn cpus_whose_exception_stacks_adjoin_are_told_apart() {
        let second = Segment {
            sp0: 0,
            ist: [0xffff_fe00_0004_6000, 0, 0, 0, 0, 0, 0],
        };
        assert!(second.begins_at(0xffff_fe00_0004_3000));
        assert!(!second.begins_at(0xffff_fe00_0000_8000));
        assert!(!second.begins_at(0));
    }

    #[test]
    fn a_task_state_segment_of_another_shape_gives_no_exception_stacks() {
        let spans = Segment {
            sp0: 0,
            ist: [1, 2, 3, 4, 5, 6, 7],
        }
        .spans();
        assert_eq!(spans, []);
    }
}
