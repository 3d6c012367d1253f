//! What an object defines: its functions and its variables, with their extents. Owns the choice of one
//! name for what has several, and finding what is at an offset. Looks at no instruction.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::object::{Home, Object, SectionId, Symbol, SymbolId, SymbolKind};

/// One function, or a part the compiler split off from one (`name.cold`).
#[derive(Clone, Debug)]
pub(super) struct Function {
    /// The name that stands for it: the first global one in the alphabet, else the first one.
    pub(super) name: String,
    /// Its section.
    pub(super) section: SectionId,
    /// Offset of its entry.
    pub(super) start: u64,
    /// Offset of its end.
    pub(super) end: u64,
    /// All its names.
    pub(super) names: BTreeSet<String>,
    /// Those by which other files may name it.
    pub(super) globals: BTreeSet<String>,
    /// The function it was split off from.
    pub(super) parent: Option<usize>,
}

/// One variable or constant.
#[derive(Clone, Debug)]
pub(super) struct Variable {
    /// Its name, chosen as a function's.
    pub(super) name: String,
    /// Its section.
    pub(super) section: SectionId,
    /// Offset in it.
    pub(super) start: u64,
    /// Size in bytes; 0 is possible (an empty structure).
    pub(super) size: u64,
    /// All its names.
    pub(super) names: BTreeSet<String>,
    /// Those by which other files may name it.
    pub(super) globals: BTreeSet<String>,
}

/// Functions and variables of one object; indices into the two lists are what everything else holds.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    pub(super) functions: Vec<Function>,
    pub(super) variables: Vec<Variable>,
    function_names: HashMap<String, usize>,
    variable_names: HashMap<String, usize>,
    function_starts: BTreeMap<(SectionId, u64), usize>,
    variable_starts: BTreeMap<(SectionId, u64), usize>,
    variables_of_section: HashMap<SectionId, Vec<usize>>,
    symbol_variables: HashMap<SymbolId, usize>,
    /// Names of more than one place, as objects have that a linker made of others.
    pub(super) ambiguous: BTreeSet<String>,
}

/// Symbols that stand for one place.
type Claims<'a> = BTreeMap<(SectionId, u64), Vec<(SymbolId, &'a Symbol)>>;

impl Inventory {
    /// Lists what an object defines.
    pub(super) fn of(object: &Object) -> Self {
        let mut functions = Claims::new();
        let mut variables = Claims::new();
        for (id, symbol) in object.symbols_with_ids() {
            let Home::In { section, offset } = symbol.home else {
                continue;
            };
            let home = object.section(section);
            let claims = match symbol.kind {
                SymbolKind::Function if home.flags.exec => &mut functions,
                SymbolKind::Object if home.flags.alloc && !home.flags.exec => &mut variables,
                _ => continue,
            };
            claims
                .entry((section, offset))
                .or_default()
                .push((id, symbol));
        }
        let mut inventory = Self::default();
        functions
            .iter()
            .for_each(|(place, symbols)| inventory.add_function(*place, symbols));
        variables
            .iter()
            .for_each(|(place, symbols)| inventory.add_variable(*place, symbols));
        inventory.find_parents();
        inventory.find_ambiguous(object);
        inventory
    }

    fn add_function(
        &mut self,
        (section, start): (SectionId, u64),
        symbols: &[(SymbolId, &Symbol)],
    ) {
        let index = self.functions.len();
        let size = symbols
            .iter()
            .map(|(_, it)| it.size)
            .max()
            .unwrap_or_default();
        for (_, symbol) in symbols {
            let name = &symbol.name;
            if self
                .function_names
                .insert(name.clone(), index)
                .is_some_and(|it| it != index)
            {
                self.ambiguous.insert(name.clone());
            }
        }
        self.function_starts.insert((section, start), index);
        let name = representative(symbols);
        let end = start.saturating_add(size);
        self.functions.push(Function {
            name,
            section,
            start,
            end,
            names: names(symbols, |_| true),
            globals: names(symbols, |it| it.global),
            parent: None,
        });
    }

