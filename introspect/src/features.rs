//! Values the kernel settled at boot that decide how its code looks now: CPU feature words, the return
//! thunk, variables by name. Reads them; judges nothing.

use crate::address::Gva;
use crate::kernel::{AttachError, Kernel};
use crate::paging::KernelMemory;
use crate::target::PhysicalMemory;

/// More feature words than any kernel has (Linux v6.12 has 22 and 1 bug word).
const MOST_WORDS: u64 = 64;

/// `boot_cpu_data.x86_capability`: the words that alternatives are chosen by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuFeatures(Vec<u32>);

impl CpuFeatures {
    /// From its words.
    #[must_use]
    pub const fn new(words: Vec<u32>) -> Self {
        Self(words)
    }

    /// Whether feature `number` (`word * 32 + bit`, as `X86_FEATURE_…` counts) is set. `None` past the
    /// last word this kernel has.
    #[must_use]
    pub fn has(&self, number: u16) -> Option<bool> {
        let word = self.0.get(usize::from(number / 32))?;
        Some(word >> (number % 32) & 1 != 0)
    }

    /// The words.
    #[must_use]
    pub fn words(&self) -> &[u32] {
        &self.0
    }
}

impl Kernel {
    /// The CPU feature words of the boot CPU, feature words first, then bug words, as one array.
    ///
    /// # Errors
    /// A kernel whose `boot_cpu_data` is not known, or memory that cannot be read.
    pub fn cpu_features(&self, physical: &dyn PhysicalMemory) -> Result<CpuFeatures, AttachError> {
        let member = self
            .types
            .member("cpuinfo_x86", "x86_capability")
            .map_err(|why| AttachError::Unsupported {
                what: "types",
                why: why.to_string(),
            })?;
        let at = self.place("boot_cpu_data")?.wrapping_add(member.offset);
        let memory = self.memory(physical);
        let words = (0..(member.size / 4).min(MOST_WORDS))
            .map(|word| memory.read_u32(at.wrapping_add(word * 4)))
            .collect::<Result<_, _>>()?;
        Ok(CpuFeatures(words))
    }

    /// What `x86_return_thunk` holds: where functions return through. `None` in kernels built without.
    ///
    /// # Errors
    /// Memory that cannot be read, or a kernel with return thunks whose variable is not known.
    pub fn return_thunk(&self, physical: &dyn PhysicalMemory) -> Result<Option<Gva>, AttachError> {
        match self.place("x86_return_thunk") {
            Ok(at) => Ok(Some(self.memory(physical).read_pointer(at)?)),
            Err(_) if self.symbols.named("__x86_return_thunk").next().is_none() => Ok(None),
            Err(unknown) => Err(unknown),
        }
    }

    /// The 64-bit value of the kernel's variable of that name.
    ///
    /// # Errors
    /// A variable that is not known, or memory that cannot be read.
    pub fn value_u64(&self, physical: &dyn PhysicalMemory, name: &str) -> Result<u64, AttachError> {
        let memory: KernelMemory<'_> = self.memory(physical);
        Ok(memory.read_u64(self.place(name)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_is_a_bit_of_its_word() {
        let features = CpuFeatures::new(vec![0, 1 << 31]);
        assert_eq!(features.has(63), Some(true));
        assert_eq!(features.has(62), Some(false));
        assert_eq!(features.has(64), None);
    }
}
