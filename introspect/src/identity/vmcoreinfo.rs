//! VMCOREINFO: what the kernel writes down about itself for crash dumps (Linux v6.12
//! kernel/vmcore_info.c), lines of `KEY=value`. A second opinion on what page tables and symbols say.

use std::collections::HashMap;

use crate::paging::KernelMemory;
use crate::symbols::Symbols;

/// Most bytes of it: a page (kernel/vmcore_info.c, VMCOREINFO_BYTES).
const MOST_BYTES: u64 = 4096;

/// Its lines by key.
#[derive(Debug, Default)]
pub(super) struct VmcoreInfo(HashMap<String, String>);

impl VmcoreInfo {
    /// The kernel's, or an empty one where it has none or it cannot be read.
    pub(super) fn read(memory: &KernelMemory<'_>, symbols: &Symbols) -> Self {
        let text = || {
            let at = memory
                .read_pointer(symbols.unique("vmcoreinfo_data").ok()?)
                .ok()?;
            let size = memory
                .read_u64(symbols.unique("vmcoreinfo_size").ok()?)
                .ok()?;
            let mut bytes = vec![0; usize::try_from(size.min(MOST_BYTES)).ok()?];
            memory.read(at, &mut bytes).ok()?;
            Some(String::from_utf8_lossy(&bytes).into_owned())
        };
        text().map(|text| Self::parse(&text)).unwrap_or_default()
    }

    fn parse(text: &str) -> Self {
        let lines = text.lines().filter_map(|line| line.split_once('='));
        Self(
            lines
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
        )
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// A value written in hex without a prefix: `KERNELOFFSET`, `SYMBOL(…)`.
    pub(super) fn hex(&self, key: &str) -> Option<u64> {
        u64::from_str_radix(self.text(key)?, 16).ok()
    }

    /// A value written as a signed decimal: `NUMBER(…)`.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        self.text(key)?.parse::<i64>().ok().map(i64::cast_unsigned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_in_the_base_they_are_written_in() {
        let info =
            VmcoreInfo::parse("OSRELEASE=6.1\nKERNELOFFSET=1f000000\nNUMBER(phys_base)=-16\nx");
        assert_eq!(info.text("OSRELEASE"), Some("6.1"));
        assert_eq!(info.hex("KERNELOFFSET"), Some(0x1f00_0000));
        assert_eq!(
            info.number("NUMBER(phys_base)"),
            Some(16_u64.wrapping_neg())
        );
        assert_eq!(info.hex("OSRELEASE"), None);
    }
}
