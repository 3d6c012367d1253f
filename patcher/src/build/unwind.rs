//! The unwind data (ORC) of an object's code, as objtool wrote it into the object or into a copy. Of a copy the tables
//! alone are taken, and only if its code is that of the object, byte for byte.
//!
//! Layout: `.orc_unwind_ip` holds a relocation to code for each entry of `.orc_unwind` (Linux v6.12 and v6.1
//! tools/objtool/orc_gen.c). Objects do not say in which format entries are; the entries themselves do.

use std::collections::HashMap;

use vmpatch_introspect::unwind::orc::raw::ENTRY_SIZE;
use vmpatch_introspect::unwind::orc::{Entry, Format, Kind};

use crate::object::{self, Home, Object, Section, SectionId};
use crate::patch::Unwind;
use crate::unwind::is_of_function;

/// The tables: entries, and the places they are for.
const ENTRIES: &str = ".orc_unwind";
const PLACES: &str = ".orc_unwind_ip";

/// Bytes of a place.
const PLACE_SIZE: u64 = 4;

/// Where the unwind data of an object's code is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnwindData<'a> {
    /// In the object itself, if anywhere.
    #[default]
    Within,
    /// In a copy of the object that objtool has gone over.
    Copy(&'a [u8]),
    /// Nowhere.
    Absent {
        /// Why not.
        why: &'a str,
    },
}

/// For each section of code: what holds from an offset on, ascending.
#[derive(Debug, Default)]
pub(super) struct Tables(HashMap<SectionId, Vec<(u64, Entry)>>);

impl Tables {
    /// Reads the data of an object's code.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn read(code: &Object, data: UnwindData<'_>) -> Result<Self, String> {
        match data {
            UnwindData::Within => Self::of(code),
            UnwindData::Absent { why } => Err(why.to_owned()),
            UnwindData::Copy(bytes) => {
                let copy = object::read(bytes).map_err(|why| format!("objtool's copy: {why}"))?;
                match other_code(code, &copy) {
                    Some(section) => Err(format!("objtool's copy has other code in {section}")),
                    None => Self::of(&copy),
                }
            }
        }
    }

    fn of(object: &Object) -> Result<Self, String> {
        let (Some(entries), Some(places)) = (named(object, ENTRIES), named(object, PLACES)) else {
            return Err("the object has none (`objtool --orc` makes it)".to_owned());
        };
        let stored = entries.bytes.as_chunks::<ENTRY_SIZE>().0;
        let format = Format::from_entries(&entries.bytes);
        if places.relocations.len() != stored.len() {
            let (places, entries) = (places.relocations.len(), stored.len());
            return Err(format!(
                "{PLACES} has {places} places for {entries} entries"
            ));
        }
        let mut tables = Self::default();
        for ((index, field), bytes) in (0..).zip(&places.relocations).zip(stored) {
            let unusable = || format!("{PLACES} leads nowhere at {:#x}", field.offset);
            let (section, offset) = code_at(object, field).ok_or_else(unusable)?;
            if field.offset != index * PLACE_SIZE || !field.kind.is_relative() {
                return Err(unusable());
            }
            let rows = tables.0.entry(section).or_default();
            rows.push((offset, format.decode(*bytes)));
        }
        // Stable: of two at one place the later one holds.
        for rows in tables.0.values_mut() {
            rows.sort_by_key(|(offset, _)| *offset);
        }
        Ok(tables)
    }

    /// What holds in a function; nothing where that is not known, or not of a kind that functions have.
    pub(super) fn of_function(&self, section: SectionId, start: u64, end: u64) -> Vec<Unwind> {
        let rows = self.0.get(&section).map_or(&[][..], Vec::as_slice);
        let first = rows.partition_point(|(offset, _)| *offset <= start);
        let last = rows.partition_point(|(offset, _)| *offset < end);
        let at_start = first.checked_sub(1).and_then(|at| rows.get(at));
        let Some((_, at_start)) = at_start.filter(|(_, entry)| entry.kind != Kind::Undefined)
        else {
            return Vec::new();
        };
        let inner = rows.get(first..last).unwrap_or_default();
        let rows = std::iter::once((start, *at_start)).chain(inner.iter().copied());
        let mut made = Vec::with_capacity(inner.len() + 2);
        for (offset, entry) in rows.chain([(end, Entry::UNDEFINED)]) {
            let Ok(offset) = u32::try_from(offset - start) else {
                return Vec::new();
            };
            if !is_of_function(&entry) {
                return Vec::new();
            }
            // Of two at one place the later one holds.
            made.pop_if(|before: &mut Unwind| before.offset == offset);
            made.push(Unwind { offset, entry });
        }
        made
    }
}

fn named<'a>(object: &'a Object, name: &str) -> Option<&'a Section> {
    object.sections.iter().find(|section| section.name == name)
}

fn code_at(object: &Object, field: &object::Relocation) -> Option<(SectionId, u64)> {
    let Home::In { section, offset } = object.symbol(field.symbol).home else {
        return None;
    };
    let home = object.section(section);
    let offset = offset.checked_add_signed(field.addend)?;
    (home.flags.exec && offset <= home.size).then_some((section, offset))
}

