//! The tables of a patch: what the kernel is to find when the CPU traps in new code. Owns their bytes, in the
//! kernel's own formats; how the kernel comes to look there is [`hooks`](super::hooks)'s.
//!
//! Both formats are rows of twelve bytes that begin with the distance from the entry to the instruction, in 6.1 and
//! 6.12 alike: `struct bug_entry` (include/asm-generic/bug.h, with `CONFIG_GENERIC_BUG_RELATIVE_POINTERS` and
//! `CONFIG_DEBUG_BUGVERBOSE`) and `struct exception_table_entry` (arch/x86/include/asm/extable.h).

use std::collections::BTreeMap;

use vmpatch_introspect::Gva;

use super::code::{CodeError, Context, Obstacle};
use super::relocate;
use super::unwind;
use crate::arena::fixed::{ENTRY, Table};
use crate::patch::{Patch, RelocationKind, Section, SectionKind, Trap, TrapKind};

/// Room for one part of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// How it is mapped: the kernel marks a WARN that was given.
    pub kind: SectionKind,
    /// Alignment in bytes.
    pub align: u64,
    /// Size in bytes; 0 where nothing is needed.
    pub size: u64,
}

/// Something for each part of the tables: its room, its address, its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts<T> {
    /// Entries of WARN and BUG.
    pub bugs: T,
    /// Entries of accesses that may fault.
    pub faults: T,
    /// Names of source files.
    pub files: T,
    /// How to unwind from new code.
    pub unwind: T,
}

impl<T> Parts<T> {
    /// The parts in their order in memory.
    pub fn in_order(&self) -> [&T; 4] {
        [&self.bugs, &self.faults, &self.files, &self.unwind]
    }
}

impl Parts<Gva> {
    /// Where a table lies.
    #[must_use]
    pub const fn table(&self, table: Table) -> Gva {
        match table {
            Table::Bugs => self.bugs,
            Table::Faults => self.faults,
        }
    }
}

/// The tables that a patch has entries for.
#[must_use]
pub fn needed(patch: &Patch) -> Vec<Table> {
    let has = |table: &Table| traps(patch).any(|(_, trap)| table_of(trap) == *table);
    Table::ALL.into_iter().filter(has).collect()
}

/// The room that the tables of a patch take, with at most so many pieces of made code.
#[must_use]
pub fn room(patch: &Patch, pieces: usize) -> Parts<Block> {
    let block = |kind, align, size| Block { kind, align, size };
    let table = |table, kind| {
        let entries = traps(patch).filter(|(_, trap)| table_of(trap) == table);
        let size = match entries.count() {
            0 => 0,
            count => ((count + 1) * ENTRY) as u64,
        };
        block(kind, 4, size)
    };
    let files = files(patch).len() as u64;
    Parts {
        bugs: table(Table::Bugs, SectionKind::Data),
        faults: table(Table::Faults, SectionKind::ReadOnly),
        files: block(SectionKind::ReadOnly, 1, files),
        unwind: block(SectionKind::ReadOnly, 4, unwind::room(patch, pieces)),
    }
}

/// The bytes of the tables that the kernel looks into.
///
/// # Errors
/// [`CodeError`]: a fixup is not known or out of reach.
pub fn fill(context: &Context<'_>) -> Result<Parts<Vec<u8>>, CodeError> {
    let patch = context.patch;
    let mut filler = Filler {
        context,
        names: places(patch),
        parts: Parts {
            files: files(patch),
            ..Parts::default()
        },
    };
    for (index, section) in patch.sections.iter().enumerate() {
        for trap in &section.traps {
            filler.add(index, section, trap)?;
        }
    }
    let Parts { bugs, faults, .. } = &mut filler.parts;
    for table in [bugs, faults] {
        if !table.is_empty() {
            table.extend([0; ENTRY]);
        }
    }
    Ok(filler.parts)
}

struct Filler<'a> {
    context: &'a Context<'a>,
    names: BTreeMap<&'a str, u64>,
    parts: Parts<Vec<u8>>,
}

