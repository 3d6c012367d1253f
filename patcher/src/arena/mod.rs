//! Where new code lives: a window of guest-virtual addresses that no allocator of the guest knows, backed
//! by a memory slot of the hypervisor's own. Owns the layout of the slot, the page-table entries that map
//! it, the manifest at its head and the allocation of pages. Writes nothing itself: it yields bytes for
//! [`Target::write_arena`](vmpatch_introspect::Target::write_arena) and [`Edit`]s for the stop.
//!
//! ```text
//!   slot (guest-physical)                          window (guest-virtual, from ffffffffff000000)
//!   ┌ page  0..16  manifest, copy A                not mapped
//!   │ page 16..32  manifest, copy B                not mapped
//!   │ page 32..34  page tables of the window       not mapped
//!   └ page 34..    extents, in order of arrival    same page number; text r-x, constants r--, data rw-
//! ```
//!
//! Pages are handed out once and never again within one boot: timers, RCU callbacks and work items may
//! point into text that has been rolled back.

pub mod manifest;

use vmpatch_introspect::target::Edit;

pub use manifest::{BusyKind, BusyRange, Extent, Manifest, PatchRecord, PatchState, SiteRecord};

/// Edits that map the arena window: only ever from not-present to present, and never reversed, so that
/// no TLB flush is needed. Empty once the window is mapped.
pub type MapEdits = Vec<Edit>;
