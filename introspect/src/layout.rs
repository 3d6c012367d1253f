//! Where the parts of a kernel lie: its text, its own page tables, its per-CPU areas, its direct map.
//! Found by symbols where the kernel has data symbols (CONFIG_KALLSYMS_ALL), else by what memory shows.

use crate::address::{Gpa, Gva, GvaRange, PAGE_SIZE};
use crate::find::Found;
use crate::image::Region;
use crate::kernel::AttachError;
use crate::paging::{AddressSpace, KernelMemory, ReadError};
use crate::places::Lookup;
use crate::symbols::Symbols;

/// More CPUs than x86-64 Linux can have (arch/x86/Kconfig, NR_CPUS_RANGE_END).
const MOST_CPUS: u32 = 8192;
/// First entry of the kernel half of a top-level table, and how many there are.
const KERNEL_HALF: u64 = 256;
const ENTRIES: u64 = 512;
/// KASLR moves the direct map by multiples of this (Linux v6.12 arch/x86/mm/kaslr.c, PUD_SIZE).
const GIGABYTE: u64 = 1 << 30;
/// Per-CPU areas lie in the direct map or among vmalloc mappings, below the kernel image.
const PER_CPU_AREAS: std::ops::Range<u64> = 0xff00_0000_0000_0000..0xffff_ffff_8000_0000;

/// Where the kernel lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `_stext` to `_etext`.
    pub text: GvaRange,
    /// `__init_begin` to `__init_end`, freed after boot; where kallsyms has text symbols only, no more than
    /// its text.
    pub init: Option<GvaRange>,
    /// The kernel's own page tables (`init_top_pgt`).
    pub space: AddressSpace,
    /// `__per_cpu_offset`, one for each possible CPU.
    pub per_cpu_offset: Vec<u64>,
    /// Base of the direct map (`page_offset_base`).
    pub direct_map: Gva,
    /// The interrupt descriptor table that every CPU of this kernel has loaded.
    pub idt_base: Gva,
}

impl Layout {
    /// Reads the layout of the kernel that was `found`.
    ///
    /// # Errors
    /// [`AttachError`] where text or page tables are not as any kernel has them.
    pub(crate) fn read(
        memory: &KernelMemory<'_>,
        found: &Found,
        regions: &[Region],
        lookup: Lookup<'_>,
    ) -> Result<Self, AttachError> {
        let text = text(lookup.symbols)?;
        let space = own_tables(memory, found.space, regions, lookup)?;
        let memory = KernelMemory::new(memory.physical, space);
        Ok(Self {
            text,
            init: between(lookup.symbols, "__init_begin", "__init_end")
                .or_else(|| between(lookup.symbols, "_sinittext", "_einittext")),
            space,
            per_cpu_offset: per_cpu_offsets(&memory, lookup)?,
            direct_map: direct_map(&memory, lookup)?,
            idt_base: found.idt_base,
        })
    }
}

fn between(symbols: &Symbols, start: &str, end: &str) -> Option<GvaRange> {
    let range = GvaRange {
        start: symbols.unique(start).ok()?,
        end: symbols.unique(end).ok()?,
    };
    (!range.is_empty()).then_some(range)
}

fn text(symbols: &Symbols) -> Result<GvaRange, AttachError> {
    between(symbols, "_stext", "_etext").ok_or_else(|| AttachError::Unsupported {
        what: "kallsyms",
        why: "no `_stext` below an `_etext`".to_owned(),
    })
}

/// The tables that outlive every process.
fn own_tables(
    memory: &KernelMemory<'_>,
    found: AddressSpace,
    regions: &[Region],
    lookup: Lookup<'_>,
) -> Result<AddressSpace, AttachError> {
    let root = match lookup
        .get("init_top_pgt")
        .or_else(|| lookup.get("swapper_pg_dir"))
    {
        Some(at) => memory.physical_of(at)?,
        None => tables_like(memory, found, regions)?,
    };
    Ok(AddressSpace { root, ..found })
}

