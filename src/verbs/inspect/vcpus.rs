//! `vmpatch inspect vcpus`: registers of every vCPU, of one moment.

use serde::Serialize;
use vmpatch_introspect::Vcpu;

use crate::exit::Failure;
use crate::live;
use crate::report::{Output, table};

#[derive(Serialize)]
struct Answer {
    vcpus: Vec<Vcpu>,
}

pub(super) fn show(vm: &str, output: &Output) -> Result<(), Failure> {
    let target = live::connect(vm)?;
    let answer = Answer {
        vcpus: live::registers(&target)?,
    };
    output.answer(&answer, |answer| {
        answer
            .vcpus
            .iter()
            .map(paragraph)
            .collect::<Vec<_>>()
            .join("\n\n")
    });
    Ok(())
}

fn paragraph(vcpu: &Vcpu) -> String {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    let hex = |value: u64| format!("{value:#018x}");
    let activity = format!("{:?}, privilege level {}", vcpu.activity, vcpu.cpl);
    let mut rows = vec![("vcpu", vcpu.index.to_string()), ("activity", activity)];
    rows.extend([("rip", hex(vcpu.rip.0)), ("rflags", hex(vcpu.rflags))]);
    rows.extend(NAMES.into_iter().zip(vcpu.general.map(hex)));
    rows.extend([("cr0", hex(vcpu.cr0)), ("cr2", hex(vcpu.cr2))]);
    rows.extend([
        ("cr3", hex(vcpu.cr3)),
        ("cr4", hex(vcpu.cr4)),
        ("efer", hex(vcpu.efer)),
    ]);
    rows.extend([
        ("fs base", hex(vcpu.fs_base.0)),
        ("gs base", hex(vcpu.gs_base.0)),
    ]);
    rows.extend([
        ("idt base", hex(vcpu.idt_base.0)),
        ("gdt base", hex(vcpu.gdt_base.0)),
    ]);
    rows.extend(vcpu.lstar.map(|lstar| ("lstar", hex(lstar.0))));
    table::pairs(&rows)
}
