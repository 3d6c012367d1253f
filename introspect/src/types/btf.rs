//! BTF as stored (Linux v6.12 Documentation/bpf/btf.rst and include/uapi/linux/btf.h): the bytes, where
//! each type begins, and its parts. Resolves nothing across types beyond what a name lookup needs.

use std::collections::HashMap;

/// `struct btf_header`: magic, version, flags, then five 32-bit words.
const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
const HEADER: usize = 24;
/// Most bytes of types and strings together that are believed: the biggest kernels have about 16 MiB.
pub(crate) const MOST_BYTES: usize = 64 << 20;
/// `struct btf_type` without what follows it.
const TYPE: usize = 12;

/// Why bytes are not BTF.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// The header is cut short or not that of BTF version 1 in little-endian order.
    #[error("no BTF version 1 header")]
    Header,
    /// The sections reach outside the data.
    #[error("BTF sections reach outside the data")]
    Sections,
    /// A type is cut short or of a kind this program does not know.
    #[error("BTF type {id} is cut short or of unknown kind {kind}")]
    Type {
        /// Its number.
        id: u32,
        /// Its kind.
        kind: u8,
    },
}

/// Kinds of types (`BTF_KIND_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Int,
    Pointer,
    Array,
    Struct,
    Union,
    Enum,
    Forward,
    Typedef,
    /// `const`, `volatile`, `restrict` and type tags: something before a type.
    Qualifier,
    /// A variable: `size_or_type` is its type.
    Variable,
    /// A section and the variables in it.
    Section,
    /// Functions, prototypes, declaration tags: no data type.
    Other,
    Float,
    Enum64,
}

impl Kind {
    /// The kind of that number, and how many bytes follow its `struct btf_type`, fixed and an element.
    const fn of(number: u8) -> Option<(Self, usize, usize)> {
        Some(match number {
            1 => (Self::Int, 4, 0),
            2 => (Self::Pointer, 0, 0),
            3 => (Self::Array, 12, 0),
            4 => (Self::Struct, 0, 12),
            5 => (Self::Union, 0, 12),
            6 => (Self::Enum, 0, 8),
            7 => (Self::Forward, 0, 0),
            8 => (Self::Typedef, 0, 0),
            9 | 10 | 11 | 18 => (Self::Qualifier, 0, 0),
            12 => (Self::Other, 0, 0),
            13 => (Self::Other, 0, 8),
            14 => (Self::Variable, 4, 0),
            15 => (Self::Section, 0, 12),
            17 => (Self::Other, 4, 0),
            16 => (Self::Float, 0, 0),
            19 => (Self::Enum64, 0, 12),
            _ => return None,
        })
    }
}

/// One type, its name and what follows still packed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Type<'a> {
    pub(crate) kind: Kind,
    name: u32,
    /// How many elements follow.
    count: usize,
    /// Member offsets hold bit-field sizes.
    kind_flag: bool,
    /// Size in bytes, or the number of another type, by kind.
    pub(crate) size_or_type: u32,
    rest: &'a [u8],
}

/// One member of a struct or union.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawMember<'a> {
    pub(crate) name: &'a str,
    pub(crate) of: u32,
    pub(crate) bit_offset: u32,
    /// Zero: no bit field.
    pub(crate) bit_size: u32,
}

/// Parsed BTF.
#[derive(Debug)]
pub(crate) struct Btf {
    data: Vec<u8>,
    /// Where the strings begin in `data`.
    strings: usize,
    /// Where each type begins in `data`; type 0 is `void` and has none.
    starts: Vec<u32>,
    /// Structs and unions that have members, by name.
    composites: HashMap<Box<str>, u32>,
}

/// Length in bytes of the BTF that `header`, its first bytes, announces.
///
/// # Errors
/// [`BtfError`] where that is no header, or announces more than is believed.
pub(crate) fn announced(header: &[u8]) -> Result<usize, BtfError> {
    let [types, strings] = sections(header)?;
    let end = types.1.max(strings.1);
    if end > MOST_BYTES {
        Err(BtfError::Sections)
    } else {
        Ok(end)
    }
}

/// Start and end of the type and the string section.
fn sections(data: &[u8]) -> Result<[(usize, usize); 2], BtfError> {
    let right = data.get(..2) == Some(&MAGIC.to_le_bytes()) && data.get(2) == Some(&VERSION);
    let word = |at| u32_at(data, at).map(|word| word as usize);
    let header = word(4)
        .filter(|len| right && *len >= HEADER)
        .ok_or(BtfError::Header)?;
    let section = |at: usize| {
        let start = header.checked_add(word(at)?)?;
        Some((start, start.checked_add(word(at + 4)?)?))
    };
    match (section(8), section(16)) {
        (Some(types), Some(strings)) => Ok([types, strings]),
        _ => Err(BtfError::Header),
    }
}

