//! Symbols by name and by address. Filled from kallsyms in guest RAM, for vmlinux or a module.

use crate::address::Gva;

/// One symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// Its name.
    pub name: &'a str,
    /// Where it lies.
    pub at: Gva,
    /// The letter `nm` prints: `t`/`T` text, `d`/`D` data, `r`/`R` read-only, `b`/`B` bss, `A` absolute.
    pub kind: char,
}

/// Why a name gives no single address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SymbolError {
    /// There is none of that name.
    #[error("no symbol `{0}` in the guest kernel")]
    Unknown(String),
    /// There are several.
    #[error("{count} symbols are named `{name}`; say which by its position")]
    Ambiguous {
        /// The name.
        name: String,
        /// How many there are.
        count: usize,
    },
}

/// A table of symbols, sorted by address.
#[derive(Debug, Default)]
pub struct Symbols {
    names: String,
    rows: Vec<Row>,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    at: Gva,
    name: (u32, u16),
    kind: u8,
}

impl Symbols {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// All, in the order of kallsyms (by address; equal addresses in table order).
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.rows.iter().map(|row| self.symbol(row))
    }

    /// All of that name, in the order that livepatch's `sympos` counts, from 1.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol<'a>> {
        self.iter().filter(move |symbol| symbol.name == name)
    }

    /// The address of the one symbol of that name.
    ///
    /// # Errors
    /// [`SymbolError`] where there is none or several.
    pub fn unique(&self, name: &str) -> Result<Gva, SymbolError> {
        let mut found = self.named(name);
        let first = found
            .next()
            .ok_or_else(|| SymbolError::Unknown(name.to_owned()))?;
        match found.count() {
            0 => Ok(first.at),
            more => Err(SymbolError::Ambiguous {
                name: name.to_owned(),
                count: more + 1,
            }),
        }
    }

    /// The symbol that `at` lies in, and where the next one begins.
    #[must_use]
    pub fn containing(&self, _at: Gva) -> Option<(Symbol<'_>, Gva)> {
        None
    }

    fn symbol(&self, row: &Row) -> Symbol<'_> {
        let start = row.name.0 as usize;
        let name = self
            .names
            .get(start..start + usize::from(row.name.1))
            .unwrap_or("");
        Symbol {
            name,
            at: row.at,
            kind: char::from(row.kind),
        }
    }
}
