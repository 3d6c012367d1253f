//! Reads the module list. Which module is where stands in [`super`]; this owns the offsets and the walk.

use crate::address::{Gva, GvaRange};
use crate::deadline::Deadline;
use crate::kernel::AttachError;
use crate::modules::{Module, ModuleOrc, ModulePlace, ModuleState};
use crate::paging::{KernelMemory, ReadError};
use crate::symbols::Symbols;
use crate::types::{TypeError, Types};

/// Longest module name (Linux v6.12 include/linux/moduleparam.h, MAX_PARAM_PREFIX_LEN).
const NAME: usize = 64;
/// `Elf64_Sym`.
const ELF_SYMBOL: usize = 24;
/// More symbols, and bytes of their names, than any module has.
const MOST_SYMBOLS: u64 = 1 << 18;
const MOST_NAMES: usize = 32 << 20;
/// Longest name within a module that is believed (Linux v6.12 include/linux/kallsyms.h, KSYM_NAME_LEN).
const LONGEST_NAME: usize = 512;
/// More modules than one uses.
const MOST_USES: usize = 1 << 10;
/// More modules than there is room for in the module window (1 GiB of pages).
const MOST_MODULES: usize = 1 << 16;

/// Offsets within `struct module` and what hangs off it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModuleFields {
    list: u64,
    name: u64,
    state: u64,
    kallsyms: u64,
    text: TextFields,
    /// Missing in kernels without kallsyms of modules.
    tables: Option<KallsymsFields>,
    orc: Option<OrcFields>,
    /// Missing in kernels that unload no module.
    uses: Option<UseFields>,
}

/// `module.target_list`, on which each `struct module_use` names a module that this one uses (Linux v6.12 and v6.1
/// kernel/module/main.c, `add_module_usage`).
#[derive(Clone, Debug, PartialEq, Eq)]
struct UseFields {
    list: u64,
    link: u64,
    target: u64,
}

