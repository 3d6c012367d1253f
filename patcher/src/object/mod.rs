//! A relocatable ELF object as data: sections, symbols and relocations, owned and bounded. Knows ELF and
//! x86-64 relocations, nothing of the kernel and nothing of patches. [`read`] makes it from bytes.

pub mod homes;
mod read;
pub mod types;

pub use read::{MAX_OBJECT_BYTES, ObjectError, read};

/// Index of a section in [`Object::sections`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SectionId(pub usize);

/// Index of a symbol in [`Object::symbols`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SymbolId(pub usize);

/// A whole object file.
#[derive(Clone, Debug, Default)]
pub struct Object {
    /// In the file's order, the empty first one left out.
    pub sections: Vec<Section>,
    /// In the file's order, the empty first one left out.
    pub symbols: Vec<Symbol>,
}

/// One section.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// What the loader is to do with it.
    pub flags: Flags,
    /// Size in bytes in memory.
    pub size: u64,
    /// Alignment in bytes, at least 1.
    pub align: u64,
    /// Size in bytes of one entry of a mergeable section, else 0.
    pub entry_size: u64,
    /// Its bytes; empty for zero-initialised sections and for those that are not loaded.
    pub bytes: Vec<u8>,
    /// Sorted by offset; empty for sections that are not loaded.
    pub relocations: Vec<Relocation>,
}

/// Section flags (ELF `sh_flags`, and whether it has bytes in the file).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// SHF_ALLOC: takes part in the running program.
    pub alloc: bool,
    /// SHF_WRITE.
    pub write: bool,
    /// SHF_EXECINSTR.
    pub exec: bool,
    /// SHF_MERGE: equal entries may be one.
    pub merge: bool,
    /// SHF_STRINGS: entries end with a zero.
    pub strings: bool,
    /// SHT_NOBITS: zeroes, no bytes in the file.
    pub zeroes: bool,
}

/// One relocation (RELA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// Offset of the field in its section.
    pub offset: u64,
    /// How the field is filled in.
    pub kind: Kind,
    /// What it refers to.
    pub symbol: SymbolId,
    /// What is added.
    pub addend: i64,
}

/// Relocation types (System V ABI, AMD64 supplement, section 4.4), what is the same for us as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// R_X86_64_PC32 and R_X86_64_PLT32.
    Relative32,
    /// R_X86_64_PC64.
    Relative64,
    /// R_X86_64_64.
    Absolute64,
    /// R_X86_64_32.
    Absolute32,
    /// R_X86_64_32S.
    Absolute32Signed,
    /// Any other, by number.
    Other(u32),
}

impl Kind {
    /// Size of the field in bytes (System V ABI, AMD64 supplement, table 4.9).
    #[must_use]
    pub const fn field_bytes(self) -> u64 {
        match self {
            Self::Relative64 | Self::Absolute64 => 8,
            // R_X86_64_16, R_X86_64_PC16, R_X86_64_8, R_X86_64_PC8.
            Self::Other(12 | 13) => 2,
            Self::Other(14 | 15) => 1,
            // R_X86_64_GOTOFF64 and the like.
            Self::Other(25 | 27..=31) => 8,
            _ => 4,
        }
    }

    /// Whether the field's own address is subtracted.
    #[must_use]
    pub const fn is_relative(self) -> bool {
        matches!(self, Self::Relative32 | Self::Relative64)
    }
}

/// One symbol.
#[derive(Clone, Debug)]
pub struct Symbol {
    /// Its name; a section symbol has its section's.
    pub name: String,
    /// Where it is.
    pub home: Home,
    /// Size in bytes, 0 where not given.
    pub size: u64,
    /// What it stands for.
    pub kind: SymbolKind,
    /// Visible to other objects.
    pub global: bool,
}

/// Where a symbol is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// In another object.
    Undefined,
    /// Not in a section: an absolute value, a file name.
    Absolute,
    /// To be allotted by the linker (`-fcommon`).
    Common,
    /// In a section of this object.
    In {
        /// Which.
        section: SectionId,
        /// Offset in it.
        offset: u64,
    },
}

/// What a symbol stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SymbolKind {
    /// STT_FUNC.
    Function,
    /// STT_OBJECT.
    Object,
    /// STT_SECTION.
    Section,
    /// STT_NOTYPE: labels, and what assembly defines.
    Label,
    /// Anything else.
    Other,
}

impl Object {
    /// The section of an id that came from this object.
    #[must_use]
    pub fn section(&self, id: SectionId) -> &Section {
        &self.sections[id.0]
    }

    /// The symbol of an id that came from this object.
    #[must_use]
    pub fn symbol(&self, id: SymbolId) -> &Symbol {
        &self.symbols[id.0]
    }

    /// Sections with their ids.
    pub fn sections_with_ids(&self) -> impl Iterator<Item = (SectionId, &Section)> {
        self.sections
            .iter()
            .enumerate()
            .map(|(index, section)| (SectionId(index), section))
    }

    /// Symbols with their ids.
    pub fn symbols_with_ids(&self) -> impl Iterator<Item = (SymbolId, &Symbol)> {
        self.symbols
            .iter()
            .enumerate()
            .map(|(index, symbol)| (SymbolId(index), symbol))
    }
}

impl Section {
    /// Bytes of a range, if the section has them all.
    #[must_use]
    pub fn range(&self, start: u64, end: u64) -> Option<&[u8]> {
        self.bytes
            .get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }

    /// The relocations whose fields begin in a range.
    #[must_use]
    pub fn relocations_in(&self, start: u64, end: u64) -> &[Relocation] {
        let from = self.relocations.partition_point(|it| it.offset < start);
        let to = self.relocations.partition_point(|it| it.offset < end);
        self.relocations.get(from..to).unwrap_or_default()
    }

    /// The relocation whose field begins at an offset.
    #[must_use]
    pub fn relocation_at(&self, offset: u64) -> Option<&Relocation> {
        self.relocations_in(offset, offset.saturating_add(1))
            .first()
    }
}
