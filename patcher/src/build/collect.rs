//! What goes into the patch: new bodies of changed functions, and whatever they need that the guest has
//! not. Owns the walk from what must be brought to what that refers to; what a reference is to, something of the
//! guest or something brought along, is [`resolve`](super::resolve)'s.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use super::compare::Verdict;
use super::policy;
use super::reference::{Reference, references_in_code};
use super::report::{Brought, FileReport, Refused};
use super::resolve::NewResolver;
use super::side::Side;
use super::site;
use super::special::Special;
use super::table::SymbolTable;
use super::unit::Unit;
use crate::object::{Home, SectionId};
use crate::patch::{Section, SectionKind, VMLINUX};

/// Most bytes of one new variable: the arena has 4 MiB in all.
const MAX_VARIABLE_BYTES: u64 = 1 << 20;

/// Something brought along, each a section of its own in the patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Thing {
    /// A function of the new object.
    Function(usize),
    /// A variable of the new object.
    Variable(usize),
    /// A string of a pool.
    Text(SectionId, u64),
    /// An entry of a pool of constants.
    Constant(SectionId, u64),
    /// A whole section without names.
    Whole(SectionId),
    /// Code that belongs to no function: what `.altinstr_aux` has for one place, start and end.
    Auxiliary(SectionId, u64, u64),
}

/// The patch in the making.
pub(super) struct Collector<'a> {
    pub(super) units: &'a [Unit],
    pub(super) symbols: SymbolTable,
    pub(super) sections: Vec<Section>,
    /// One for each unit.
    pub(super) reports: Vec<FileReport>,
    /// What one file newly defines for all of its object.
    exports: HashMap<(&'a str, &'a str), (usize, Thing)>,
    /// What one file newly exports to all objects.
    offered: HashMap<&'a str, (usize, Thing)>,
    placed: BTreeMap<(usize, Thing), u32>,
    queue: VecDeque<(usize, Thing)>,
}

impl<'a> Collector<'a> {
    /// An empty one.
    pub(super) fn new(units: &'a [Unit], reports: Vec<FileReport>) -> Self {
        let all = units.iter().enumerate();
        let exports: HashMap<_, _> = all.flat_map(|(at, unit)| exports(at, unit)).collect();
        let is_offered = |at: usize, name: &str| units[at].exports.new.contains(name);
        let offered = exports
            .iter()
            .filter(|((_, name), (at, _))| is_offered(*at, name));
        Self {
            units,
            symbols: SymbolTable::default(),
            sections: Vec::new(),
            reports,
            offered: offered.map(|((_, name), it)| (*name, *it)).collect(),
            exports,
            placed: BTreeMap::new(),
            queue: VecDeque::new(),
        }
    }

    /// The section of the patch that a thing of a file has or will have.
    pub(super) fn bring(&mut self, unit: usize, thing: Thing) -> u32 {
        if let Some(section) = self.placed.get(&(unit, thing)) {
            return *section;
        }
        let section = self.sections.len() as u32;
        self.sections.push(shell(&self.units[unit].new, thing));
        self.placed.insert((unit, thing), section);
        self.queue.push_back((unit, thing));
        section
    }

    /// What a file of the patch newly defines for all of its object under a name, or for every object: if it is the kernel's, or
    /// exported.
    pub(super) fn exported(&self, object: &str, name: &str) -> Option<(usize, Thing)> {
        let of = |object| self.exports.get(&(object, name)).copied();
        let offered = || self.offered.get(name).copied();
        of(object).or_else(|| of(VMLINUX)).or_else(offered)
    }

    /// Whether what a file of the patch brings is there as long as another object is: it is of the same one or of the kernel, or
    /// of a module that the other one has used before, as one of its files shows.
    pub(super) fn stays(&self, object: &str, unit: usize) -> bool {
        let of = self.units[unit].object.as_str();
        let known = || {
            let of_it = self.units.iter().filter(|it| it.object == of);
            of_it.flat_map(|it| &it.exports.known)
        };
        let uses = |unit: &Unit| {
            let symbols = unit.old.object.symbols_with_ids();
            let mut outside = symbols.filter(|(_, it)| it.home == Home::Undefined);
            outside.any(|(_, it)| known().any(|name| *name == it.name))
        };
        let mut users = self.units.iter().filter(|it| it.object == object);
        of == object || of == VMLINUX || users.any(uses)
    }

    /// Fills in everything that was asked for, and what that asks for.
    pub(super) fn finish(&mut self) {
        while let Some((unit, thing)) = self.queue.pop_front() {
            let section = self.placed[&(unit, thing)] as usize;
            self.symbols.enter(unit);
            let mut filler = Filler {
                unit: &self.units[unit],
                at: unit,
                collector: self,
            };
            match thing {
                Thing::Function(function) => filler.function(section, function),
                Thing::Auxiliary(..) => filler.auxiliary(section, thing),
                _ => filler.data(section, thing),
            }
        }
    }

