//! The symbols of the patch being made, each once. Owns their numbering.

use std::collections::HashMap;

use crate::patch::{SHADOW_ROOT, Symbol};

/// Symbols in the order they were first asked for.
#[derive(Debug, Default)]
pub(super) struct SymbolTable {
    symbols: Vec<Symbol>,
    /// By file and name.
    guest: HashMap<(u32, String), u32>,
    unit: u32,
    own: HashMap<u32, u32>,
    shadow_root: Option<u32>,
}

impl SymbolTable {
    /// From here on, names are those of this file.
    pub(super) const fn enter(&mut self, unit: usize) {
        self.unit = unit as u32;
    }

    /// A symbol of the guest. One name in a file is one symbol for old and new code, so that what run-pre matching
    /// reads off the old code serves the new.
    pub(super) fn guest(&mut self, name: &str) -> u32 {
        if name == SHADOW_ROOT {
            return self.shadow_root();
        }
        let key = (self.unit, name.to_owned());
        if let Some(index) = self.guest.get(&key) {
            return *index;
        }
        let index = self.push(Symbol::Guest {
            unit: self.unit,
            name: name.to_owned(),
            sympos: None,
        });
        self.guest.insert(key, index);
        index
    }

    /// Not of the guest's, but known to linking by name as its symbols are.
    fn shadow_root(&mut self) -> u32 {
        if let Some(index) = self.shadow_root {
            return index;
        }
        let index = self.push(Symbol::ShadowRoot);
        self.shadow_root = Some(index);
        index
    }

    /// The start of a section of the patch.
    pub(super) fn own(&mut self, name: &str, section: u32) -> u32 {
        if let Some(index) = self.own.get(&section) {
            return *index;
        }
        let index = self.push(Symbol::Own {
            name: name.to_owned(),
            section,
            offset: 0,
        });
        self.own.insert(section, index);
        index
    }

    /// Bytes of the old object.
    pub(super) fn old_bytes(&mut self, section: &str, bytes: &[u8]) -> u32 {
        let symbol = Symbol::OldBytes {
            section: section.to_owned(),
            bytes: bytes.to_vec(),
        };
        match self.symbols.iter().position(|it| *it == symbol) {
            Some(index) => index as u32,
            None => self.push(symbol),
        }
    }

    fn push(&mut self, symbol: Symbol) -> u32 {
        let index = self.symbols.len() as u32;
        self.symbols.push(symbol);
        index
    }

    /// All of them.
    pub(super) fn finish(self) -> Vec<Symbol> {
        self.symbols
    }
}
