//! One small patch that has every kind of thing in it, for tests.

use super::{
    Alternative, Callback, CallbackKind, Code, Fragment, Part, Patch, Reference, Relocation,
    RelocationKind, Replacement, Requirement, Section, SectionKind, Site, SiteKind, Symbol, Trap,
    TrapKind, Unit, Unwind, VMLINUX,
};
use vmpatch_introspect::unwind::orc::Entry;

/// `call __fentry__; lea string, %rdi; jmp __x86_return_thunk`, with one site of each kind.
fn old_code() -> Code {
    let relative = |offset, symbol| Relocation {
        offset,
        kind: RelocationKind::Relative32,
        symbol,
        addend: -4,
    };
    let site = |offset, len, kind| Site { offset, len, kind };
    let reference = |symbol| Reference { symbol, addend: 0 };
    let branch = SiteKind::JumpLabel {
        key: reference(1),
        target: reference(3),
        inverted: true,
    };
    let replacement = Alternative {
        feature: 0x68,
        negated: true,
        direct_call: false,
        code: Fragment {
            bytes: vec![0xe8, 0, 0, 0, 0],
            relocations: vec![relative(1, 0)],
        },
    };
    let mut bytes = vec![0x90; 46];
    bytes[..5].copy_from_slice(&[0xe8, 0, 0, 0, 0]);
    Code {
        bytes,
        relocations: vec![relative(1, 0), relative(8, 2), relative(13, 1)],
        sites: vec![
            site(0, 5, SiteKind::Fentry),
            site(12, 5, SiteKind::Return),
            site(
                17,
                5,
                SiteKind::Retpoline {
                    register: 11,
                    call: true,
                },
            ),
            site(22, 2, branch),
            site(24, 5, SiteKind::StaticCall),
            site(
                29,
                5,
                SiteKind::Alternative {
                    replacements: vec![replacement],
                },
            ),
            site(34, 4, SiteKind::Endbr),
            site(38, 1, SiteKind::LockPrefix),
            site(
                39,
                1,
                SiteKind::RuntimeConstant {
                    symbol: 3,
                    shift: true,
                },
            ),
            site(40, 6, SiteKind::Paravirt { slot: 1 }),
        ],
    }
}

/// One of each kind: an access that goes on at the return, and a WARN_ON_ONCE.
fn traps() -> Vec<Trap> {
    let fault = TrapKind::Fault {
        fixup: Reference {
            symbol: 3,
            addend: 12,
        },
        data: 3,
    };
    let bug = TrapKind::Bug {
        file: "fs/sample.c".to_owned(),
        line: 42,
        flags: 0x903,
    };
    let trap = |offset, kind| Trap { offset, kind };
    vec![trap(20, fault), trap(24, bug)]
}

/// One push after the mark, and the end.
fn unwind(len: usize) -> Vec<Unwind> {
    let row = |offset, entry| Unwind { offset, entry };
    let pushed = Entry {
        sp_offset: 16,
        ..Entry::FUNCTION_START
    };
    vec![
        row(0, Entry::FUNCTION_START),
        row(6, pushed),
        row(len as u32, Entry::UNDEFINED),
    ]
}

/// The patch.
pub(crate) fn patch() -> Patch {
    let guest = |name: &str| Symbol::Guest {
        unit: 0,
        name: name.to_owned(),
        sympos: None,
    };
    let section = |name: &str, kind, bytes| Section {
        name: name.to_owned(),
        kind,
        align: 16,
        bytes,
        relocations: vec![],
        sites: vec![],
        traps: vec![],
        unwind: vec![],
    };
    let mut text = section(".text.sample", SectionKind::Text, old_code().bytes);
    text.bytes[24..26].copy_from_slice(&[0x0f, 0x0b]);
    text.traps = traps();
    text.unwind = unwind(text.bytes.len());
    text.relocations = vec![Relocation {
        offset: 8,
        kind: RelocationKind::Absolute32Signed,
        symbol: 4,
        addend: 0,
    }];
    text.sites = vec![Site {
        offset: 0,
        len: 5,
        kind: SiteKind::Fentry,
    }];
    Patch {
        name: "sample-1.0".to_owned(),
        requires: Requirement {
            release: Some("6.12.107+deb12-cloud-amd64".to_owned()),
            build_id: Some("00ff".repeat(10)),
        },
        units: vec![Unit {
            file: "fs/sample.c".to_owned(),
            object: VMLINUX.to_owned(),
        }],
        replaced: vec![Replacement {
            unit: 0,
            name: "sample".to_owned(),
            sympos: Some(1),
            old: old_code(),
            old_parts: vec![Part {
                name: "sample.cold".to_owned(),
                code: old_code(),
            }],
            new_section: 0,
            new_offset: 0,
        }],
        sections: vec![
            text,
            section(".rodata.str1.1", SectionKind::ReadOnly, b"new\0".to_vec()),
        ],
        symbols: vec![
            guest("__fentry__"),
            guest("__x86_return_thunk"),
            Symbol::OldBytes {
                section: ".rodata.str1.1".to_owned(),
                bytes: b"old\0".to_vec(),
            },
            guest("sample"),
            Symbol::Own {
                name: ".rodata.str1.1".to_owned(),
                section: 1,
                offset: 0,
            },
        ],
        callbacks: vec![Callback {
            kind: CallbackKind::PreApply,
            name: "sample_ready".to_owned(),
            section: 0,
        }],
    }
}
