//! Layouts of structures and unions, from the debug information of an object (DWARF 5, sections 2.5, 5.7). Owns reading them;
//! what a difference means is for others. Knows types that are defined for a whole file; those within a function are its own.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use gimli::{
    AttributeValue, DebuggingInformationEntry, EndianSlice, LittleEndian, RelocateReader,
    UnitOffset,
};
use object::{Object as _, ObjectSection as _, read::RelocationMap};

/// How deep structures without a name lie within each other before the rest is left out.
const MAX_DEPTH: usize = 16;
/// How many names, qualifiers and arrays a type may have around it.
const MAX_LAYERS: usize = 32;
/// Most members of one structure; the rest is left out. A hostile one may hold itself many times.
const MAX_MEMBERS: usize = 1 << 14;

/// Layouts by `struct NAME` or `union NAME`, or by the name that a type definition gives to one that has none itself.
pub type Layouts = BTreeMap<String, Layout>;

/// How a structure lies in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Size in bytes.
    pub bytes: u64,
    /// Members, in the order of the source. Those of structures without a name are among them, by `member.inner` where the
    /// member has a name.
    pub members: Vec<Member>,
}

/// A member of a structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where it begins, in bits from the start of the structure.
    pub at_bit: u64,
    /// Its width in bits, where it is a bit-field or the width of its type can be told.
    pub bits: Option<u64>,
}

/// The layouts that an object's debug information tells; `None` if it has none.
///
/// # Errors
/// Debug information that cannot be read.
pub fn layouts(object: &[u8]) -> Result<Option<Layouts>, gimli::Error> {
    let Ok(file) = object::File::parse(object) else {
        return Ok(None);
    };
    let Some(info) = file.section_by_name(".debug_info") else {
        return Ok(None);
    };
    // What cannot be uncompressed is as good as none.
    if info.uncompressed_data().is_err() {
        return Ok(None);
    }
    let fields = info.relocation_map().unwrap_or_default();
    let sections = Sections {
        info: data(&info),
        abbreviations: named(&file, ".debug_abbrev"),
        strings: named(&file, ".debug_str"),
    };
    sections.read(&fields).map(Some)
}

pub(super) fn named<'a>(file: &object::File<'a>, name: &str) -> Cow<'a, [u8]> {
    file.section_by_name(name)
        .map_or(Cow::Borrowed(&[]), |section| data(&section))
}

/// Compressed sections, which kernels do not have by default, are as good as none.
pub(super) fn data<'a>(section: &impl object::ObjectSection<'a>) -> Cow<'a, [u8]> {
    section.uncompressed_data().unwrap_or(Cow::Borrowed(&[]))
}

struct Sections<'a> {
    info: Cow<'a, [u8]>,
    abbreviations: Cow<'a, [u8]>,
    strings: Cow<'a, [u8]>,
}

/// The fields of debug information that the linker would fill in.
#[derive(Clone, Copy, Debug)]
struct Fields<'a>(&'a RelocationMap);

impl gimli::Relocate for Fields<'_> {
    fn relocate_address(&self, offset: usize, value: u64) -> gimli::Result<u64> {
        Ok(self.0.relocate(offset as u64, value))
    }

    fn relocate_offset(&self, offset: usize, value: usize) -> gimli::Result<usize> {
        let value = self.0.relocate(offset as u64, value as u64);
        usize::try_from(value).map_err(|_| gimli::Error::OffsetOutOfBounds(value))
    }
}

type Reader<'a> = RelocateReader<EndianSlice<'a, LittleEndian>, Fields<'a>>;
type Entry<'a> = DebuggingInformationEntry<Reader<'a>>;

impl Sections<'_> {
    fn read(&self, fields: &RelocationMap) -> gimli::Result<Layouts> {
        let none = RelocationMap::default();
        let reader = |bytes, fields| {
            RelocateReader::new(EndianSlice::new(bytes, LittleEndian), Fields(fields))
        };
        let info = gimli::DebugInfo::from(reader(&self.info, fields));
        let abbreviations = gimli::DebugAbbrev::from(reader(&self.abbreviations, &none));
        let strings = gimli::DebugStr::from(reader(&self.strings, &none));
        let mut found = Layouts::new();
        let mut units = info.units();
        while let Some(header) = units.next()? {
            let shapes = header.abbreviations(&abbreviations)?;
            let mut entries = header.entries(&shapes);
            let mut unit = Unit::default();
            while let Some(entry) = entries.next_dfs()? {
                unit.add(entry, &strings);
            }
            unit.layouts(&mut found);
        }
        Ok(found)
    }
}

