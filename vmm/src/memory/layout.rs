//! Where guest RAM and the arena slot lie in guest-physical space. Pure arithmetic: allocates nothing
//! and knows no KVM. What lies inside the low RAM (tables, kernel, initrd) is [`crate::boot`]'s.
//!
//! ```text
//! 0 ............ RAM ............ 3 GiB | devices | 4 GiB .... RAM .... | ... | arena 4 MiB | 16 GiB | top
//! ```

use vmpatch_introspect::address::{Gpa, GpaRange};

/// Start of the hole for devices below 4 GiB: IOAPIC (fec00000), LAPIC (fee00000) and the identity-map
/// and TSS pages of KVM on Intel lie in it, and so will virtio-mmio.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole: RAM goes on here.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Bytes of the arena slot: the two level-2 entries that hold it map 2 MiB each.
pub const ARENA_SIZE: u64 = 4 << 20;

const MIB: u64 = 1 << 20;
/// The arena lies at least this far below the top. AMD reserves the top 12 GiB of the physical address
/// space (for HyperTransport; before family 17h the 12 GiB below 1 TiB), and a guest access there faults
/// whatever the nested page tables say (Linux v6.12 tools/testing/selftests/kvm/lib/x86_64/processor.c,
/// `vm_compute_max_gfn`).
const RESERVED_TOP: u64 = 16 << 30;
/// Four-level nested page tables reach 48 bits, whatever CPUID says of the width.
const WIDEST: u8 = 48;
/// The narrowest width that leaves room below [`RESERVED_TOP`] (Intel SDM vol. 3A, 4.1.4: at least 36
/// where CPUID does not tell).
const NARROWEST: u8 = 36;

/// The guest-physical ranges of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    ram: Vec<GpaRange>,
    arena: GpaRange,
}

/// Why a memory size cannot be laid out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Not a multiple of 2 MiB, or nothing.
    #[error("{bytes} bytes of memory: must be a multiple of 2 MiB, and at least 2 MiB")]
    Granularity {
        /// The size asked for.
        bytes: u64,
    },
    /// RAM would reach the arena slot or pass the guest's physical address width.
    #[error(
        "{bytes} bytes of memory do not fit below the arena slot at {arena} ({bits} address bits)"
    )]
    TooLarge {
        /// The size asked for.
        bytes: u64,
        /// Where the arena slot begins.
        arena: Gpa,
        /// The guest's physical address width.
        bits: u8,
    },
    /// A width no x86-64 CPU has.
    #[error(
        "the host reports a guest physical address width of {bits} bits; at least 36 are needed"
    )]
    Width {
        /// The width reported.
        bits: u8,
    },
}

impl Layout {
    /// Lays out `bytes` of RAM on a guest with a physical address width of `bits` (CPUID 80000008 EAX
    /// bits 7:0).
    ///
    /// # Errors
    /// [`LayoutError`] for a size or width that cannot be.
    pub fn new(bytes: u64, bits: u8) -> Result<Self, LayoutError> {
        if bytes == 0 || !bytes.is_multiple_of(2 * MIB) {
            return Err(LayoutError::Granularity { bytes });
        }
        let arena = arena(bits)?;
        let too_large = LayoutError::TooLarge {
            bytes,
            arena: arena.start,
            bits,
        };
        let Some(high) = GpaRange::sized(Gpa(HOLE_END), bytes.saturating_sub(HOLE_START)) else {
            return Err(too_large);
        };
        if high.end > arena.start {
            return Err(too_large);
        }
        let low = GpaRange {
            start: Gpa(0),
            end: Gpa(bytes.min(HOLE_START)),
        };
        let ram = [low, high]
            .into_iter()
            .filter(|range| !range.is_empty())
            .collect();
        Ok(Self { ram, arena })
    }

    /// Guest RAM: one range, or two around the hole. Sorted.
    #[must_use]
    pub fn ram(&self) -> &[GpaRange] {
        &self.ram
    }

    /// The arena slot, 2 MiB aligned.
    #[must_use]
    pub const fn arena(&self) -> GpaRange {
        self.arena
    }
}

fn arena(bits: u8) -> Result<GpaRange, LayoutError> {
    if bits < NARROWEST {
        return Err(LayoutError::Width { bits });
    }
    let end = (1_u64 << bits.min(WIDEST)) - RESERVED_TOP;
    Ok(GpaRange {
        start: Gpa(end - ARENA_SIZE),
        end: Gpa(end),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn up_to_three_gib_are_one_range() {
        let layout = Layout::new(3 * GIB, 40).unwrap();
        assert_eq!(
            layout.ram(),
            [GpaRange {
                start: Gpa(0),
                end: Gpa(3 * GIB)
            }]
        );
    }

    #[test]
    fn more_than_three_gib_go_on_at_four_gib() {
        let layout = Layout::new(5 * GIB, 48).unwrap();
        let high = GpaRange {
            start: Gpa(4 * GIB),
            end: Gpa(6 * GIB),
        };
        assert_eq!(
            layout.ram(),
            [
                GpaRange {
                    start: Gpa(0),
                    end: Gpa(3 * GIB)
                },
                high
            ]
        );
    }

    #[test]
    fn every_size_is_covered_exactly_and_never_touches_hole_or_arena() {
        for mib in [2, 128, 3070, 3072, 3074, 4096, 40960] {
            let layout = Layout::new(mib * MIB, 36).unwrap();
            assert_eq!(
                layout.ram().iter().map(GpaRange::size).sum::<u64>(),
                mib * MIB
            );
            let hole = GpaRange {
                start: Gpa(HOLE_START),
                end: Gpa(HOLE_END),
            };
            for range in layout.ram() {
                assert!(!range.overlaps(&hole) && !range.overlaps(&layout.arena()));
            }
        }
    }

    #[test]
    fn the_arena_is_two_mib_aligned_and_below_amds_reserved_top() {
        for (bits, start) in [
            (36, 0xb_ffc0_0000),
            (40, 0xfb_ffc0_0000),
            (48, 0xfffb_ffc0_0000),
        ] {
            let arena = Layout::new(2 * MIB, bits).unwrap().arena();
            assert_eq!(arena.start, Gpa(start));
            assert_eq!((arena.size(), arena.start.0 % (2 * MIB)), (ARENA_SIZE, 0));
            assert!(arena.end.0 <= (1_u64 << bits) - 12 * GIB);
        }
    }

    #[test]
    fn a_width_over_48_bits_is_not_relied_on() {
        assert_eq!(
            Layout::new(2 * MIB, 52).unwrap(),
            Layout::new(2 * MIB, 48).unwrap()
        );
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        assert_eq!(
            Layout::new(0, 40),
            Err(LayoutError::Granularity { bytes: 0 })
        );
        assert_eq!(
            Layout::new(3 * MIB, 40),
            Err(LayoutError::Granularity { bytes: 3 * MIB })
        );
        assert!(matches!(
            Layout::new(64 * GIB, 36),
            Err(LayoutError::TooLarge { .. })
        ));
        assert!(matches!(
            Layout::new(1 << 63, 48),
            Err(LayoutError::TooLarge { .. })
        ));
        assert_eq!(
            Layout::new(2 * MIB, 32),
            Err(LayoutError::Width { bits: 32 })
        );
    }
}
