//! What the arena says of its own code, for an unwinder. Owns which of it counts: all that was placed in this boot, applied
//! or rolled back since, for its code may still run.

use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::{GpaRange, Gva, Kernel, PhysicalMemory};

use super::rows::{Row, Rows};
use crate::arena::fixed::Table;
use crate::arena::{Arena, window};
use crate::link::hooks::stub;

/// Takes in the rows of every patch in the arena. Where there are none, or they are damaged, its code stays without unwind
/// data, which costs time and no safety.
pub fn cover(
    unwinder: &mut Unwinder,
    kernel: &Kernel,
    memory: &dyn PhysicalMemory,
    slot: GpaRange,
) {
    let arena = match Arena::open(kernel, memory, slot) {
        Ok(arena) if arena.is_mapped() => arena,
        // Nothing runs there.
        Ok(_) => return,
        Err(why) => {
            tracing::warn!(%why, "code in the arena is without unwind data");
            return;
        }
    };
    let records = arena.manifest().patches.iter();
    let placed = records.filter_map(|record| Some((record.name.as_str(), record.unwind?)));
    for (name, place) in placed {
        match read(place, memory, slot) {
            Some(rows) => take(unwinder, name, &rows),
            None => tracing::warn!(name, "unwind data of a patch is damaged"),
        }
    }
    for table in Table::ALL {
        take(unwinder, "hooks", &stub::rows(table));
    }
}

fn take(unwinder: &mut Unwinder, name: &str, rows: &[Row]) {
    if let Err(why) = unwinder.cover(rows) {
        tracing::warn!(name, %why, "unwind data of a patch is of no use");
    }
}

fn read(place: Rows, memory: &dyn PhysicalMemory, slot: GpaRange) -> Option<Vec<Row>> {
    let size = place.size()?;
    let end = place.at.checked_add(size as u64)?;
    if place.at < window::WINDOW_START || end > window::window().end {
        return None;
    }
    let mut bytes = vec![0; size];
    // Pages of the window follow one another in the slot too.
    let Gva(from) = place.at;
    let at = window::page_frame(slot, 0).checked_add(from - window::WINDOW_START.0)?;
    memory.read(at, &mut bytes).ok()?;
    place.decode(&bytes)
}
