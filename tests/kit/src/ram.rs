//! A guest's memory as the host's kernel shows it: through the memfd that its process holds. An oracle that shares no code with
//! the product. Guests of tests have less than 3 GiB, so an offset in the file is a guest-physical address.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::Oracle;

/// Page of the table that hangs the arena into the kernel's address space.
const PAGE: u64 = 4096;

/// Open guest memory.
#[derive(Debug)]
pub struct Ram(File);

/// Digests of what a change may touch and of what it must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Kernel code.
    pub code: String,
    /// Read-only data.
    pub rodata: String,
    /// The page table that would map an arena; none where the guest shows no symbols of data.
    pub arena_table: Option<String>,
}

impl Ram {
    /// The memory of the VM that this process runs.
    ///
    /// # Errors
    /// The process is gone or has no such memory.
    pub fn of_process(pid: u32) -> Result<Self> {
        let folder = format!("/proc/{pid}/fd");
        for entry in fs::read_dir(&folder)
            .with_context(|| format!("cannot list {folder}"))?
            .flatten()
        {
            let names_ram = fs::read_link(entry.path())
                .is_ok_and(|to| to.to_string_lossy().contains("vmpatch-ram"));
            if names_ram {
                return Ok(Self(
                    File::open(entry.path()).context("cannot open guest memory")?,
                ));
            }
        }
        bail!("process {pid} holds no guest memory")
    }

    /// SHA-256 of a physical range, both ends included.
    ///
    /// # Errors
    /// It is not all there.
    pub fn digest(&self, (first, last): (u64, u64)) -> Result<String> {
        let size = usize::try_from(last.saturating_sub(first).saturating_add(1))
            .context("too big a range")?;
        let mut bytes = vec![0; size];
        self.0
            .read_exact_at(&mut bytes, first)
            .context("cannot read guest memory")?;
        Ok(Sha256::digest(&bytes)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect())
    }

    /// What there is now of code, read-only data and the arena's page table.
    ///
    /// # Errors
    /// The oracle does not say where they lie.
    pub fn snapshot(&self, oracle: &Oracle) -> Result<Snapshot> {
        let range = |name: &str| {
            oracle
                .ranges
                .get(name)
                .copied()
                .with_context(|| format!("no range {name} in /proc/iomem"))
        };
        let symbol = |name: &str| oracle.known.get(name).copied();
        let code = range("code")?;
        // The image is mapped as one piece, so distances are the same in both views.
        let table = symbol("level2_fixmap_pgt")
            .zip(symbol("_text"))
            .map(|(table, text)| table.wrapping_sub(text).wrapping_add(code.0));
        Ok(Snapshot {
            code: self.digest(code)?,
            rodata: self.digest(range("rodata")?)?,
            arena_table: table
                .map(|at| self.digest((at, at + PAGE - 1)))
                .transpose()?,
        })
    }
}
