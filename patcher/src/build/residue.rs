//! Code and data that belong to no function and no variable: what assembly has at plain labels, and what lies behind a variable.
//! No reference can bring it along by a name and no function stands for it, so a difference there is refused. Owns finding and
//! comparing it; padding does not count.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Decoder, DecoderOptions, Mnemonic};

use super::key::{self, Content, Names};
use super::policy;
use super::reference::references_in_code;
use super::report::{FileReport, Refused};
use super::side::Side;
use crate::object::{Section, SectionId};

/// What belongs to nobody, in the order of each section's name.
type Residue = BTreeMap<String, Vec<Content>>;

/// Records every section in which it differs.
pub(super) fn compare(old: &Side, new: &Side, new_names: &Names, report: &mut FileReport) {
    let (before, after) = (of(old, &Names::default()), of(new, new_names));
    let sections: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    for section in sections {
        if before.get(section) == after.get(section) {
            continue;
        }
        report.refused.push(Refused {
            name: String::new(),
            section: section.clone(),
            offset: None,
            reason: "what belongs to no function and no variable differs there (assembly at plain labels), and cannot be replaced"
                .to_owned(),
        });
    }
}

fn of(side: &Side, names: &Names) -> Residue {
    let mut found = Residue::new();
    for (id, section) in side.object.sections_with_ids() {
        if !is_compared(side, id, section) {
            continue;
        }
        let gaps = gaps(side, id, section).into_iter();
        let contents: Vec<_> = gaps
            .filter_map(|gap| match section.flags.exec {
                true => code(side, names, id, gap),
                false => data(side, names, id, gap),
            })
            .collect();
        if !contents.is_empty() {
            found
                .entry(section.name.clone())
                .or_default()
                .extend(contents);
        }
    }
    found
}

/// Sections without any variable are compared as a whole elsewhere, pools by what refers to them, and what
/// `static_cpu_has` does before alternatives are applied by its alternatives.
fn is_compared(side: &Side, id: SectionId, section: &Section) -> bool {
    let flags = section.flags;
    let pool = flags.merge || section.name.starts_with(".rodata");
    let is_home = flags.exec || !side.inventory.variables_in(id).is_empty() && !pool;
    flags.alloc
        && !flags.zeroes
        && is_home
        && section.name != policy::AUXILIARY
        && !policy::is_no_data(&section.name)
        && !policy::is_init(&section.name)
}

/// The parts of a section that nothing covers.
fn gaps(side: &Side, id: SectionId, section: &Section) -> Vec<(u64, u64)> {
    let functions = side.inventory.functions.iter();
    let functions = functions.filter(|it| it.section == id);
    let variables = side.inventory.variables_in(id).iter();
    let variables = variables.map(|index| side.variable(*index));
    let mut covered: Vec<_> = functions
        .map(|it| (it.start, it.end))
        .chain(variables.map(|it| (it.start, it.start.saturating_add(it.size))))
        .collect();
    covered.sort_unstable();
    covered.push((section.size, section.size));
    let (mut gaps, mut at) = (Vec::new(), 0);
    for (start, end) in covered {
        if at < start {
            gaps.push((at, start.min(section.size)));
        }
        at = at.max(end);
    }
    gaps
}

/// Code but for what only fills: nops and traps that nothing leads to.
fn code(side: &Side, names: &Names, id: SectionId, (start, end): (u64, u64)) -> Option<Content> {
    let bytes = side.bytes(id, start, end)?;
    let mut decoder = Decoder::new(64, bytes, DecoderOptions::NONE);
    let fills = |mnemonic| matches!(mnemonic, Mnemonic::Nop | Mnemonic::Int3);
    let is_padding = decoder.iter().all(|it| fills(it.mnemonic()));
    let references = references_in_code(&side.object, &side.inventory, id, (start, end));
    (!is_padding || !references.is_empty()).then(|| key::masked(side, names, bytes, &references))
}

fn data(side: &Side, names: &Names, id: SectionId, (start, end): (u64, u64)) -> Option<Content> {
    let content = key::data(side, names, id, (start, end));
    let is_padding = content.bytes.iter().all(|byte| *byte == 0) && content.fields.is_empty();
    (!is_padding).then_some(content)
}
