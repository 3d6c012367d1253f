//! A tree of links that stands before a source: files can be changed in it while the source stays as it is. What is
//! not changed is a link to a whole folder, so that making one takes no longer for a large source. Which files are changed
//! is written down before they are, so that whoever comes after a run that was killed can take it back.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
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
    /// Lists what is changed, a path a line, as long as something is.
    changed: PathBuf,
}

impl Shadow {
    /// Links everything of `source` into the new or empty folder `root`, or goes on with one made before. What is changed
    /// in it is written down beside it, in `root` with `.changed` behind its name.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn before(source: &Path, root: &Path) -> Result<Self, BuildError> {
        let shadow = Self {
            source: source.to_owned(),
            root: root.to_owned(),
            changed: root.with_added_extension("changed"),
        };
        shadow.own_folder(Path::new(""))?;
        for built in BUILT {
            let parent = Path::new(built).parent().unwrap_or(Path::new(""));
            shadow.own_folder(parent)?;
        }
        shadow.restore()?;
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
        self.note(files).at(&self.changed)?;
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

    /// Makes every changed file again what it is in the source, also those that another run changed.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn restore(&self) -> Result<(), BuildError> {
        let list = match fs::read(&self.changed) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            list => list.at(&self.changed)?,
        };
        for line in list.split(|byte| *byte == b'\n') {
            let file = Path::new(OsStr::from_bytes(line));
            match self.source.join(file).is_file() {
                true => self.own(file)?,
                // The source may have lost it since.
                false => self.drop_file(file)?,
            }
        }
        fs::remove_file(&self.changed).at(&self.changed)
    }

    /// Adds to the list of what is changed, on the disk before anything is.
    fn note(&self, files: &[PathBuf]) -> io::Result<()> {
        let mut options = fs::OpenOptions::new();
        let mut list = options.create(true).append(true).open(&self.changed)?;
        for file in files {
            list.write_all(file.as_os_str().as_bytes())?;
            list.write_all(b"\n")?;
        }
        list.sync_all()
    }

    /// Makes a file a copy of the source's.
    fn own(&self, file: &Path) -> Result<(), BuildError> {
        self.own_folder(file.parent().unwrap_or(Path::new("")))?;
        let (from, to) = (self.source.join(file), self.root.join(file));
        let text = fs::read(&from).at(&from)?;
        self.drop_file(file)?;
        fs::write(&to, text).at(&to)
    }

    fn drop_file(&self, file: &Path) -> Result<(), BuildError> {
        let at = self.root.join(file);
        match fs::symlink_metadata(&at) {
            Ok(what) if !what.is_dir() => fs::remove_file(&at).at(&at),
            _ => Ok(()),
        }
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
