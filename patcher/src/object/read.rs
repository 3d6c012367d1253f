//! Bytes to [`Object`]. The file may be hostile: sizes are limited before anything is copied, and every id
//! and offset in the result is inside it.

use object::elf;
use object::read::elf::{ElfFile64, ElfSection64, FileHeader as _, SectionHeader as _};
use object::{
    LittleEndian, Object as _, ObjectSection as _, RelocationFlags, RelocationTarget, SymbolSection,
};

use super::{
    Flags, Home, Kind, Object, Relocation, Section, SectionId, Symbol, SymbolId, SymbolKind,
};

/// Largest object file accepted: vmlinux.o without its debug sections is about 60 MB.
pub const MAX_OBJECT_BYTES: usize = 256 << 20;
/// Most bytes copied out of one object: sections of a hostile file may overlap.
const MAX_LOADED_BYTES: u64 = 64 << 20;
const MAX_SECTIONS: usize = 1 << 17;
const MAX_SYMBOLS: usize = 1 << 20;
const MAX_RELOCATIONS: usize = 1 << 22;
const MAX_NAME_BYTES: usize = 4096;

/// Why an object file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// Not ELF, or damaged where it is looked at.
    #[error("not a readable ELF file: {0}")]
    Elf(#[from] object::Error),
    /// ELF, but no relocatable object for x86-64.
    #[error("not a relocatable x86-64 object ({what})")]
    NotRelocatable {
        /// What it is instead.
        what: String,
    },
    /// Beyond one of the limits.
    #[error("object has too many {what}: {count}, at most {limit} are accepted")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: u64,
        /// The limit.
        limit: u64,
    },
    /// Something leads outside of the object.
    #[error("object is damaged: {what} in {place}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
        /// Section or symbol.
        place: String,
    },
}

type Elf<'a> = ElfFile64<'a, LittleEndian>;

/// Reads a relocatable x86-64 object.
///
/// # Errors
/// Everything that is not one, or is beyond the limits.
pub fn read(bytes: &[u8]) -> Result<Object, ObjectError> {
    limit("bytes", bytes.len() as u64, MAX_OBJECT_BYTES as u64)?;
    let file = Elf::parse(bytes)?;
    kind_of_file(&file)?;
    limit(
        "sections",
        file.elf_section_table().len() as u64,
        MAX_SECTIONS as u64,
    )?;
    limit(
        "symbols",
        file.elf_symbol_table().len() as u64,
        MAX_SYMBOLS as u64,
    )?;
    let sections = read_sections(&file)?;
    let symbols = read_symbols(&file, &sections)?;
    let object = Object { sections, symbols };
    relocations_lead_to_symbols(&object)?;
    Ok(object)
}

fn kind_of_file(file: &Elf<'_>) -> Result<(), ObjectError> {
    let header = file.elf_header();
    let (kind, machine) = (header.e_type(LittleEndian), header.e_machine(LittleEndian));
    if kind == elf::ET_REL && machine == elf::EM_X86_64 {
        return Ok(());
    }
    Err(ObjectError::NotRelocatable {
        what: format!("type {kind:?}, machine {machine:?}"),
    })
}

fn limit(what: &'static str, count: u64, limit: u64) -> Result<(), ObjectError> {
    if count > limit {
        return Err(ObjectError::TooMany { what, count, limit });
    }
    Ok(())
}

/// Sums up what is taken out of the file.
#[derive(Default)]
struct Budget {
    bytes: u64,
    relocations: u64,
}

fn read_sections(file: &Elf<'_>) -> Result<Vec<Section>, ObjectError> {
    let mut budget = Budget::default();
    // The reader leaves out the empty section 0, so that index n of the file is n - 1 here.
    file.sections()
        .map(|section| read_section(&section, &mut budget))
        .collect()
}

fn read_section(
    section: &ElfSection64<'_, '_, LittleEndian>,
    budget: &mut Budget,
) -> Result<Section, ObjectError> {
    let header = section.elf_section_header();
    let raw = header.sh_flags(LittleEndian).0;
    let has = |flag: elf::SectionFlags| raw & flag.0 != 0;
    let flags = Flags {
        alloc: has(elf::SHF_ALLOC),
        write: has(elf::SHF_WRITE),
        exec: has(elf::SHF_EXECINSTR),
        // A pool whose entries have no size is no pool (gABI, sh_entsize).
        merge: has(elf::SHF_MERGE) && header.sh_entsize(LittleEndian) > 0,
        strings: has(elf::SHF_STRINGS),
        zeroes: header.sh_type(LittleEndian) == elf::SHT_NOBITS,
    };
    let mut out = Section {
        name: bounded_name(section.name_bytes()?),
        flags,
        size: section.size(),
        align: section.align().max(1),
        entry_size: header.sh_entsize(LittleEndian),
        ..Section::default()
    };
    if flags.alloc {
        load(section, &mut out, budget)?;
    }
    Ok(out)
}