/// A structure as one unit has it.
#[derive(Debug, Default)]
struct Structure {
    /// `None`: it has none, or is not of the whole file.
    name: Option<String>,
    /// It has a name of its own.
    is_named: bool,
    bytes: u64,
    members: Vec<RawMember>,
}

#[derive(Debug)]
struct RawMember {
    name: Option<String>,
    at_bit: u64,
    bits: Option<u64>,
    of: Option<UnitOffset>,
}

/// A type that is no structure, as far as its width goes.
#[derive(Clone, Copy, Debug)]
enum Plain {
    Bytes(u64),
    /// Another name for a type, or a qualified one.
    Same(Option<UnitOffset>),
    /// So many of a type one after the other; `None`: nobody knows how many.
    Array(Option<UnitOffset>, Option<u64>),
}

#[derive(Debug, Default)]
struct Unit {
    structures: HashMap<UnitOffset, Structure>,
    plain: HashMap<UnitOffset, Plain>,
    /// The structures around the place that is read, and how deep each lies.
    open: Vec<(UnitOffset, isize)>,
    /// The array whose dimensions are read.
    array: Option<UnitOffset>,
    /// Type definitions of the whole file: name, and what it names.
    definitions: Vec<(String, UnitOffset)>,
}

impl Unit {
    fn add<'a>(&mut self, entry: &Entry<'a>, strings: &gimli::DebugStr<Reader<'a>>) {
        while self
            .open
            .pop_if(|(_, depth)| *depth >= entry.depth())
            .is_some()
        {}
        let kind = match entry.tag() {
            gimli::DW_TAG_structure_type => "struct",
            gimli::DW_TAG_union_type => "union",
            gimli::DW_TAG_member => return self.add_member(entry, strings),
            gimli::DW_TAG_typedef => return self.add_definition(entry, strings),
            _ => return self.add_plain(entry),
        };
        let Some(bytes) = number(entry, gimli::DW_AT_byte_size) else {
            // A mere declaration.
            return;
        };
        let name = text(entry, strings);
        let of_file = name.as_ref().filter(|_| entry.depth() == 1);
        let structure = Structure {
            is_named: name.is_some(),
            name: of_file.map(|name| format!("{kind} {name}")),
            bytes,
            members: Vec::new(),
        };
        self.structures.insert(entry.offset(), structure);
        self.open.push((entry.offset(), entry.depth()));
    }

    fn add_member<'a>(&mut self, entry: &Entry<'a>, strings: &gimli::DebugStr<Reader<'a>>) {
        let Some(&(home, depth)) = self.open.last() else {
            return;
        };
        let Some(structure) = self.structures.get_mut(&home) else {
            return;
        };
        if entry.depth() != depth + 1 {
            return;
        }
        let at_byte = number(entry, gimli::DW_AT_data_member_location).unwrap_or_default();
        let at_bit = number(entry, gimli::DW_AT_data_bit_offset);
        structure.members.push(RawMember {
            name: text(entry, strings),
            at_bit: at_bit.unwrap_or_else(|| at_byte.wrapping_mul(8)),
            bits: number(entry, gimli::DW_AT_bit_size),
            of: of(entry),
        });
    }

    fn add_definition<'a>(&mut self, entry: &Entry<'a>, strings: &gimli::DebugStr<Reader<'a>>) {
        let named = text(entry, strings).zip(of(entry));
        self.definitions
            .extend(named.filter(|_| entry.depth() == 1));
        self.plain.insert(entry.offset(), Plain::Same(of(entry)));
    }

    fn add_plain(&mut self, entry: &Entry<'_>) {
        let plain = match entry.tag() {
            gimli::DW_TAG_const_type
            | gimli::DW_TAG_volatile_type
            | gimli::DW_TAG_restrict_type
            | gimli::DW_TAG_atomic_type => Plain::Same(of(entry)),
            gimli::DW_TAG_array_type => {
                self.array = Some(entry.offset());
                Plain::Array(of(entry), Some(1))
            }
            gimli::DW_TAG_subrange_type => return self.add_dimension(entry),
            gimli::DW_TAG_base_type
            | gimli::DW_TAG_pointer_type
            | gimli::DW_TAG_enumeration_type => {
                let Some(bytes) = number(entry, gimli::DW_AT_byte_size) else {
                    return;
                };
                Plain::Bytes(bytes)
            }
            _ => return,
        };
        self.plain.insert(entry.offset(), plain);
    }

    /// The dimensions of an array are what lies within it.
    fn add_dimension(&mut self, entry: &Entry<'_>) {
        let array = self.array.and_then(|array| self.plain.get_mut(&array));
        if let Some(Plain::Array(_, count)) = array {
            let highest = || number(entry, gimli::DW_AT_upper_bound)?.checked_add(1);
            let these = number(entry, gimli::DW_AT_count).or_else(highest);
            *count = count
                .zip(these)
                .and_then(|(one, other)| one.checked_mul(other));
        }
    }

    /// A type without its other names and qualifiers.
    fn bare(&self, mut at: UnitOffset) -> Option<UnitOffset> {
        for _ in 0..MAX_LAYERS {
            match self.plain.get(&at) {
                Some(Plain::Same(of)) => at = (*of)?,
                _ => return Some(at),
            }
        }
        None
    }

    /// Bytes of a type.
    fn width(&self, mut at: UnitOffset) -> Option<u64> {
        let mut times = 1_u64;
        for _ in 0..MAX_LAYERS {
            at = self.bare(at)?;
            let bytes = match (self.plain.get(&at), self.structures.get(&at)) {
                (Some(Plain::Array(of, count)), _) => {
                    times = times.checked_mul((*count)?)?;
                    at = (*of)?;
                    continue;
                }
                (Some(Plain::Bytes(bytes)), _) => *bytes,
                (_, Some(structure)) => structure.bytes,
                _ => return None,
            };
            return times.checked_mul(bytes);
        }
        None
    }

    fn layouts(&self, into: &mut Layouts) {
        let defined = self.definitions.iter().filter_map(|(name, of)| {
            let structure = self.structures.get(of)?;
            (!structure.is_named).then_some((name, structure))
        });
        let structures = self.structures.values();
        let named = structures.filter_map(|it| Some((it.name.as_ref()?, it)));
        for (name, structure) in named.chain(defined) {
            let mut layout = Layout {
                bytes: structure.bytes,
                members: Vec::new(),
            };
            let mut budget = MAX_MEMBERS;
            let place = Place::default();
            self.flatten(structure, &place, &mut budget, &mut layout.members);
            into.insert(name.clone(), layout);
        }
    }

    fn flatten(
        &self,
        structure: &Structure,
        place: &Place,
        budget: &mut usize,
        into: &mut Vec<Member>,
    ) {
        for member in &structure.members {
            *budget = budget.saturating_sub(1);
            if *budget == 0 {
                return;
            }
            let at_bit = place.at_bit.wrapping_add(member.at_bit);
            let within = || self.structures.get(&self.bare(member.of?)?);
            let width = || self.width(member.of?)?.checked_mul(8);
            if let Some(name) = &member.name {
                into.push(Member {
                    name: format!("{}{name}", place.prefix),
                    at_bit,
                    bits: member.bits.or_else(width),
                });
            }
            let within = within().filter(|it| !it.is_named && place.depth < MAX_DEPTH);
            if let Some(within) = within {
                let prefix = match &member.name {
                    Some(name) => format!("{}{name}.", place.prefix),
                    None => place.prefix.clone(),
                };
                let depth = place.depth + 1;
                let place = Place {
                    at_bit,
                    depth,
                    prefix,
                };
                self.flatten(within, &place, budget, into);
            }
        }
    }
}

/// Where a structure lies within another.
#[derive(Default)]
struct Place {
    at_bit: u64,
    depth: usize,
    /// Before the names of its members.
    prefix: String,
}

/// The type that an entry has or is made of.
fn of(entry: &Entry<'_>) -> Option<UnitOffset> {
    match entry.attr_value(gimli::DW_AT_type)? {
        AttributeValue::UnitRef(offset) => Some(offset),
        _ => None,
    }
}

fn number(entry: &Entry<'_>, name: gimli::DwAt) -> Option<u64> {
    entry.attr(name)?.udata_value()
}

pub(super) fn text<R: gimli::Reader>(
    entry: &DebuggingInformationEntry<R>,
    strings: &gimli::DebugStr<R>,
) -> Option<String> {
    let text = entry.attr(gimli::DW_AT_name)?.string_value(strings)?;
    Some(text.to_string_lossy().ok()?.into_owned())
}
