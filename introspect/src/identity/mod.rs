//! Which kernel this is: enough to say whether a patch was made for it, and whether it is still the
//! same boot of it.

mod notes;
mod vmcoreinfo;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::address::{Gva, GvaRange};
use crate::image::Region;
use crate::kernel::AttachError;
use crate::layout::Layout;
use crate::paging::{KernelMemory, ReadError};
use crate::symbols::Symbols;
use crate::tasks::fields::TaskFields;
use vmcoreinfo::VmcoreInfo;

/// Where the kernel image is mapped without KASLR (Linux v6.12 arch/x86/include/asm/page_types.h,
/// __START_KERNEL_map, and __START_KERNEL with the default CONFIG_PHYSICAL_START).
const IMAGE_MAP: u64 = 0xffff_ffff_8000_0000;
const LINKED_AT: u64 = 0xffff_ffff_8100_0000;
/// How every banner begins (Linux v6.12 init/version-timestamp.c).
const BANNER: &[u8] = b"Linux version ";
/// Longest banner that is believed.
const LONGEST_BANNER: usize = 1024;
/// How much of the boot hash is kept, in bytes.
const BOOT_HASH: usize = 16;

/// What a running kernel says of itself, each read from its own place so that they can be compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// `linux_banner`, without the newline.
    pub banner: String,
    /// `uname -r`.
    pub release: String,
    /// GNU build id of vmlinux, in lower-case hex, where its note is in memory.
    pub build_id: Option<String>,
    /// How far KASLR moved the kernel from where it was linked, in bytes.
    pub slide: u64,
    /// The kernel's own `phys_base`: what turns an image address, less ffffffff80000000, into a
    /// guest-physical one. Wraps below zero where KASLR moved the image further up virtually.
    pub phys_base: u64,
    /// Differs with every boot of the same kernel: a hash of where KASLR put things and of random
    /// words and times of this boot. In lower-case hex.
    pub boot: String,
}

/// What identity is read from.
pub(crate) struct Sources<'a> {
    pub(crate) memory: &'a KernelMemory<'a>,
    pub(crate) layout: &'a Layout,
    pub(crate) regions: &'a [Region],
    pub(crate) symbols: &'a Symbols,
    /// Where task members lie, and `init_task`, if known.
    pub(crate) tasks: Option<(&'a TaskFields, Gva)>,
}

impl Identity {
    /// Reads what the kernel says of itself.
    ///
    /// # Errors
    /// Memory that cannot be read, no banner, or places that contradict each other.
    pub(crate) fn read(from: &Sources<'_>) -> Result<Self, AttachError> {
        let banner = banner(from)?;
        let release = release(&banner)?;
        let info = VmcoreInfo::read(from.memory, from.symbols);
        let text = from.layout.text.start;
        let at = from.memory.physical_of(text)?;
        let slide = text.0.wrapping_sub(LINKED_AT);
        let phys_base = at.0.wrapping_sub(text.0.wrapping_sub(IMAGE_MAP));
        compare(
            "release",
            &release,
            info.text("OSRELEASE").map(str::to_owned).as_ref(),
        )?;
        compare("_stext", &text.0, info.hex("SYMBOL(_stext)").as_ref())?;
        compare("KASLR slide", &slide, info.hex("KERNELOFFSET").as_ref())?;
        compare(
            "phys_base",
            &phys_base,
            info.number("NUMBER(phys_base)").as_ref(),
        )?;
        compare(
            "phys_base",
            &phys_base,
            variable(from, "phys_base")?.as_ref(),
        )?;
        Ok(Self {
            build_id: notes::build_id(from.memory, from.regions, from.symbols)?,
            boot: boot(from.memory, from.layout, from.tasks)?,
            banner,
            release,
            slide,
            phys_base,
        })
    }
}

/// What one place says against what page tables and symbols say; a place that is silent agrees.
fn compare<T: PartialEq + std::fmt::Debug>(
    what: &'static str,
    here: &T,
    there: Option<&T>,
) -> Result<(), AttachError> {
    match there {
        Some(there) if there != here => Err(AttachError::Unsupported {
            what,
            why: format!("page tables and symbols say {here:x?}, the kernel itself {there:x?}"),
        }),
        _ => Ok(()),
    }
}

