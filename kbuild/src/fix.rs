//! The diff of a fix in a tree: which files it makes a difference to, and their objects without and with it.
//!
//! ```text
//! Diff ─ affected ─ compile ─ patch ─ compile ─ those that differ ─ compile wide ─ orc ─ restore ─ Built
//! ```

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::affected::{self, Affected};
use crate::apply::Moved;
use crate::diff::Diff;
use crate::error::{At, BuildError};
use crate::orc::{Maker, Orc};
use crate::tree::{Compiled, LINKER_SCRIPT, Tree};
use crate::{code, wide};

/// One file before and after the fix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The file, relative to the root of the source.
    pub file: PathBuf,
    /// Before.
    pub old: Vec<u8>,
    /// After.
    pub new: Vec<u8>,
    /// After, compiled such that each static branch takes five bytes and nothing else differs; `None` where there is none.
    /// The guest has the short ones, so old and new are compared without it; it is what new code is taken from.
    pub wide: Option<Vec<u8>>,
    /// How to unwind from the code of that, or of `new` where there is none.
    pub orc: Orc,
    /// The module that it is linked into; `None` for vmlinux.
    pub module: Option<String>,
}

/// The objects of a diff.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// One for each file that may differ, sorted: those that the diff changes, and those that include what it changes and
    /// came out otherwise. At least one.
    pub pairs: Vec<Pair>,
    /// What of the diff makes no difference.
    pub left_out: Vec<LeftOut>,
    /// What of the diff stands elsewhere in this source than it says.
    pub moved: Vec<Moved>,
}

/// A file of the diff, or one that includes it, that makes no difference to the running kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Which.
    pub file: PathBuf,
    /// Why.
    pub why: Why,
}

/// Why a file makes no difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// Documentation, tools, other processors.
    #[error("no part of a kernel for x86")]
    NoPart,
    /// The configuration leaves it out.
    #[error("not built by this configuration")]
    NotBuilt,
    /// A header, or a file that is only included.
    #[error("nothing that this configuration builds includes it")]
    NotIncluded,
    /// Boot code and such, which includes something that is changed.
    #[error(
        "includes what is changed, but runs before the kernel or in user space: it stays as it is"
    )]
    Apart,
    /// It includes something that is changed.
    #[error("includes what is changed, and comes out the same")]
    Same,
}

/// A failure with the change that there was none of without it: the change is the reason.
fn of_change(error: BuildError) -> BuildError {
    let BuildError::Failed { said, .. } = error else {
        return error;
    };
    let errors: Vec<_> = said
        .lines()
        .filter(|line| line.contains("error:"))
        .collect();
    BuildError::DoesNotCompile(match errors.is_empty() {
        true => said,
        false => errors.join("\n"),
    })
}

/// What the compiler of assembly is told of types; all of it is made with these (Linux v6.12 Kbuild).
const OFFSETS: [&str; 2] = [
    "include/generated/asm-offsets.h",
    "include/generated/bounds.h",
];

impl Tree {
    /// Compiles the files that a diff makes a difference to, without and with it; at most so many for the sake of what they
    /// include. What the change only moves keeps its line numbers. `step` is told what takes long.
    ///
    /// # Errors
    /// [`BuildError`], among others [`BuildError::DoesNotApply`].
    pub fn compile_both(
        &self,
        diff: &Diff,
        most: usize,
        step: &dyn Fn(&str),
    ) -> Result<Built, BuildError> {
        self.has_files_of(diff)?;
        let affected = affected::by(self, diff, most, step)?;
        let files = affected.files();
        step(&format!(
            "compiling without the change: {} files",
            files.len()
        ));
        for folder in &affected.folders {
            self.shadow.unfold(folder)?;
        }
        let old = self.compile(&files)?;
        let made = self.changed(diff, &affected, &old, step);
        let restored = self.shadow.restore();
        let built = made?;
        restored?;
        Ok(built)
    }

