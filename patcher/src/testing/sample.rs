//! One verified patch for the machine of plain bytes: two functions, one of them with a cold part, new text
//! in the arena, the manifest there too.

use vmpatch_introspect::target::Edit;
use vmpatch_introspect::{Gpa, GpaRange, Gva, GvaRange, PhysicalMemory, Target};

use super::machine::{Machine, SLOT, SLOT_SIZE};
use crate::apply::Caller;
use crate::apply::callback::BUDGET;
use crate::arena::{
    ArenaWrite, BusyKind, BusyRange, CallbackRecord, Extent, Manifest, PatchRecord, SiteRecord,
    SiteRole, codec, stage, window,
};
use crate::link::layers::{Layers, Stacking};
use crate::patch::{CallbackKind, SectionKind};
use crate::status::Known;
use crate::verify::{Switch, Verified};

/// The boot that samples are made for.
pub const BOOT: &str = "b007";
/// Where the kernel's text begins; it lies at guest-physical zero.
pub const TEXT: Gva = Gva(0xffff_ffff_8100_0000);
/// The first function: 64 bytes.
pub const FIRST: Gva = Gva(TEXT.0 + 0x1000);
/// The second: 64 bytes.
pub const SECOND: Gva = Gva(TEXT.0 + 0x2000);
/// The first one's cold part: 32 bytes.
pub const COLD: Gva = Gva(TEXT.0 + 0x9000);
/// The level-2 entries that map the arena.
const LEVEL2: Gpa = Gpa(0x3fc0);
const FUNCTION: u64 = 64;

/// The arena slot.
#[must_use]
pub fn slot() -> GpaRange {
    GpaRange {
        start: SLOT,
        end: Gpa(SLOT.0 + SLOT_SIZE),
    }
}

/// Makes a machine fit for the samples: nothing maps the arena.
#[must_use]
pub fn machine() -> Machine {
    let machine = Machine::new();
    machine.set(LEVEL2, &[0; 16]);
    machine
}

/// A patch of that name for what `machine` holds now, upon what is there, its new text in pages of its own.
#[must_use]
pub fn verified(machine: &Machine, name: &str) -> Verified {
    let none = Layers::of(&Known::default(), Stacking::Upon).unwrap();
    verified_beside(machine, name, &none)
}

/// The same beside patches that are there, or in their place.
#[must_use]
pub fn verified_beside(machine: &Machine, name: &str, layers: &Layers) -> Verified {
    verified_calling(machine, name, layers, &[])
}

/// The same with callbacks, all at the first new function.
#[must_use]
pub fn verified_calling(
    machine: &Machine,
    name: &str,
    layers: &Layers,
    callbacks: &[CallbackKind],
) -> Verified {
    let manifest = manifest(machine);
    let page = manifest.next_page;
    let mut record = record(&layers.ground(machine), name, page);
    let callback = |kind: &CallbackKind| CallbackRecord {
        kind: *kind,
        function: format!("my_{kind}"),
        at: window::page_address(page),
    };
    record.callbacks = callbacks.iter().map(callback).collect();
    let text: Vec<u8> = (0..4096_u32).map(|at| (at % 251) as u8).collect();
    let write = |at, bytes| ArenaWrite { at, bytes };
    let stage = match callbacks {
        [] => Vec::new(),
        _ => stage::writes(slot()),
    };
    Verified {
        boot: BOOT.to_owned(),
        arena_writes: [
            write_manifest(manifest, &record),
            write(window::page_frame(slot(), page), text),
        ]
        .into_iter()
        .chain(stage)
        .collect(),
        map: map_edits(machine),
        switch: Switch::of(&record, layers, machine).unwrap(),
        functions: Vec::new(),
        record,
    }
}

/// What calls need to know of this machine: one per-CPU area, that of every vCPU.
#[must_use]
pub fn caller() -> Caller {
    Caller {
        slot: slot(),
        page_tables: (Gpa(0x1000), false),
        per_cpu: vec![Gva(0)],
        scheduler: TEXT,
        idle: None,
        preempt_count: None,
        budget: BUDGET,
    }
}

/// The manifest in force.
#[must_use]
pub fn manifest(machine: &Machine) -> Manifest {
    codec::read(machine, machine.arena().unwrap())
        .unwrap()
        .unwrap_or_else(|| Manifest::fresh(BOOT, 0))
}

fn write_manifest(mut manifest: Manifest, record: &PatchRecord) -> ArenaWrite {
    manifest.generation += 1;
    manifest.next_page += 1;
    manifest.patches.push(record.clone());
    let bytes = codec::encode(&manifest).unwrap();
    ArenaWrite {
        at: codec::place(slot(), manifest.generation),
        bytes,
    }
}

fn map_edits(machine: &Machine) -> Vec<Edit> {
    let mut old = [0; 8];
    machine.read(LEVEL2, &mut old).unwrap();
    let new = window::level2_entry(slot()).to_le_bytes();
    let edit = Edit {
        at: LEVEL2,
        old: old.to_vec(),
        new: new.to_vec(),
    };
    if old == new { Vec::new() } else { vec![edit] }
}

fn record(machine: &dyn PhysicalMemory, name: &str, page: u32) -> PatchRecord {
    let new = |index: u64| window::page_address(page).wrapping_add(index * FUNCTION);
    PatchRecord {
        name: name.to_owned(),
        digest: format!("{name}-digest"),
        extents: vec![Extent {
            page,
            pages: 1,
            kind: SectionKind::Text,
        }],
        modules: Vec::new(),
        sites: vec![
            site(machine, "first", FIRST, new(0)),
            site(machine, "second", SECOND, new(1)),
        ],
        busy: vec![
            busy("first", FIRST, FUNCTION, BusyKind::Old),
            busy("first.cold", COLD, 32, BusyKind::OldPart),
            busy("second", SECOND, FUNCTION, BusyKind::Old),
            busy("first", new(0), FUNCTION, BusyKind::New),
            busy("second", new(1), FUNCTION, BusyKind::New),
        ],
        hooks: Vec::new(),
        unwind: None,
        callbacks: Vec::new(),
    }
}

/// An entry jump five bytes into the function, after its fentry site.
fn site(machine: &dyn PhysicalMemory, function: &str, entry: Gva, to: Gva) -> SiteRecord {
    let at = entry.wrapping_add(5);
    let physical = Gpa(at.0 - TEXT.0);
    let mut old = vec![0; 5];
    machine.read(physical, &mut old).unwrap();
    let distance = to.0.wrapping_sub(at.0 + 5) as u32;
    let mut new = vec![0xe9];
    new.extend(distance.to_le_bytes());
    SiteRecord {
        function: function.to_owned(),
        role: SiteRole::Entry,
        at,
        edits: vec![Edit {
            at: physical,
            old,
            new,
        }],
        covered: GvaRange {
            start: at,
            end: at.wrapping_add(5),
        },
    }
}

fn busy(function: &str, start: Gva, size: u64, kind: BusyKind) -> BusyRange {
    BusyRange {
        range: GvaRange {
            start,
            end: start.wrapping_add(size),
        },
        function: function.to_owned(),
        kind,
    }
}
