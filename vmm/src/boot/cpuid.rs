//! The CPU that one vCPU shows: what KVM offers, with this vCPU's number in it and a topology of one
//! package with one thread a core. Pure: makes no ioctl.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1 ECX: VMX, TSC-deadline timer, running under a hypervisor (Intel SDM vol. 2A, CPUID).
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: the processor count in EBX counts.
const HTT: u32 = 1 << 28;
/// Leaf 80000001 ECX: SVM, and "the count in leaf 1 is of cores" (AMD APM vol. 3, appendix E).
const SVM: u32 = 1 << 2;
const CMP_LEGACY: u32 = 1 << 1;

/// Types of a topology level in leaf B ECX bits 15:8.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// One vCPU's place among all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number and APIC id.
    pub index: u8,
    /// How many there are, at least 1.
    pub count: u8,
}

impl Place {
    /// Bits of an APIC id that number the cores of the package.
    fn core_bits(self) -> u32 {
        u32::from(self.count.max(1))
            .next_power_of_two()
            .trailing_zeros()
    }

    fn last(self) -> u32 {
        u32::from(self.count.saturating_sub(1))
    }
}

/// Shapes what KVM offers for one vCPU. Nested virtualisation is not passed on: while a guest's own guest
/// runs, the vCPU's registers are not the kernel's, and nothing could be said of its stack.
#[must_use]
pub fn shape(
    offered: &[kvm_cpuid_entry2],
    place: Place,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let is_topology =
        |leaf: &kvm_cpuid_entry2| matches!(leaf.function, 0xb | 0x1f | 0x8000_000a | 0x8000_0026);
    let mut leaves: Vec<_> = offered
        .iter()
        .copied()
        .filter(|leaf| !is_topology(leaf))
        .collect();
    let amd = is_amd(offered);
    for leaf in &mut leaves {
        shape_leaf(leaf, place, tsc_deadline);
        if amd {
            shape_amd_leaf(leaf, place);
        }
    }
    if offered.iter().any(|leaf| leaf.function == 0xb) {
        leaves.extend(topology(place));
    }
    leaves
}

/// Leaves that have a meaning on every CPU.
fn shape_leaf(leaf: &mut kvm_cpuid_entry2, place: Place, tsc_deadline: bool) {
    match leaf.function {
        1 => {
            let counts = u32::from(place.count) << 16 | u32::from(place.index) << 24;
            leaf.ebx = leaf.ebx & 0xffff | counts;
            leaf.ecx = with(leaf.ecx & !VMX, TSC_DEADLINE, tsc_deadline) | HYPERVISOR;
            leaf.edx = with(leaf.edx, HTT, place.count > 1);
        }
        4 => leaf.eax = shared_by_cores(leaf.eax, place) & 0x03ff_ffff | place.last() << 26,
        0x8000_0001 => leaf.ecx &= !SVM,
        _ => {}
    }
}