    fn add_variable(
        &mut self,
        (section, start): (SectionId, u64),
        symbols: &[(SymbolId, &Symbol)],
    ) {
        let index = self.variables.len();
        for (id, symbol) in symbols {
            let name = &symbol.name;
            if self
                .variable_names
                .insert(name.clone(), index)
                .is_some_and(|it| it != index)
            {
                self.ambiguous.insert(name.clone());
            }
            self.symbol_variables.insert(*id, index);
        }
        self.variable_starts.insert((section, start), index);
        self.variables_of_section
            .entry(section)
            .or_default()
            .push(index);
        let size = symbols
            .iter()
            .map(|(_, it)| it.size)
            .max()
            .unwrap_or_default();
        self.variables.push(Variable {
            name: representative(symbols),
            section,
            start,
            size,
            names: names(symbols, |_| true),
            globals: names(symbols, |it| it.global),
        });
    }

    fn find_parents(&mut self) {
        for index in 0..self.functions.len() {
            let parent = cold_parent(&self.functions[index].name)
                .and_then(|name| self.function_names.get(name).copied());
            self.functions[index].parent = parent.filter(|parent| *parent != index);
        }
    }

    /// One name means one thing in the patch, whether function or variable, of this object or of another.
    fn find_ambiguous(&mut self, object: &Object) {
        let both = self.function_names.keys();
        let both = both.filter(|it| self.variable_names.contains_key(*it));
        let locals: BTreeSet<&str> = self.locals().collect();
        let outside = object.symbols_with_ids().map(|(_, it)| it);
        let outside = outside.filter(|it| it.home == Home::Undefined && locals.contains(&*it.name));
        let found: Vec<_> = both.chain(outside.map(|it| &it.name)).cloned().collect();
        self.ambiguous.extend(found);
    }

    /// What the object alone may name.
    pub(super) fn locals(&self) -> impl Iterator<Item = &str> {
        let functions = self
            .functions
            .iter()
            .flat_map(|it| it.names.difference(&it.globals));
        let variables = self
            .variables
            .iter()
            .flat_map(|it| it.names.difference(&it.globals));
        functions.chain(variables).map(String::as_str)
    }

    /// The function of a name, aliases included.
    pub(super) fn function_named(&self, name: &str) -> Option<usize> {
        self.function_names.get(name).copied()
    }

    /// The variable of a name, aliases included.
    pub(super) fn variable_named(&self, name: &str) -> Option<usize> {
        self.variable_names.get(name).copied()
    }

    /// The variable a symbol stands for.
    pub(super) fn variable_of(&self, symbol: SymbolId) -> Option<usize> {
        self.symbol_variables.get(&symbol).copied()
    }

    /// The function that has an offset, its end included: a label after its last instruction is its own.
    pub(super) fn function_at(&self, section: SectionId, offset: i64) -> Option<usize> {
        let offset = u64::try_from(offset).ok()?;
        let range = (section, 0)..=(section, offset);
        let (_, index) = self.function_starts.range(range).next_back()?;
        (offset <= self.functions[*index].end).then_some(*index)
    }

    /// The variable that has an offset, else the one before it, else the first one: compilers address arrays from outside of
    /// them.
    pub(super) fn variable_at(&self, section: SectionId, offset: i64) -> Option<usize> {
        let here = self.variables_of_section.get(&section)?;
        if let [only] = here[..] {
            return (self.variables[only].start == 0).then_some(only);
        }
        let before = |offset| self.variable_starts.range((section, 0)..=(section, offset));
        let before = u64::try_from(offset).ok().map(before);
        let found = before.and_then(|mut before| before.next_back());
        found.map(|(_, index)| *index).or(here.first().copied())
    }

    /// Whether a variable has an offset or begins there.
    pub(super) fn covers(&self, variable: usize, offset: i64) -> bool {
        let it = &self.variables[variable];
        let distance = u64::try_from(offset)
            .ok()
            .and_then(|at| at.checked_sub(it.start));
        distance.is_some_and(|distance| distance < it.size.max(1))
    }

