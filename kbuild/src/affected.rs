//! Which files a diff makes a difference to: those it changes and the configuration builds, and those that include what it
//! changes. Compiles nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::diff::{Diff, Part};
use crate::error::BuildError;
use crate::fix::{LeftOut, Why};
use crate::includes::Includes;
use crate::tree::Tree;

/// So many times as many files as may be compiled are asked about; of more than those too many are built in any
/// configuration worth the name, and asking takes long.
const ASKED: usize = 64;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Affected {
    /// Changed, and compiled.
    changed: BTreeSet<PathBuf>,
    /// Not changed, but may include what is.
    pub(crate) includers: BTreeSet<PathBuf>,
    /// Folders of all that stands between a changed header and what is compiled.
    pub(crate) folders: BTreeSet<PathBuf>,
    /// What makes no difference.
    pub(crate) left_out: Vec<LeftOut>,
}

impl Affected {
    /// All that is to be compiled, sorted.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        self.changed.union(&self.includers).cloned().collect()
    }

    fn leave_out(&mut self, file: PathBuf, why: Why) {
        self.left_out.push(LeftOut { file, why });
    }
}

/// Finds them.
///
/// # Errors
/// Too many include something; nothing of it is built.
pub(crate) fn by(
    tree: &Tree,
    diff: &Diff,
    most: usize,
    step: &dyn Fn(&str),
) -> Result<Affected, BuildError> {
    let mut affected = Affected::default();
    for file in diff.ignored() {
        affected.leave_out(file.clone(), Why::NoPart);
    }
    step("asking the kernel's makefiles what this configuration builds");
    let built = tree.configured(diff.compiled())?;
    let mut included: Vec<PathBuf> = diff.headers().to_vec();
    for file in diff.compiled() {
        let is_built = built.builds(file);
        if is_built {
            affected.changed.insert(file.clone());
        }
        if !is_built || tree.may_be_included(file)? {
            included.push(file.clone());
        }
    }
    if !included.is_empty() {
        step("looking which files include what is changed");
        let includes = Includes::scan(&tree.source)?;
        for file in included {
            add_includers(tree, &includes, file, most, &mut affected)?;
        }
    }
    if affected.changed.is_empty() && affected.includers.is_empty() {
        let files = affected.left_out.into_iter().map(|left| left.file);
        return Err(BuildError::NotBuilt(files.collect()));
    }
    Ok(affected)
}

/// Adds the files that may include this one.
fn add_includers(
    tree: &Tree,
    includes: &Includes,
    file: PathBuf,
    most: usize,
    affected: &mut Affected,
) -> Result<(), BuildError> {
    let includers = includes.all_includers(&file);
    let of_part = |part| {
        includers
            .iter()
            .filter(move |it| Part::of(it) == part)
            .cloned()
    };
    let (apart, sources) = (of_part(Part::Apart), of_part(Part::Source));
    let sources: Vec<_> = sources.collect();
    enough(&file, &sources, most.saturating_mul(ASKED), most)?;
    let built = tree.configured(&sources)?;
    let sources = sources.into_iter().filter(|source| built.builds(source));
    let sources: Vec<_> = sources.collect();
    for source in apart.filter(|it| it.extension().is_some_and(|ending| ending != "h")) {
        affected.leave_out(source, Why::Apart);
    }
    if sources.is_empty() && affected.changed.contains(&file) {
        return Ok(());
    }
    if sources.is_empty() {
        let why = match Part::of(&file) {
            Part::Header => Why::NotIncluded,
            _ => Why::NotBuilt,
        };
        affected.leave_out(file, why);
        return Ok(());
    }
    for source in sources {
        if !affected.changed.contains(&source) {
            affected.includers.insert(source);
        }
    }
    let all: Vec<_> = affected.includers.iter().cloned().collect();
    enough(&file, &all, most, most)?;
    let folders = includers.iter().filter_map(|it| it.parent());
    affected.folders.extend(folders.map(Path::to_owned));
    Ok(())
}

/// Refuses more than `limit` files that include one.
fn enough(file: &Path, by: &[PathBuf], limit: usize, most: usize) -> Result<(), BuildError> {
    match by.len() {
        count if count > limit => Err(BuildError::TooMany {
            file: file.to_owned(),
            count,
            most,
            first: by.iter().take(5).cloned().collect(),
        }),
        _ => Ok(()),
    }
}
