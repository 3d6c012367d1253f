//! What an object was made of, as the kernel's build wrote it down: the command, the module, the files read.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::diff::Diff;
use crate::error::{At, BuildError};
use crate::tree::Tree;

impl Tree {
    /// Refuses objects that were made of a file as it is in the source itself, though the diff changes it: a way that led past
    /// the shadow. Tells which changed files any of them was made of.
    pub(crate) fn made_of<'a>(
        &self,
        files: &[PathBuf],
        diff: &'a Diff,
    ) -> Result<BTreeSet<&'a Path>, BuildError> {
        let mut used = BTreeSet::new();
        for by in files {
            let text = self.made_by(&by.with_extension("o"))?;
            for read in read_files(&text) {
                let read = Path::new(read);
                let alike = diff.files().into_iter();
                for file in alike.filter(|file| file.file_name() == read.file_name()) {
                    let [source, shadow] =
                        [self.shadow.original(file), self.shadow.root().join(file)];
                    let [read, source, shadow] =
                        [self.out.join(read), source, shadow].map(|it| it.canonicalize().ok());
                    if read.is_some() && read == source && read != shadow {
                        return Err(BuildError::Unchanged {
                            file: file.to_owned(),
                            by: by.clone(),
                        });
                    }
                    if read.is_some() && read == shadow {
                        used.insert(file);
                    }
                }
            }
        }
        Ok(used)
    }

    /// How the kernel's build made an object.
    pub(crate) fn made_by(&self, object: &Path) -> Result<String, BuildError> {
        let at = self.out.join(made_by(object));
        fs::read_to_string(&at).at(&at)
    }
}

/// The file in which the kernel's build keeps how it made an object.
fn made_by(object: &Path) -> PathBuf {
    let name = object.file_name().unwrap_or_default().to_string_lossy();
    object.with_file_name(format!(".{name}.cmd"))
}

/// The files that were read for an object (Linux v6.12 scripts/basic/fixdep.c: `source_OBJECT := FILE`, and behind
/// `deps_OBJECT :=` the rest, a line each).
fn read_files(made_by: &str) -> impl Iterator<Item = &str> {
    let lines = made_by.lines().skip(1);
    let words = lines.flat_map(str::split_ascii_whitespace);
    words.filter(|word| *word != "\\" && *word != ":=")
}

/// The module that an object was compiled for (Linux v6.12 scripts/Makefile.lib, `modkern_cflags`, `modname_flags`).
pub(crate) fn module(made_by: &str) -> Option<String> {
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
    fn the_files_that_were_read_are_told() {
        let text = "savedcmd_a.o := gcc a.c\n\nsource_a.o := ../a.c\n\ndeps_a.o := \\\n  ../b.h \\\n    $(wildcard x) \\\n";
        let read: Vec<_> = read_files(text).collect();
        assert!(
            read.contains(&"../a.c") && read.contains(&"../b.h"),
            "{read:?}"
        );
    }
}
