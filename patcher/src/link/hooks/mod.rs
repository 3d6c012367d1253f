//! Hooks: how the kernel comes to find what patches bring when the CPU traps in new code. It looks WARN and BUG up
//! by `find_bug` (lib/bug.c) and accesses that may fault by `search_exception_tables` (kernel/extable.c); a jump at
//! the head of these leads to a [`stub`] in the arena that looks into the tables of patches first. The kernel does the
//! rest itself: it prints, taints, marks what warns once, and goes on at the fixup.
//!
//! Owns the choice of the place and what must be true of the guest. A hook is there once a boot, while any patch
//! that needs it is applied.

pub mod layout;
pub mod site;
pub mod stub;

use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::{Gva, PhysicalMemory, ReadError};

use super::boot::Facts;
use super::layers::{LayerError, Layers};
use super::live::{Guest, Live};
use super::plan::edits;
use super::region::{self, RegionError};
use super::relocate::{OutOfReach, branch};
use super::tracing::TracingError;
use crate::arena::fixed::{STUB, Table};
use crate::arena::{Arena, SiteRecord, SiteRole};
use crate::patch::VMLINUX;

/// Why a hook cannot be placed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// There is not just one function of that name.
    #[error("the guest has {count} functions of that name")]
    Count {
        /// How many it has.
        count: usize,
    },
    /// It does not lie where a jump can leave.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// A patch has replaced it, or is to.
    #[error("patch `{owner}` replaces it")]
    Replaced {
        /// The patch.
        owner: String,
    },
    /// It is not known what patches have made of it.
    #[error(transparent)]
    Layers(#[from] LayerError),
    /// The guest leads its calls elsewhere.
    #[error(transparent)]
    Tracing(#[from] TracingError),
    /// Its head cannot be moved.
    #[error(transparent)]
    Site(#[from] site::SiteError),
    /// The kernel does not look up by it, or not in tables of this form.
    #[error(transparent)]
    Layout(#[from] layout::LayoutError),
    /// The arena holds code for another text of it, which may still run.
    #[error("its first instructions are others than when it was hooked before in this boot")]
    Changed,
    /// Something is out of reach.
    #[error(transparent)]
    Far(#[from] OutOfReach),
    /// Guest memory cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The arena cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The hooks that a patch needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Where they are or will be.
    pub sites: Vec<SiteRecord>,
    /// Code that the arena does not hold yet.
    pub stubs: Vec<(Table, Vec<u8>)>,
}

/// The function that a table is looked up by.
#[must_use]
pub const fn function(table: Table) -> &'static str {
    match table {
        Table::Bugs => "find_bug",
        Table::Faults => "search_exception_tables",
    }
}

/// Chooses the hooks for these tables: those that are there, and the places of those that are not.
///
/// # Errors
/// The function that cannot be hooked, and why.
pub fn choose(
    tables: &[Table],
    guest: &Guest<'_>,
    facts: &Facts,
    arena: &Arena,
    layers: &Layers,
) -> Result<Hooks, (&'static str, HookError)> {
    let chooser = Chooser {
        guest,
        facts,
        arena,
        layers,
    };
    let mut hooks = Hooks::default();
    for table in tables {
        chooser
            .add(*table, &mut hooks)
            .map_err(|why| (function(*table), why))?;
    }
    Ok(hooks)
}

struct Chooser<'a> {
    guest: &'a Guest<'a>,
    facts: &'a Facts,
    arena: &'a Arena,
    layers: &'a Layers,
}

impl Chooser<'_> {
    fn add(&self, table: Table, hooks: &mut Hooks) -> Result<(), HookError> {
        if let Some(there) = self.in_place(table)? {
            hooks.sites.push(there);
            return Ok(());
        }
        let at = self.address(table)?;
        layout::check(table, at, self.guest, self.facts)?;
        let site = site::choose(at, self.guest)?;
        let back = site.covered.end;
        let code = stub::encode(table, &site.displaced, back, self.facts.returns)?;
        let jump = branch(0xe9, site.covered.start, table.stub())?;
        hooks.sites.push(SiteRecord {
            function: function(table).to_owned(),
            role: SiteRole::Entry,
            at: site.covered.start,
            edits: edits(self.guest, site.covered.start, &jump)?,
            covered: site.covered,
        });
        if self.must_be_written(table, &code)? {
            hooks.stubs.push((table, code));
        }
        Ok(())
    }

    /// The hook as another patch recorded it, if it is there.
    fn in_place(&self, table: Table) -> Result<Option<SiteRecord>, MemoryError> {
        let records = self.arena.manifest().patches.iter();
        let sites = records.flat_map(|record| &record.hooks);
        for site in sites.filter(|site| site.function == function(table)) {
            if site.is_in_place(self.memory())? {
                return Ok(Some(site.clone()));
            }
        }
        Ok(None)
    }

    fn address(&self, table: Table) -> Result<Gva, HookError> {
        let name = function(table);
        let named = self.guest.named(name);
        let [at] = named[..] else {
            let count = named.len();
            return Err(HookError::Count { count });
        };
        let range = site::extent(at, self.guest);
        region::check(range, VMLINUX, self.guest)?;
        match self.layers.upon(name, range)? {
            None => Ok(at),
            Some(record) => Err(HookError::Replaced {
                owner: record.name.clone(),
            }),
        }
    }

    /// A CPU may still be in a stub whose hook is gone, so one is never written over.
    fn must_be_written(&self, table: Table, code: &[u8]) -> Result<bool, HookError> {
        if !self.arena.is_mapped() {
            return Ok(true);
        }
        let mut there = vec![0; STUB];
        self.memory().read(self.arena.stub(table), &mut there)?;
        if there.iter().all(|byte| *byte == 0xcc) {
            return Ok(true);
        }
        let mut wanted = code.to_vec();
        wanted.resize(STUB, 0xcc);
        if there == wanted {
            Ok(false)
        } else {
            Err(HookError::Changed)
        }
    }

    fn memory(&self) -> &dyn PhysicalMemory {
        self.guest.memory().physical
    }
}