impl Filler<'_> {
    fn add(&mut self, index: usize, section: &Section, trap: &Trap) -> Result<(), CodeError> {
        let error = |why| CodeError {
            section: section.name.clone(),
            offset: trap.offset,
            why,
        };
        let home = self.context.placement.sections.get(index);
        let start = home.copied().unwrap_or_default();
        self.entry(start.wrapping_add(trap.offset), trap)
            .map_err(error)
    }

    fn entry(&mut self, at: Gva, trap: &Trap) -> Result<(), Obstacle> {
        let tables = &self.context.placement.tables;
        let place = |table, done: &[u8]| tables.table(table).wrapping_add(done.len() as u64);
        match &trap.kind {
            TrapKind::Bug { file, line, flags } => {
                let name = self.names.get(file.as_str()).copied().unwrap_or_default();
                let entry = place(Table::Bugs, &self.parts.bugs);
                let bugs = &mut self.parts.bugs;
                bugs.extend(distance(entry, at)?);
                bugs.extend(distance(
                    entry.wrapping_add(4),
                    tables.files.wrapping_add(name),
                )?);
                bugs.extend(line.to_le_bytes());
                bugs.extend(flags.to_le_bytes());
            }
            TrapKind::Fault { fixup, data } => {
                let symbol = self.context.value(fixup.symbol)?;
                let fixup = symbol.wrapping_add(fixup.addend.cast_unsigned());
                let entry = place(Table::Faults, &self.parts.faults);
                let faults = &mut self.parts.faults;
                faults.extend(distance(entry, at)?);
                faults.extend(distance(entry.wrapping_add(4), fixup)?);
                faults.extend(data.to_le_bytes());
            }
        }
        Ok(())
    }
}

fn distance(field: Gva, to: Gva) -> Result<Vec<u8>, Obstacle> {
    relocate::encode(RelocationKind::Relative32, to, 0, field).map_err(|far| Obstacle::Far {
        name: "an entry of a table".to_owned(),
        far,
    })
}

fn table_of(trap: &Trap) -> Table {
    match trap.kind {
        TrapKind::Bug { .. } => Table::Bugs,
        TrapKind::Fault { .. } => Table::Faults,
    }
}

fn traps(patch: &Patch) -> impl Iterator<Item = (&Section, &Trap)> {
    let sections = patch.sections.iter();
    sections.flat_map(|section| section.traps.iter().map(move |trap| (section, trap)))
}

/// Each source file once, with where its name begins.
fn places(patch: &Patch) -> BTreeMap<&str, u64> {
    let mut places = BTreeMap::new();
    for (_, trap) in traps(patch) {
        if let TrapKind::Bug { file, .. } = &trap.kind {
            places.insert(file.as_str(), 0);
        }
    }
    let mut next = 0;
    for (name, place) in &mut places {
        *place = next;
        next += name.len() as u64 + 1;
    }
    places
}

fn files(patch: &Patch) -> Vec<u8> {
    let names = places(patch).into_keys();
    names.flat_map(|name| name.bytes().chain([0])).collect()
}

#[cfg(test)]
mod tests {
    use super::super::names::{Learned, Names};
    use super::super::place::{Placement, Shape};
    use super::super::tests::{Fake, facts};
    use super::*;
    use crate::arena::Extent;
    use crate::patch::{Reference, Requirement, Symbol};

    fn bug(offset: u64, file: &str, line: u16) -> Trap {
        let (file, flags) = (file.to_owned(), 0x903);
        let kind = TrapKind::Bug { file, line, flags };
        Trap { offset, kind }
    }

    fn fault(offset: u64, addend: i64) -> Trap {
        let fixup = Reference { symbol: 0, addend };
        let kind = TrapKind::Fault { fixup, data: 3 };
        Trap { offset, kind }
    }

