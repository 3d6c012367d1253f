//! A source made ready to compile single files of it, with a configuration and the compiler it names. Kept in the
//! cache: making it ready takes a minute, compiling one file then seconds.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sha2::{Digest, Sha256};

use crate::command;
use crate::compiler::Compiler;
use crate::config;
use crate::configured::{self, Configured, Elsewhere};
use crate::error::{At, BuildError};
use crate::fresh::Seen;
use crate::headers;
use crate::includes::{self, Includes};
use crate::lock::Lock;
use crate::made;
use crate::publish;
use crate::shadow::Shadow;

/// What is added to the kernel's own flags: each function and each datum in a section of its own, so that a change is
/// seen where it is.
pub const FLAGS: &str = "KCFLAGS=-ffunction-sections -fdata-sections";

/// The script by which the kernel is linked, in the folder of what is made; its source has `.S` behind.
pub(crate) const LINKER_SCRIPT: &str = "arch/x86/kernel/vmlinux.lds";

/// Characters of the digest that names a tree in the cache.
const NAME: usize = 16;

/// See the module.
#[derive(Debug)]
pub struct Tree {
    pub(crate) source: PathBuf,
    pub(crate) shadow: Shadow,
    pub(crate) out: PathBuf,
    compiler: Compiler,
    /// Where the compiler finds the headers that vmpatch brings.
    headers: PathBuf,
    /// Names of sources that others include, a line each: found when the tree was made, for reading a whole source takes long.
    included: PathBuf,
    /// What the makefiles of other folders build.
    elsewhere: Elsewhere,
    /// Held as long as the tree is, and by what runs in it: two commands in one tree would compile each other's source.
    lock: Lock,
}

