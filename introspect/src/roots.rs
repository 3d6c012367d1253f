//! Top-level page tables as they were at one moment. A kernel is found by way of the tables that a vCPU uses, which are those of a
//! process: while the guest runs on, that process may end and its tables be used for something else. The tables below, which map
//! the kernel, are shared by all processes and stay. Does not walk; [`paging`](crate::paging) does.

use crate::address::{Gpa, GpaRange, PAGE_SIZE};
use crate::find;
use crate::target::{MemoryError, PhysicalMemory};
use crate::vcpu::Vcpu;

const PAGE: usize = PAGE_SIZE as usize;

/// Copies of the tables that the vCPUs use, to be made while the guest stands still.
#[derive(Debug, Default)]
pub struct Roots {
    pages: Vec<(Gpa, Box<[u8; PAGE]>)>,
}

/// Memory that runs on, but for the roots.
#[allow(missing_debug_implementations, reason = "borrows a trait object")]
pub struct Rooted<'a> {
    roots: &'a Roots,
    memory: &'a dyn PhysicalMemory,
}

impl Roots {
    /// Copies them. A root that is not RAM is left out: who walks it learns that.
    #[must_use]
    pub fn copy(memory: &dyn PhysicalMemory, vcpus: &[Vcpu]) -> Self {
        let mut roots = Self::default();
        for at in vcpus.iter().flat_map(find::roots) {
            let mut page = Box::new([0; PAGE]);
            let known = roots.pages.iter().any(|(known, _)| *known == at);
            if !known && memory.read(at, &mut *page).is_ok() {
                roots.pages.push((at, page));
            }
        }
        roots
    }

    /// Shows `memory` as it is, with the copies in their places.
    #[must_use]
    pub const fn over<'a>(&'a self, memory: &'a dyn PhysicalMemory) -> Rooted<'a> {
        Rooted {
            roots: self,
            memory,
        }
    }
}

impl PhysicalMemory for Rooted<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(at, into)?;
        for (page_at, page) in &self.roots.pages {
            overlay(at.0, into, page_at.0, &page[..]);
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.memory.ram()
    }
}

/// Copies what `from`, which lies at `from_at`, has of the range that `into` stands for.
fn overlay(at: u64, into: &mut [u8], from_at: u64, from: &[u8]) {
    let skipped = usize::try_from(from_at.saturating_sub(at)).unwrap_or(usize::MAX);
    let begin = usize::try_from(at.saturating_sub(from_at)).unwrap_or(usize::MAX);
    let into = into.get_mut(skipped..).unwrap_or_default();
    let from = from.get(begin..).unwrap_or_default();
    for (to, byte) in into.iter_mut().zip(from) {
        *to = *byte;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_covers_just_its_own_bytes() {
        for (at, len, expected) in [
            (90, 5, "....."),
            (98, 4, "..ab"),
            (100, 4, "abcd"),
            (102, 5, "cd..."),
            (98, 8, "..abcd.."),
            (104, 3, "..."),
        ] {
            let mut into = vec![b'.'; len];
            overlay(at, &mut into, 100, b"abcd");
            assert_eq!(String::from_utf8(into).unwrap(), expected, "{at} {len}");
        }
    }
}