fn variable(from: &Sources<'_>, name: &str) -> Result<Option<u64>, ReadError> {
    from.symbols
        .unique(name)
        .ok()
        .map(|at| from.memory.read_u64(at))
        .transpose()
}

fn no_banner() -> AttachError {
    AttachError::NoKernel(
        "there is text, but no banner that begins with `Linux version`".to_owned(),
    )
}

/// The banner by its symbol, or searched for in read-only data.
fn banner(from: &Sources<'_>) -> Result<String, AttachError> {
    if let Ok(at) = from.symbols.unique("linux_banner") {
        return Ok(from
            .memory
            .read_string(at, LONGEST_BANNER)?
            .trim_end()
            .to_owned());
    }
    for region in from.regions.iter().filter(|region| !region.executable) {
        if let Some(banner) = search_banner(from.memory, region.range)? {
            return Ok(banner);
        }
    }
    Err(no_banner())
}

/// Whether a `Linux version …` is the kernel's own: the pattern of /proc/version holds format directives,
/// and the copy that the linker drops at last (Linux v6.12 init/version.c) has no number of the build.
fn is_banner(text: &str) -> bool {
    let number = text
        .split(" #")
        .nth(1)
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    text.ends_with('\n') && !text.contains('%') && number
}

/// The first banner in a range.
fn search_banner(memory: &KernelMemory<'_>, range: GvaRange) -> Result<Option<String>, ReadError> {
    const CHUNK: u64 = 256 << 10;
    let finder = memchr::memmem::Finder::new(BANNER);
    let mut buffer = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let len = CHUNK.min(range.end.0 - at.0);
        buffer.resize(usize::try_from(len).unwrap_or(0), 0);
        memory.read(at, &mut buffer)?;
        for offset in finder.find_iter(&buffer) {
            let text = memory.read_string(at.wrapping_add(offset as u64), LONGEST_BANNER)?;
            if is_banner(&text) {
                return Ok(Some(text.trim_end().to_owned()));
            }
        }
        if len < CHUNK {
            break;
        }
        at = at.wrapping_add(len - BANNER.len() as u64);
    }
    Ok(None)
}

/// The third word of the banner.
fn release(banner: &str) -> Result<String, AttachError> {
    let words = banner
        .strip_prefix("Linux version ")
        .ok_or_else(no_banner)?;
    words
        .split_whitespace()
        .next()
        .map(str::to_owned)
        .ok_or_else(no_banner)
}

/// A hash of where this boot put things and of the first task's random stack canary; for kernels without
/// stack protector of the moments in which the first two processes began.
pub(crate) fn boot(
    memory: &KernelMemory<'_>,
    layout: &Layout,
    tasks: Option<(&TaskFields, Gva)>,
) -> Result<String, ReadError> {
    let text = layout.text.start;
    let physical = memory.physical_of(text)?;
    let mut words = vec![text.0, physical.0, layout.direct_map.0];
    if let Some((fields, init_task)) = tasks {
        match fields.stack_canary {
            Some(canary) => words.push(memory.read_u64(init_task.wrapping_add(canary))?),
            None => words.extend(first_starts(memory, fields, init_task)?),
        }
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let hash = Sha256::digest(bytes);
    Ok(notes::hex(hash.get(..BOOT_HASH).unwrap_or_default()))
}

/// When the first two processes of the task list were started, in nanoseconds since boot.
fn first_starts(
    memory: &KernelMemory<'_>,
    fields: &TaskFields,
    init_task: Gva,
) -> Result<Vec<u64>, ReadError> {
    let Some(start) = fields.start_boottime else {
        return Ok(Vec::new());
    };
    let first = memory.read_pointer(init_task.wrapping_add(fields.tasks))?;
    let second = memory.read_pointer(first)?;
    [first, second]
        .iter()
        .map(|node| memory.read_u64(node.wrapping_sub(fields.tasks).wrapping_add(start)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_finished_banner_is_one() {
        assert!(is_banner(
            "Linux version 6.12.1 (a@b) (gcc) #1 SMP Tue Nov 24\n"
        ));
        assert!(!is_banner("Linux version 6.12.1 (a@b) (gcc) # SMP\n"));
        assert!(!is_banner("Linux version %s (a@b) (gcc) %s\n"));
    }
}
