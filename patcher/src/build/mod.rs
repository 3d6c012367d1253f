//! From pairs of objects to a patch: the differ. The old object of a file is what the guest was built from, the new one what
//! it should have been built from, both compiled with `-ffunction-sections -fdata-sections`. Owns the order
//! of the steps; each step has its own file, in the order they are listed here.
//!
//! ```text
//! a file: bytes ─ object::read ─ Side ──┐ inventory, instructions, reference, special
//!         bytes ─ object::read ─ Side ──┴─ pair ─ compare, data ─ Unit ──┐
//! another file: …                                         moves ─ Unit ──┴─ collect, resolve, old ─ Patch + BuildReport
//! ```

mod callback;
mod class;
mod collect;
mod compare;
mod data;
mod exports;
mod instructions;
mod inventory;
mod key;
mod layout;
mod moves;
mod old;
mod pair;
mod policy;
mod reference;
mod report;
mod residue;
mod resolve;
mod side;
mod site;
mod special;
mod table;
mod unit;
mod unwind;
mod wide;

use std::fmt;

pub use old::OldFunction;
pub use report::{Brought, BuildReport, CalledBack, FileReport, Ignored, Refused, Replaced};
pub use unwind::UnwindData;

use collect::{Collector, Thing};
use compare::Verdict;
use side::Side;
use table::SymbolTable;

use crate::object::{self, ObjectError};
use crate::patch::check::{self, Malformed};
use crate::patch::{Patch, Replacement, Requirement, Symbol};

/// One file in the versions that a patch is made from.
#[derive(Clone, Copy, Debug)]
pub struct ObjectPair<'a> {
    /// The file, for messages.
    pub file: &'a str,
    /// What it is linked into: `vmlinux` or a module's name.
    pub object: &'a str,
    /// As the guest was built.
    pub old: &'a [u8],
    /// As it should have been built.
    pub new: &'a [u8],
    /// The new version with every static-key branch as long as a jump of five bytes, from which new code is taken; without
    /// it, from `new`.
    pub wide: Option<&'a [u8]>,
    /// How to unwind from new code, which is that of `wide` or `new`.
    pub unwind: UnwindData<'a>,
}

/// What a build is to make besides what the objects say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BuildOptions {
    /// Name of the patch.
    pub name: String,
    /// What the guest must be.
    pub requires: Requirement,
    /// Structures, as `struct NAME` or `NAME`, whose layout may differ: whoever asks knows that no object of them lives
    /// longer than a call of the functions replaced.
    pub safe_types: Vec<String>,
}

/// The versions of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// [`ObjectPair::old`].
    Old,
    /// [`ObjectPair::new`].
    New,
    /// [`ObjectPair::wide`].
    Wide,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Old => "old",
            Self::New => "new",
            Self::Wide => "wide",
        })
    }
}

/// Why there is no patch.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// An object cannot be read.
    #[error("{version} object of {file}: {why}")]
    Object {
        /// The file.
        file: String,
        /// Which of its versions.
        version: Version,
        /// Why not.
        #[source]
        why: ObjectError,
    },
    /// A table of an object has another layout than any kernel known.
    #[error("section {section} has an unknown layout at {offset:#x}")]
    Table {
        /// The section.
        section: String,
        /// Offset of the entry.
        offset: u64,
    },
    /// The objects do the same.
    #[error("nothing changed: {} functions are the same in both objects", .0.unchanged())]
    NothingChanged(Box<BuildReport>),
    /// Something differs that cannot be patched.
    #[error("{}", refusals(.0))]
    Refused(Box<BuildReport>),
    /// The patch would not be well formed: a name or number that the options or the objects gave.
    #[error("{0}")]
    Malformed(#[from] Malformed),
}

fn refusals(report: &BuildReport) -> String {
    let lines: Vec<_> = report.refused().collect();
    format!(
        "the difference cannot be patched:\n  {}",
        lines.join("\n  ")
    )
}