    /// Two functions of 32 bytes; the symbol is the first.
    fn patch(first: Vec<Trap>, second: Vec<Trap>) -> Patch {
        let section = |traps| Section {
            name: ".text.f".into(),
            kind: SectionKind::Text,
            align: 16,
            bytes: vec![0x90; 32],
            relocations: Vec::new(),
            sites: Vec::new(),
            traps,
            unwind: Vec::new(),
        };
        Patch {
            name: "p".into(),
            requires: Requirement::default(),
            units: Vec::new(),
            replaced: Vec::new(),
            sections: vec![section(first), section(second)],
            symbols: vec![Symbol::Own {
                name: "f".into(),
                section: 0,
                offset: 0,
            }],
            callbacks: Vec::new(),
        }
    }

    fn filled(patch: &Patch) -> (Placement, Parts<Vec<u8>>) {
        let shape = Shape::of(patch, 0);
        let extent = |page, kind| Extent {
            page,
            pages: 1,
            kind,
        };
        let kinds = [SectionKind::Text, SectionKind::ReadOnly, SectionKind::Data];
        let needed = |kind: &SectionKind| shape.needs(*kind);
        let extents: Vec<_> = (7..)
            .zip(kinds.into_iter().filter(needed))
            .map(|(page, kind)| extent(page, kind))
            .collect();
        let placement = shape.place_again(&extents).unwrap();
        let live = Fake::new();
        let context = Context {
            patch,
            live: &live,
            facts: &facts(),
            names: &Names::look_up(&patch.symbols, &patch.units, &live),
            learned: &Learned::new(),
            placement: &placement,
        };
        let parts = fill(&context).unwrap();
        (placement, parts)
    }

    /// What the kernel reads from an entry: `&field + field`.
    fn followed(table: Gva, bytes: &[u8], field: usize) -> Gva {
        let distance = i32::from_le_bytes(*bytes[field..].first_chunk().unwrap());
        let place = table.0 + field as u64;
        Gva(place.wrapping_add_signed(distance.into()))
    }

    #[test]
    fn a_kernel_finds_instruction_file_and_fixup_from_the_entries() {
        let patch = patch(
            vec![bug(4, "mm/b.c", 9), fault(8, 24)],
            vec![bug(6, "fs/a.c", 700), fault(12, 30)],
        );
        let (placement, parts) = filled(&patch);
        let [first, second] = placement.sections[..] else {
            panic!();
        };
        let bugs = &parts.bugs;
        assert_eq!(bugs.len(), 3 * ENTRY);
        let table = placement.tables.bugs;
        assert_eq!(followed(table, bugs, 0), first.wrapping_add(4));
        assert_eq!(followed(table, bugs, ENTRY), second.wrapping_add(6));
        let file = followed(table, bugs, 4).0 - placement.tables.files.0;
        assert!(parts.files[file as usize..].starts_with(b"mm/b.c\0"));
        assert_eq!(bugs[8..12], [9, 0, 3, 9]);
        let faults = &parts.faults;
        let table = placement.tables.faults;
        assert_eq!(followed(table, faults, ENTRY), second.wrapping_add(12));
        assert_eq!(followed(table, faults, ENTRY + 4), first.wrapping_add(30));
        assert_eq!(faults[8..12], [3, 0, 0, 0]);
        assert!(bugs.ends_with(&[0; ENTRY]) && faults.ends_with(&[0; ENTRY]));
    }

    #[test]
    fn a_file_is_named_once_and_what_is_not_needed_takes_no_room() {
        let patch = patch(vec![bug(0, "fs/a.c", 1), bug(2, "fs/a.c", 2)], Vec::new());
        assert_eq!(needed(&patch), [Table::Bugs]);
        let (_, parts) = filled(&patch);
        assert_eq!(parts.files, b"fs/a.c\0");
        assert!(parts.faults.is_empty());
        let room = room(&patch, 2);
        let sizes = room.in_order().map(|block| block.size);
        assert_eq!(sizes, [3 * ENTRY as u64, 0, 7, 0]);
    }
}