    /// Whether a function of a file is brought along.
    pub(super) fn has_function(&self, unit: usize, function: usize) -> bool {
        self.placed.contains_key(&(unit, Thing::Function(function)))
    }
}

/// The new functions and variables of a file that other files may name.
fn exports<'a>(
    at: usize,
    unit: &'a Unit,
) -> impl Iterator<Item = ((&'a str, &'a str), (usize, Thing))> {
    let object = unit.object.as_str();
    let inventory = &unit.new.inventory;
    let named = move |names: &'a BTreeSet<String>, thing: Thing| {
        names
            .iter()
            .map(move |name| ((object, name.as_str()), (at, thing)))
    };
    let functions = inventory.functions.iter().enumerate();
    let functions = functions
        .filter(|(index, _)| unit.verdicts[*index] == Verdict::New)
        .flat_map(move |(index, it)| named(&it.globals, Thing::Function(index)));
    let variables = inventory.variables.iter().enumerate();
    let variables = variables
        .filter(|(index, _)| unit.guest_variable(*index).is_none())
        .flat_map(move |(index, it)| named(&it.globals, Thing::Variable(index)));
    functions.chain(variables)
}

/// Section, start and end of a thing in its object.
fn extent(new: &Side, thing: Thing) -> (SectionId, u64, u64) {
    match thing {
        Thing::Function(function) => {
            let it = new.function(function);
            (it.section, it.start, it.end)
        }
        Thing::Variable(variable) => {
            let it = new.variable(variable);
            (it.section, it.start, it.start.saturating_add(it.size))
        }
        Thing::Text(section, offset) => {
            let len = new.text(section, offset).len() as u64;
            (section, offset, offset.saturating_add(len))
        }
        Thing::Constant(section, start) => {
            let size = new.object.section(section).entry_size;
            (section, start, start.saturating_add(size))
        }
        Thing::Whole(section) => (section, 0, new.object.section(section).size),
        Thing::Auxiliary(section, start, end) => (section, start, end),
    }
}

/// The section of the patch for a thing, without relocations and sites.
fn shell(new: &Side, thing: Thing) -> Section {
    let (id, start, end) = extent(new, thing);
    let home = new.object.section(id);
    let kind = match (home.flags.exec, home.flags.write) {
        (true, _) => SectionKind::Text,
        (_, true) => SectionKind::Data,
        _ => SectionKind::ReadOnly,
    };
    let size = end.saturating_sub(start).min(MAX_VARIABLE_BYTES);
    let bytes = match home.flags.zeroes {
        true => vec![0; size as usize],
        false => home.range(start, end).unwrap_or_default().to_vec(),
    };
    // What stands on a multiple of its alignment in the object stands on one in the arena.
    let align = match thing {
        Thing::Text(..) => 1,
        _ => {
            1 << home
                .align
                .trailing_zeros()
                .min(start.trailing_zeros())
                .min(12)
        }
    };
    let (name, relocations, sites) = (home.name.clone(), Vec::new(), Vec::new());
    Section {
        name,
        kind,
        align,
        bytes,
        relocations,
        sites,
        traps: Vec::new(),
        unwind: Vec::new(),
    }
}

/// What a thing is called in messages and symbols.
pub(super) fn name_of(new: &Side, thing: Thing) -> String {
    match thing {
        Thing::Function(function) => new.function(function).name.clone(),
        Thing::Variable(variable) => new.variable(variable).name.clone(),
        Thing::Text(section, offset) => {
            let bytes = new.text(section, offset);
            let text = String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes));
            format!("{:?}", text.chars().take(60).collect::<String>())
        }
        Thing::Constant(section, offset) => {
            format!("{}+{offset:#x}", new.object.section(section).name)
        }
        Thing::Whole(section) | Thing::Auxiliary(section, ..) => {
            new.object.section(section).name.clone()
        }
    }
}

fn kind_of(new: &Side, thing: Thing) -> &'static str {
    let (id, ..) = extent(new, thing);
    match (thing, new.object.section(id).flags.write) {
        (Thing::Function(_), _) => "function",
        (Thing::Text(..), _) => "string",
        (Thing::Auxiliary(..), _) => "code",
        (_, true) => "variable",
        (_, false) => "constant",
    }
}

/// Fills in one section, of one file.
struct Filler<'c, 'a> {
    unit: &'a Unit,
    at: usize,
    collector: &'c mut Collector<'a>,
}