/// Compares the objects of all files and makes one patch of the difference.
///
/// # Errors
/// Unreadable objects, no difference, or one that cannot be patched: [`BuildError::Refused`] then holds
/// every reason found.
pub fn build(
    pairs: &[ObjectPair<'_>],
    options: &BuildOptions,
) -> Result<(Patch, BuildReport), BuildError> {
    check::patch_name(&options.name)?;
    let (units, reports) = unit::units(pairs, &options.safe_types)?;
    let collector = Collector::new(&units, reports);
    let (mut patch, report) = assemble(collector, options);
    patch.units = pairs.iter().map(unit::record).collect();
    conclude(patch, report)
}

/// Every function of an object, and the symbols its code names: what a guest built from that object runs.
///
/// # Errors
/// An unreadable object.
pub fn functions(object: &[u8]) -> Result<(Vec<OldFunction>, Vec<Symbol>), BuildError> {
    let object = object::read(object).map_err(|why| BuildError::Object {
        file: "the kernel".to_owned(),
        version: Version::Old,
        why,
    })?;
    let side = Side::of(object)?;
    let mut symbols = SymbolTable::default();
    let functions = old::functions(&side, &mut symbols);
    Ok((functions, symbols.finish()))
}

fn assemble(mut collector: Collector<'_>, options: &BuildOptions) -> (Patch, BuildReport) {
    let mut replaced = Vec::new();
    for at in 0..collector.units.len() {
        replaced.extend(replacements(&mut collector, at));
    }
    let callbacks = callback::bring(&mut collector);
    collector.finish();
    list_unreached(&mut collector);
    let patch = Patch {
        name: options.name.clone(),
        requires: options.requires.clone(),
        units: Vec::new(),
        replaced,
        sections: collector.sections,
        symbols: collector.symbols.finish(),
        callbacks,
    };
    let mut files = collector.reports;
    for file in files.iter_mut().filter(|file| !file.brings_code()) {
        file.no_unwind_data = None;
    }
    (patch, BuildReport { files })
}

/// The functions of one file that are replaced; their new bodies are asked for.
fn replacements(collector: &mut Collector<'_>, at: usize) -> Vec<Replacement> {
    let units = collector.units;
    let (unit, mut replaced) = (&units[at], Vec::new());
    for (function, (of, before), difference) in unit.replacements(at) {
        let (old, new) = (&units[of].old, &unit.new);
        let new_section = collector.bring(at, Thing::Function(function));
        collector.reports[at].replaced.push(Replaced {
            function: old.function(before).name.clone(),
            difference: difference.to_owned(),
            old_bytes: old.function_bytes(before).len() as u64,
            new_bytes: new.function_bytes(function).len() as u64,
        });
        let symbols = &mut collector.symbols;
        symbols.enter(of);
        replaced.push(Replacement {
            unit: of as u32,
            name: old.function(before).name.clone(),
            sympos: None,
            old: old::code(old, symbols, before),
            old_parts: old::parts(old, symbols, before),
            new_section,
            new_offset: 0,
        });
    }
    replaced
}

/// New functions that nothing in the patch refers to.
fn list_unreached(collector: &mut Collector<'_>) {
    for (at, unit) in collector.units.iter().enumerate() {
        for (index, function) in unit.new.inventory.functions.iter().enumerate() {
            if unit.verdicts[index] == Verdict::New && !collector.has_function(at, index) {
                let reason = "new, but nothing in the patch refers to it".to_owned();
                collector.reports[at].ignored.push(Ignored {
                    what: function.name.clone(),
                    reason,
                });
            }
        }
    }
}

fn conclude(patch: Patch, report: BuildReport) -> Result<(Patch, BuildReport), BuildError> {
    if report.refused().next().is_some() {
        return Err(BuildError::Refused(Box::new(report)));
    }
    if report.is_empty() {
        return Err(BuildError::NothingChanged(Box::new(report)));
    }
    check::check(&patch)?;
    Ok((patch, report))
}
