//! What calls of callbacks need to know of a guest, found in dumps of stock kernels.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod guests;

use guests::Guest;
use vmpatch_introspect::{Called, Gva};
use vmpatch_patcher::apply::callback::BUDGET;
use vmpatch_patcher::apply::{Caller, CallerError};
use vmpatch_patcher::testing::Machine;

/// Bits of the count that are how deep, not `PREEMPT_NEED_RESCHED` (Linux v6.12 arch/x86/include/asm/preempt.h).
const DEPTHS: u32 = 0x7fff_ffff;

#[test]
fn every_stock_kernel_tells_what_calls_need() {
    let machine = Machine::new();
    machine.let_call(|_| Ok(Called::Returned(0)));
    for (name, guest) in Guest::every() {
        let kernel = &guest.kernel;
        let caller = Caller::of(kernel, &machine, BUDGET).unwrap();
        let (entry, _) = kernel.symbols.containing(caller.scheduler).unwrap();
        assert_eq!((entry.name, entry.at), ("__schedule", caller.scheduler));
        let idle = caller.idle.unwrap();
        assert!(
            idle.start < idle.end && kernel.layout.text.contains(idle.start),
            "{name}"
        );
        assert!(!caller.per_cpu.is_empty(), "{name}");
        let count = caller.preempt_count.unwrap();
        let memory = kernel.memory(&guest);
        for area in &caller.per_cpu {
            let mut word = [0; 4];
            memory.read(area.wrapping_add(count.0), &mut word).unwrap();
            // A few levels, in interrupts some more: nothing else that lies there looks like that on every CPU.
            let depth = u32::from_le_bytes(word) & DEPTHS;
            assert!(depth < 0x10_0000, "{name}: {depth:#x} at {area}");
        }
        assert_ne!(count, Gva(0), "{name}");
    }
}

#[test]
fn a_machine_that_cannot_call_is_told() {
    let machine = Machine::new();
    for (_, guest) in Guest::every().into_iter().take(1) {
        let refused = Caller::of(&guest.kernel, &machine, BUDGET);
        assert!(matches!(refused, Err(CallerError::Machine)));
    }
}
