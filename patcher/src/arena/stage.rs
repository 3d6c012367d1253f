//! The stage of a call: pages of the window on which one vCPU executes a callback of a patch while all others stand. Owns what
//! lies there; who is called, when and on which vCPU is [`apply`](crate::apply)'s.
//!
//! ```text
//!   page 4       gates: one for each vector, one to return to       r-x
//!   page 5       interrupt descriptor table                         r--
//!   page 6       descriptors, task state, the stack of traps        rw-
//!   page 7       not mapped: a stack that overflows is a page fault
//!   pages 8-11   the stack of the callback                          rw-
//! ```
//!
//! The guest's own tables are not used: a trap in a callback must lead out of the guest and not into handlers that take
//! locks, log, or return to where a fault is met again for ever.

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::call::{CALL_PORT, CODE_SELECTOR, Call, DATA_SELECTOR, GATE, GATES};
use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::{GpaRange, Gva, PhysicalMemory};

use super::ArenaWrite;
use super::manifest::Extent;
use super::window::{page_address, page_frame};
use crate::patch::SectionKind;

const GATE_PAGE: u32 = 4;
const IDT_PAGE: u32 = 5;
const TABLE_PAGE: u32 = 6;
const STACK_PAGE: u32 = 8;
/// As many as a kernel thread has (`THREAD_SIZE`, Linux v6.12 arch/x86/include/asm/page_64_types.h).
const STACK_PAGES: u32 = 4;
/// The first page after the stage.
pub const END_PAGE: u32 = STACK_PAGE + STACK_PAGES;

/// Where the task-state segment lies on its page, after the descriptors.
const TSS: u64 = 0x100;
/// Bytes of a task-state segment, and where its stack pointer 1 of the interrupt stack table is (Intel SDM vol. 3 section 8.7,
/// figure 8-11).
const TSS_BYTES: usize = 104;
const TSS_IST1: usize = 36;
/// Flat segments of privilege level 0, accessed (Intel SDM vol. 3 section 3.4.5): 64-bit code, data.
const CODE: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// A present interrupt gate of privilege level 0 that switches to stack 1 (Intel SDM vol. 3 section 6.14.1, figure 6-8).
const INTERRUPT_GATE: u64 = 0x8e << 40 | 1 << 32;
/// Vectors that push an error code (Intel SDM vol. 3 section 6.13; 29 and 30 on AMD: Architecture Programmer's Manual vol. 2
/// section 8.2).
const WITH_ERROR_CODE: [u8; 10] = [8, 10, 11, 12, 13, 14, 17, 21, 29, 30];

/// The stage as extents, so that it is mapped like all else.
pub const EXTENTS: [Extent; 4] = [
    extent(GATE_PAGE, 1, SectionKind::Text),
    extent(IDT_PAGE, 1, SectionKind::ReadOnly),
    extent(TABLE_PAGE, 1, SectionKind::Data),
    extent(STACK_PAGE, STACK_PAGES, SectionKind::Data),
];

const fn extent(page: u32, pages: u32, kind: SectionKind) -> Extent {
    Extent { page, pages, kind }
}

/// What is to be in the slot for it, the same for every boot.
#[must_use]
pub fn writes(slot: GpaRange) -> Vec<ArenaWrite> {
    let write = |page, offset, bytes| ArenaWrite {
        at: page_frame(slot, page).wrapping_add(offset),
        bytes,
    };
    vec![
        write(GATE_PAGE, 0, gates()),
        write(IDT_PAGE, 0, idt()),
        write(TABLE_PAGE, 0, tables()),
        write(END_PAGE - 1, PAGE_SIZE - 8, way_back().to_vec()),
    ]
}

