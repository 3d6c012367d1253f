//! Old code in the patch's form: what run-pre matching compares the running text with. Owns how the old
//! object's references are named.

use super::reference::Target;
use super::side::Side;
use super::site::{self, Resolver};
use super::table::SymbolTable;
use super::unwind::{Tables, UnwindData};
use crate::object::SectionId;
use crate::patch::{Code, Part, Unwind};

/// The code of a function of the old object.
pub(super) fn code(old: &Side, symbols: &mut SymbolTable, function: usize) -> Code {
    let mut resolver = OldResolver { old, symbols };
    let calls = |it: &_| site::is_call(old, function, it);
    let references = &old.code[function].references;
    Code {
        bytes: old.function_bytes(function).to_vec(),
        relocations: site::relocations(references, calls, &mut resolver),
        sites: site::sites(old, function, &mut resolver),
    }
}

/// The parts split off from a function of the old object.
pub(super) fn parts(old: &Side, symbols: &mut SymbolTable, function: usize) -> Vec<Part> {
    let parts = old.inventory.parts_of(function);
    parts
        .map(|part| Part {
            name: old.function(part).name.clone(),
            code: code(old, symbols, part),
        })
        .collect()
}

/// A function of an object, in the form that run-pre matching compares with running text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OldFunction {
    /// Its symbol.
    pub name: String,
    /// Its code.
    pub code: Code,
    /// Its split-off parts.
    pub parts: Vec<Part>,
    /// How to unwind from it, if the object says so.
    pub unwind: Vec<Unwind>,
}

/// Every function of the old object but split-off parts, which stand with their functions.
pub(super) fn functions(old: &Side, symbols: &mut SymbolTable) -> Vec<OldFunction> {
    let unwind = Tables::read(&old.object, UnwindData::Within).unwrap_or_default();
    let whole = (0..old.inventory.functions.len()).filter(|it| old.function(*it).parent.is_none());
    whole
        .map(|function| OldFunction {
            name: old.function(function).name.clone(),
            code: code(old, symbols, function),
            parts: parts(old, symbols, function),
            unwind: {
                let it = old.function(function);
                unwind.of_function(it.section, it.start, it.end)
            },
        })
        .collect()
}

struct OldResolver<'a> {
    old: &'a Side,
    symbols: &'a mut SymbolTable,
}

impl Resolver for OldResolver<'_> {
    fn symbol(&mut self, target: &Target, _calls: bool) -> Option<(u32, i64)> {
        match *target {
            Target::Outside { distance, .. }
            | Target::Function { distance, .. }
            | Target::Variable { distance, .. }
            | Target::Near { distance, .. } => {
                Some((self.symbols.guest(&self.old.name_of(target)), distance))
            }
            Target::Text {
                section,
                offset,
                distance,
            } => {
                let (symbol, _) = self.bytes(section, self.old.text(section, offset));
                Some((symbol, distance))
            }
            Target::Constant {
                section,
                offset,
                distance,
            } => {
                let size = self.old.object.section(section).entry_size;
                let end = offset
                    .checked_div(size)?
                    .saturating_add(1)
                    .saturating_mul(size);
                let (symbol, _) = self.bytes(section, comparable(self.old, section, offset, end));
                Some((symbol, distance))
            }
            Target::Place { section, offset } => {
                let start = u64::try_from(offset).unwrap_or(u64::MAX);
                let end = self.old.object.section(section).size;
                Some(self.bytes(section, comparable(self.old, section, start, end)))
            }
        }
    }

    fn guest(&mut self, name: &str) -> u32 {
        self.symbols.guest(name)
    }
}

impl OldResolver<'_> {
    fn bytes(&mut self, section: SectionId, bytes: &[u8]) -> (u32, i64) {
        (
            self.symbols
                .old_bytes(&self.old.object.section(section).name, bytes),
            0,
        )
    }
}

/// The bytes that a running guest must have there: none of what it may write, none from the first pointer
/// on, and no code, which only a symbol can name.
fn comparable(old: &Side, section: SectionId, start: u64, end: u64) -> &[u8] {
    let home = old.object.section(section);
    if home.flags.write || home.flags.exec {
        return &[];
    }
    let pointer = home
        .relocations_in(start, end)
        .first()
        .map_or(end, |it| it.offset);
    home.range(start, pointer.max(start)).unwrap_or_default()
}
