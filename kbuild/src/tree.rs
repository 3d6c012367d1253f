//! A source made ready to compile single files of it, with a configuration and the compiler it names. Kept in the
//! cache: making it ready takes a minute, compiling one file then seconds.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::command;
use crate::compiler::Compiler;
use crate::diff::Diff;
use crate::error::{At, BuildError};
use crate::lines;
use crate::shadow::Shadow;
use crate::wide;

/// What is added to the kernel's own flags: each function and each datum in a section of its own, so that a change is
/// seen where it is.
pub const FLAGS: &str = "KCFLAGS=-ffunction-sections -fdata-sections";

/// Characters of the digest that names a tree in the cache.
const NAME: usize = 16;

/// See the module.
#[derive(Debug)]
pub struct Tree {
    source: PathBuf,
    shadow: Shadow,
    out: PathBuf,
    compiler: Compiler,
    /// Held as long as the tree is: two commands in one tree would compile each other's source.
    _lock: fs::File,
}

/// What became of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The object's bytes.
    pub object: Vec<u8>,
    /// The module that it is linked into; `None` for vmlinux.
    pub module: Option<String>,
}

/// What became of one file with the change.
struct Changed {
    object: Vec<u8>,
    wide: Option<Vec<u8>>,
}

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
    /// The module that it is linked into; `None` for vmlinux.
    pub module: Option<String>,
}

/// The objects of a diff.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// One for each file that is compiled, sorted.
    pub pairs: Vec<Pair>,
    /// What of the diff makes no difference.
    pub left_out: Vec<LeftOut>,
}

/// A file of the diff, or one that includes it, that is not compiled or makes no difference.
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
}

impl Tree {
    /// Makes a tree of this source and configuration ready under `cache`, or takes the one made before. `step` is told
    /// what takes long.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn ready(
        source: &Path,
        config: &str,
        cache: &Path,
        step: &dyn Fn(&str),
    ) -> Result<Self, BuildError> {
        for needed in ["Makefile", "Kbuild", "scripts"] {
            if !source.join(needed).exists() {
                return Err(BuildError::NoSource(source.to_owned(), needed));
            }
        }
        let source = source.canonicalize().at(source)?;
        let compiler = Compiler::of(config)?;
        let root = cache.join("kbuild").join(name(&source, config, &compiler)?);
        fs::create_dir_all(&root).at(&root)?;
        let lock = root.join("lock");
        let lock = fs::File::create(&lock)
            .and_then(|file| file.lock().map(|()| file))
            .at(&lock)?;
        let tree = Self {
            shadow: Shadow::before(&source, &root.join("source"))?,
            source,
            out: root.join("out"),
            compiler,
            _lock: lock,
        };
        let ready = root.join("ready");
        if !ready.exists() {
            step("making the source ready to be compiled (a minute or two, once)");
            tree.prepare(config)?;
            fs::write(&ready, "").at(&ready)?;
        }
        Ok(tree)
    }

    fn prepare(&self, config: &str) -> Result<(), BuildError> {
        fs::create_dir_all(&self.out).at(&self.out)?;
        let to = self.out.join(".config");
        fs::write(&to, config).at(&to)?;
        self.make(&["olddefconfig"])?;
        self.make(&["prepare"])
    }

    /// What the compiler says of itself.
    #[must_use]
    pub fn compiler(&self) -> &str {
        &self.compiler.version
    }

    /// Compiles these files as they are in the source, in their order.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn compile(&self, files: &[PathBuf]) -> Result<Vec<Compiled>, BuildError> {
        self.compile_as_they_stand(files)
    }

    /// Compiles the files that a diff changes, without and with it. What the change only moves keeps its line numbers.
    ///
    /// # Errors
    /// [`BuildError`], among others [`BuildError::DoesNotApply`].
    pub fn compile_both(&self, diff: &Diff, step: &dyn Fn(&str)) -> Result<Built, BuildError> {
        let files = diff.compiled();
        step("compiling without the change");
        let old = self.compile(files)?;
        let new = self.compile_changed(diff, step);
        self.shadow.restore()?;
        let sides = files.iter().zip(old).zip(new?);
        let pairs = sides.map(|((file, old), new)| Pair {
            file: file.clone(),
            old: old.object,
            new: new.object,
            wide: new.wide,
            module: old.module,
        });
        let left_out = diff.ignored().iter().map(|file| LeftOut {
            file: file.clone(),
            why: Why::NoPart,
        });
        Ok(Built {
            pairs: pairs.collect(),
            left_out: left_out.collect(),
        })
    }

    /// The objects of the changed source, each with the one whose static branches are wide.
    fn compile_changed(
        &self,
        diff: &Diff,
        step: &dyn Fn(&str),
    ) -> Result<Vec<Changed>, BuildError> {
        step("compiling with the change");
        self.apply(diff)?;
        let files = diff.compiled();
        let new = self.compile_as_they_stand(files)?;
        let branching = files.iter().zip(&new);
        let branching = branching.filter(|(_, new)| wide::has_branches(&new.object));
        let branching: Vec<_> = branching.map(|(file, _)| file.clone()).collect();
        step("compiling with wide static branches");
        let mut made = self.compile_wide(&branching)?;
        let changed = files.iter().zip(new).map(|(file, new)| Changed {
            object: new.object,
            wide: made.remove(file),
        });
        Ok(changed.collect())
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
        let made = self.compile_as_they_stand(files);
        self.shadow.stand_back(header)?;
        let objects = made?.into_iter().map(|made| made.object);
        let made: HashMap<_, _> = files.iter().cloned().zip(objects).collect();
        for (file, object) in &made {
            wide::check(&file.display().to_string(), object)?;
        }
        Ok(made)
    }

    /// Applies the diff to the shadow, whose files of it are the shadow's own.
    fn apply(&self, diff: &Diff) -> Result<(), BuildError> {
        let files = diff.compiled().iter().chain(diff.ignored());
        // The source may come without its documentation; `patch` would want it.
        let files = files.filter(|file| self.shadow.original(file).is_file());
        self.shadow.change(&files.cloned().collect::<Vec<_>>())?;
        let text = self.out.join("fix.patch");
        fs::write(&text, diff.text()).at(&text)?;
        let mut patch = Command::new("patch");
        patch.args([
            "-p1",
            "--forward",
            "--batch",
            "--no-backup-if-mismatch",
            // Lines of a hunk that are not there show that the source is another one.
            "--fuzz=0",
            "--reject-file=-",
            "-i",
        ]);
        let output = command::finish(patch.arg(&text).current_dir(self.shadow.root()))?;
        if !output.status.success() {
            return Err(BuildError::DoesNotApply {
                source_dir: self.source.clone(),
                said: command::last_words(&output),
            });
        }
        diff.compiled()
            .iter()
            .try_for_each(|file| self.keep_lines(file))
    }

    /// Gives what stands below the changes of a file of C the numbers of its lines back.
    fn keep_lines(&self, file: &Path) -> Result<(), BuildError> {
        if file.extension().is_none_or(|ending| ending != "c") {
            return Ok(());
        }
        let (from, to) = (self.source.join(file), self.shadow.root().join(file));
        let (old, new) = (fs::read(&from).at(&from)?, fs::read(&to).at(&to)?);
        fs::write(&to, lines::kept(&old, &new)).at(&to)
    }

    fn compile_as_they_stand(&self, files: &[PathBuf]) -> Result<Vec<Compiled>, BuildError> {
        let objects: Vec<_> = files.iter().map(|file| file.with_extension("o")).collect();
        for object in &objects {
            let made = self.out.join(object);
            // A time stamp says nothing after a change was taken back.
            if made.exists() {
                fs::remove_file(&made).at(&made)?;
            }
        }
        let names = objects.iter().map(|object| object.to_string_lossy());
        let targets: Vec<_> = names.collect();
        let targets: Vec<&str> = [FLAGS]
            .into_iter()
            .chain(targets.iter().map(AsRef::as_ref))
            .collect();
        self.make(&targets)?;
        objects.iter().map(|object| self.compiled(object)).collect()
    }

    fn compiled(&self, object: &Path) -> Result<Compiled, BuildError> {
        let (made, by) = (self.out.join(object), self.out.join(made_by(object)));
        let by = fs::read_to_string(&by).at(&by)?;
        Ok(Compiled {
            object: fs::read(&made).at(&made)?,
            module: module(&by),
        })
    }

    fn make(&self, targets: &[&str]) -> Result<(), BuildError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut make = Command::new("make");
        make.args(["-s", &format!("-j{cores}")])
            .arg(format!("CC={}", self.compiler.program))
            .arg(format!("HOSTCC={}", self.compiler.program))
            .arg(format!("O={}", self.out.display()))
            .args(targets)
            // Flags of whoever calls us are not the kernel's.
            .env_remove("MAKEFLAGS")
            .env_remove("KCFLAGS")
            .current_dir(self.shadow.root());
        let what = format!("the kernel's own `make {}`", targets.join(" "));
        command::succeed(&what, &mut make).map(drop)
    }
}

