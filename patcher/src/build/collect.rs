//! What goes into the patch: new bodies of changed functions, and whatever they need that the guest has
//! not. Owns the walk from what must be brought to what that refers to; a reference is either to something
//! of the guest, by name, or to something brought along.

use std::collections::{BTreeMap, VecDeque};

use super::compare::Verdict;
use super::instructions::{Flow, Instructions};
use super::key::{self, Key, Names, is_numbered_constant};
use super::pair::Pairs;
use super::policy;
use super::reference::{Reference, Target, references_in_code};
use super::report::{Brought, BuildReport, Refused};
use super::side::Side;
use super::site::{self, Resolver};
use super::table::SymbolTable;
use crate::object::SectionId;
use crate::patch::{Section, SectionKind};

/// Most bytes of one new variable: the arena has 4 MiB in all.
const MAX_VARIABLE_BYTES: u64 = 1 << 20;

/// What `static_cpu_has` does before alternatives are applied (Linux v6.12
/// arch/x86/include/asm/cpufeature.h).
const AUXILIARY: &str = ".altinstr_aux";

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
    pub(super) old: &'a Side,
    pub(super) new: &'a Side,
    pub(super) pairs: &'a Pairs,
    pub(super) names: &'a Names,
    pub(super) verdicts: &'a [Verdict],
    pub(super) symbols: SymbolTable,
    pub(super) sections: Vec<Section>,
    pub(super) report: BuildReport,
    placed: BTreeMap<Thing, u32>,
    queue: VecDeque<Thing>,
}

impl<'a> Collector<'a> {
    /// An empty one.
    pub(super) fn new(
        (old, new): (&'a Side, &'a Side),
        (pairs, names): (&'a Pairs, &'a Names),
        verdicts: &'a [Verdict],
        report: BuildReport,
    ) -> Self {
        Self {
            old,
            new,
            pairs,
            names,
            verdicts,
            symbols: SymbolTable::default(),
            sections: Vec::new(),
            report,
            placed: BTreeMap::new(),
            queue: VecDeque::new(),
        }
    }

    /// The section of the patch that a thing has or will have.
    pub(super) fn bring(&mut self, thing: Thing) -> u32 {
        if let Some(section) = self.placed.get(&thing) {
            return *section;
        }
        let section = self.sections.len() as u32;
        self.sections.push(self.shell(thing));
        self.placed.insert(thing, section);
        self.queue.push_back(thing);
        section
    }

    /// Fills in everything that was asked for, and what that asks for.
    pub(super) fn finish(&mut self) {
        while let Some(thing) = self.queue.pop_front() {
            let section = self.placed[&thing] as usize;
            match thing {
                Thing::Function(function) => self.fill_function(section, function),
                Thing::Auxiliary(..) => self.fill_auxiliary(section, thing),
                _ => self.fill_data(section, thing),
            }
        }
    }

    /// Whether a function is brought along.
    pub(super) fn has_function(&self, function: usize) -> bool {
        self.placed.contains_key(&Thing::Function(function))
    }

    /// Section, start and end of a thing in the new object.
    fn extent(&self, thing: Thing) -> (SectionId, u64, u64) {
        match thing {
            Thing::Function(function) => {
                let it = self.new.function(function);
                (it.section, it.start, it.end)
            }
            Thing::Variable(variable) => {
                let it = self.new.variable(variable);
                (it.section, it.start, it.start.saturating_add(it.size))
            }
            Thing::Text(section, offset) => {
                let len = self.new.text(section, offset).len() as u64;
                (section, offset, offset.saturating_add(len))
            }
            Thing::Constant(section, start) => {
                let size = self.new.object.section(section).entry_size;
                (section, start, start.saturating_add(size))
            }
            Thing::Whole(section) => (section, 0, self.new.object.section(section).size),
            Thing::Auxiliary(section, start, end) => (section, start, end),
        }
    }

