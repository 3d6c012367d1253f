//! Which kernel this is: enough to say whether a patch was made for it, and whether it is still the
//! same boot of it.

use serde::{Deserialize, Serialize};

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
