//! How to unwind from new code in its place: what the patch says of each section, and what holds in the code that linking
//! makes itself. Sites that linking fills in keep their length and do to the stack what the kernel's own do.

use vmpatch_introspect::Gva;
use vmpatch_introspect::unwind::orc::{Entry, Kind};

use super::pieces::Made;
use super::place::{PIECE, Placement};
use crate::patch::{Patch, Section};
use crate::unwind::Row;
use crate::unwind::rows::ROW;

/// Bytes that the rows of a patch take at most, with at most so many pieces of made code; 0 for one that brings no unwind data.
#[must_use]
pub fn room(patch: &Patch, pieces: usize) -> u64 {
    let rows: usize = patch.sections.iter().map(|it| it.unwind.len()).sum();
    match rows {
        0 => 0,
        rows => (rows.saturating_add(pieces).saturating_add(1) as u64).saturating_mul(ROW as u64),
    }
}

/// What holds at a place in a section; `None` where that is not known.
#[must_use]
pub fn at(section: &Section, offset: u64) -> Option<Entry> {
    let before = section
        .unwind
        .partition_point(|row| u64::from(row.offset) <= offset);
    let row = section.unwind.get(before.checked_sub(1)?)?;
    (row.entry.kind != Kind::Undefined).then_some(row.entry)
}

/// All rows, by address.
#[must_use]
pub fn rows(patch: &Patch, placement: &Placement, made: &Made) -> Vec<Row> {
    let sections = patch.sections.iter().zip(&placement.sections);
    let mut all: Vec<Row> = sections
        .flat_map(|(section, start)| of_section(section, *start))
        .collect();
    if all.is_empty() {
        return all;
    }
    let places = (placement.pieces.0..).step_by(PIECE as usize).map(Gva);
    let entries = made
        .holds
        .iter()
        .map(|holds| holds.unwrap_or(Entry::UNDEFINED));
    let end = placement.pieces.wrapping_add(made.bytes.len() as u64);
    all.extend(places.zip(entries));
    all.push((end, Entry::UNDEFINED));
    // Stable: where a section ends and the next begins at one place, what is said of the next holds.
    all.sort_by_key(|(at, _)| *at);
    let mut rows: Vec<Row> = Vec::with_capacity(all.len());
    for row in all {
        rows.pop_if(|before| before.0 == row.0);
        rows.push(row);
    }
    rows
}

fn of_section(section: &Section, start: Gva) -> impl Iterator<Item = Row> + '_ {
    let size = section.bytes.len() as u64;
    let end = (!section.unwind.is_empty()).then_some((start.wrapping_add(size), Entry::UNDEFINED));
    let rows = section.unwind.iter();
    rows.map(move |row| (start.wrapping_add(row.offset.into()), row.entry))
        .filter(move |(at, _)| *at < start.wrapping_add(size))
        .chain(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::traps::Parts;
    use crate::patch::{Requirement, SectionKind, Unwind};

    const TEXT: Gva = Gva(0xffff_ffff_ff00_3000);
    const PIECES: Gva = Gva(0xffff_ffff_ff00_3040);

    fn pushed(bytes: i16) -> Entry {
        Entry {
            sp_offset: bytes,
            ..Entry::FUNCTION_START
        }
    }

    fn section(rows: &[(u32, Entry)]) -> Section {
        let rows = rows.iter();
        Section {
            name: ".text.f".into(),
            kind: SectionKind::Text,
            align: 16,
            bytes: vec![0x90; 16],
            relocations: Vec::new(),
            sites: Vec::new(),
            traps: Vec::new(),
            unwind: rows
                .map(|&(offset, entry)| Unwind { offset, entry })
                .collect(),
        }
    }

    fn linked(sections: Vec<Section>, holds: Vec<Option<Entry>>) -> Vec<(u64, i16)> {
        let patch = Patch {
            name: "p".into(),
            requires: Requirement::default(),
            units: Vec::new(),
            replaced: Vec::new(),
            sections,
            symbols: Vec::new(),
            callbacks: Vec::new(),
        };
        let starts = (TEXT.0..).step_by(16).map(Gva);
        let placement = Placement {
            extents: Vec::new(),
            sections: starts.take(patch.sections.len()).collect(),
            pieces: PIECES,
            tables: Parts::default(),
        };
        let made = Made {
            bytes: vec![0xcc; holds.len() * PIECE as usize],
            holds,
        };
        let rows = rows(&patch, &placement, &made);
        assert!(rows.is_sorted_by(|one, other| one.0 < other.0));
        assert!((rows.len() * ROW) as u64 <= room(&patch, made.holds.len()));
        rows.iter()
            .map(|(at, entry)| (at.0 - TEXT.0, entry.sp_offset))
            .collect()
    }

    #[test]
    fn what_is_said_of_a_section_ends_with_it() {
        let said = section(&[(0, pushed(8)), (4, pushed(16)), (16, Entry::UNDEFINED)]);
        let unsaid = section(&[]);
        let endless = section(&[(2, pushed(24))]);
        let rows = linked(vec![said.clone(), said, unsaid, endless], Vec::new());
        let wanted = [
            (0, 8),
            (4, 16),
            (16, 8),
            (20, 16),
            (32, 0),
            (50, 24),
            (64, 0),
        ];
        assert_eq!(rows, wanted);
    }

    #[test]
    fn made_code_has_what_holds_where_it_is_made_for() {
        let said = section(&[(0, pushed(8)), (4, pushed(16)), (16, Entry::UNDEFINED)]);
        let branch = at(&said, 9);
        assert_eq!(branch, Some(pushed(16)));
        assert_eq!(at(&said, 16), None);
        let rows = linked(vec![said], vec![branch, None, Some(pushed(8))]);
        let wanted = [
            (0, 8),
            (4, 16),
            (16, 0),
            (64, 16),
            (96, 0),
            (128, 8),
            (160, 0),
        ];
        assert_eq!(rows, wanted);
    }

    #[test]
    fn a_patch_without_unwind_data_has_none_for_made_code_either() {
        assert_eq!(linked(vec![section(&[])], vec![Some(pushed(8))]), []);
    }
}