/// The first section of code that a copy has otherwise.
fn other_code<'a>(object: &'a Object, copy: &Object) -> Option<&'a str> {
    let mut sections = object.sections.iter().zip(0..);
    let other = sections.find(|(section, at)| {
        let same = |it: &Section| it.name == section.name && it.bytes == section.bytes;
        section.flags.exec && !copy.sections.get(*at).is_some_and(same)
    });
    other.map(|(section, _)| section.name.as_str())
}

#[cfg(test)]
mod tests {
    use vmpatch_introspect::unwind::orc::Base;

    use super::*;
    use crate::object::{Flags, Kind as Field, Relocation, Symbol, SymbolId, SymbolKind};

    const TEXT: SectionId = SectionId(0);

    /// As Linux 6.12 stores it: counted from rsp, a call; or nothing.
    fn stored(sp_offset: u8) -> [u8; ENTRY_SIZE] {
        match sp_offset {
            0 => [0; ENTRY_SIZE],
            _ => [sp_offset, 0, 0, 0, 0x05, 0x02],
        }
    }

    /// An object with 64 bytes of code and these rows.
    fn object(rows: &[(i64, u8)]) -> Object {
        let section = |name: &str, bytes: Vec<u8>, exec| Section {
            name: name.to_owned(),
            size: bytes.len() as u64,
            bytes,
            flags: Flags {
                alloc: true,
                exec,
                ..Flags::default()
            },
            ..Section::default()
        };
        let entries = rows.iter().flat_map(|(_, sp)| stored(*sp)).collect();
        let mut places = section(PLACES, vec![0; rows.len() * 4], false);
        let fields = (0..).step_by(4).zip(rows);
        places.relocations = fields
            .map(|(offset, (addend, _))| Relocation {
                offset,
                kind: Field::Relative32,
                symbol: SymbolId(0),
                addend: *addend,
            })
            .collect();
        Object {
            sections: vec![
                section(".text.f", vec![0x90; 64], true),
                section(ENTRIES, entries, false),
                places,
            ],
            symbols: vec![Symbol {
                name: ".text.f".to_owned(),
                home: Home::In {
                    section: TEXT,
                    offset: 0,
                },
                size: 0,
                kind: SymbolKind::Section,
                global: false,
            }],
        }
    }

    fn rows(object: &Object, start: u64, end: u64) -> Vec<(u32, i16)> {
        let tables = Tables::read(object, UnwindData::Within).unwrap();
        let rows = tables.of_function(TEXT, start, end);
        rows.iter()
            .map(|row| (row.offset, row.entry.sp_offset))
            .collect()
    }

    #[test]
    fn a_function_has_what_holds_at_its_start_and_within_it_and_ends() {
        let object = object(&[(16, 8), (20, 16), (40, 8), (60, 0)]);
        let whole = [(0, 8), (4, 16), (24, 8), (44, 0), (48, 0)];
        assert_eq!(rows(&object, 16, 64), whole);
        assert_eq!(rows(&object, 18, 40), [(0, 8), (2, 16), (22, 0)]);
        assert_eq!(rows(&object, 0, 16), [], "nothing is known of it");
    }

    #[test]
    fn of_two_rows_at_one_place_the_later_one_holds() {
        let object = object(&[(0, 8), (4, 16), (4, 24), (64, 0)]);
        assert_eq!(rows(&object, 0, 64), [(0, 8), (4, 24), (64, 0)]);
        assert_eq!(rows(&object, 4, 64), [(0, 24), (60, 0)]);
    }

    #[test]
    fn entries_are_in_normal_form() {
        let object = object(&[(0, 8), (64, 0)]);
        let tables = Tables::read(&object, UnwindData::Within).unwrap();
        let first = tables.of_function(TEXT, 0, 64)[0].entry;
        assert_eq!(first, Entry::FUNCTION_START);
        assert_eq!((first.sp, first.kind), (Base::Sp, Kind::Call));
    }

    #[test]
    fn a_function_with_an_entry_of_another_kind_has_none_at_all() {
        let mut object = object(&[(0, 8), (32, 8), (64, 0)]);
        // Registers of an interrupt.
        object.sections[1].bytes[11] = 0x0b;
        assert_eq!(rows(&object, 0, 64), []);
    }

    #[test]
    fn tables_that_do_not_fit_are_not_believed() {
        let refused = |change: fn(&mut Object)| {
            let mut object = object(&[(0, 8), (64, 0)]);
            change(&mut object);
            Tables::read(&object, UnwindData::Within).unwrap_err()
        };
        assert!(refused(|it| drop(it.sections.remove(2))).contains("has none"));
        assert!(refused(|it| it.sections[2].relocations.truncate(1)).contains("1 places for 2"));
        assert!(refused(|it| it.sections[2].relocations[1].addend = 65).contains("nowhere at 0x4"));
        assert!(refused(|it| it.sections[2].relocations[1].offset = 2).contains("nowhere"));
        assert!(refused(|it| it.sections[0].flags.exec = false).contains("nowhere"));
    }

    #[test]
    fn a_copy_with_other_code_is_told_by_its_section() {
        let (object, mut copy) = (object(&[]), object(&[(0, 8)]));
        assert_eq!(other_code(&object, &copy), None);
        copy.sections[0].bytes[5] = 0xcc;
        assert_eq!(other_code(&object, &copy), Some(".text.f"));
        copy.sections.clear();
        assert_eq!(other_code(&object, &copy), Some(".text.f"));
    }
}