/// Copies bytes and relocations of a section that the running program has.
fn load(
    section: &ElfSection64<'_, '_, LittleEndian>,
    out: &mut Section,
    budget: &mut Budget,
) -> Result<(), ObjectError> {
    budget.bytes = budget.bytes.saturating_add(out.size);
    limit("bytes in its sections", budget.bytes, MAX_LOADED_BYTES)?;
    out.bytes = section.data()?.to_vec();
    for (offset, relocation) in section.relocations() {
        budget.relocations += 1;
        limit("relocations", budget.relocations, MAX_RELOCATIONS as u64)?;
        out.relocations
            .push(read_relocation(offset, &relocation, out)?);
    }
    out.relocations.sort_by_key(|it| it.offset);
    Ok(())
}

fn read_relocation(
    offset: u64,
    relocation: &object::Relocation,
    section: &Section,
) -> Result<Relocation, ObjectError> {
    let damaged = |what| ObjectError::Damaged {
        what,
        place: section.name.clone(),
    };
    let RelocationFlags::Elf { r_type } = relocation.flags() else {
        return Err(damaged("a relocation without type"));
    };
    let RelocationTarget::Symbol(symbol) = relocation.target() else {
        return Err(damaged("a relocation without symbol"));
    };
    let kind = kind_of(r_type.0);
    let end = offset.checked_add(kind.field_bytes());
    if end.is_none_or(|end| end > section.bytes.len() as u64) {
        return Err(damaged("a relocation outside of its section"));
    }
    let symbol = SymbolId(symbol.0.wrapping_sub(1));
    Ok(Relocation {
        offset,
        kind,
        symbol,
        addend: relocation.addend(),
    })
}

fn kind_of(r_type: u32) -> Kind {
    match r_type {
        1 => Kind::Absolute64,
        2 | 4 => Kind::Relative32,
        10 => Kind::Absolute32,
        11 => Kind::Absolute32Signed,
        24 => Kind::Relative64,
        other => Kind::Other(other),
    }
}

fn read_symbols(file: &Elf<'_>, sections: &[Section]) -> Result<Vec<Symbol>, ObjectError> {
    file.symbols()
        .map(|symbol| read_symbol(&symbol, sections))
        .collect()
}

fn read_symbol<'data>(
    symbol: &impl object::ObjectSymbol<'data>,
    sections: &[Section],
) -> Result<Symbol, ObjectError> {
    let mut name = bounded_name(symbol.name_bytes()?);
    let kind = match symbol.kind() {
        object::SymbolKind::Text => SymbolKind::Function,
        object::SymbolKind::Data => SymbolKind::Object,
        object::SymbolKind::Section => SymbolKind::Section,
        object::SymbolKind::Label | object::SymbolKind::Unknown => SymbolKind::Label,
        _ => SymbolKind::Other,
    };
    let home = home_of(symbol, sections, &name)?;
    if let (SymbolKind::Section, Home::In { section, .. }) = (kind, home) {
        name.clone_from(&sections[section.0].name);
    }
    Ok(Symbol {
        name,
        home,
        size: symbol.size(),
        kind,
        global: symbol.is_global(),
    })
}

fn home_of<'data>(
    symbol: &impl object::ObjectSymbol<'data>,
    sections: &[Section],
    name: &str,
) -> Result<Home, ObjectError> {
    let damaged = |what| ObjectError::Damaged {
        what,
        place: name.to_owned(),
    };
    match symbol.section() {
        SymbolSection::Undefined => Ok(Home::Undefined),
        SymbolSection::Common => Ok(Home::Common),
        SymbolSection::Section(index) => {
            let id = SectionId(index.0.wrapping_sub(1));
            let section = sections
                .get(id.0)
                .ok_or(damaged("a symbol in an absent section"))?;
            let offset = symbol.address();
            let end = offset.checked_add(symbol.size());
            if end.is_none_or(|end| end > section.size) {
                return Err(damaged("a symbol outside of its section"));
            }
            Ok(Home::In {
                section: id,
                offset,
            })
        }
        _ => Ok(Home::Absolute),
    }
}

fn bounded_name(bytes: &[u8]) -> String {
    let bytes = bytes.get(..MAX_NAME_BYTES).unwrap_or(bytes);
    String::from_utf8_lossy(bytes).into_owned()
}

fn relocations_lead_to_symbols(object: &Object) -> Result<(), ObjectError> {
    for section in &object.sections {
        if section
            .relocations
            .iter()
            .any(|it| it.symbol.0 >= object.symbols.len())
        {
            let what = "a relocation with an absent symbol";
            return Err(ObjectError::Damaged {
                what,
                place: section.name.clone(),
            });
        }
    }
    Ok(())
}
