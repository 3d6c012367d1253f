//! A guest whose memory is damaged at random is refused or read, but never makes us panic or run on.

mod common;

use std::time::{Duration, Instant};

use common::{Guest, each_guest};
use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::{Gpa, GpaRange, Kernel, PhysicalMemory};

/// A guest's memory with one byte changed in one of `rarity` blocks of 64 bytes.
struct Damaged<'a> {
    guest: &'a Guest,
    seed: u64,
    rarity: u64,
    /// Damage begins here, so that some rounds leave the page tables, others the symbols alone.
    from: u64,
}

impl Damaged<'_> {
    /// splitmix64.
    fn chance(&self, block: u64) -> u64 {
        let mut z = (self.seed ^ block).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl PhysicalMemory for Damaged<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.guest.dump.read(at, into)?;
        let end = at.0 + into.len() as u64;
        for block in at.0.max(self.from) / 64..end.div_ceil(64) {
            let chance = self.chance(block);
            let place = block * 64 + (chance >> 40) % 64;
            if chance.is_multiple_of(self.rarity) && (at.0..end).contains(&place) {
                into[(place - at.0) as usize] ^= (chance >> 32) as u8;
            }
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.guest.dump.ram()
    }
}

fn look(memory: &Damaged<'_>) -> u32 {
    let attached = Kernel::attach(memory, memory.guest.dump.vcpus());
    // Where the damage hits what attaching needs, go on with the true kernel over damaged memory.
    let kernel = attached.as_ref().unwrap_or(&memory.guest.kernel);
    let _ = kernel.text_patching(memory);
    let _ = kernel.cpu_features(memory);
    let worked = [
        attached.is_ok(),
        kernel.tasks(memory).is_ok(),
        kernel.modules(memory).is_ok(),
        kernel.log(memory).is_ok(),
    ];
    worked.into_iter().map(u32::from).sum()
}

#[test]
fn damaged_memory_never_makes_us_panic_or_run_on() {
    each_guest(|guest| {
        let mut worked = 0;
        for seed in 0..24 {
            let rarity = 10_u64.pow(1 + (seed % 6) as u32);
            let from = if seed % 2 == 0 { 0 } else { seed * (8 << 20) };
            let damaged = Damaged {
                guest,
                seed: seed << 48,
                rarity,
                from,
            };
            let start = Instant::now();
            worked += look(&damaged);
            assert!(start.elapsed() < Duration::from_secs(60), "seed {seed}");
        }
        // The damage must not be so heavy that only the first check is ever reached.
        assert!(worked > 10, "{}: {worked}", guest.name);
    });
}