    /// The variables of a section, by offset.
    pub(super) fn variables_in(&self, section: SectionId) -> &[usize] {
        self.variables_of_section
            .get(&section)
            .map_or(&[], Vec::as_slice)
    }

    /// The split-off parts of a function.
    pub(super) fn parts_of(&self, function: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.functions.len()).filter(move |it| self.functions[*it].parent == Some(function))
    }
}

fn names(symbols: &[(SymbolId, &Symbol)], wanted: impl Fn(&Symbol) -> bool) -> BTreeSet<String> {
    let wanted = symbols.iter().filter(|(_, it)| wanted(it));
    wanted.map(|(_, it)| it.name.clone()).collect()
}

fn representative(symbols: &[(SymbolId, &Symbol)]) -> String {
    let globals = symbols
        .iter()
        .filter(|(_, it)| it.global)
        .map(|(_, it)| &it.name);
    // One function can be the system call of both ABIs; its native name is the better known.
    let globals = globals.min_by_key(|name| (name.starts_with("__ia32_"), *name));
    let first = symbols.first().map(|(_, it)| &it.name);
    globals.or(first).cloned().unwrap_or_default()
}

/// `f` for `f.cold` and `f.cold.3` (gcc's names for what -freorder-blocks-and-partition splits off).
pub(super) fn cold_parent(name: &str) -> Option<&str> {
    let (parent, rest) = name.rsplit_once(".cold")?;
    let numbered = rest.strip_prefix('.').is_some_and(is_digits);
    (rest.is_empty() || numbered).then_some(parent)
}

/// The name of a clone without its numbers, if it is one: `f.isra` for `f.isra.0`, `f.part.cold` for `f.part.3.cold`
/// (gcc counts the clones of each function).
pub(super) fn clone_base(name: &str) -> Option<String> {
    let mut parts = name.split('.');
    let mut base = parts.next()?.to_owned();
    let mut is_clone = false;
    for part in parts {
        if is_digits(part) {
            is_clone = true;
        } else {
            base.push('.');
            base.push_str(part);
        }
    }
    is_clone.then_some(base)
}

/// The name without the number that the compiler or a macro adds to tell equal ones apart: `v` for `v.12`
/// (static variables of functions), `__UNIQUE_ID_x` for `__UNIQUE_ID_x34` (Linux v6.12
/// include/linux/compiler.h). The numbers change with the source around them.
pub(super) fn numbered_base(name: &str) -> Option<&str> {
    if name.starts_with("__UNIQUE_ID_") {
        let base = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
        return (base.len() < name.len()).then_some(base);
    }
    let (base, digits) = name.rsplit_once('.')?;
    (is_digits(digits) && !base.is_empty()).then_some(base)
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cold_parts_are_told_from_functions_that_look_like_them() {
        assert_eq!(cold_parent("f.cold"), Some("f"));
        assert_eq!(cold_parent("f.isra.0.cold"), Some("f.isra.0"));
        assert_eq!(cold_parent("f.cold.12"), Some("f"));
        assert_eq!(cold_parent("f.colder"), None);
        assert_eq!(cold_parent("cold"), None);
    }

    #[test]
    fn clones_of_one_function_have_one_base() {
        assert_eq!(clone_base("f.isra.0").as_deref(), Some("f.isra"));
        assert_eq!(clone_base("f.part.3.cold").as_deref(), Some("f.part.cold"));
        let twice = clone_base("f.constprop.1.isra.0");
        assert_eq!(twice.as_deref(), Some("f.constprop.isra"));
        assert_eq!(clone_base("f"), None);
        assert_eq!(clone_base("f.cold"), None);
    }

    #[test]
    fn numbers_at_the_end_of_names_are_found() {
        assert_eq!(numbered_base("__func__.12"), Some("__func__"));
        assert_eq!(
            numbered_base("__UNIQUE_ID_ddebug417.3"),
            Some("__UNIQUE_ID_ddebug")
        );
        assert_eq!(
            numbered_base("__UNIQUE_ID_license17"),
            Some("__UNIQUE_ID_license")
        );
        assert_eq!(numbered_base("tcp_ip"), None);
        assert_eq!(numbered_base("x.y"), None);
    }
}