/// A tree's name in the cache: another for every source, configuration and compiler.
fn name(source: &Path, config: &str, compiler: &Compiler) -> Result<String, BuildError> {
    let makefile = source.join("Makefile");
    let makefile = fs::read(&makefile).at(&makefile)?;
    let mut digest = Sha256::new();
    let path = source.as_os_str().as_encoded_bytes();
    for part in [
        path,
        &makefile,
        config.as_bytes(),
        compiler.version.as_bytes(),
        FLAGS.as_bytes(),
    ] {
        digest.update(part.len().to_le_bytes());
        digest.update(part);
    }
    let hex: String = digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(hex.get(..NAME).unwrap_or_default().to_owned())
}

/// The file in which the kernel's build keeps how it made an object.
fn made_by(object: &Path) -> PathBuf {
    let name = object.file_name().unwrap_or_default().to_string_lossy();
    object.with_file_name(format!(".{name}.cmd"))
}

/// The module that an object was compiled for (Linux v6.12 scripts/Makefile.lib, `modkern_cflags`, `modname_flags`).
fn module(made_by: &str) -> Option<String> {
    let mut words = made_by.lines().next()?.split_ascii_whitespace();
    let name = |word: &str| {
        let name = word.strip_prefix("-DKBUILD_MODNAME=")?;
        Some(name.trim_matches(['\'', '"', '\\']).to_owned())
    };
    words
        .clone()
        .any(|word| word == "-DMODULE")
        .then(|| words.find_map(name))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_is_read_from_how_an_object_was_made() {
        let built_in = "savedcmd_fs/a.o := gcc-12 -c -DKBUILD_MODFILE='\"fs/a\"' -DKBUILD_MODNAME='\"a\"' -o fs/a.o ../fs/a.c\n";
        assert_eq!(module(built_in), None);
        let of_module = built_in
            .replace("-c ", "-c -DMODULE ")
            .replace("NAME='\"a\"'", "NAME='\"ext4\"'");
        assert_eq!(module(&of_module).as_deref(), Some("ext4"));
        assert_eq!(module(""), None);
        assert_eq!(made_by(Path::new("fs/a.o")), Path::new("fs/.a.o.cmd"));
    }

    #[test]
    fn a_folder_that_is_no_source_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let error = Tree::ready(folder.path(), "", folder.path(), &|_| {}).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("no kernel source: it has no Makefile"),
            "{error}"
        );
    }
}
