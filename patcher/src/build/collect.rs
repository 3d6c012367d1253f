//! What goes into the patch: new bodies of changed functions, and whatever they need that the guest has
//! not. Owns the walk from what must be brought to what that refers to; what a reference is to, something of the
//! guest or something brought along, is [`resolve`](super::resolve)'s.

use std::collections::{BTreeMap, VecDeque};

use super::compare::Verdict;
use super::key::Names;
use super::pair::Pairs;
use super::policy;
use super::reference::{Reference, references_in_code};
use super::report::{Brought, BuildReport, Refused};
use super::resolve::NewResolver;
use super::side::Side;
use super::site;
use super::table::SymbolTable;
use crate::object::SectionId;
use crate::patch::{Section, SectionKind};

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
            traps: Vec::new(),
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
        let traps = site::traps(new, function, &mut resolver);
        self.sections[section].relocations = relocations;
        self.sections[section].sites = sites;
        self.sections[section].traps = traps;
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

    /// What a thing is called in messages and symbols.
    pub(super) fn name_of(&self, thing: Thing) -> String {
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
