//! What the symbols of a patch are in one guest: known from its symbol table, or learned from the fields of
//! old code that runs. Owns the rule that all uses of a symbol must agree.

use std::collections::BTreeMap;

use vmpatch_introspect::Gva;

use super::live::Live;
use crate::arena::fixed;
use crate::patch::{SHADOW_ROOT, Symbol, Unit, VMLINUX};

/// Values that running code gave to symbols, by index in the patch.
pub type Learned = BTreeMap<u32, Gva>;

/// What the guest's symbol table says of a symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Known {
    /// One address.
    At(Gva),
    /// Several; running code tells which.
    OneOf(Vec<Gva>),
    /// No such name.
    Absent,
    /// Not a name of the guest's: the patch's own, or bytes.
    Foreign,
}

/// The symbols of a patch, looked up in a guest.
pub struct Names<'a> {
    symbols: &'a [Symbol],
    units: &'a [Unit],
    live: &'a dyn Live,
    known: Vec<Known>,
    data_named: bool,
}

/// A field that runs does not name what the symbol is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Disagreement {
    /// It names something else.
    #[error("it names {found}, and `{name}` is at {expected}")]
    Elsewhere {
        /// The symbol.
        name: String,
        /// What the field names.
        found: String,
        /// Where the symbol lies, or where an earlier field says it does.
        expected: String,
    },
    /// The guest has no such symbol.
    #[error("the guest has no symbol `{name}`")]
    Absent {
        /// The symbol.
        name: String,
    },
    /// The bytes at the place it names are others.
    #[error("it names {found}, where not the bytes of {section} stand")]
    OtherBytes {
        /// What the field names.
        found: String,
        /// The section the bytes come from.
        section: String,
    },
    /// Old code refers to new.
    #[error("old code refers to symbol {index}, which the old object does not have")]
    NotOld {
        /// Index in the patch.
        index: u32,
    },
}

impl<'a> Names<'a> {
    /// Looks all of them up, each in the object of the file that names it.
    #[must_use]
    pub fn look_up(symbols: &'a [Symbol], units: &'a [Unit], live: &'a dyn Live) -> Self {
        let known = symbols
            .iter()
            .map(|symbol| known(symbol, units, live))
            .collect();
        // With KALLSYMS_ALL the guest names its data too, so a name that is not there does not exist.
        let data_named = live.unique("init_task").is_some();
        Self {
            symbols,
            units,
            live,
            known,
            data_named,
        }
    }