/// Whether all of it is there: a guest can write to its arena.
///
/// # Errors
/// The slot cannot be read.
pub fn is_set(memory: &dyn PhysicalMemory, slot: GpaRange) -> Result<bool, MemoryError> {
    for write in writes(slot) {
        let mut now = vec![0; write.bytes.len()];
        memory.read(write.at, &mut now)?;
        if now != write.bytes {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Puts the addresses of the stage into a call.
pub const fn put_on(call: &mut Call) {
    call.stack = page_address(END_PAGE).wrapping_sub(8);
    call.gates = page_address(GATE_PAGE);
    call.idt = page_address(IDT_PAGE);
    call.gdt = page_address(TABLE_PAGE);
    call.tss = page_address(TABLE_PAGE).wrapping_add(TSS);
}

/// Where a trap struck, by the frame that the CPU pushed; `None` where it is not on the stack of traps.
#[must_use]
pub fn trapped_at(
    memory: &dyn PhysicalMemory,
    slot: GpaRange,
    vector: u8,
    frame: Gva,
) -> Option<Gva> {
    let error_code = if WITH_ERROR_CODE.contains(&vector) {
        8
    } else {
        0
    };
    let offset = frame.0.checked_sub(page_address(TABLE_PAGE).0)?;
    let offset = offset.checked_add(error_code)?;
    // Five words: RIP is the first.
    if offset > PAGE_SIZE - 40 || !offset.is_multiple_of(8) {
        return None;
    }
    let at = page_frame(slot, TABLE_PAGE).wrapping_add(offset);
    memory.read_u64(at).ok().map(Gva)
}

fn gate(number: u64) -> Gva {
    page_address(GATE_PAGE).wrapping_add(number * GATE)
}

/// The address that the callback returns to.
fn way_back() -> [u8; 8] {
    gate(GATES - 1).0.to_le_bytes()
}

fn gates() -> Vec<u8> {
    // out %eax, $port; ud2; int3 to the end
    let gate = [0xe7, CALL_PORT, 0x0f, 0x0b, 0xcc, 0xcc, 0xcc, 0xcc];
    let mut page = gate.repeat(GATES as usize);
    page.resize(PAGE_SIZE as usize, 0xcc);
    page
}

fn idt() -> Vec<u8> {
    let descriptor = |vector| {
        let to = gate(vector).0;
        let low = (to & 0xffff)
            | u64::from(CODE_SELECTOR) << 16
            | INTERRUPT_GATE
            | (to >> 16 & 0xffff) << 48;
        [low, to >> 32]
    };
    (0..256)
        .flat_map(descriptor)
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// Descriptors and task state. The descriptor of the task-state segment itself is never read: the register is set with its
/// hidden part.
fn tables() -> Vec<u8> {
    let mut bytes = vec![0; TSS as usize + TSS_BYTES];
    let trap_stack = page_address(TABLE_PAGE + 1).0;
    for (at, word) in [
        (usize::from(CODE_SELECTOR), CODE),
        (usize::from(DATA_SELECTOR), DATA),
        (TSS as usize + TSS_IST1, trap_stack),
    ] {
        bytes.splice(at..at + 8, word.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vmpatch_introspect::Gpa;

    use super::super::tests::Slot;
    use super::*;

    fn set() -> Slot {
        let slot = Slot::new();
        for write in writes(slot.range) {
            slot.write(write.at, &write.bytes);
        }
        slot
    }

    #[test]
    fn a_changed_bit_of_the_stage_is_seen() {
        let slot = set();
        assert!(is_set(&slot, slot.range).unwrap());
        for page in [GATE_PAGE, IDT_PAGE, TABLE_PAGE] {
            let at = page_frame(slot.range, page).wrapping_add(0x10);
            let word = slot.read_u64(at).unwrap();
            slot.write(at, &(word ^ 1).to_le_bytes());
            assert!(!is_set(&slot, slot.range).unwrap(), "page {page}");
            slot.write(at, &word.to_le_bytes());
        }
        assert!(is_set(&slot, slot.range).unwrap());
    }

    #[test]
    fn every_vector_leads_to_its_gate_and_the_stack_to_the_last() {
        let slot = set();
        let read = |page, offset| slot.read_u64(page_frame(slot.range, page).wrapping_add(offset));
        for vector in 0..256 {
            let low = read(IDT_PAGE, vector * 16).unwrap();
            let high = read(IDT_PAGE, vector * 16 + 8).unwrap();
            let to = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
            assert_eq!(to, gate(vector).0);
        }
        assert_eq!(read(END_PAGE - 1, 4088).unwrap(), gate(256).0);
        let mut call = call();
        put_on(&mut call);
        assert_eq!(call.gate(gate(256).wrapping_add(2)), Some(256));
        // As the ABI wants it where a function is entered: a multiple of 16, less the return address.
        assert_eq!(call.stack.0 % 16, 8);
    }

    #[test]
    fn the_place_of_a_trap_is_read_behind_an_error_code() {
        let slot = set();
        let top = page_address(TABLE_PAGE + 1);
        let at = |below| page_frame(slot.range, TABLE_PAGE).wrapping_add(PAGE_SIZE - below);
        slot.write(at(40), &0x1234_u64.to_le_bytes());
        let place = |vector, below| trapped_at(&slot, slot.range, vector, top.wrapping_sub(below));
        assert_eq!(place(6, 40), Some(Gva(0x1234)));
        assert_eq!(place(14, 48), Some(Gva(0x1234)));
        assert_eq!(place(6, 8), None);
        assert_eq!(place(6, 8192), None);
        assert_eq!(trapped_at(&slot, slot.range, 6, Gva(u64::MAX)), None);
    }

    fn call() -> Call {
        Call {
            vcpu: 0,
            function: Gva(0),
            stack: Gva(0),
            page_tables: Gpa(0),
            gs_base: Gva(0),
            gates: Gva(0),
            idt: Gva(0),
            gdt: Gva(0),
            tss: Gva(0),
            forbidden: Gva(0),
            preempt_count: None,
            budget: Duration::ZERO,
        }
    }
}
