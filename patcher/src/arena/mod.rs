//! Where new code lives: a window of guest-virtual addresses that no allocator of the guest knows, backed
//! by a memory slot of the hypervisor's own. Owns the layout of the slot, the page-table entries that map
//! it, the manifest at its head and the allocation of pages. Writes nothing itself: it yields bytes for
//! [`Target::write_arena`](vmpatch_introspect::Target::write_arena) and [`Edit`]s for the stop.
//!
//! ```text
//!   slot (guest-physical, in 4 KiB pages)     window (guest-virtual, from ffffffffff000000)
//!   ┌  0..16   manifest, copy A               not mapped
//!   │ 16..32   manifest, copy B               not mapped
//!   │ 32       page table of the window       not mapped
//!   └ 64..576  twelve fixed pages, then the   pages 0..512: text r-x, constants r--, data rw-
//!              extents, in order of arrival
//! ```
//!
//! Pages are handed out once and never again within one boot: timers, RCU callbacks and work items may
//! point into text that has been rolled back.

pub mod claim;
pub mod codec;
pub mod fixed;
pub mod manifest;
pub mod overlay;
pub mod stage;
pub mod state;
pub mod window;

use serde::{Deserialize, Serialize};

use vmpatch_introspect::Gpa;
use vmpatch_introspect::target::Edit;

pub use claim::{Loaded, ModuleClaim};
pub use manifest::{
    BusyKind, BusyRange, CallbackRecord, Extent, Manifest, PatchRecord, SiteRecord, SiteRole,
};
pub use overlay::Overlay;
pub use state::{Arena, ArenaError, Arrival};

/// Edits that map the arena window: only ever from not-present to present, and never reversed, so that
/// no TLB flush is needed. Empty once the window is mapped.
pub type MapEdits = Vec<Edit>;

/// Bytes for the arena slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArenaWrite {
    /// Where in the slot.
    pub at: Gpa,
    /// What is to be there.
    pub bytes: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use vmpatch_introspect::address::PAGE_SIZE;
    use vmpatch_introspect::identity::Identity;
    use vmpatch_introspect::kernel::Layout;
    use vmpatch_introspect::symbols::Symbols;
    use vmpatch_introspect::target::MemoryError;
    use vmpatch_introspect::types::Types;
    use vmpatch_introspect::{AddressSpace, GpaRange, Gva, GvaRange, Kernel, PhysicalMemory};

    use super::*;

    const RAM: u64 = 16 * PAGE_SIZE;
    const SLOT: u64 = 1 << 32;

    /// RAM with three upper tables, and a slot.
    pub(super) struct Slot {
        pub(super) range: GpaRange,
        ram: RefCell<Vec<u8>>,
        slot: RefCell<Vec<u8>>,
    }

    impl Slot {
        pub(super) fn new() -> Self {
            let size: u64 = 4 << 20;
            let it = Self {
                range: GpaRange::sized(Gpa(SLOT), size).unwrap(),
                ram: RefCell::new(vec![0; RAM as usize]),
                slot: RefCell::new(vec![0; size as usize]),
            };
            it.write(Gpa(0x1000 + 511 * 8), &0x2063_u64.to_le_bytes());
            it.write(Gpa(0x2000 + 511 * 8), &0x3063_u64.to_le_bytes());
            it
        }

        pub(super) fn write(&self, at: Gpa, bytes: &[u8]) {
            let (memory, from) = if at.0 < RAM {
                (&self.ram, at.0)
            } else {
                (&self.slot, at.0 - SLOT)
            };
            memory.borrow_mut()[from as usize..][..bytes.len()].copy_from_slice(bytes);
        }
    }

    impl PhysicalMemory for Slot {
        fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
            let (memory, from) = if at.0 < RAM {
                (&self.ram, at.0)
            } else {
                (&self.slot, at.0.wrapping_sub(SLOT))
            };
            let from = from as usize;
            let bytes = memory.borrow();
            let found = from
                .checked_add(into.len())
                .and_then(|end| bytes.get(from..end));
            into.copy_from_slice(found.ok_or(MemoryError::NotBacked {
                at,
                len: into.len(),
            })?);
            Ok(())
        }

        fn ram(&self) -> Vec<GpaRange> {
            vec![GpaRange {
                start: Gpa(0),
                end: Gpa(RAM),
            }]
        }
    }

    pub(super) fn kernel() -> Kernel {
        Kernel::new(
            Identity {
                banner: String::new(),
                release: String::new(),
                build_id: None,
                slide: 0,
                phys_base: 0,
                boot: "b00t".into(),
            },
            Layout {
                text: GvaRange {
                    start: Gva(0),
                    end: Gva(0),
                },
                init: None,
                space: AddressSpace {
                    root: Gpa(0x1000),
                    five_level: false,
                },
                per_cpu_offset: Vec::new(),
                direct_map: Gva(0),
                idt_base: Gva(0),
            },
            Symbols::default(),
            Types::default(),
        )
    }

    pub(super) fn record(name: &str) -> PatchRecord {
        PatchRecord {
            name: name.into(),
            digest: "00".into(),
            extents: Vec::new(),
            modules: Vec::new(),
            sites: vec![SiteRecord {
                function: "f".into(),
                role: SiteRole::Entry,
                at: Gva(0x1005),
                edits: vec![Edit {
                    at: Gpa(5),
                    old: vec![1, 2],
                    new: vec![3, 4],
                }],
                covered: GvaRange {
                    start: Gva(0x1005),
                    end: Gva(0x100a),
                },
            }],
            busy: Vec::new(),
            hooks: Vec::new(),
            unwind: None,
            callbacks: Vec::new(),
        }
    }

    #[test]
    fn rollback_edits_are_those_of_apply_the_other_way() {
        let record = record("fix");
        assert_eq!(
            record.rollback_edits(&[])[0],
            record.apply_edits()[0].reversed()
        );
    }
}