    /// The symbol itself.
    #[must_use]
    pub fn symbol(&self, index: u32) -> Option<&'a Symbol> {
        self.symbols.get(index as usize)
    }

    /// Its name, for messages and for what is decided by name.
    #[must_use]
    pub fn name(&self, index: u32) -> &'a str {
        match self.symbol(index) {
            Some(Symbol::Guest { name, .. } | Symbol::Own { name, .. }) => name,
            Some(Symbol::OldBytes { section, .. }) => section,
            Some(Symbol::ShadowRoot) => SHADOW_ROOT,
            None => "?",
        }
    }

    /// The object whose code names it.
    #[must_use]
    pub fn object(&self, index: u32) -> &'a str {
        match self.symbol(index) {
            Some(Symbol::Guest { unit, .. }) => object(*unit, self.units),
            _ => VMLINUX,
        }
    }

    /// Its address in the guest, as far as it is known by now.
    #[must_use]
    pub fn value(&self, learned: &Learned, index: u32) -> Option<Gva> {
        match self.known.get(index as usize)? {
            Known::At(at) => Some(*at),
            Known::OneOf(_) | Known::Absent => learned.get(&index).copied(),
            Known::Foreign => None,
        }
    }

    /// How many symbols of that name there are; for messages.
    #[must_use]
    pub fn count(&self, index: u32) -> usize {
        match self.known.get(index as usize) {
            Some(Known::At(_)) => 1,
            Some(Known::OneOf(all)) => all.len(),
            _ => 0,
        }
    }

    /// Presumes that the guest symbols which a file calls `name`, where there are several, mean the one at `at`.
    pub fn presume(&self, learned: &mut Learned, (unit, name): (u32, &str), at: Gva) {
        for index in self.called(unit, name) {
            let open = matches!(self.known.get(index as usize), Some(Known::OneOf(_)));
            if open {
                learned.entry(index).or_insert(at);
            }
        }
    }

    /// The address that a guest symbol which a file calls `name` has or turned out to have.
    #[must_use]
    pub fn learned_as(&self, learned: &Learned, (unit, name): (u32, &str)) -> Option<Gva> {
        let mut indices = self.called(unit, name);
        indices.find_map(|index| self.value(learned, index))
    }

    fn called<'s>(&'s self, unit: u32, name: &'s str) -> impl Iterator<Item = u32> + 's {
        let is_called = move |symbol: &Symbol| matches!(symbol, Symbol::Guest { unit: of, name: it, .. } if *of == unit && it == name);
        (0..)
            .zip(self.symbols)
            .filter(move |(_, symbol)| is_called(symbol))
            .map(|(index, _)| index)
    }

    /// Whether a field of running code that names `found` agrees with what the symbol is; learns from it
    /// where that was open.
    ///
    /// # Errors
    /// [`Disagreement`].
    pub fn agree(&self, learned: &mut Learned, index: u32, found: Gva) -> Result<(), Disagreement> {
        if let Some(Symbol::OldBytes { section, bytes }) = self.symbol(index) {
            return self.same_bytes(section, bytes, found);
        }
        match self.known.get(index as usize) {
            Some(Known::At(at)) if *at == found => Ok(()),
            Some(Known::At(at)) => Err(self.elsewhere(index, found, *at)),
            Some(Known::OneOf(all)) if !all.contains(&found) => {
                let first = all.first().copied().unwrap_or_default();
                Err(self.elsewhere(index, found, first))
            }
            Some(Known::Absent) if self.data_named => Err(Disagreement::Absent {
                name: self.name(index).to_owned(),
            }),
            Some(Known::OneOf(_) | Known::Absent) => match *learned.entry(index).or_insert(found) {
                before if before == found => Ok(()),
                before => Err(self.elsewhere(index, found, before)),
            },
            Some(Known::Foreign) | None => Err(Disagreement::NotOld { index }),
        }
    }

    fn same_bytes(&self, section: &str, bytes: &[u8], found: Gva) -> Result<(), Disagreement> {
        // Where nothing can be compared (what the guest itself writes) something must at least be there.
        match self.live.bytes(found, bytes.len().max(1)) {
            Ok(there) if there.starts_with(bytes) => Ok(()),
            _ => Err(Disagreement::OtherBytes {
                found: self.live.describe(found),
                section: section.to_owned(),
            }),
        }
    }

    fn elsewhere(&self, index: u32, found: Gva, expected: Gva) -> Disagreement {
        Disagreement::Elsewhere {
            name: self.name(index).to_owned(),
            found: self.live.describe(found),
            expected: expected.to_string(),
        }
    }
}

fn object(unit: u32, units: &[Unit]) -> &str {
    units
        .get(unit as usize)
        .map_or(VMLINUX, |unit| &unit.object)
}

