//! One vCPU's registers as words of the shared page. Owns their order.

use vmpatch_introspect::address::Gva;
use vmpatch_introspect::vcpu::{Activity, Vcpu};

/// Words of one vCPU's registers.
pub(super) const SLOT_WORDS: usize = 32;

const HAS_KERNEL_GS: u64 = 1 << 48;
const HAS_LSTAR: u64 = 1 << 49;
const SMM: u64 = 1 << 50;
const NESTED: u64 = 1 << 51;

/// The words of a vCPU.
pub(super) fn to_words(vcpu: &Vcpu) -> [u64; SLOT_WORDS] {
    let flag = |set: bool, bit: u64| if set { bit } else { 0 };
    let activity = match vcpu.activity {
        Activity::Running => 0,
        Activity::Halted => 1,
        Activity::WaitingForSipi => 2,
    };
    let small = u64::from(vcpu.cs)
        | u64::from(vcpu.ss) << 16
        | u64::from(vcpu.cpl) << 32
        | activity << 40
        | flag(vcpu.kernel_gs_base.is_some(), HAS_KERNEL_GS)
        | flag(vcpu.lstar.is_some(), HAS_LSTAR)
        | flag(vcpu.smm, SMM)
        | flag(vcpu.nested_guest, NESTED);
    let mut words = [0; SLOT_WORDS];
    let rest = [
        vcpu.rip.0,
        vcpu.rflags,
        vcpu.fs_base.0,
        vcpu.gs_base.0,
        vcpu.kernel_gs_base.unwrap_or_default().0,
        vcpu.cr0,
        vcpu.cr2,
        vcpu.cr3,
        vcpu.cr4,
        vcpu.efer,
        vcpu.idt_base.0,
        vcpu.gdt_base.0,
        vcpu.tss_base.0,
        vcpu.lstar.unwrap_or_default().0,
        small,
        u64::from(vcpu.index),
    ];
    let values = vcpu.general.into_iter().chain(rest);
    words
        .iter_mut()
        .zip(values)
        .for_each(|(to, from)| *to = from);
    words
}

/// The vCPU of these words. Truncations keep the bits that `to_words` put there.
#[allow(clippy::cast_possible_truncation)]
pub(super) const fn from_words(words: &[u64; SLOT_WORDS]) -> Vcpu {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15, //
        rip,
        rflags,
        fs,
        gs,
        kernel_gs,
        cr0,
        cr2,
        cr3,
        cr4,
        efer,
        idt,
        gdt,
        tss,
        lstar,
        small,
        index,
    ] = *words;
    let activity = match small >> 40 & 0xff {
        1 => Activity::Halted,
        2 => Activity::WaitingForSipi,
        _ => Activity::Running,
    };
    Vcpu {
        index: index as u32,
        activity,
        general: [
            rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
        ],
        rip: Gva(rip),
        rflags,
        cs: small as u16,
        ss: (small >> 16) as u16,
        cpl: (small >> 32) as u8,
        fs_base: Gva(fs),
        gs_base: Gva(gs),
        kernel_gs_base: known(kernel_gs, small & HAS_KERNEL_GS),
        cr0,
        cr2,
        cr3,
        cr4,
        efer,
        idt_base: Gva(idt),
        gdt_base: Gva(gdt),
        tss_base: Gva(tss),
        lstar: known(lstar, small & HAS_LSTAR),
        smm: small & SMM != 0,
        nested_guest: small & NESTED != 0,
    }
}

const fn known(value: u64, flag: u64) -> Option<Gva> {
    if flag == 0 { None } else { Some(Gva(value)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vcpu() -> Vcpu {
        Vcpu {
            index: 7,
            activity: Activity::Halted,
            general: std::array::from_fn(|n| 100 + n as u64),
            rip: Gva(1),
            rflags: 2,
            cs: 0xfff3,
            ss: 0xfff4,
            cpl: 3,
            fs_base: Gva(5),
            gs_base: Gva(6),
            kernel_gs_base: Some(Gva(7)),
            cr0: 8,
            cr2: 9,
            cr3: 10,
            cr4: 11,
            efer: 12,
            idt_base: Gva(13),
            gdt_base: Gva(14),
            tss_base: Gva(15),
            lstar: None,
            smm: true,
            nested_guest: false,
        }
    }

    #[test]
    fn registers_come_out_as_they_went_in() {
        let other = Vcpu {
            kernel_gs_base: None,
            lstar: Some(Gva(u64::MAX)),
            smm: false,
            nested_guest: true,
            activity: Activity::WaitingForSipi,
            ..vcpu()
        };
        for vcpu in [vcpu(), other] {
            assert_eq!(from_words(&to_words(&vcpu)), vcpu);
        }
    }
}