    /// Goes on with the changed source; leaves it changed.
    fn changed(
        &self,
        diff: &Diff,
        affected: &Affected,
        old: &[Compiled],
        step: &dyn Fn(&str),
    ) -> Result<Built, BuildError> {
        let files = affected.files();
        let offsets = self.offsets();
        let linker_script = || match affected.linker_script {
            true => self.linker_script().map(Some),
            false => Ok(None),
        };
        let script = linker_script()?;
        let moved = self.apply(diff)?;
        step(&format!("compiling with the change: {} files", files.len()));
        let new = self.compile(&files).map_err(of_change)?;
        let used = self.made_of(&files, diff)?;
        if linker_script().map_err(of_change)? != script {
            return Err(BuildError::LinkedOtherwise(LINKER_SCRIPT));
        }
        let other = offsets.iter().zip(self.offsets());
        let other = other.zip(OFFSETS).find(|((old, new), _)| *old != new);
        if let Some((_, name)) = other {
            return Err(BuildError::Offsets(name));
        }
        let mut left_out = affected.left_out.clone();
        let told: Vec<_> = left_out.iter().map(|left| left.file.clone()).collect();
        let unused = diff.files().into_iter().filter(|file| !used.contains(file));
        let unused = unused
            .map(Path::to_owned)
            .filter(|file| !told.contains(file));
        left_out.extend(unused.map(|file| LeftOut {
            file,
            why: Why::NotIncluded,
        }));
        let mut pairs = Vec::new();
        for (file, (old, new)) in files.into_iter().zip(old.iter().zip(new)) {
            if affected.includers.contains(&file) && code::is_same(&old.object, &new.object) {
                let why = Why::Same;
                left_out.push(LeftOut { file, why });
                continue;
            }
            pairs.push(Pair {
                file,
                old: old.object.clone(),
                new: new.object,
                wide: None,
                orc: Orc::Within,
                module: old.module.clone(),
            });
        }
        if pairs.is_empty() {
            return Err(BuildError::AllTheSame(affected.includers.len()));
        }
        self.add_wide(&mut pairs, step)?;
        self.add_orc(&mut pairs)?;
        Ok(Built {
            pairs,
            left_out,
            moved,
        })
    }

    /// Tells from which words all assembly is made.
    fn offsets(&self) -> [Option<Vec<u8>>; 2] {
        OFFSETS.map(|name| fs::read(self.out.join(name)).ok())
    }

    /// Compiles what has static branches once more with wide ones.
    fn add_wide(&self, pairs: &mut [Pair], step: &dyn Fn(&str)) -> Result<(), BuildError> {
        let branching = pairs
            .iter_mut()
            .filter(|pair| wide::has_branches(&pair.new));
        let branching: Vec<_> = branching.collect();
        let files: Vec<_> = branching.iter().map(|pair| pair.file.clone()).collect();
        step("compiling with wide static branches");
        let mut made = self.compile_wide(&files)?;
        for pair in branching {
            pair.wide = made.remove(&pair.file);
        }
        Ok(())
    }

    /// Has unwind data made for the objects that new code is taken from.
    fn add_orc(&self, pairs: &mut [Pair]) -> Result<(), BuildError> {
        for pair in pairs {
            pair.orc = self.orc(pair.wide.as_ref().unwrap_or(&pair.new))?;
        }
        Ok(())
    }

    /// The unwind data of an object compiled here.
    ///
    /// # Errors
    /// The configuration cannot be read.
    pub fn orc(&self, object: &[u8]) -> Result<Orc, BuildError> {
        let config = self.out.join(".config");
        let config = fs::read_to_string(&config).at(&config)?;
        Ok(Maker::of(&self.out, &config).make(object))
    }

    /// Compiles files as they stand, but for the header of static branches.
    fn compile_wide(&self, files: &[PathBuf]) -> Result<HashMap<PathBuf, Vec<u8>>, BuildError> {
        if files.is_empty() {
            return Ok(HashMap::new());
        }
        let header = Path::new(wide::HEADER);
        let at = self.shadow.root().join(header);
        let text = fs::read_to_string(&at).at(&at)?;
        let text = wide::header(&text).ok_or_else(|| BuildError::NoBranches(header.to_owned()))?;
        self.shadow.stand_in(header, &text)?;
        let made = self.compile(files);
        let back = self.shadow.stand_back(header);
        let objects = made?.into_iter().map(|made| made.object);
        let made: HashMap<_, _> = files.iter().cloned().zip(objects).collect();
        back?;
        for (file, object) in &made {
            wide::check(&file.display().to_string(), object)?;
        }
        Ok(made)
    }
}