fn known(symbol: &Symbol, units: &[Unit], live: &dyn Live) -> Known {
    let (unit, name, sympos) = match symbol {
        Symbol::Guest { unit, name, sympos } => (unit, name, sympos),
        // The same place in every guest.
        Symbol::ShadowRoot => return Known::At(fixed::SHADOW_ROOT),
        Symbol::Own { .. } | Symbol::OldBytes { .. } => return Known::Foreign,
    };
    let mut all = live.named_in(object(*unit, units), name);
    match (sympos, all.as_slice()) {
        (_, []) => Known::Absent,
        (None, &[only]) => Known::At(only),
        (None, _) => {
            all.sort_unstable();
            all.dedup();
            Known::OneOf(all)
        }
        (Some(position), _) => (position.checked_sub(1))
            .and_then(|index| all.get(index as usize))
            .map_or(Known::Absent, |at| Known::At(*at)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Fake;
    use super::*;

    fn guest(name: &str, sympos: Option<u32>) -> Symbol {
        Symbol::Guest {
            unit: 0,
            name: name.into(),
            sympos,
        }
    }

    fn fake() -> Fake {
        let mut live = Fake::new();
        live.name("init_task", Gva(0x9000));
        live.name("one", Gva(0x1000));
        live.name("two", Gva(0x2000));
        live.name("two", Gva(0x3000));
        live
    }

    #[test]
    fn a_position_picks_among_equal_names() {
        let live = fake();
        let symbols = [
            guest("two", Some(2)),
            guest("two", Some(3)),
            guest("two", None),
        ];
        let names = Names::look_up(&symbols, &[], &live);
        let none = Learned::new();
        assert_eq!(names.value(&none, 0), Some(Gva(0x3000)));
        assert_eq!(names.value(&none, 1), None);
        assert_eq!(names.value(&none, 2), None);
    }

    #[test]
    fn an_open_name_is_learned_once_and_then_held_to() {
        let live = fake();
        let symbols = [guest("two", None)];
        let names = Names::look_up(&symbols, &[], &live);
        let mut learned = Learned::new();
        assert!(
            names.agree(&mut learned, 0, Gva(0x1000)).is_err(),
            "none of that name is there"
        );
        names.agree(&mut learned, 0, Gva(0x3000)).unwrap();
        assert_eq!(names.value(&learned, 0), Some(Gva(0x3000)));
        assert!(
            names.agree(&mut learned, 0, Gva(0x2000)).is_err(),
            "two uses disagree"
        );
    }

    #[test]
    fn a_name_the_guest_does_not_have_is_learned_only_where_data_has_no_names() {
        let symbols = [guest("static_thing", None)];
        let named = fake();
        let mut learned = Learned::new();
        let refused = Names::look_up(&symbols, &[], &named).agree(&mut learned, 0, Gva(1));
        assert!(matches!(refused, Err(Disagreement::Absent { .. })));
        let unnamed = Fake::new();
        let names = Names::look_up(&symbols, &[], &unnamed);
        names.agree(&mut learned, 0, Gva(1)).unwrap();
        assert_eq!(names.value(&learned, 0), Some(Gva(1)));
    }

    #[test]
    fn bytes_without_a_name_are_compared_where_the_field_leads() {
        let mut live = fake();
        live.put(Gva(0x5000), b"MemTotal\0");
        let bytes = |text: &[u8]| {
            [Symbol::OldBytes {
                section: ".rodata.str1.1".into(),
                bytes: text.to_vec(),
            }]
        };
        let mut learned = Learned::new();
        let same = bytes(b"MemTotal\0");
        Names::look_up(&same, &[], &live)
            .agree(&mut learned, 0, Gva(0x5000))
            .unwrap();
        let other = bytes(b"MemTotbl\0");
        assert!(
            Names::look_up(&other, &[], &live)
                .agree(&mut learned, 0, Gva(0x5000))
                .is_err()
        );
        assert!(
            Names::look_up(&same, &[], &live)
                .agree(&mut learned, 0, Gva(0x6000))
                .is_err()
        );
        assert!(learned.is_empty());
    }

    #[test]
    fn a_place_without_bytes_to_compare_must_at_least_exist() {
        let mut live = fake();
        live.put(Gva(0x5000), &[7]);
        let place = [Symbol::OldBytes {
            section: ".data".into(),
            bytes: Vec::new(),
        }];
        let names = Names::look_up(&place, &[], &live);
        names.agree(&mut Learned::new(), 0, Gva(0x5000)).unwrap();
        assert!(names.agree(&mut Learned::new(), 0, Gva(0x6000)).is_err());
    }

    #[test]
    fn the_root_of_shadow_data_lies_where_it_lies_in_every_guest() {
        let live = fake();
        let names = Names::look_up(&[Symbol::ShadowRoot], &[], &live);
        let mut learned = Learned::new();
        assert_eq!(names.value(&learned, 0), Some(fixed::SHADOW_ROOT));
        // Old code may name it too: that of a patch that is replaced.
        names.agree(&mut learned, 0, fixed::SHADOW_ROOT).unwrap();
        assert!(names.agree(&mut learned, 0, Gva(0x1000)).is_err());
    }
}
