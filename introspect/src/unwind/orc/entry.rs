//! One ORC entry in its normal form, whatever format it was stored in.

use serde::{Deserialize, Serialize};

/// What a frame's previous stack pointer or frame pointer is counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Base {
    /// The register did not change in this frame.
    Undefined,
    /// The stack pointer before the call (DWARF's CFA).
    PreviousSp,
    /// rax (since Linux 7.1).
    Ax,
    /// rdx.
    Dx,
    /// rdi.
    Di,
    /// rbp.
    Bp,
    /// rsp.
    Sp,
    /// r10.
    R10,
    /// r13.
    R13,
    /// The word that rbp plus the offset points to.
    BpIndirect,
    /// The word that rsp points to, plus the offset.
    SpIndirect,
    /// A number that names no register.
    Unknown,
}

/// What lies at the previous stack pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Kind {
    /// Nothing is known: code without unwind data, or the gap after a section.
    Undefined,
    /// The outermost frame.
    EndOfStack,
    /// A return address, just below it.
    Call,
    /// A whole `struct pt_regs`, from it on.
    Regs,
    /// Only what the CPU pushes for an interrupt (rip, cs, rflags, rsp, ss).
    RegsPartial,
    /// A number that names no kind.
    Unknown,
}

/// How to get from a frame to the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Added to `sp`.
    pub sp_offset: i16,
    /// Added to `bp`.
    pub bp_offset: i16,
    /// What the previous stack pointer is counted from.
    pub sp: Base,
    /// Where the previous frame pointer is kept.
    pub bp: Base,
    /// What lies there.
    pub kind: Kind,
    /// The previous ip is where execution was interrupted, not a return address after a call.
    pub signal: bool,
}

impl Entry {
    /// On the first instruction of a function nothing is pushed but the return address.
    pub const FUNCTION_START: Self = Self {
        sp_offset: 8,
        bp_offset: 0,
        sp: Base::Sp,
        bp: Base::Undefined,
        kind: Kind::Call,
        signal: false,
    };

    /// Nothing is known from here on.
    pub const UNDEFINED: Self = Self {
        sp_offset: 0,
        bp_offset: 0,
        sp: Base::Undefined,
        bp: Base::Undefined,
        kind: Kind::Undefined,
        signal: false,
    };

    /// What holds in a function that keeps a frame pointer, and what the kernel assumes of code that ORC does not cover, where
    /// it is only a guess (Linux
    /// v6.12 `arch/x86/kernel/unwind_orc.c`, `orc_fp_entry`).
    pub const FRAME_POINTER_GUESS: Self = Self {
        sp_offset: 16,
        bp_offset: -16,
        sp: Base::Bp,
        bp: Base::PreviousSp,
        kind: Kind::Call,
        signal: false,
    };
}