/// What became of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The object's bytes.
    pub object: Vec<u8>,
    /// The module that it is linked into; `None` for vmlinux.
    pub module: Option<String>,
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
        same_version(&source, config)?;
        let compiler = Compiler::of(config)?;
        let root = cache.join("kbuild").join(name(&source, config, &compiler)?);
        fs::create_dir_all(&root).at(&root)?;
        let lock = Lock::take(&root.join("lock"), &|| {
            step(
                "waiting until another build of this kernel, or what a killed one left running, ends",
            );
        })?;
        let mut tree = Self {
            shadow: Shadow::before(&source, &root.join("source"))?,
            source,
            out: root.join("out"),
            headers: root.join("include"),
            included: root.join("included"),
            elsewhere: Elsewhere::default(),
            compiler,
            lock,
        };
        headers::write(&tree.headers)?;
        let ready = root.join("ready");
        // Whoever ran the kernel's make there by hand may have changed what was settled.
        if !ready.exists() || tree.agrees(config).is_err() {
            step("making the source ready to be compiled (a minute or two, once)");
            if let Err(error) = tree.prepare(config) {
                // Of no use to anybody; that it cannot be removed would say less than why.
                let _ = clear(&root);
                return Err(error);
            }
            fs::write(&ready, "").at(&ready)?;
        }
        let seen = Seen::of(&tree.source)?;
        tree.renew_included(&seen, step)?;
        tree.elsewhere = tree.renew_elsewhere(&root.join("elsewhere"), &seen, step)?;
        for folder in tree.elsewhere.folders() {
            tree.shadow.unfold(&folder)?;
        }
        Ok(tree)
    }

    /// Brings the names of sources that others include up to date.
    fn renew_included(&self, seen: &Seen, step: &dyn Fn(&str)) -> Result<(), BuildError> {
        let kept = fs::read_to_string(&self.included).unwrap_or_default();
        let (head, kept) = kept.split_once('\n').unwrap_or_default();
        let names: BTreeSet<String> = match seen.changed_since(head) {
            Some(changed) if changed.is_empty() => return Ok(()),
            // What is named no longer does no harm.
            Some(changed) => {
                let named = includes::sources_named_in(&self.source, &changed)?;
                kept.lines().map(str::to_owned).chain(named).collect()
            }
            None => {
                step("looking which files include others");
                Includes::scan(&self.source)?.included_sources()
            }
        };
        let lines = [seen.files()].into_iter().chain(names);
        let text = Vec::from_iter(lines).join("\n");
        publish::file(&self.included, text.as_bytes())
    }

    /// What the makefiles of other folders build, as kept or asked anew.
    fn renew_elsewhere(
        &self,
        kept: &Path,
        seen: &Seen,
        step: &dyn Fn(&str),
    ) -> Result<Elsewhere, BuildError> {
        let text = fs::read_to_string(kept).unwrap_or_default();
        if text.lines().next() == Some(&seen.makefiles()) {
            return Ok(Elsewhere::read(&text));
        }
        step("looking which folders build files of others");
        let found = self.find_elsewhere()?;
        let text = format!("{}\n{}", seen.makefiles(), found.text());
        publish::file(kept, text.as_bytes())?;
        Ok(found)
    }

    fn prepare(&self, config: &str) -> Result<(), BuildError> {
        fs::create_dir_all(&self.out).at(&self.out)?;
        let to = self.out.join(".config");
        fs::write(&to, config).at(&to)?;
        self.make(&["olddefconfig"])?;
        self.agrees(config)?;
        self.make(&["prepare"]).map(drop)
    }

    /// That the kernel's own tools take the configuration as it is.
    fn agrees(&self, config: &str) -> Result<(), BuildError> {
        let at = self.out.join(".config");
        let settled = fs::read_to_string(&at).at(&at)?;
        match config::changed(config, &settled) {
            changed if changed.is_empty() => Ok(()),
            changed => Err(BuildError::ConfigChanges(changed)),
        }
    }

    /// What the compiler says of itself.
    #[must_use]
    pub fn compiler(&self) -> &str {
        &self.compiler.version
    }

    /// Compiles these files as they stand in the tree, in their order: as they are in the source, unless a change is made.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn compile(&self, files: &[PathBuf]) -> Result<Vec<Compiled>, BuildError> {
        if files.is_empty() {
            // Without a target, make would build the whole kernel.
            return Ok(Vec::new());
        }
        let objects: Vec<_> = files.iter().map(|file| file.with_extension("o")).collect();
        for object in &objects {
            self.shadow
                .unfold(object.parent().unwrap_or(Path::new("")))?;
            let made = self.out.join(object);
            // A time stamp says nothing after a change was taken back.
            if made.exists() {
                fs::remove_file(&made).at(&made)?;
            }
        }
        // Some folders of an architecture are reached from its own folder as well as from the root, for the same object at the same
        // time (Linux v6.12 Kbuild, $(ARCH_LIB); scripts/Makefile.build, single-subdirs). One after another, the root's way is the
        // last, which is that of the kernel's build.
        let (arch, others): (Vec<&PathBuf>, _) =
            files.iter().partition(|file| file.starts_with("arch"));
        let flags = format!("{FLAGS} -I{}", self.headers.display());
        for (cores, files) in [(1, arch), (cores(), others)] {
            let targets = files.iter().map(|file| self.elsewhere.target(file));
            let targets: Vec<_> = targets.map(|it| it.display().to_string()).collect();
            if !targets.is_empty() {
                let words = [flags.as_str()]
                    .into_iter()
                    .chain(targets.iter().map(AsRef::as_ref));
                self.make_by(cores, &words.collect::<Vec<_>>())?;
            }
        }
        objects.iter().map(|object| self.compiled(object)).collect()
    }

    /// Makes the script by which the kernel is linked, as the tree stands.
    pub(crate) fn linker_script(&self) -> Result<Vec<u8>, BuildError> {
        let made = self.out.join(LINKER_SCRIPT);
        if made.exists() {
            fs::remove_file(&made).at(&made)?;
        }
        self.make(&[LINKER_SCRIPT])?;
        fs::read(&made).at(&made)
    }

    fn compiled(&self, object: &Path) -> Result<Compiled, BuildError> {
        let made = self.out.join(object);
        Ok(Compiled {
            object: fs::read(&made).at(&made)?,
            module: made::module(&self.made_by(object)?),
        })
    }

    /// Whether a file that is compiled may be included by another one too, as fs/binfmt_elf.c is.
    pub(crate) fn may_be_included(&self, file: &Path) -> Result<bool, BuildError> {
        let names = fs::read_to_string(&self.included).at(&self.included)?;
        let name = file.file_name().unwrap_or_default();
        Ok(names.lines().any(|line| name == line))
    }

    /// Which files the makefiles of other folders build.
    fn find_elsewhere(&self) -> Result<Elsewhere, BuildError> {
        let folders = configured::reaching_out(&self.source)?.into_iter();
        let within = folders.map(|folder| folder.join("any.c"));
        Ok(Elsewhere::read(&self.ask(&within.collect::<Vec<_>>())?))
    }

    /// Which of these files the configuration builds.
    pub(crate) fn configured(&self, files: &[PathBuf]) -> Result<Configured, BuildError> {
        Ok(Configured::read(&self.ask(files)?, &self.elsewhere))
    }

    /// What the kernel's makefiles say of the folders of these files.
    fn ask(&self, files: &[PathBuf]) -> Result<String, BuildError> {
        let question = self.out.join("vmpatch.mk");
        fs::write(&question, configured::question(files)).at(&question)?;
        let read = format!("--eval=include {}", question.display());
        let answer = self.make(&[&read, configured::GOAL])?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// What the kernel's own build says, or why it failed.
    fn make(&self, targets: &[&str]) -> Result<Vec<u8>, BuildError> {
        self.make_by(cores(), targets)
    }

    /// The same, by so many processes at once.
    fn make_by(&self, cores: usize, targets: &[&str]) -> Result<Vec<u8>, BuildError> {
        let mut make = command::plain("make");
        make.args(["-s", &format!("-j{cores}")])
            .arg(format!("CC={}", self.compiler.program))
            .arg(format!("HOSTCC={}", self.compiler.program))
            .arg(format!("O={}", self.out.display()))
            .args(targets)
            .current_dir(self.shadow.root());
        let what = format!("the kernel's own `make {}`", targets.join(" "));
        Ok(command::succeeded(&what, self.run(&mut make)?)?.stdout)
    }

    /// Runs something in the tree, to its end.
    pub(crate) fn run(&self, command: &mut Command) -> Result<Output, BuildError> {
        command::finish_reading(command, self.lock.held_as_input()?)
    }
}

/// Removes all of a tree but its lock, which another may wait for.
fn clear(root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else if entry.file_name() != "lock" {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// How many processes this machine runs at once.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// That a configuration says it is of the source's version, if both say so.
fn same_version(source: &Path, config: &str) -> Result<(), BuildError> {
    let makefile = source.join("Makefile");
    let makefile = fs::read_to_string(&makefile).at(&makefile)?;
    match (config::source_version(&makefile), config::version(config)) {
        (Some(source), Some(config)) if source != config => Err(BuildError::ConfigOfAnother {
            config: config.to_owned(),
            source_version: source,
        }),
        _ => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::*;

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
