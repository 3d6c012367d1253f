//! Which files a diff makes a difference to: those it changes and the configuration builds, and those that include what it
//! changes. Compiles nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::diff::{APART, Diff, DiffError, Part};
use crate::error::BuildError;
use crate::fix::{LeftOut, Why};
use crate::includes::Includes;
use crate::tree::{LINKER_SCRIPT, Tree};

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
    /// Whether the script by which the kernel is linked may include what is changed.
    pub(crate) linker_script: bool,
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
    refuse(diff.compiled().iter().filter(|file| built.runs(file)), RUN)?;
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
    // Programs include headers of the kernel beside them by their names; others are those of the C library.
    let runs = sources
        .iter()
        .filter(|by| built.runs(by) && includes.is_beside(by, &file));
    refuse(runs.map(|_| &file), RUN)?;
    affected.linker_script |=
        includers.contains(&Path::new(LINKER_SCRIPT).with_added_extension("S"));
    let sources = sources.into_iter().filter(|source| built.builds(source));
    let sources: Vec<_> = sources.collect();
    let mut apart = apart.filter(|it| it.extension().is_some_and(|ending| ending != "h"));
    if sources.is_empty() && !affected.changed.contains(&file) {
        refuse(apart.next().map(|_| &file), APART)?;
    }
    // Through others nearly everything includes nearly everything.
    let direct = includes
        .includers(&file)
        .collect::<BTreeSet<_>>()
        .into_iter();
    for by in direct.filter(|by| Part::of(by) == Part::Apart) {
        affected.leave_out(by.to_owned(), Why::Apart);
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

/// Why files are refused that the build runs.
const RUN: &str = "the kernel's build runs this to make other files of it, which cannot change yet";

/// Refuses files, if there are any.
fn refuse<'a>(
    files: impl IntoIterator<Item = &'a PathBuf>,
    why: &'static str,
) -> Result<(), DiffError> {
    let files: Vec<_> = files.into_iter().cloned().collect();
    match files.is_empty() {
        true => Ok(()),
        false => Err(DiffError::NotYet { files, why }),
    }
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