impl<'a> Filler<'_, 'a> {
    fn resolver(&mut self, function: Option<usize>) -> NewResolver<'_, 'a> {
        NewResolver {
            unit: self.unit,
            at: self.at,
            collector: self.collector,
            function,
        }
    }

    fn report(&mut self) -> &mut FileReport {
        &mut self.collector.reports[self.at]
    }

    fn section(&mut self, index: usize) -> &mut Section {
        &mut self.collector.sections[index]
    }

    fn function(&mut self, section: usize, function: usize) {
        self.refuse_unfit(function);
        let new = &self.unit.new;
        let view = &new.code[function];
        let mut resolver = self.resolver(Some(function));
        resolver.refuse_unknown_kinds(&view.references);
        for entry in &new.entries[function] {
            if let Special::Alternative { references, .. } = &entry.special {
                resolver.refuse_unknown_kinds(references);
            }
        }
        let calls = |it: &Reference| site::is_call(new, function, it);
        let relocations = site::relocations(&view.references, calls, &mut resolver);
        let sites = site::sites(new, function, &mut resolver);
        let traps = site::traps(new, function, &mut resolver);
        let (home, start, end) = extent(new, Thing::Function(function));
        let unwind = self.unit.unwind.of_function(home, start, end);
        let filled = self.section(section);
        filled.relocations = relocations;
        filled.sites = sites;
        filled.traps = traps;
        filled.unwind = unwind;
        filled.align = filled.align.max(16);
        let bytes = filled.bytes.len() as u64;
        if self.unit.verdicts[function] == Verdict::New {
            let name = new.function(function).name.clone();
            let kind = "function";
            self.report().new.push(Brought { name, kind, bytes });
        }
    }

    /// What cannot be done with this function whatever it refers to.
    fn refuse_unfit(&mut self, function: usize) {
        let new = &self.unit.new;
        let it = new.function(function);
        let before = self.unit.before(self.at, function);
        let before = before.filter(|_| self.unit.verdicts[function] != Verdict::New);
        let before = before.map(|(of, at)| (&self.collector.units[of].old, at));
        let homes = [
            Some(new.home_of(function)),
            before.map(|(old, at)| old.home_of(at)),
        ];
        let unfit = homes
            .into_iter()
            .flatten()
            .find_map(|it| policy::code(&it.name).err());
        if let Some(reason) = unfit {
            self.refuse(function, None, reason);
        }
        let before = before.map(|(old, at)| &old.code[at]);
        for view in before.into_iter().chain([&new.code[function]]) {
            if let Some(at) = view.instructions.undecodable_at {
                self.refuse(function, Some(at), "bytes that are no known instruction");
            }
            if let Some(at) = view.short_exit {
                self.refuse(function, Some(at), "a short jump leads out of the function");
            }
        }
        if new.function_bytes(function).is_empty() {
            self.refuse(function, None, "its size is not given");
        }
        for entry in &new.entries[function] {
            let instruction = new.code[function].instructions.at(entry.offset);
            let len = instruction.map_or(0, |it| it.end - it.start);
            let Some(reason) = policy::refused_entry(&entry.special, len) else {
                continue;
            };
            let section = new.object.section(entry.table).name.clone();
            let (name, offset) = (it.name.clone(), Some(entry.offset));
            self.report().refused.push(Refused {
                name,
                section,
                offset,
                reason,
            });
        }
    }

    fn refuse(&mut self, function: usize, offset: Option<u64>, reason: &str) {
        let new = &self.unit.new;
        let name = new.function(function).name.clone();
        let section = new.home_of(function).name.clone();
        self.report().refused.push(Refused {
            name,
            section,
            offset,
            reason: reason.to_owned(),
        });
    }

    fn auxiliary(&mut self, section: usize, thing: Thing) {
        let new = &self.unit.new;
        let (id, start, end) = extent(new, thing);
        let references = references_in_code(&new.object, &new.inventory, id, (start, end));
        let mut resolver = self.resolver(None);
        resolver.refuse_unknown_kinds(&references);
        let relocations = site::relocations(&references, |_| true, &mut resolver);
        self.section(section).relocations = relocations;
    }

    fn data(&mut self, section: usize, thing: Thing) {
        let new = &self.unit.new;
        let (id, start, end) = extent(new, thing);
        let home = new.object.section(id);
        let name = name_of(new, thing);
        if end.saturating_sub(start) > MAX_VARIABLE_BYTES || home.align > 4096 {
            let (name, section) = (name.clone(), home.name.clone());
            let reason = "too large or too aligned for the arena".to_owned();
            self.report().refused.push(Refused {
                name,
                section,
                offset: None,
                reason,
            });
        }
        let references = new.data_references(id, start, end);
        let mut resolver = self.resolver(None);
        resolver.refuse_unknown_kinds(&references);
        let relocations = site::relocations(&references, |_| false, &mut resolver);
        let filled = self.section(section);
        filled.relocations = relocations;
        let bytes = filled.bytes.len() as u64;
        let kind = kind_of(new, thing);
        self.report().new.push(Brought { name, kind, bytes });
    }
}
