//! A tree of links that stands before a source: files can be changed in it while the source stays as it is. What is
//! not changed is a link to a whole folder, so that making one takes no longer for a large source.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::error::{At, BuildError};

/// Left out: what a build within the source leaves there, by which the kernel's makefile takes it for one that cannot be
/// built elsewhere (Linux v6.12 Makefile, "outputmakefile").
const BUILT: [&str; 5] = [
    ".config",
    "include/config",
    "include/generated",
    "arch/x86/include/generated",
    ".git",
];

/// See the module.
#[derive(Debug)]
pub struct Shadow {
    source: PathBuf,
    root: PathBuf,
}

impl Shadow {
    /// Links everything of `source` into the new or empty folder `root`, or goes on with one made before.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn before(source: &Path, root: &Path) -> Result<Self, BuildError> {
        let shadow = Self {
            source: source.to_owned(),
            root: root.to_owned(),
        };
        shadow.own_folder(Path::new(""))?;
        for built in BUILT {
            let parent = Path::new(built).parent().unwrap_or(Path::new(""));
            shadow.own_folder(parent)?;
        }
        Ok(shadow)
    }

    /// The folder that looks like the source.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes a file of the source one that can be changed: a copy, as it is in the source now.
    ///
    /// # Errors
    /// [`BuildError::File`], also where the source has no such file.
    pub fn own(&self, file: &Path) -> Result<(), BuildError> {
        self.own_folder(file.parent().unwrap_or(Path::new("")))?;
        let (from, to) = (self.source.join(file), self.root.join(file));
        let text = fs::read(&from).at(&from)?;
        if fs::symlink_metadata(&to).is_ok() {
            fs::remove_file(&to).at(&to)?;
        }
        fs::write(&to, text).at(&to)
    }

    /// Makes a folder, and those on the way to it, real ones with links in them.
    fn own_folder(&self, folder: &Path) -> Result<(), BuildError> {
        if let Some(parent) = folder.parent() {
            self.own_folder(parent)?;
        }
        let (from, to) = (self.source.join(folder), self.root.join(folder));
        let known = fs::symlink_metadata(&to);
        if known.as_ref().is_ok_and(fs::Metadata::is_symlink) {
            fs::remove_file(&to).at(&to)?;
        }
        if !from.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(&to).at(&to)?;
        let mut there = HashSet::new();
        for entry in fs::read_dir(&to).at(&to)? {
            there.insert(entry.at(&to)?.file_name());
        }
        for entry in fs::read_dir(&from).at(&from)? {
            let name = entry.at(&from)?.file_name();
            let built = BUILT
                .iter()
                .any(|built| folder.join(&name) == Path::new(built));
            if !built && !there.contains(&name) {
                let link = to.join(&name);
                symlink(from.join(&name), &link).at(&link)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A source with a few files, and a folder for its shadow.
    fn source() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (source, root) = (folder.path().join("source"), folder.path().join("shadow"));
        for file in [
            "Makefile",
            ".config",
            "fs/proc/a.c",
            "fs/b.c",
            "include/linux/a.h",
            "include/generated/x.h",
        ] {
            let file = source.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "as it was").unwrap();
        }
        (folder, source, root)
    }

    fn read(root: &Path, file: &str) -> Option<String> {
        fs::read_to_string(root.join(file)).ok()
    }

    #[test]
    fn a_file_is_changed_in_the_shadow_alone_and_taken_back() {
        let (_folder, source, root) = source();
        let shadow = Shadow::before(&source, &root).unwrap();
        let file = Path::new("fs/proc/a.c");
        shadow.own(file).unwrap();
        fs::write(root.join(file), "changed").unwrap();
        assert_eq!(read(&source, "fs/proc/a.c").as_deref(), Some("as it was"));
        for other in ["Makefile", "fs/b.c", "include/linux/a.h"] {
            assert_eq!(read(&root, other).as_deref(), Some("as it was"), "{other}");
        }
        // Also by another run, later.
        let shadow = Shadow::before(&source, &root).unwrap();
        assert_eq!(read(&root, "fs/proc/a.c").as_deref(), Some("changed"));
        shadow.own(file).unwrap();
        assert_eq!(read(&root, "fs/proc/a.c").as_deref(), Some("as it was"));
        assert!(shadow.own(Path::new("fs/none.c")).is_err());
    }

    #[test]
    fn what_a_build_left_in_the_source_is_not_seen() {
        let (_folder, source, root) = source();
        Shadow::before(&source, &root).unwrap();
        assert_eq!(read(&root, ".config"), None);
        assert_eq!(read(&root, "include/generated/x.h"), None);
    }
}
