//! Symbols by name and by address. Filled from kallsyms in guest RAM ([`kallsyms`]), or for a module
//! from its own table. Owns lookup; knows nothing of how tables are stored.

#[cfg(test)]
mod golden;
pub(crate) mod kallsyms;
mod names;
pub(crate) mod tables;

use crate::address::Gva;
use names::NameIndex;

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

/// A table of symbols, in the order of the guest's own table.
#[derive(Debug, Default)]
pub struct Symbols {
    names: String,
    rows: Vec<Row>,
    by_name: NameIndex,
    /// Positions in `rows` by address (equal addresses in table order); empty if `rows` is so already.
    by_address: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub(crate) at: Gva,
    /// Start and length of the name within all names.
    pub(crate) name: (u32, u16),
    pub(crate) kind: u8,
}

impl Symbols {
    /// A table of `(name, address, kind)` in the order given. Names after the first 4 GiB of them are
    /// empty, and names are cut at 65,535 bytes: neither happens to a real kernel.
    pub fn from_list<'a>(list: impl IntoIterator<Item = (&'a str, Gva, char)>) -> Self {
        let mut names = String::new();
        let mut rows = Vec::new();
        for (name, at, kind) in list {
            let start = u32::try_from(names.len()).unwrap_or(u32::MAX);
            let len = u16::try_from(name.len()).unwrap_or(u16::MAX);
            names.push_str(name);
            rows.push(Row {
                at,
                name: (start, len),
                kind: u8::try_from(kind).unwrap_or(b'?'),
            });
        }
        Self::from_rows(names, rows)
    }

    /// A table of rows that point into `names`.
    pub(crate) fn from_rows(names: String, rows: Vec<Row>) -> Self {
        let by_name = NameIndex::new(rows.iter().map(|row| name_of(&names, row)));
        let by_address = if rows.is_sorted_by_key(|row| row.at) {
            Vec::new()
        } else {
            sorted_positions(&rows)
        };
        Self {
            names,
            rows,
            by_name,
            by_address,
        }
    }

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

    /// All, in the order of the guest's own table: kallsyms by address, a module's as its symbol table.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.rows.iter().map(|row| self.symbol(row))
    }

    /// All of that name, in the order that livepatch's `sympos` counts, from 1.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol<'a>> {
        self.by_name
            .candidates(name)
            .filter_map(|position| self.rows.get(position))
            .map(|row| self.symbol(row))
            .filter(move |symbol| symbol.name == name)
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

    /// The symbol that `at` lies in, and where the next one begins: of several at the same address the
    /// first, as the kernel itself chooses (Linux v6.12 kernel/kallsyms.c, get_symbol_pos). The last
    /// symbol of the table reaches to the end of the address space, so bound `at` by the text first.
    #[must_use]
    pub fn containing(&self, at: Gva) -> Option<(Symbol<'_>, Gva)> {
        let after = self.partition(|row| row.at <= at);
        let last = self.row(after.checked_sub(1)?)?;
        let first = self.partition(|row| row.at < last.at);
        let next = self.row(after).map_or(Gva(u64::MAX), |row| row.at);
        Some((self.symbol(self.row(first)?), next))
    }

    /// How many rows, by address, `before` holds for.
    fn partition(&self, before: impl Fn(&Row) -> bool) -> usize {
        if self.by_address.is_empty() {
            return self.rows.partition_point(before);
        }
        let holds = |&position: &u32| self.rows.get(position as usize).is_some_and(&before);
        self.by_address.partition_point(holds)
    }

    /// The row at a position by address.
    fn row(&self, position: usize) -> Option<&Row> {
        if self.by_address.is_empty() {
            return self.rows.get(position);
        }
        self.rows.get(*self.by_address.get(position)? as usize)
    }

    fn symbol(&self, row: &Row) -> Symbol<'_> {
        Symbol {
            name: name_of(&self.names, row),
            at: row.at,
            kind: char::from(row.kind),
        }
    }
}

fn name_of<'a>(names: &'a str, row: &Row) -> &'a str {
    let start = row.name.0 as usize;
    names
        .get(start..start.saturating_add(usize::from(row.name.1)))
        .unwrap_or("")
}

fn sorted_positions(rows: &[Row]) -> Vec<u32> {
    let mut keyed: Vec<(Gva, u32)> = rows.iter().map(|row| row.at).zip(0..).collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, position)| position).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Symbols {
        Symbols::from_list([
            ("late", Gva(0x300), 't'),
            ("twin", Gva(0x100), 't'),
            ("alias", Gva(0x100), 'T'),
            ("twin", Gva(0x200), 't'),
        ])
    }

    #[test]
    fn symbols_of_one_name_come_in_table_order() {
        let table = table();
        let twins: Vec<_> = table.named("twin").map(|symbol| symbol.at).collect();
        assert_eq!(twins, [Gva(0x100), Gva(0x200)]);
        assert_eq!(table.unique("alias"), Ok(Gva(0x100)));
        assert_eq!(
            table.unique("twin"),
            Err(SymbolError::Ambiguous {
                name: "twin".into(),
                count: 2
            })
        );
        assert_eq!(
            table.unique("none"),
            Err(SymbolError::Unknown("none".into()))
        );
    }

    #[test]
    fn an_address_lies_in_the_first_symbol_at_or_before_it() {
        let table = table();
        let within = |at| {
            table
                .containing(Gva(at))
                .map(|(symbol, end)| (symbol.name, end))
        };
        assert_eq!(within(0xff), None);
        assert_eq!(within(0x1ff), Some(("twin", Gva(0x200))));
        assert_eq!(within(0x300), Some(("late", Gva(u64::MAX))));
    }

    #[test]
    fn iteration_keeps_the_order_of_the_table() {
        let names: Vec<_> = table().iter().map(|symbol| symbol.at.0).collect();
        assert_eq!(names, [0x300, 0x100, 0x100, 0x200]);
    }
}
