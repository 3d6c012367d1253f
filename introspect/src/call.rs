//! A call of a function of the guest within a stop: one vCPU executes it while all others stand, and is then as it was
//! before. Owns the contract between who prepares the call and the machine that makes it; knows neither a hypervisor nor
//! what is called.
//!
//! ```text
//!   StoppedTarget::call ─▶ vCPU: rip = function, CPL 0, interrupts off
//!                            ├ returns ─────────▶ gate 256 ─▶ Returned
//!                            ├ exception n ─────▶ gate n ───▶ Trapped
//!                            ├ time is over ────────────────▶ Late
//!                            └ KVM cannot go on ────────────▶ Stuck
//! ```
//!
//! A gate is eight bytes of code that begin with `out %eax, $CALL_PORT` (e7 and the port): the exit that cannot be mistaken,
//! for no device has that port and no other code counts.

use std::time::Duration;

use crate::address::{Gpa, Gva};

/// The port of a gate: one that no PC device has.
pub const CALL_PORT: u8 = 0xe4;
/// Bytes of a gate.
pub const GATE: u64 = 8;
/// Gates: one for each vector, and the last one, which the function returns to.
pub const GATES: u64 = 257;
/// Selector of the code segment that is loaded, and that the gates of the IDT name: `__KERNEL_CS` (Linux v6.12
/// arch/x86/include/asm/segment.h).
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the stack segment: `__KERNEL_DS`.
pub const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task-state segment: `GDT_ENTRY_TSS`.
pub const TSS_SELECTOR: u16 = 0x40;

/// What is to be called, and the ground it stands on. All addresses are mapped by `page_tables`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The vCPU that executes it.
    pub vcpu: u32,
    /// The function.
    pub function: Gva,
    /// Its stack pointer on entry; the word there is the address of the last gate.
    pub stack: Gva,
    /// Top-level page table (CR3 without flags), with as many levels as the vCPU has switched on.
    pub page_tables: Gpa,
    /// Base of GS: the per-CPU area of the CPU that the vCPU is.
    pub gs_base: Gva,
    /// The first of [`GATES`] gates, [`GATE`] bytes apart.
    pub gates: Gva,
    /// A table of 256 interrupt gates of 16 bytes, which lead to `gates` on a stack of their own.
    pub idt: Gva,
    /// A table of at least ten words with the three selectors above.
    pub gdt: Gva,
    /// A task-state segment of 104 bytes.
    pub tss: Gva,
    /// Code that must not be reached: a breakpoint (#DB, vector 1) stands there.
    pub forbidden: Gva,
    /// Four bytes that belong to the state of the CPU as its registers do, and are put back with them where the function did
    /// not return: how deep preemption is switched off.
    pub preempt_count: Option<Gpa>,
    /// How long it may take.
    pub budget: Duration,
}

/// What came of a call. The registers of the vCPU are as before in every case; what the function wrote to memory stays, but for
/// [`Call::preempt_count`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Called {
    /// It returned this (RAX).
    Returned(u64),
    /// An exception or interrupt came.
    Trapped {
        /// Its vector.
        vector: u8,
        /// Where the CPU pushed what it interrupted.
        frame: Gva,
        /// CR2: where the last page fault was about.
        cr2: u64,
    },
    /// The time was over.
    Late {
        /// Where it was.
        at: Gva,
    },
    /// The vCPU could not go on.
    Stuck {
        /// Where it was.
        at: Gva,
        /// What the machine says.
        what: String,
    },
}

/// Why nothing was called, or worse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// This machine cannot.
    #[error("this VM cannot call functions of its guest: {0}")]
    Unsupported(&'static str),
    /// The vCPU is in no state for it. Another one, or a moment later, may do.
    #[error("vCPU {vcpu} cannot be made to call a function now: {why}")]
    Unfit {
        /// Which.
        vcpu: u32,
        /// Why not.
        why: String,
    },
    /// Afterwards its registers could not be set as before: the machine stays stopped.
    #[error(
        "registers of vCPU {vcpu} could not be restored after a call: {why}; the VM stays stopped"
    )]
    NotRestored {
        /// Which.
        vcpu: u32,
        /// What the machine says.
        why: String,
    },
    /// The lease ran out: the machine undid everything and runs again.
    #[error("the stop's lease ran out; the machine undid everything and runs again")]
    LeaseExpired,
    /// The machine cannot be reached.
    #[error("the VM does not answer: {0}")]
    Unreachable(String),
}

impl Call {
    /// Which gate an instruction pointer stands at or has just executed.
    #[must_use]
    pub fn gate(&self, rip: Gva) -> Option<u64> {
        let gate = rip.0.checked_sub(self.gates.0)? / GATE;
        (gate < GATES).then_some(gate)
    }
}

impl Called {
    /// What a gate says.
    #[must_use]
    pub fn through(gate: u64, rax: u64, frame: Gva, cr2: u64) -> Self {
        match u8::try_from(gate) {
            Ok(vector) => Self::Trapped { vector, frame, cr2 },
            Err(_) => Self::Returned(rax),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: Call = Call {
        vcpu: 0,
        function: Gva(0x1000),
        stack: Gva(0x2000),
        page_tables: Gpa(0x3000),
        gs_base: Gva(0),
        gates: Gva(0x4000),
        idt: Gva(0),
        gdt: Gva(0),
        tss: Gva(0),
        forbidden: Gva(0),
        preempt_count: None,
        budget: Duration::ZERO,
    };

    #[test]
    fn a_gate_is_told_by_the_instruction_pointer_before_and_after_it() {
        for (rip, gate) in [
            (0x4000, 0),
            (0x4002, 0),
            (0x4070, 14),
            (0x4072, 14),
            (0x4802, 256),
        ] {
            assert_eq!(CALL.gate(Gva(rip)), Some(gate), "{rip:#x}");
        }
        assert_eq!(CALL.gate(Gva(0x3fff)), None);
        assert_eq!(CALL.gate(Gva(0x4808)), None);
    }

    #[test]
    fn the_last_gate_is_the_way_back_and_all_others_are_vectors() {
        let called = |gate| Called::through(gate, 7, Gva(8), 9);
        assert_eq!(called(256), Called::Returned(7));
        let trapped = |vector| Called::Trapped {
            vector,
            frame: Gva(8),
            cr2: 9,
        };
        assert_eq!((called(0), called(255)), (trapped(0), trapped(255)));
    }
}
