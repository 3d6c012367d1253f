//! From two objects to a patch: the differ. The old object is what the guest was built from, the new one what
//! it should have been built from, both compiled with `-ffunction-sections -fdata-sections`. Owns the order
//! of the steps; each step has its own file, in the order they are listed here.
//!
//! ```text
//! bytes ─ object::read ─ Side ──┐ inventory, instructions, reference, special
//! bytes ─ object::read ─ Side ──┤
//!                               ├─ pair ─ compare, data ─ collect, resolve, old ─ Patch + BuildReport
//! ```

mod collect;
mod compare;
mod data;
mod instructions;
mod inventory;
mod key;
mod old;
mod pair;
mod policy;
mod reference;
mod report;
mod resolve;
mod side;
mod site;
mod special;
mod table;

pub use old::OldFunction;
pub use report::{Brought, BuildReport, Ignored, Refused, Replaced};

use collect::{Collector, Thing};
use compare::Verdict;
use side::Side;

use crate::object::{self, ObjectError};
use crate::patch::check::{self, Malformed};
use crate::patch::{Patch, Replacement, Requirement, Symbol};

/// What a build is to make besides what the objects say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BuildOptions {
    /// Name of the patch.
    pub name: String,
    /// What the guest must be; the patched object is `vmlinux` if empty.
    pub requires: Requirement,
}

/// Why there is no patch.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The old object cannot be read.
    #[error("old object: {0}")]
    Old(#[source] ObjectError),
    /// The new object cannot be read.
    #[error("new object: {0}")]
    New(#[source] ObjectError),
    /// A table of an object has another layout than any kernel known.
    #[error("section {section} has an unknown layout at {offset:#x}")]
    Table {
        /// The section.
        section: String,
        /// Offset of the entry.
        offset: u64,
    },
    /// The objects do the same.
    #[error("nothing changed: {} functions are the same in both objects", .0.unchanged)]
    NothingChanged(Box<BuildReport>),
    /// Something differs that cannot be patched.
    #[error("{}", refusals(.0))]
    Refused(Box<BuildReport>),
    /// The patch would not be well formed: a name or number that the options or the objects gave.
    #[error("{0}")]
    Malformed(#[from] Malformed),
}

fn refusals(report: &BuildReport) -> String {
    let lines: Vec<_> = report.refused.iter().map(ToString::to_string).collect();
    format!(
        "the difference cannot be patched:\n  {}",
        lines.join("\n  ")
    )
}

/// Compares two objects and makes a patch of the difference.
///
/// # Errors
/// Unreadable objects, no difference, or one that cannot be patched: [`BuildError::Refused`] then holds
/// every reason found.
pub fn build(
    old: &[u8],
    new: &[u8],
    options: &BuildOptions,
) -> Result<(Patch, BuildReport), BuildError> {
    check::patch_name(&options.name)?;
    let old = Side::of(object::read(old).map_err(BuildError::Old)?)?;
    let new = Side::of(object::read(new).map_err(BuildError::New)?)?;
    let pairs = pair::pair(&old, &new);
    let names = pairs.names(&old);
    let verdicts = compare::verdicts(&old, &new, &names);
    let mut report = BuildReport::default();
    data::compare(&old, &new, &pairs, &mut report);
    list_functions(&old, &new, &verdicts, &mut report);
    let collector = Collector::new((&old, &new), (&pairs, &names), &verdicts, report);
    let (patch, report) = assemble(collector, options);
    conclude(patch, report)
}

/// Every function of an object, and the symbols its code names: what a guest built from that object runs.
///
/// # Errors
/// An unreadable object.
pub fn functions(object: &[u8]) -> Result<(Vec<OldFunction>, Vec<Symbol>), BuildError> {
    let side = Side::of(object::read(object).map_err(BuildError::Old)?)?;
    let mut symbols = table::SymbolTable::default();
    let functions = old::functions(&side, &mut symbols);
    Ok((functions, symbols.finish()))
}

/// Records what became of every function that is not brought.
fn list_functions(old: &Side, new: &Side, verdicts: &[Verdict], report: &mut BuildReport) {
    let mut ignore = |what: &str, reason: &str| {
        let (what, reason) = (what.to_owned(), reason.to_owned());
        report.ignored.push(Ignored { what, reason });
    };
    for function in &old.inventory.functions {
        if new.inventory.function_named(&function.name).is_none() {
            ignore(
                &function.name,
                "only the old object has it; the guest keeps it",
            );
        }
    }
    for (function, verdict) in new.inventory.functions.iter().zip(verdicts) {
        if *verdict == Verdict::LinesOnly {
            ignore(
                &function.name,
                "only line numbers of its WARN or BUG differ",
            );
        }
    }
    report.unchanged = verdicts.iter().filter(|it| **it == Verdict::Same).count();
}

fn assemble(mut collector: Collector<'_>, options: &BuildOptions) -> (Patch, BuildReport) {
    let (old, new) = (collector.old, collector.new);
    let mut replaced = Vec::new();
    for (index, verdict) in collector.verdicts.iter().enumerate() {
        let function = new.function(index);
        let (Verdict::Changed(difference), None) = (verdict, function.parent) else {
            continue;
        };
        let Some(before) = old.inventory.function_named(&function.name) else {
            continue;
        };
        let new_section = collector.bring(Thing::Function(index));
        collector.report.replaced.push(Replaced {
            function: old.function(before).name.clone(),
            difference: (*difference).to_owned(),
            old_bytes: old.function_bytes(before).len() as u64,
            new_bytes: new.function_bytes(index).len() as u64,
        });
        replaced.push(Replacement {
            name: old.function(before).name.clone(),
            sympos: None,
            old: old::code(old, &mut collector.symbols, before),
            old_parts: old::parts(old, &mut collector.symbols, before),
            new_section,
            new_offset: 0,
        });
    }
    collector.finish();
    list_unreached(&mut collector);
    let requires = requirement(&options.requires);
    let (sections, symbols) = (collector.sections, collector.symbols.finish());
    let patch = Patch {
        name: options.name.clone(),
        requires,
        replaced,
        sections,
        symbols,
    };
    (patch, collector.report)
}

/// New functions that nothing in the patch refers to.
fn list_unreached(collector: &mut Collector<'_>) {
    for (index, function) in collector.new.inventory.functions.iter().enumerate() {
        if collector.verdicts[index] == Verdict::New && !collector.has_function(index) {
            let reason = "new, but nothing in the patch refers to it".to_owned();
            collector.report.ignored.push(Ignored {
                what: function.name.clone(),
                reason,
            });
        }
    }
}

fn requirement(given: &Requirement) -> Requirement {
    let object = if given.object.is_empty() {
        "vmlinux"
    } else {
        &given.object
    };
    Requirement {
        object: object.to_owned(),
        ..given.clone()
    }
}

fn conclude(patch: Patch, report: BuildReport) -> Result<(Patch, BuildReport), BuildError> {
    if !report.refused.is_empty() {
        return Err(BuildError::Refused(Box::new(report)));
    }
    if report.is_empty() {
        return Err(BuildError::NothingChanged(Box::new(report)));
    }
    check::check(&patch)?;
    Ok((patch, report))
}
