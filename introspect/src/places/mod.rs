//! Addresses of the kernel's variables where kallsyms has text symbols only (no CONFIG_KALLSYMS_ALL):
//! from what the variables hold ([`content`]), from what known functions do ([`code`]), and from BTF, which
//! lists per-CPU variables. Each is found by evidence that nothing else in the image shows; what is
//! ambiguous is left out.

mod code;
mod content;
#[cfg(test)]
mod oracle;

use std::collections::BTreeMap;

use crate::address::Gva;
use crate::image::Region;
use crate::paging::{KernelMemory, ReadError};
use crate::symbols::Symbols;
use crate::types::Types;

/// All ways to the address of a variable: its symbol, evidence, or for a per-CPU variable BTF.
#[derive(Clone, Copy)]
pub(crate) struct Lookup<'a> {
    pub(crate) symbols: &'a Symbols,
    pub(crate) types: &'a Types,
    pub(crate) places: &'a Places,
}

impl Lookup<'_> {
    /// The address, for a per-CPU variable its offset within each CPU's area.
    pub(crate) fn get(&self, name: &str) -> Option<Gva> {
        let symbol = self.symbols.unique(name).ok();
        symbol
            .or_else(|| self.places.get(name))
            .or_else(|| self.types.per_cpu(name).map(Gva))
    }
}

/// What the search works on.
pub(crate) struct Given<'a> {
    pub(crate) memory: &'a KernelMemory<'a>,
    pub(crate) regions: &'a [Region],
    /// Text symbols at least.
    pub(crate) symbols: &'a Symbols,
    pub(crate) types: &'a Types,
}

/// Addresses by name; `None` where several places fit.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places(BTreeMap<&'static str, Option<Gva>>);

impl Places {
    /// Nothing to search for where kallsyms knows data.
    ///
    /// # Errors
    /// Data of the image that cannot be read.
    pub(crate) fn search(given: &Given<'_>) -> Result<Self, ReadError> {
        if given.symbols.unique("init_task").is_ok() {
            return Ok(Self::default());
        }
        Self::by_evidence(given)
    }

    /// Searches whatever the symbols tell.
    ///
    /// # Errors
    /// Data of the image that cannot be read.
    pub(crate) fn by_evidence(given: &Given<'_>) -> Result<Self, ReadError> {
        let mut found = BTreeMap::new();
        code::find(given, &mut found);
        content::find(given, &mut found)?;
        Ok(Self(found))
    }

    /// The address of that name, if it was found.
    pub(crate) fn get(&self, name: &str) -> Option<Gva> {
        self.0.get(name).copied().flatten()
    }

    /// Whether several places fit the name, so that it cannot be told which it is.
    pub(crate) fn is_ambiguous(&self, name: &str) -> bool {
        self.0.get(name) == Some(&None)
    }
}
