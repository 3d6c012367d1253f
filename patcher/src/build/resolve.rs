//! What new code and new data refer to, named: something of the guest, or something brought along. Owns the choice
//! between the two; what is brought is [`collect`](super::collect)'s.

use super::collect::{self, Collector, Thing};
use super::compare::Verdict;
use super::instructions::{Flow, Instructions};
use super::key::{self, Key, Names, is_numbered_constant};
use super::policy;
use super::reference::{Reference, Target};
use super::report::Refused;
use super::site::{self, Resolver};
use super::unit::Unit;
use crate::object::SectionId;

/// How deep constants that refer to constants are followed.
const MAX_DEPTH: usize = 4;

/// Names what new code and new data refer to.
pub(super) struct NewResolver<'c, 'a> {
    pub(super) collector: &'c mut Collector<'a>,
    /// The file that refers.
    pub(super) unit: &'a Unit,
    /// Its index.
    pub(super) at: usize,
    /// The function that refers, for messages.
    pub(super) function: Option<usize>,
}

impl Resolver for NewResolver<'_, '_> {
    fn symbol(&mut self, target: &Target, calls: bool) -> Option<(u32, i64)> {
        match *target {
            Target::Outside { symbol, distance } => self.outside(symbol, target, distance),
            Target::Function { function, distance } => self.function(function, distance, calls),
            Target::Variable { variable, distance } => self.variable(variable, target, distance),
            Target::Near { variable, distance } => self.near(variable, distance),
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
                let size = self.unit.new.object.section(section).entry_size;
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
        self.own_of(self.at, thing)
    }

    fn own_of(&mut self, unit: usize, thing: Thing) -> u32 {
        let section = self.collector.bring(unit, thing);
        let new = &self.collector.units[unit].new;
        let name = match thing {
            Thing::Function(_) | Thing::Variable(_) => collect::name_of(new, thing),
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
        let home = self.unit.new.object.symbol(symbol).home;
        let name = self.unit.new.name_of(target);
        if home != crate::object::Home::Undefined || name.is_empty() {
            self.refuse(&name, "an absolute or common symbol cannot be linked");
            return None;
        }
        if let Some((unit, thing)) = self.collector.exported(&self.unit.object, &name) {
            if !self.collector.stays(&self.unit.object, unit) {
                let of = &self.collector.units[unit].object;
                let reason =
                    format!("it is newly used of module {of}, which may be unloaded before");
                self.refuse(&name, &reason);
                return None;
            }
            if let Thing::Variable(variable) = thing
                && let Err(reason) = self.collector.units[unit].can_bring(variable)
            {
                self.refuse(&name, &reason);
                return None;
            }
            return Some((self.own_of(unit, thing), distance));
        }
        if self.unit.names.locals.contains(&name) {
            let reason =
                "the old object has its own of this name, and the new one uses another file's";
            self.refuse(&name, reason);
            return None;
        }
        Some((self.collector.symbols.guest(&name), distance))
    }

    /// The address of a function that the guest has is the guest's, so that none is kept that ends with the
    /// patch; only calls and jumps go straight to the new body.
    fn function(&mut self, function: usize, distance: i64, calls: bool) -> Option<(u32, i64)> {
        let new = &self.unit.new;
        let it = new.function(function);
        let is_inside = distance != 0 || it.parent.is_some();
        match self.unit.verdicts[function] {
            Verdict::New => Some((self.own(Thing::Function(function)), distance)),
            Verdict::Changed(_) if calls || is_inside => {
                Some((self.own(Thing::Function(function)), distance))
            }
            _ => {
                let before = self.unit.before(self.at, function);
                let home = before.map(|(of, at)| self.collector.units[of].old.home_of(at));
                let home = home.unwrap_or(new.home_of(function));
                if policy::is_init(&home.name) {
                    let section = home.name.clone();
                    self.refuse(&section, "it refers to code that is gone after boot");
                    return None;
                }
                let found = self.unit.names.functions.get(&function);
                let name = found.unwrap_or(&it.name);
                Some((self.collector.symbols.guest(name), distance))
            }
        }
    }

    fn near(&mut self, variable: usize, distance: i64) -> Option<(u32, i64)> {
        let (new, old) = (&self.unit.new, &self.unit.old);
        if !self.unit.pairs.lies_as_before(old, new, variable) {
            let (section, name) = (
                &new.home_of_variable(variable).name,
                &new.variable(variable).name,
            );
            let reason = format!(
                "an address near {name} may belong to one of several variables, which do not lie as before"
            );
            self.refuse(section, &reason);
            return None;
        }
        let target = Target::Variable { variable, distance };
        self.variable(variable, &target, distance)
    }

    fn variable(&mut self, variable: usize, target: &Target, distance: i64) -> Option<(u32, i64)> {
        let new = &self.unit.new;
        let section = new
            .object
            .section(new.variable(variable).section)
            .name
            .clone();
        if is_numbered_constant(new, variable) {
            let is_of_new_code = self.leads_into_replaced(variable, 0);
            if let Some(name) = self.same_constant(variable, target)
                && !is_of_new_code
            {
                return Some((self.collector.symbols.guest(&name), distance));
            }
            if !is_of_new_code && self.unit.is_changed_table(variable) {
                let name = &new.variable(variable).name;
                let reason =
                    format!("{name} holds pointers that differ, and the guest has its own");
                self.refuse(&section, &reason);
                return None;
            }
            return Some((self.own(Thing::Variable(variable)), distance));
        }
        if let Some(name) = self.unit.guest_variable(variable) {
            let before = self.unit.variable_before(self.at, variable);
            let home = before.map(|(of, it)| self.collector.units[of].old.home_of_variable(it));
            let home = home.map_or(&*section, |it| &*it.name);
            if policy::is_init(home) {
                self.refuse(home, "it refers to data that is gone after boot");
                return None;
            }
            if self.leads_into_replaced(variable, 0) {
                let name = &new.variable(variable).name;
                let reason = format!(
                    "{name} leads into code that is replaced, and the guest's own into the old code"
                );
                self.refuse(home, &reason);
                return None;
            }
            return Some((self.collector.symbols.guest(name), distance));
        }
        if let Err(reason) = self.unit.can_bring(variable) {
            self.refuse(&section, &reason);
            return None;
        }
        Some((self.own(Thing::Variable(variable)), distance))
    }

    /// Whether a table of labels leads to the inside of a new body, or a constant to such a table.
    fn leads_into_replaced(&self, variable: usize, depth: usize) -> bool {
        let new = &self.unit.new;
        let it = new.variable(variable);
        let end = it.start.saturating_add(it.size);
        let fields = new.data_references(it.section, it.start, end);
        let is_new = |function: usize| {
            !matches!(
                self.unit.verdicts[function],
                Verdict::Same | Verdict::LinesOnly
            )
        };
        fields.iter().any(|it| match it.target.exact() {
            Target::Function { function, distance } => distance != 0 && is_new(function),
            Target::Variable { variable, .. } => {
                depth < MAX_DEPTH
                    && is_numbered_constant(new, variable)
                    && self.leads_into_replaced(variable, depth + 1)
            }
            _ => false,
        })
    }

    /// The old constant of the same content, if the constant holds pointers and there is just one: a table
    /// of functions may be known by its address. Text and numbers may as well be copied.
    fn same_constant(&self, variable: usize, target: &Target) -> Option<String> {
        let (new, old) = (&self.unit.new, &self.unit.old);
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
        let wanted = without_distance(key::key(new, &self.unit.names, target));
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
        let home = self.unit.new.object.section(section);
        if home.flags.exec {
            let auxiliary = self
                .auxiliary(section, offset)
                .filter(|_| home.name == policy::AUXILIARY);
            if auxiliary.is_none() {
                self.refuse(&home.name, "it refers to code that belongs to no function");
            }
            return Some((self.own(auxiliary?), 0));
        }
        let has_names = !self.unit.new.inventory.variables_in(section).is_empty();
        if home.flags.write || has_names || policy::new_data(&home.name).is_err() {
            self.refuse(&home.name, "it refers to data without a name");
            return None;
        }
        Some((self.own(Thing::Whole(section)), offset))
    }

    /// The test of a CPU feature that runs until alternatives are applied ends with its first plain jump.
    fn auxiliary(&self, section: SectionId, offset: i64) -> Option<Thing> {
        let start = u64::try_from(offset).ok()?;
        let home = self.unit.new.object.section(section);
        let code = Instructions::decode(home.range(start, home.size)?);
        let last = code.iter().find(|it| it.flow == Flow::Jump)?;
        Some(Thing::Auxiliary(
            section,
            start,
            start.checked_add(last.end)?,
        ))
    }

    /// Refuses every relocation of a kind that no patch can have.
    pub(super) fn refuse_unknown_kinds(&mut self, references: &[Reference]) {
        for reference in references {
            if site::kind_of(reference.kind).is_none() {
                let name = self.unit.new.name_of(&reference.target);
                let reason = format!("relocation {:?} to {name}", reference.kind);
                self.refuse("relocations", &reason);
            }
        }
    }

    fn refuse(&mut self, section: &str, reason: &str) {
        let name = self
            .function
            .map(|it| self.unit.new.function(it).name.clone());
        let (name, section) = (name.unwrap_or_default(), section.to_owned());
        let refused = Refused {
            name,
            section,
            offset: None,
            reason: reason.to_owned(),
        };
        if !self.collector.reports[self.at].refused.contains(&refused) {
            self.collector.reports[self.at].refused.push(refused);
        }
    }
}

fn without_distance(key: Key) -> Key {
    match key {
        Key::Content(content, _) => Key::Content(content, 0),
        other => other,
    }
}