    /// The section of the patch for a thing, without relocations and sites.
    fn shell(&self, thing: Thing) -> Section {
        let (id, start, end) = self.extent(thing);
        let home = self.new.object.section(id);
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
        }
    }

    fn fill_function(&mut self, section: usize, function: usize) {
        self.refuse_unfit(function);
        let new = self.new;
        let view = &new.code[function];
        let mut resolver = NewResolver {
            collector: self,
            function: Some(function),
        };
        resolver.refuse_unknown_kinds(&view.references);
        let calls = |it: &Reference| site::is_call(new, function, it);
        let relocations = site::relocations(&view.references, calls, &mut resolver);
        let sites = site::sites(new, function, &mut resolver);
        self.sections[section].relocations = relocations;
        self.sections[section].sites = sites;
        self.sections[section].align = self.sections[section].align.max(16);
        if self.verdicts[function] == Verdict::New {
            let name = new.function(function).name.clone();
            let bytes = self.sections[section].bytes.len() as u64;
            self.report.new.push(Brought {
                name,
                kind: "function",
                bytes,
            });
        }
    }

    /// What cannot be done with this function whatever it refers to.
    fn refuse_unfit(&mut self, function: usize) {
        let (new, old) = (self.new, self.old);
        let it = new.function(function);
        if let Err(reason) = policy::code(&new.home_of(function).name) {
            self.refuse(function, None, reason);
        }
        let before = old
            .inventory
            .function_named(&it.name)
            .map(|at| &old.code[at]);
        for view in before.into_iter().chain([&new.code[function]]) {
            if let Some(at) = view.instructions.undecodable_at {
                self.refuse(function, Some(at), "bytes that are no known instruction");
            }
            if let Some(at) = view.short_exit {
                self.refuse(function, Some(at), "a short jump leads out of the function");
            }
        }
        if self.new.function_bytes(function).is_empty() {
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
            self.report.refused.push(Refused {
                name,
                section,
                offset,
                reason,
            });
        }
    }

    fn refuse(&mut self, function: usize, offset: Option<u64>, reason: &str) {
        let name = self.new.function(function).name.clone();
        let section = self.new.home_of(function).name.clone();
        self.report.refused.push(Refused {
            name,
            section,
            offset,
            reason: reason.to_owned(),
        });
    }

    fn fill_auxiliary(&mut self, section: usize, thing: Thing) {
        let (id, start, end) = self.extent(thing);
        let references =
            references_in_code(&self.new.object, &self.new.inventory, id, (start, end));
        let mut resolver = NewResolver {
            collector: self,
            function: None,
        };
        resolver.refuse_unknown_kinds(&references);
        let relocations = site::relocations(&references, |_| true, &mut resolver);
        self.sections[section].relocations = relocations;
    }

    fn fill_data(&mut self, section: usize, thing: Thing) {
        let (id, start, end) = self.extent(thing);
        let home = self.new.object.section(id);
        if end.saturating_sub(start) > MAX_VARIABLE_BYTES || home.align > 4096 {
            let (name, section) = (self.name_of(thing), home.name.clone());
            let reason = "too large or too aligned for the arena".to_owned();
            self.report.refused.push(Refused {
                name,
                section,
                offset: None,
                reason,
            });
        }
        let references = self.new.data_references(id, start, end);
        let mut resolver = NewResolver {
            collector: self,
            function: None,
        };
        resolver.refuse_unknown_kinds(&references);
        let relocations = site::relocations(&references, |_| false, &mut resolver);
        self.sections[section].relocations = relocations;
        let (name, kind) = (self.name_of(thing), self.kind_of(thing));
        let bytes = self.sections[section].bytes.len() as u64;
        self.report.new.push(Brought { name, kind, bytes });
    }

    fn kind_of(&self, thing: Thing) -> &'static str {
        let (id, ..) = self.extent(thing);
        match (thing, self.new.object.section(id).flags.write) {
            (Thing::Function(_), _) => "function",
            (Thing::Text(..), _) => "string",
            (Thing::Auxiliary(..), _) => "code",
            (_, true) => "variable",
            (_, false) => "constant",
        }
    }

    fn name_of(&self, thing: Thing) -> String {
        match thing {
            Thing::Function(function) => self.new.function(function).name.clone(),
            Thing::Variable(variable) => self.new.variable(variable).name.clone(),
            Thing::Text(section, offset) => {
                let bytes = self.new.text(section, offset);
                let text = String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes));
                format!("{:?}", text.chars().take(60).collect::<String>())
            }
            Thing::Constant(section, offset) => {
                format!("{}+{offset:#x}", self.new.object.section(section).name)
            }
            Thing::Whole(section) | Thing::Auxiliary(section, ..) => {
                self.new.object.section(section).name.clone()
            }
        }
    }
}

