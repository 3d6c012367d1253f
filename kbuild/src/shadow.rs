//! A tree of links that stands before a source: files can be changed in it while the source stays as it is. What is
//! not changed is a link to a whole folder, so that making one takes no longer for a large source. What is a folder of its own,
//! or a copy, stays one; it is held against the source whenever a run begins or ends, so that neither what a killed run left nor
//! what happened to the source since goes unseen.

use std::collections::HashSet;
use std::ffi::OsString;
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

/// The folder from which headers with trace points are included by ways up (Linux v6.12 include/trace/define_trace.h,
/// TRACE_INCLUDE; TRACE_INCLUDE_PATH of arch/x86/kvm/trace.h).
const TRACE: &str = "include/trace";

/// See the module.
#[derive(Debug)]
pub struct Shadow {
    source: PathBuf,
    root: PathBuf,
    /// Where a copy is made, before it is put in its place.
    part: PathBuf,
}

impl Shadow {
    /// Links everything of `source` into the new or empty folder `root`, or goes on with one made before, as the source is now.
    /// Copies are made beside it, in `root` with `.part` behind its name.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn before(source: &Path, root: &Path) -> Result<Self, BuildError> {
        let shadow = Self {
            source: source.to_owned(),
            root: root.to_owned(),
            part: root.with_added_extension("part"),
        };
        shadow.own_folder(Path::new(""))?;
        shadow.restore()?;
        let parents = BUILT.map(|built| Path::new(built).parent().unwrap_or(Path::new("")));
        for folder in parents.into_iter().chain([Path::new(TRACE)]) {
            shadow.own_folder(folder)?;
        }
        Ok(shadow)
    }

    /// The folder that looks like the source.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a file lies in the source.
    #[must_use]
    pub fn original(&self, file: &Path) -> PathBuf {
        self.source.join(file)
    }

    /// Makes a folder one of links to single files: a way up from it (`../`) then stays here, where a link to a whole folder
    /// leads into the source itself, past what is changed.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn unfold(&self, folder: &Path) -> Result<(), BuildError> {
        self.own_folder(folder)
    }

    /// Makes files of the source such that can be changed: copies, as they are in the source now. [`Self::restore`] takes
    /// back what is then done to them.
    ///
    /// # Errors
    /// [`BuildError::File`], also where the source has no such file.
    pub fn change(&self, files: &[PathBuf]) -> Result<(), BuildError> {
        files.iter().try_for_each(|file| self.own(file))
    }

    /// Writes another text in place of a file's until [`Self::restore`], with the file's own time: what was made of it
    /// before is not made anew for it, nor what was made of this text once the file is back.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn stand_in(&self, file: &Path, text: &str) -> Result<(), BuildError> {
        self.change(&[file.to_owned()])?;
        let (from, to) = (self.source.join(file), self.root.join(file));
        fs::write(&to, text).at(&to)?;
        same_time(&from, &to)
    }

    /// Puts back a file that [`Self::stand_in`] replaced.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn stand_back(&self, file: &Path) -> Result<(), BuildError> {
        self.own(file)?;
        same_time(&self.source.join(file), &self.root.join(file))
    }

    /// Makes everything again what it is in the source, also what another run changed, or the source itself since.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn restore(&self) -> Result<(), BuildError> {
        self.follow(Path::new(""))
    }

    /// Holds a folder that is a real one against the source's, and those in it.
    fn follow(&self, folder: &Path) -> Result<(), BuildError> {
        let (from, to) = (self.source.join(folder), self.root.join(folder));
        let names = names(&from)?;
        for entry in fs::read_dir(&to).at(&to)? {
            let entry = entry.at(&to)?;
            let (at, kind) = (entry.path(), entry.file_type().at(&to)?);
            let original = from.join(entry.file_name());
            let is_there = names.contains(&entry.file_name());
            if kind.is_dir() && is_there && original.is_dir() {
                self.follow(&folder.join(entry.file_name()))?;
            } else if kind.is_dir() {
                fs::remove_dir_all(&at).at(&at)?;
            } else if !is_there || (kind.is_file() && !original.is_file()) {
                fs::remove_file(&at).at(&at)?;
            } else if kind.is_file()
                && fs::read(&at).at(&at)? != fs::read(&original).at(original)?
            {
                self.own(&folder.join(entry.file_name()))?;
            }
        }
        self.link_all(folder)
    }

    /// Makes a file a copy of the source's, in one step: one that is not whole would never be seen for what it is.
    fn own(&self, file: &Path) -> Result<(), BuildError> {
        self.own_folder(file.parent().unwrap_or(Path::new("")))?;
        let (from, to) = (self.source.join(file), self.root.join(file));
        let text = fs::read(&from).at(&from)?;
        fs::write(&self.part, text).at(&self.part)?;
        fs::rename(&self.part, &to).at(&to)
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
        self.link_all(folder)
    }

    /// Links what a real folder has not.
    fn link_all(&self, folder: &Path) -> Result<(), BuildError> {
        let (from, to) = (self.source.join(folder), self.root.join(folder));
        let there = names(&to)?;
        for name in names(&from)? {
            let path = folder.join(&name);
            let built = BUILT.iter().any(|built| path == Path::new(built));
            if !built && !there.contains(&name) {
                let link = to.join(&name);
                symlink(from.join(&name), &link).at(&link)?;
            }
        }
        Ok(())
    }
}