/// The page of the kernel's data whose upper half equals that of the tables in use and whose lower half
/// is empty: no process has tables in the image, and no other page looks so.
fn tables_like(
    memory: &KernelMemory<'_>,
    found: AddressSpace,
    regions: &[Region],
) -> Result<Gpa, AttachError> {
    let unsupported = |why: &str| AttachError::Unsupported {
        what: "page tables",
        why: why.to_owned(),
    };
    let model = read_table(memory, found.root)?;
    let mut candidates = Vec::new();
    for region in regions
        .iter()
        .filter(|region| region.writable && !region.executable)
    {
        let mut at = region.range.start;
        while at < region.range.end {
            let frame = memory.physical_of(at)?;
            // The last entry maps the kernel image: compare it before all others.
            let last = frame.wrapping_add((ENTRIES - 1) * 8);
            let matches = memory.physical.read_u64(last).ok() == model.last().copied()
                && like(&read_table(memory, frame)?, &model);
            if matches {
                candidates.push(frame);
            }
            at = at.wrapping_add(PAGE_SIZE);
        }
    }
    match candidates.as_slice() {
        [one] => Ok(*one),
        [] => Err(unsupported(
            "no page of the kernel's data looks like init_top_pgt",
        )),
        _ => Err(unsupported(
            "several pages of the kernel's data look like init_top_pgt",
        )),
    }
}

fn read_table(memory: &KernelMemory<'_>, at: Gpa) -> Result<Vec<u64>, AttachError> {
    let mut bytes = vec![0; (ENTRIES * 8) as usize];
    memory
        .physical
        .read(at, &mut bytes)
        .map_err(ReadError::from)?;
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).unwrap_or(0);
    Ok(bytes.chunks_exact(8).map(word).collect())
}

/// Whether a table has an empty user half and the kernel half of `model`, access marks aside.
fn like(table: &[u64], model: &[u64]) -> bool {
    const ACCESSED: u64 = 1 << 5;
    let half = KERNEL_HALF as usize;
    let user_empty = table.iter().take(half).all(|entry| *entry == 0);
    let same = |(a, b): (&u64, &u64)| a | ACCESSED == b | ACCESSED;
    user_empty && table.iter().zip(model).skip(half).all(same)
}

/// The table, as long as it is for this machine. A kernel built for one CPU has none.
fn per_cpu_offsets(memory: &KernelMemory<'_>, lookup: Lookup<'_>) -> Result<Vec<u64>, AttachError> {
    let Some(table) = lookup.get("__per_cpu_offset") else {
        return Ok(Vec::new());
    };
    let count = lookup
        .get("nr_cpu_ids")
        .map(|at| memory.read_u32(at))
        .transpose()?;
    let mut offsets = Vec::new();
    for cpu in 0..u64::from(count.unwrap_or(MOST_CPUS).clamp(1, MOST_CPUS)) {
        let offset = memory.read_u64(table.wrapping_add(cpu * 8))?;
        // CPUs that cannot be there keep the address of the image's own copy (Linux v6.12
        // arch/x86/kernel/setup_percpu.c, BOOT_PERCPU_OFFSET), and after the table other data follow.
        if count.is_none() && (offset % PAGE_SIZE != 0 || !PER_CPU_AREAS.contains(&offset)) {
            break;
        }
        offsets.push(offset);
    }
    Ok(offsets)
}

/// The base by its variable, or where the kernel half of the tables begins to map: there physical page
/// zero lies.
fn direct_map(memory: &KernelMemory<'_>, lookup: Lookup<'_>) -> Result<Gva, AttachError> {
    if let Some(at) = lookup.get("page_offset_base") {
        return Ok(memory.read_pointer(at)?);
    }
    let mut at = Gva(if memory.space.five_level {
        0xff00 << 48
    } else {
        0xffff_8000 << 32
    });
    for _ in 0..ENTRIES * 4 {
        if at.0.is_multiple_of(GIGABYTE) && maps_from_zero(memory, at) {
            return Ok(at);
        }
        let skip = memory
            .space
            .hole(memory.physical, at)
            .map_err(ReadError::from)?;
        at = at.wrapping_add(skip);
    }
    let why = "no mapping of physical page zero was found".to_owned();
    Err(AttachError::Unsupported {
        what: "direct map",
        why,
    })
}

/// Whether the second MiB of physical memory, which is RAM on every PC, lies at its place after `base`.
fn maps_from_zero(memory: &KernelMemory<'_>, base: Gva) -> bool {
    let at = 1 << 20;
    memory.physical_of(base.wrapping_add(at)) == Ok(Gpa(at))
}
