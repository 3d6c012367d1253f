//! Where the kernel keeps its BTF: between `__start_BTF` and `__stop_BTF`, or for kernels without data
//! symbols wherever read-only data hold a header whose types are a kernel's.

use memchr::memmem::Finder;

use crate::address::{Gva, GvaRange};
use crate::image::Region;
use crate::paging::{KernelMemory, ReadError};
use crate::symbols::Symbols;
use crate::types::{Types, btf};

/// Magic, version 1, no flags, header of 24 bytes.
const HEADER: &[u8; 8] = &[0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
const WHOLE_HEADER: usize = 24;
/// How many places that look like a header are tried.
const MOST_CANDIDATES: usize = 16;

/// The kernel's types, or none at all where it has no BTF.
///
/// # Errors
/// Read-only data that cannot be read.
pub(crate) fn read(
    memory: &KernelMemory<'_>,
    regions: &[Region],
    symbols: &Symbols,
) -> Result<Types, ReadError> {
    let start = symbols
        .unique("__start_BTF")
        .or_else(|_| symbols.unique("__start_btf"));
    if let Some(types) = start.ok().and_then(|at| parse(memory, at)) {
        return Ok(types);
    }
    for region in regions
        .iter()
        .filter(|region| !region.writable && !region.executable)
    {
        if let Some(types) = search(memory, region.range)? {
            return Ok(types);
        }
    }
    Ok(Types::default())
}

fn search(memory: &KernelMemory<'_>, range: GvaRange) -> Result<Option<Types>, ReadError> {
    const CHUNK: u64 = 256 << 10;
    let finder = Finder::new(HEADER);
    let mut buffer = Vec::new();
    let mut tried = 0;
    let mut at = range.start;
    while at < range.end && tried < MOST_CANDIDATES {
        let len = CHUNK.min(range.end.0 - at.0);
        buffer.resize(usize::try_from(len).unwrap_or(0), 0);
        memory.read(at, &mut buffer)?;
        for offset in finder.find_iter(&buffer).take(MOST_CANDIDATES) {
            tried += 1;
            if let Some(types) = parse(memory, at.wrapping_add(offset as u64)) {
                return Ok(Some(types));
            }
        }
        if len < CHUNK {
            break;
        }
        at = at.wrapping_add(len - HEADER.len() as u64);
    }
    Ok(None)
}

/// The types at `at`, if they are there and know of tasks.
fn parse(memory: &KernelMemory<'_>, at: Gva) -> Option<Types> {
    let header = memory.read_array::<WHOLE_HEADER>(at).ok()?;
    let mut data = vec![0; btf::announced(&header).ok()?];
    memory.read(at, &mut data).ok()?;
    Types::from_btf(data)
        .ok()
        .filter(|types| types.size_of("task_struct").is_ok())
}