/// The names in a folder.
fn names(folder: &Path) -> Result<HashSet<OsString>, BuildError> {
    let entries = fs::read_dir(folder).at(folder)?;
    let names = entries.map(|entry| Ok(entry.at(folder)?.file_name()));
    names.collect()
}

/// Gives one file the time of another's last change.
fn same_time(from: &Path, to: &Path) -> Result<(), BuildError> {
    let time = fs::metadata(from).and_then(|it| it.modified()).at(from)?;
    let file = fs::OpenOptions::new().write(true).open(to);
    file.and_then(|file| file.set_modified(time)).at(to)
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
        shadow.change(&[file.to_owned()]).unwrap();
        fs::write(root.join(file), "changed").unwrap();
        assert_eq!(read(&source, "fs/proc/a.c").as_deref(), Some("as it was"));
        for other in ["Makefile", "fs/b.c", "include/linux/a.h"] {
            assert_eq!(read(&root, other).as_deref(), Some("as it was"), "{other}");
        }
        shadow.restore().unwrap();
        assert_eq!(read(&root, "fs/proc/a.c").as_deref(), Some("as it was"));
        assert!(shadow.change(&["fs/none.c".into()]).is_err());
    }

    #[test]
    fn a_way_up_from_an_unfolded_folder_leads_to_what_is_changed() {
        let (_folder, source, root) = source();
        let shadow = Shadow::before(&source, &root).unwrap();
        shadow.change(&["fs/b.c".into()]).unwrap();
        fs::write(root.join("fs/b.c"), "changed").unwrap();
        let way_up = "fs/proc/../b.c";
        assert_eq!(read(&root, way_up).as_deref(), Some("as it was"));
        shadow.unfold(Path::new("fs/proc")).unwrap();
        assert_eq!(read(&root, way_up).as_deref(), Some("changed"));
    }

    #[test]
    fn what_a_killed_run_left_changed_is_taken_back_by_the_next() {
        let (_folder, source, root) = source();
        let files = ["fs/proc/a.c", "include/linux/a.h"].map(PathBuf::from);
        let killed = Shadow::before(&source, &root).unwrap();
        killed.change(&files).unwrap();
        for file in &files {
            fs::write(root.join(file), "changed").unwrap();
        }
        killed.stand_in(Path::new("fs/b.c"), "another").unwrap();
        drop(killed);
        // The source may have gone on too.
        fs::remove_file(source.join("fs/b.c")).unwrap();
        fs::write(source.join("fs/proc/a.c"), "newer").unwrap();
        Shadow::before(&source, &root).unwrap();
        assert_eq!(read(&root, "fs/proc/a.c").as_deref(), Some("newer"));
        let header = read(&root, "include/linux/a.h");
        assert_eq!(header.as_deref(), Some("as it was"));
        assert_eq!(read(&root, "fs/b.c"), None);
    }

    #[test]
    fn what_happens_to_the_source_is_seen_in_folders_and_copies_of_before() {
        let (_folder, source, root) = source();
        let shadow = Shadow::before(&source, &root).unwrap();
        let file = Path::new("fs/proc/a.c");
        shadow.change(&[file.to_owned()]).unwrap();
        shadow.restore().unwrap();
        shadow.unfold(Path::new("include/linux")).unwrap();
        fs::write(source.join(file), "by its owner").unwrap();
        fs::write(source.join("fs/proc/new.c"), "new").unwrap();
        fs::remove_file(source.join("fs/b.c")).unwrap();
        fs::remove_dir_all(source.join("include/linux")).unwrap();
        Shadow::before(&source, &root).unwrap();
        assert_eq!(read(&root, "fs/proc/a.c").as_deref(), Some("by its owner"));
        assert_eq!(read(&root, "fs/proc/new.c").as_deref(), Some("new"));
        for gone in ["fs/b.c", "include/linux"] {
            assert!(fs::symlink_metadata(root.join(gone)).is_err(), "{gone}");
        }
    }

    #[test]
    fn what_stands_in_for_a_file_has_its_time() {
        let (_folder, source, root) = source();
        let shadow = Shadow::before(&source, &root).unwrap();
        let file = Path::new("fs/b.c");
        let time = |root: &Path| fs::metadata(root.join(file)).unwrap().modified().unwrap();
        let original = time(&source);
        shadow.stand_in(file, "another").unwrap();
        assert_eq!(read(&root, "fs/b.c").as_deref(), Some("another"));
        assert_eq!(time(&root), original);
        shadow.stand_back(file).unwrap();
        assert_eq!(read(&root, "fs/b.c").as_deref(), Some("as it was"));
        assert_eq!(time(&root), original);
    }

    #[test]
    fn what_a_build_left_in_the_source_is_not_seen() {
        let (_folder, source, root) = source();
        Shadow::before(&source, &root).unwrap();
        assert_eq!(read(&root, ".config"), None);
        assert_eq!(read(&root, "include/generated/x.h"), None);
    }
}