/// Names what new code and new data refer to.
struct NewResolver<'c, 'a> {
    collector: &'c mut Collector<'a>,
    /// The function that refers, for messages.
    function: Option<usize>,
}

impl Resolver for NewResolver<'_, '_> {
    fn symbol(&mut self, target: &Target, calls: bool) -> Option<(u32, i64)> {
        match *target {
            Target::Outside { symbol, distance } => self.outside(symbol, target, distance),
            Target::Function { function, distance } => self.function(function, distance, calls),
            Target::Variable { variable, distance } => self.variable(variable, target, distance),
            Target::Text {
                section,
                offset,
                distance,
            } => Some((self.own(Thing::Text(section, offset)), distance)),
            Target::Constant {
                section,
                offset,
                distance,
            } => {
                let size = self.collector.new.object.section(section).entry_size;
                let start = offset.checked_div(size)?.checked_mul(size)?;
                let symbol = self.own(Thing::Constant(section, start));
                let inside = (offset - start).cast_signed();
                Some((symbol, inside.wrapping_add(distance)))
            }
            Target::Place { section, offset } => self.place(section, offset),
        }
    }

    fn guest(&mut self, name: &str) -> u32 {
        self.collector.symbols.guest(name)
    }
}

impl NewResolver<'_, '_> {
    fn own(&mut self, thing: Thing) -> u32 {
        let section = self.collector.bring(thing);
        let name = match thing {
            Thing::Function(_) | Thing::Variable(_) => self.collector.name_of(thing),
            _ => self.collector.sections[section as usize].name.clone(),
        };
        self.collector.symbols.own(&name, section)
    }

    fn outside(
        &mut self,
        symbol: crate::object::SymbolId,
        target: &Target,
        distance: i64,
    ) -> Option<(u32, i64)> {
        let home = self.collector.new.object.symbol(symbol).home;
        let name = self.collector.new.name_of(target);
        if home != crate::object::Home::Undefined || name.is_empty() {
            self.refuse(&name, "an absolute or common symbol cannot be linked");
            return None;
        }
        Some((self.collector.symbols.guest(&name), distance))
    }

    /// The address of a function that the guest has is the guest's, so that none is kept that ends with the
    /// patch; only calls and jumps go straight to the new body.
    fn function(&mut self, function: usize, distance: i64, calls: bool) -> Option<(u32, i64)> {
        let new = self.collector.new;
        let it = new.function(function);
        let is_inside = distance != 0 || it.parent.is_some();
        match self.collector.verdicts[function] {
            Verdict::New => Some((self.own(Thing::Function(function)), distance)),
            Verdict::Changed(_) if calls || is_inside => {
                Some((self.own(Thing::Function(function)), distance))
            }
            _ if policy::is_init(&new.home_of(function).name) => {
                let section = new.home_of(function).name.clone();
                self.refuse(&section, "it refers to code that is gone after boot");
                None
            }
            _ => {
                let old = self.collector.old;
                let found = old.inventory.function_named(&it.name);
                let name = found.map_or(&it.name, |at| &old.function(at).name);
                Some((self.collector.symbols.guest(name), distance))
            }
        }
    }