/// Leaves by which AMD and Hygon CPUs tell of cores.
fn shape_amd_leaf(leaf: &mut kvm_cpuid_entry2, place: Place) {
    let id = u32::from(place.index);
    match leaf.function {
        0x8000_0001 => leaf.ecx = with(leaf.ecx, CMP_LEGACY, place.count > 1),
        0x8000_0008 => leaf.ecx = leaf.ecx & !0xf0ff | place.core_bits() << 12 | place.last(),
        0x8000_001d => leaf.eax = shared_by_cores(leaf.eax, place),
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Leaf 0 EBX holds the first four letters of the vendor's name.
fn is_amd(offered: &[kvm_cpuid_entry2]) -> bool {
    let vendor = offered.iter().find(|leaf| leaf.function == 0);
    vendor.is_some_and(|leaf| matches!(&leaf.ebx.to_le_bytes(), b"Auth" | b"Hygo"))
}

const fn with(value: u32, bit: u32, on: bool) -> u32 {
    if on { value | bit } else { value & !bit }
}

/// Bits 25:14 of a cache leaf: how many logical processors share it, less one. Level 3 (bits 7:5) is
/// the package's, the others are a core's own.
fn shared_by_cores(eax: u32, place: Place) -> u32 {
    let sharers = if eax >> 5 & 7 == 3 { place.last() } else { 0 };
    eax & !(0xfff << 14) | sharers << 14
}

/// Leaf B: one thread a core, all cores in one package.
fn topology(place: Place) -> [kvm_cpuid_entry2; 3] {
    let level = |index, eax, ebx, kind| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        edx: place.index.into(),
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, place.core_bits(), place.count.into(), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const THIRD_OF_FIVE: Place = Place { index: 2, count: 5 };

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn shaped(function: u32, registers: [u32; 4]) -> [u32; 4] {
        shaped_on(*b"Auth", function, registers)
    }

    fn shaped_on(vendor: [u8; 4], function: u32, registers: [u32; 4]) -> [u32; 4] {
        let vendor = leaf(0, [0x10, u32::from_le_bytes(vendor), 0, 0]);
        let leaves = shape(&[vendor, leaf(function, registers)], THIRD_OF_FIVE, true);
        assert_eq!(leaves.len(), 2);
        [leaves[1].eax, leaves[1].ebx, leaves[1].ecx, leaves[1].edx]
    }

    #[test]
    fn leaf_1_tells_apic_id_count_and_hypervisor() {
        let [eax, ebx, ecx, edx] = shaped(1, [7, 0xff01_0800, 1 << 5 | 1, 1]);
        assert_eq!((eax, ebx), (7, 0x0205_0800));
        assert_eq!(ecx, 1 << 31 | 1 << 24 | 1);
        assert_eq!(edx, 1 << 28 | 1);
    }

    #[test]
    fn one_vcpu_is_no_multiprocessor() {
        let one = Place { index: 0, count: 1 };
        let leaves = shape(&[leaf(1, [0, 0, 0, HTT]), leaf(0xb, [9; 4])], one, false);
        assert_eq!((leaves[0].edx, leaves[0].ecx), (0, HYPERVISOR));
        assert_eq!((leaves[2].eax, leaves[2].ebx), (0, 1));
    }

    #[test]
    fn nested_virtualisation_is_hidden() {
        assert_eq!(
            shaped(0x8000_0001, [0, 0, SVM | 1 << 22, 0])[2],
            1 << 22 | CMP_LEGACY
        );
        assert_eq!(shape(&[leaf(0x8000_000a, [1; 4])], THIRD_OF_FIVE, true), []);
    }

    #[test]
    fn leaf_b_gives_every_vcpu_a_core_of_its_own() {
        let mut ids = Vec::new();
        for index in 0..5 {
            let place = Place { index, count: 5 };
            let offered = [leaf(0xb, [0; 4]), leaf(0x1f, [1; 4])];
            let [thread, core, end] = shape(&offered, place, true).try_into().unwrap();
            assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
            assert_eq!((core.eax, core.ebx, core.ecx), (3, 5, 0x201));
            assert_eq!((end.ebx, end.ecx), (0, 2));
            ids.push(core.edx);
        }
        assert_eq!(ids, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn only_the_last_level_cache_is_shared() {
        assert_eq!(shaped(4, [0x21, 0, 0, 0])[0], 4 << 26 | 0x21);
        assert_eq!(
            shaped(4, [0xffff_ff63, 0, 0, 0])[0],
            4 << 26 | 4 << 14 | 0x3f63
        );
        assert_eq!(shaped(0x8000_001d, [0x143, 0, 0, 0])[0], 0x143);
    }

    #[test]
    fn amds_own_leaves_agree() {
        assert_eq!(shaped(0x8000_0008, [0x3030, 0, 0x7_70ff, 0])[2], 0x7_3004);
        assert_eq!(shaped(0x8000_001e, [9, 0x109, 0x303, 0])[..3], [2, 2, 0]);
    }

    #[test]
    fn what_only_amd_defines_stays_as_it_is_on_intel() {
        for function in [0x8000_0008, 0x8000_001e] {
            assert_eq!(shaped_on(*b"Genu", function, [1, 2, 3, 4]), [1, 2, 3, 4]);
        }
        assert_eq!(shaped_on(*b"Genu", 0x8000_0001, [0, 0, SVM | 1, 0])[2], 1);
    }
}
