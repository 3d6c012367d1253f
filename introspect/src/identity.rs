//! Which kernel this is: enough to say whether a patch was made for it, and whether it is still the
//! same boot of it.

use serde::{Deserialize, Serialize};

use crate::address::Gva;
use crate::image::Region;
use crate::kernel::AttachError;
use crate::layout::Layout;
use crate::paging::KernelMemory;
use crate::symbols::Symbols;

/// Where the kernel image is mapped without KASLR (Linux v6.12 arch/x86/include/asm/page_types.h,
/// __START_KERNEL_map, and __START_KERNEL with the default CONFIG_PHYSICAL_START).
const IMAGE_MAP: Gva = Gva(0xffff_ffff_8000_0000);
const LINKED_AT: Gva = Gva(0xffff_ffff_8100_0000);
/// Longest banner that is believed.
const BANNER: usize = 1024;

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
    /// Guest-physical minus link-time address of the image (`phys_base`).
    pub phys_base: u64,
    /// Differs with every boot of the same kernel: the slide, the physical base, boot time and random
    /// per-boot words of the guest, hashed. In lower-case hex.
    pub boot: String,
}

impl Identity {
    /// Reads what the kernel says of itself.
    ///
    /// # Errors
    /// Memory that cannot be read, or no banner.
    pub(crate) fn read(
        memory: &KernelMemory<'_>,
        layout: &Layout,
        regions: &[Region],
        symbols: &Symbols,
    ) -> Result<Self, AttachError> {
        let _ = regions;
        let banner = match symbols.unique("linux_banner") {
            Ok(at) => memory.read_string(at, BANNER)?.trim_end().to_owned(),
            Err(_) => String::new(),
        };
        let release = banner.split_whitespace().nth(2).unwrap_or("").to_owned();
        let text = memory.physical_of(layout.text.start)?;
        Ok(Self {
            banner,
            release,
            build_id: None,
            slide: layout.text.start.0.wrapping_sub(LINKED_AT.0),
            phys_base: text
                .0
                .wrapping_sub(layout.text.start.0.wrapping_sub(IMAGE_MAP.0)),
            boot: String::new(),
        })
    }
}