impl Btf {
    /// Parses all types: one pass.
    ///
    /// # Errors
    /// [`BtfError`].
    pub(crate) fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        let [types, strings] = sections(&data)?;
        if types.1 > data.len() || strings.1 > data.len() || data.len() > MOST_BYTES {
            return Err(BtfError::Sections);
        }
        let mut btf = Self {
            data,
            strings: strings.0,
            starts: vec![0],
            composites: HashMap::new(),
        };
        btf.data.truncate(types.1.max(strings.1));
        let mut at = types.0;
        while at < types.1 {
            let id = u32::try_from(btf.starts.len()).unwrap_or(u32::MAX);
            let kind = btf.data.get(at + 7).map_or(0, |byte| byte & 0x1f);
            let (found, len) = btf.type_at(at).ok_or(BtfError::Type { id, kind })?;
            let named = matches!(found.kind, Kind::Struct | Kind::Union) && found.count > 0;
            let name = if named {
                btf.string(found.name).unwrap_or("")
            } else {
                ""
            };
            if !name.is_empty() {
                let name = name.into();
                btf.composites.entry(name).or_insert(id);
            }
            btf.starts
                .push(u32::try_from(at).map_err(|_| BtfError::Sections)?);
            at += len;
        }
        Ok(btf)
    }

    /// The type that begins at `at`, and its length in bytes.
    fn type_at(&self, at: usize) -> Option<(Type<'_>, usize)> {
        let info = u32_at(&self.data, at.checked_add(4)?)?;
        let (kind, fixed, element) = Kind::of((info >> 24 & 0x1f) as u8)?;
        let count = (info & 0xffff) as usize;
        let len = TYPE + fixed + element * count;
        let found = Type {
            kind,
            name: u32_at(&self.data, at)?,
            count,
            kind_flag: info >> 31 != 0,
            size_or_type: u32_at(&self.data, at + 8)?,
            rest: self.data.get(at + TYPE..at.checked_add(len)?)?,
        };
        Some((found, len))
    }

    /// The type of that number; `None` for `void` and for numbers out of range.
    pub(crate) fn get(&self, id: u32) -> Option<Type<'_>> {
        let start = *self.starts.get(id as usize).filter(|_| id != 0)?;
        self.type_at(start as usize).map(|(found, _)| found)
    }

    /// The struct or union of that name that has members; of several the first.
    pub(crate) fn composite(&self, name: &str) -> Option<Type<'_>> {
        self.get(*self.composites.get(name)?)
    }

    /// All types by number.
    pub(crate) fn types(&self) -> impl Iterator<Item = Type<'_>> {
        self.starts
            .iter()
            .skip(1)
            .filter_map(|start| Some(self.type_at(*start as usize)?.0))
    }

    /// Members of a struct or union.
    pub(crate) fn members<'a>(&'a self, of: &Type<'a>) -> impl Iterator<Item = RawMember<'a>> {
        let composite = matches!(of.kind, Kind::Struct | Kind::Union);
        let bytes = if composite { of.rest } else { &[] };
        let kind_flag = of.kind_flag;
        bytes.chunks_exact(12).filter_map(move |member| {
            let offset = u32_at(member, 8)?;
            let (bit_offset, bit_size) = if kind_flag {
                (offset & 0xff_ffff, offset >> 24)
            } else {
                (offset, 0)
            };
            let name = self.string(u32_at(member, 0)?)?;
            Some(RawMember {
                name,
                of: u32_at(member, 4)?,
                bit_offset,
                bit_size,
            })
        })
    }

    /// Enumerators with their values.
    pub(crate) fn enumerators<'a>(&'a self, of: &Type<'a>) -> impl Iterator<Item = (&'a str, i64)> {
        let (element, wide) = match of.kind {
            Kind::Enum => (8, false),
            Kind::Enum64 => (12, true),
            _ => (usize::MAX, false),
        };
        let signed = of.kind_flag;
        of.rest.chunks_exact(element).filter_map(move |bytes| {
            let low = u32_at(bytes, 4)?;
            let value = match (wide, signed) {
                (true, _) => (u64::from(u32_at(bytes, 8)?) << 32 | u64::from(low)).cast_signed(),
                // Kernels before the sign flag (v6.0) meant signed; Linux's own values fit either way.
                (false, true) => i64::from(low.cast_signed()),
                (false, false) => i64::from(low),
            };
            Some((self.string(u32_at(bytes, 0)?)?, value))
        })
    }

    /// Names and offsets of the variables of the section of that name.
    pub(crate) fn variables<'a>(&'a self, section: &str) -> impl Iterator<Item = (&'a str, u32)> {
        // Sections are written last.
        let found = self.starts.iter().skip(1).rev().find_map(|start| {
            let (found, _) = self.type_at(*start as usize)?;
            let named = || self.string(found.name) == Some(section);
            (found.kind == Kind::Section && named()).then_some(found)
        });
        let rest = found.map_or(&[][..], |found| found.rest);
        rest.chunks_exact(12).filter_map(|element| {
            let variable = self.get(u32_at(element, 0)?)?;
            let name = self.string(variable.name)?;
            (variable.kind == Kind::Variable).then_some((name, u32_at(element, 4)?))
        })
    }

    /// Element type and number of elements of an array.
    pub(crate) fn array(&self, of: &Type<'_>) -> Option<(u32, u32)> {
        if of.kind != Kind::Array {
            return None;
        }
        Some((u32_at(of.rest, 0)?, u32_at(of.rest, 8)?))
    }

    fn string(&self, offset: u32) -> Option<&str> {
        let start = self.strings.checked_add(offset as usize)?;
        let rest = self.data.get(start..)?;
        let end = memchr::memchr(0, rest)?;
        std::str::from_utf8(rest.get(..end)?).ok()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}
