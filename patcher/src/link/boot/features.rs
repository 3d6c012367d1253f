//! The CPU features a kernel decided on: what chooses alternatives. Read from `boot_cpu_data`.

use vmpatch_introspect::{Gva, Kernel};

use crate::link::live::Live;

/// Most words read: the kernel has 22 words of features and 2 of bugs (Linux v6.12
/// arch/x86/include/asm/cpufeatures.h).
const MOST_WORDS: u64 = 64;

/// Numbers of features the linker itself asks about; the same in Linux v6.1 and v6.12
/// arch/x86/include/asm/cpufeatures.h unless said otherwise.
pub mod number {
    /// `X86_FEATURE_PTI`.
    pub const PTI: u16 = 7 * 32 + 11;
    /// `X86_FEATURE_RETPOLINE`.
    pub const RETPOLINE: u16 = 11 * 32 + 12;
    /// `X86_FEATURE_RETPOLINE_LFENCE`.
    pub const RETPOLINE_LFENCE: u16 = 11 * 32 + 13;
    /// `X86_FEATURE_RETHUNK`.
    pub const RETHUNK: u16 = 11 * 32 + 14;
    /// `X86_FEATURE_CALL_DEPTH` (since v6.2).
    pub const CALL_DEPTH: u16 = 11 * 32 + 19;
    /// `X86_FEATURE_IBT`.
    pub const IBT: u16 = 18 * 32 + 20;
    /// `X86_FEATURE_INDIRECT_THUNK_ITS` in 6.1.
    pub const ITS_6_1: u16 = 21 * 32 + 5;
    /// `X86_FEATURE_INDIRECT_THUNK_ITS` in 6.12.
    pub const ITS_6_12: u16 = 21 * 32 + 6;
}

/// Feature and bug words, as `boot_cpu_has` reads them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features(Vec<u32>);

impl Features {
    /// Words given, for tests.
    #[must_use]
    pub const fn from_words(words: Vec<u32>) -> Self {
        Self(words)
    }

    /// `boot_cpu_data.x86_capability`; `None` where the kernel does not tell its symbols or types.
    #[must_use]
    pub fn read(kernel: &Kernel, live: &dyn Live) -> Option<Self> {
        let data = live.unique("boot_cpu_data")?;
        let member = kernel.types.member("cpuinfo_x86", "x86_capability").ok()?;
        let words = (member.size / 4).min(MOST_WORDS) as usize;
        Self::read_at(live, data.checked_add(member.offset)?, words)
    }

    fn read_at(live: &dyn Live, at: Gva, words: usize) -> Option<Self> {
        let bytes = live.bytes(at, words * 4).ok()?;
        let words = bytes.as_chunks::<4>().0;
        Some(Self(
            words.iter().map(|word| u32::from_le_bytes(*word)).collect(),
        ))
    }

    /// Whether the feature or bug is there; `None` beyond the kernel's last word.
    #[must_use]
    pub fn has(&self, number: u16) -> Option<bool> {
        let word = self.0.get(usize::from(number / 32))?;
        Some(word & (1 << (number % 32)) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_is_a_bit_of_its_word() {
        let features = Features::from_words(vec![0, 1 << 5]);
        assert_eq!(features.has(37), Some(true));
        assert_eq!(features.has(36), Some(false));
        assert_eq!(features.has(64), None);
    }
}
