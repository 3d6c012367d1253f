//! Which function the static variables of functions belong to, from the debug information of an object (DWARF 5, sections 3.3 and
//! 4.1). Owns reading that; the objects' own symbols do not tell it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use gimli::{
    AttributeValue, DebuggingInformationEntry, EndianSlice, LittleEndian, Operation,
    RelocateReader, UnitOffset,
};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, ObjectSymbolTable as _, RelocationTarget,
};

use super::SectionId;
use super::types::{data, named, text};

/// How many declarations a function may have before its name.
const MAX_LAYERS: usize = 8;

/// Functions by section and offset of a variable. One that was compiled into others counts, not those.
pub type Homes = BTreeMap<(SectionId, u64), BTreeSet<String>>;

/// The homes that an object's debug information tells: none where it has none.
///
/// # Errors
/// Debug information that cannot be read.
pub fn homes(object: &[u8]) -> Result<Homes, gimli::Error> {
    let mut homes = Homes::new();
    let Ok(file) = object::File::parse(object) else {
        return Ok(homes);
    };
    let Some(info) = file.section_by_name(".debug_info") else {
        return Ok(homes);
    };
    let (fields, none) = (Fields::of(&file, &info), Fields::default());
    let bytes = [
        data(&info),
        named(&file, ".debug_abbrev"),
        named(&file, ".debug_str"),
    ];
    let reader = |bytes, fields| RelocateReader::new(EndianSlice::new(bytes, LittleEndian), fields);
    let info = gimli::DebugInfo::from(reader(&bytes[0], &fields));
    let abbreviations = gimli::DebugAbbrev::from(reader(&bytes[1], &none));
    let strings = gimli::DebugStr::from(reader(&bytes[2], &none));
    let mut units = info.units();
    while let Some(header) = units.next()? {
        let shapes = header.abbreviations(&abbreviations)?;
        let mut entries = header.entries(&shapes);
        let mut unit = Unit::default();
        while let Some(entry) = entries.next_dfs()? {
            unit.add(entry, header.encoding(), &strings);
        }
        unit.homes(&fields, &mut homes);
    }
    Ok(homes)
}

/// What the linker would fill in, by offset: a value, and the section that it counts from.
#[derive(Debug, Default)]
struct Fields {
    values: HashMap<usize, (SectionId, u64)>,
}

impl Fields {
    fn of(file: &object::File<'_>, info: &object::Section<'_, '_>) -> Self {
        let symbols = file.symbol_table();
        let value = |target, addend: i64| {
            let RelocationTarget::Symbol(index) = target else {
                return None;
            };
            let symbol = symbols.as_ref()?.symbol_by_index(index).ok()?;
            // The reader of objects leaves out the empty section 0.
            let section = SectionId(symbol.section_index()?.0.checked_sub(1)?);
            Some((section, symbol.address().wrapping_add_signed(addend)))
        };
        let values = info.relocations().filter_map(|(offset, it)| {
            Some((
                usize::try_from(offset).ok()?,
                value(it.target(), it.addend())?,
            ))
        });
        Self {
            values: values.collect(),
        }
    }
}

impl gimli::Relocate for &Fields {
    /// The field's own offset stands for it: two sections may have the same address.
    fn relocate_address(&self, offset: usize, _value: u64) -> gimli::Result<u64> {
        Ok(offset as u64)
    }

    fn relocate_offset(&self, offset: usize, value: usize) -> gimli::Result<usize> {
        let Some((_, value)) = self.values.get(&offset) else {
            return Ok(value);
        };
        usize::try_from(*value).map_err(|_| gimli::Error::OffsetOutOfBounds(*value))
    }
}

type Reader<'a> = RelocateReader<EndianSlice<'a, LittleEndian>, &'a Fields>;
type Entry<'a> = DebuggingInformationEntry<Reader<'a>>;

/// A function as one entry has it.
#[derive(Debug, Default)]
struct Function {
    name: Option<String>,
    /// The entry that says more.
    of: Option<UnitOffset>,
}

#[derive(Debug, Default)]
struct Unit {
    functions: HashMap<UnitOffset, Function>,
    /// The functions around the place that is read, and how deep each lies.
    open: Vec<(UnitOffset, isize)>,
    /// The field with the address of a variable, and the function around it.
    variables: Vec<(u64, UnitOffset)>,
}

impl Unit {
    fn add<'a>(
        &mut self,
        entry: &Entry<'a>,
        encoding: gimli::Encoding,
        strings: &gimli::DebugStr<Reader<'a>>,
    ) {
        while self
            .open
            .pop_if(|(_, depth)| *depth >= entry.depth())
            .is_some()
        {}
        match entry.tag() {
            gimli::DW_TAG_subprogram | gimli::DW_TAG_inlined_subroutine => {
                let origin = || link(entry, gimli::DW_AT_abstract_origin);
                let function = Function {
                    name: text(entry, strings),
                    of: origin().or_else(|| link(entry, gimli::DW_AT_specification)),
                };
                self.functions.insert(entry.offset(), function);
                self.open.push((entry.offset(), entry.depth()));
            }
            gimli::DW_TAG_variable => {
                let home = self.open.last().map(|(home, _)| *home);
                self.variables.extend(address(entry, encoding).zip(home));
            }
            _ => {}
        }
    }

    fn homes(&self, fields: &Fields, into: &mut Homes) {
        for (field, home) in &self.variables {
            let place = usize::try_from(*field).ok();
            let place = place.and_then(|field| fields.values.get(&field));
            if let (Some(place), Some(name)) = (place, self.name(*home)) {
                into.entry(*place).or_default().insert(name.to_owned());
            }
        }
    }

    fn name(&self, mut at: UnitOffset) -> Option<&str> {
        for _ in 0..MAX_LAYERS {
            let function = self.functions.get(&at)?;
            if let Some(name) = &function.name {
                return Some(name);
            }
            at = function.of?;
        }
        None
    }
}

fn link(entry: &Entry<'_>, name: gimli::DwAt) -> Option<UnitOffset> {
    match entry.attr_value(name)? {
        AttributeValue::UnitRef(offset) => Some(offset),
        _ => None,
    }
}

/// The field that holds the address of a variable that stays where it is.
fn address(entry: &Entry<'_>, encoding: gimli::Encoding) -> Option<u64> {
    let AttributeValue::Exprloc(expression) = entry.attr_value(gimli::DW_AT_location)? else {
        return None;
    };
    match expression.operations(encoding).next().ok()?? {
        Operation::Address { address } => Some(address),
        _ => None,
    }
}