/// Where base and length of text lie: core, then init.
#[derive(Clone, Debug, PartialEq, Eq)]
struct TextFields {
    core: (u64, u64),
    init: (u64, u64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct KallsymsFields {
    symbols: u64,
    count: u64,
    strings: u64,
    kinds: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct OrcFields {
    count: u64,
    ips: u64,
    entries: u64,
}

impl ModuleFields {
    /// Looks all members up.
    ///
    /// # Errors
    /// One without which modules cannot be read.
    pub(crate) fn of(types: &Types) -> Result<Self, TypeError> {
        let module = |path| types.offset_of("module", path);
        Ok(Self {
            list: module("list")?,
            name: module("name")?,
            state: module("state")?,
            kallsyms: module("kallsyms").unwrap_or(0),
            text: TextFields::of(types)?,
            tables: KallsymsFields::of(types).ok(),
            orc: OrcFields::of(types).ok(),
            uses: UseFields::of(types).ok(),
        })
    }
}

impl TextFields {
    /// `mem[]` since Linux commit ac3b43283923 ("module: replace module_layout with module_memory") (in
    /// v6.4), where text is an element of its own; before, text was the first part of each layout.
    fn of(types: &Types) -> Result<Self, TypeError> {
        let module = |path| types.offset_of("module", path);
        let Ok(memories) = module("mem") else {
            return Ok(Self {
                core: (
                    module("core_layout.base")?,
                    module("core_layout.text_size")?,
                ),
                init: (
                    module("init_layout.base")?,
                    module("init_layout.text_size")?,
                ),
            });
        };
        let element = types.size_of("module_memory")?;
        let base = types.offset_of("module_memory", "base")?;
        let size = types.offset_of("module_memory", "size")?;
        let place = |name: &str, usual| {
            let index = types
                .enumerator(name)
                .and_then(|index| u64::try_from(index).ok());
            let at = index.unwrap_or(usual).min(16) * element + memories;
            (at + base, at + size)
        };
        Ok(Self {
            core: place("MOD_TEXT", 0),
            init: place("MOD_INIT_TEXT", 4),
        })
    }
}

impl UseFields {
    fn of(types: &Types) -> Result<Self, TypeError> {
        Ok(Self {
            list: types.offset_of("module", "target_list")?,
            link: types.offset_of("module_use", "target_list")?,
            target: types.offset_of("module_use", "target")?,
        })
    }
}

impl KallsymsFields {
    fn of(types: &Types) -> Result<Self, TypeError> {
        types.offset_of("module", "kallsyms")?;
        let tables = |path| types.offset_of("mod_kallsyms", path);
        Ok(Self {
            symbols: tables("symtab")?,
            count: tables("num_symtab")?,
            strings: tables("strtab")?,
            kinds: tables("typetab").ok(),
        })
    }
}

impl OrcFields {
    fn of(types: &Types) -> Result<Self, TypeError> {
        let module = |path| types.offset_of("module", path);
        Ok(Self {
            count: module("arch.num_orcs")?,
            ips: module("arch.orc_unwind_ip")?,
            entries: module("arch.orc_unwind")?,
        })
    }
}

/// Every module on the list that begins at `head` (`modules`).
///
/// # Errors
/// A list that leads out of memory or never ends.
pub(crate) fn all(
    memory: &KernelMemory<'_>,
    fields: &ModuleFields,
    head: Gva,
) -> Result<Vec<Module>, AttachError> {
    let no_end = Deadline::none();
    each(memory, fields, head, &no_end, |at| {
        module(memory, fields, at)
    })
}

/// Where the code of each lies, in the order of [`all`]; cheap enough to be asked inside a stop.
///
/// # Errors
/// As [`all`], or no time left.
pub(crate) fn places(
    memory: &KernelMemory<'_>,
    fields: &ModuleFields,
    head: Gva,
    deadline: &Deadline,
) -> Result<Vec<ModulePlace>, AttachError> {
    each(memory, fields, head, deadline, |at| {
        head_of(memory, fields, at)
    })
}

fn each<T>(
    memory: &KernelMemory<'_>,
    fields: &ModuleFields,
    head: Gva,
    deadline: &Deadline,
    read: impl Fn(Gva) -> Result<T, ReadError>,
) -> Result<Vec<T>, AttachError> {
    let mut found = Vec::new();
    let mut at = memory.read_pointer(head)?;
    while at != head {
        if found.len() == MOST_MODULES {
            let why = "the module list does not end".to_owned();
            return Err(AttachError::Unsupported {
                what: "modules",
                why,
            });
        }
        deadline.allow("modules", found.len())?;
        found.push(read(at.wrapping_sub(fields.list))?);
        at = memory.read_pointer(at)?;
    }
    Ok(found)
}

fn module(memory: &KernelMemory<'_>, fields: &ModuleFields, at: Gva) -> Result<Module, ReadError> {
    let place = head_of(memory, fields, at)?;
    Ok(Module {
        at,
        name: memory.read_string(at.wrapping_add(fields.name), NAME)?,
        state: place.state,
        text: place.text,
        init_text: place.init_text,
        uses: match (&fields.uses, place.state) {
            (None, _) => None,
            (_, ModuleState::Unformed) => Some(Vec::new()),
            (Some(fields), _) => Some(uses(memory, fields, at)?),
        },
        symbols: if place.state == ModuleState::Unformed {
            Symbols::default()
        } else {
            symbols(memory, fields, at)?
        },
        orc: place.orc,
    })
}

/// State and place. Nothing of a module that is still being set up is looked at.
fn head_of(
    memory: &KernelMemory<'_>,
    fields: &ModuleFields,
    at: Gva,
) -> Result<ModulePlace, ReadError> {
    let state = match memory.read_u32(at.wrapping_add(fields.state))? {
        0 => ModuleState::Live,
        1 => ModuleState::Coming,
        2 => ModuleState::Going,
        _ => ModuleState::Unformed,
    };
    let mut place = ModulePlace {
        at,
        state,
        text: GvaRange { start: at, end: at },
        init_text: None,
        orc: None,
    };
    if state != ModuleState::Unformed {
        place.text = text(memory, at, fields.text.core)?.unwrap_or(place.text);
        place.init_text = text(memory, at, fields.text.init)?;
        place.orc = orc(memory, fields, at)?;
    }
    Ok(place)
}

/// Base and length, if there is any.
fn text(
    memory: &KernelMemory<'_>,
    at: Gva,
    (base, size): (u64, u64),
) -> Result<Option<GvaRange>, ReadError> {
    let base = memory.read_pointer(at.wrapping_add(base))?;
    let size = memory.read_u32(at.wrapping_add(size))?;
    let range = GvaRange::sized(base, u64::from(size));
    Ok(range.filter(|range| base.0 != 0 && !range.is_empty()))
}

fn orc(
    memory: &KernelMemory<'_>,
    fields: &ModuleFields,
    at: Gva,
) -> Result<Option<ModuleOrc>, ReadError> {
    let Some(orc) = &fields.orc else {
        return Ok(None);
    };
    let count = memory.read_u32(at.wrapping_add(orc.count))?;
    let ips = memory.read_pointer(at.wrapping_add(orc.ips))?;
    let entries = memory.read_pointer(at.wrapping_add(orc.entries))?;
    Ok((count != 0).then_some(ModuleOrc {
        ips,
        entries,
        count,
    }))
}

/// The modules that one uses. A list that does not end is cut off: what is missing of it counts as not used.
fn uses(memory: &KernelMemory<'_>, fields: &UseFields, at: Gva) -> Result<Vec<Gva>, ReadError> {
    let head = at.wrapping_add(fields.list);
    let mut found = Vec::new();
    let mut link = memory.read_pointer(head)?;
    while link != head && found.len() < MOST_USES {
        let target = link.wrapping_sub(fields.link).wrapping_add(fields.target);
        found.push(memory.read_pointer(target)?);
        link = memory.read_pointer(link)?;
    }
    Ok(found)
}

/// The module's own symbols, in table order. Undefined ones and those without a name are left out, as
/// /proc/kallsyms leaves them out.
fn symbols(
    memory: &KernelMemory<'_>,
    fields: &ModuleFields,
    at: Gva,
) -> Result<Symbols, ReadError> {
    let Some(layout) = &fields.tables else {
        return Ok(Symbols::default());
    };
    let tables = memory.read_pointer(at.wrapping_add(fields.kallsyms))?;
    if tables.0 == 0 {
        return Ok(Symbols::default());
    }
    let pointer = |offset| memory.read_pointer(tables.wrapping_add(offset));
    let count = u64::from(memory.read_u32(tables.wrapping_add(layout.count))?).min(MOST_SYMBOLS);
    let raw = bytes(memory, pointer(layout.symbols)?, count * ELF_SYMBOL as u64)?;
    let kinds = match layout.kinds {
        Some(offset) => bytes(memory, pointer(offset)?, count)?,
        None => Vec::new(),
    };
    let strings = strings(memory, pointer(layout.strings)?, &raw)?;
    let rows = raw
        .chunks_exact(ELF_SYMBOL)
        .enumerate()
        .filter_map(|(position, symbol)| {
            let symbol = ElfSymbol::parse(symbol)?;
            let name = name(&strings, symbol.name)?;
            let kind = kinds
                .get(position)
                .map_or(char::from(symbol.info), |kind| char::from(*kind));
            (symbol.section != 0 && !name.is_empty()).then_some((name, Gva(symbol.value), kind))
        });
    Ok(Symbols::from_list(rows))
}

/// What is used of an `Elf64_Sym`.
struct ElfSymbol {
    name: usize,
    /// Before typetab (Linux v5.2) the loader put the kind's letter here.
    info: u8,
    section: u16,
    value: u64,
}

impl ElfSymbol {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let name = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?);
        Some(Self {
            name: name as usize,
            info: *bytes.get(4)?,
            section: u16::from_le_bytes(bytes.get(6..8)?.try_into().ok()?),
            value: u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?),
        })
    }
}

/// The string table as far as the symbols use it: to the end of the name that begins last.
fn strings(memory: &KernelMemory<'_>, at: Gva, raw: &[u8]) -> Result<Vec<u8>, ReadError> {
    let names = raw
        .chunks_exact(ELF_SYMBOL)
        .filter_map(ElfSymbol::parse)
        .map(|symbol| symbol.name);
    let last = names.max().unwrap_or(0).min(MOST_NAMES);
    let mut found = bytes(memory, at, last as u64)?;
    let tail = memory.read_string(at.wrapping_add(last as u64), LONGEST_NAME)?;
    found.extend_from_slice(tail.as_bytes());
    found.push(0);
    Ok(found)
}

fn name(strings: &[u8], start: usize) -> Option<&str> {
    let rest = strings.get(start..)?;
    let end = memchr::memchr(0, rest)?.min(LONGEST_NAME);
    std::str::from_utf8(rest.get(..end)?).ok()
}

/// `len` bytes, which the caller has bounded.
fn bytes(memory: &KernelMemory<'_>, at: Gva, len: u64) -> Result<Vec<u8>, ReadError> {
    let mut found = vec![0; usize::try_from(len).unwrap_or(0)];
    memory.read(at, &mut found)?;
    Ok(found)
}