    fn variable(&mut self, variable: usize, target: &Target, distance: i64) -> Option<(u32, i64)> {
        let (new, old) = (self.collector.new, self.collector.old);
        let section = new
            .object
            .section(new.variable(variable).section)
            .name
            .clone();
        if is_numbered_constant(new, variable) {
            if let Some(name) = self.same_constant(variable, target) {
                return Some((self.collector.symbols.guest(&name), distance));
            }
            return Some((self.own(Thing::Variable(variable)), distance));
        }
        if let Some(before) = self.collector.pairs.old_of(variable) {
            if policy::is_init(&section) {
                self.refuse(&section, "it refers to data that is gone after boot");
                return None;
            }
            return Some((
                self.collector.symbols.guest(&old.variable(before).name),
                distance,
            ));
        }
        let name = &new.variable(variable).name;
        if self.collector.pairs.is_uncertain(variable) {
            let reason = format!("{name} may be one of several static variables of the old object");
            self.refuse(&section, &reason);
            return None;
        }
        if let Err(reason) = policy::new_data(&section) {
            self.refuse(&section, &format!("{reason} ({name})"));
            return None;
        }
        Some((self.own(Thing::Variable(variable)), distance))
    }

    /// The old constant of the same content, if the constant holds pointers and there is just one: a table
    /// of functions may be known by its address. Text and numbers may as well be copied.
    fn same_constant(&self, variable: usize, target: &Target) -> Option<String> {
        let (new, old) = (self.collector.new, self.collector.old);
        let it = new.variable(variable);
        let end = it.start.saturating_add(it.size);
        if new
            .object
            .section(it.section)
            .relocations_in(it.start, end)
            .is_empty()
        {
            return None;
        }
        let wanted = without_distance(key::key(new, self.collector.names, target));
        let same = (0..old.inventory.variables.len()).filter(|index| {
            let target = Target::Variable {
                variable: *index,
                distance: 0,
            };
            is_numbered_constant(old, *index)
                && without_distance(key::key(old, &Names::default(), &target)) == wanted
        });
        match same.collect::<Vec<_>>()[..] {
            [only] => Some(old.variable(only).name.clone()),
            _ => None,
        }
    }

    fn place(&mut self, section: SectionId, offset: i64) -> Option<(u32, i64)> {
        let home = self.collector.new.object.section(section);
        if home.flags.exec {
            let auxiliary = self
                .auxiliary(section, offset)
                .filter(|_| home.name == AUXILIARY);
            if auxiliary.is_none() {
                self.refuse(&home.name, "it refers to code that belongs to no function");
            }
            return Some((self.own(auxiliary?), 0));
        }
        if home.flags.write || policy::new_data(&home.name).is_err() {
            self.refuse(&home.name, "it refers to data without a name");
            return None;
        }
        Some((self.own(Thing::Whole(section)), offset))
    }

    /// The test of a CPU feature that runs until alternatives are applied ends with its first plain jump.
    fn auxiliary(&self, section: SectionId, offset: i64) -> Option<Thing> {
        let start = u64::try_from(offset).ok()?;
        let home = self.collector.new.object.section(section);
        let code = Instructions::decode(home.range(start, home.size)?);
        let last = code.iter().find(|it| it.flow == Flow::Jump)?;
        Some(Thing::Auxiliary(
            section,
            start,
            start.checked_add(last.end)?,
        ))
    }

    fn refuse_unknown_kinds(&mut self, references: &[Reference]) {
        for reference in references {
            if site::kind_of(reference.kind).is_none() {
                let name = self.collector.new.name_of(&reference.target);
                let reason = format!("relocation {:?} to {name}", reference.kind);
                self.refuse("relocations", &reason);
            }
        }
    }

    fn refuse(&mut self, section: &str, reason: &str) {
        let name = self
            .function
            .map(|it| self.collector.new.function(it).name.clone());
        let (name, section) = (name.unwrap_or_default(), section.to_owned());
        let refused = Refused {
            name,
            section,
            offset: None,
            reason: reason.to_owned(),
        };
        if !self.collector.report.refused.contains(&refused) {
            self.collector.report.refused.push(refused);
        }
    }
}

fn without_distance(key: Key) -> Key {
    match key {
        Key::Content(content, _) => Key::Content(content, 0),
        other => other,
    }
}
