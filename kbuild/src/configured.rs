//! Which files a configuration builds, asked of the kernel's own makefiles: folder by folder from the root, for a folder that
//! the configuration leaves out may have a makefile that would build all of it. Owns the question and the reading of the
//! answer.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// The goal of the question.
pub(crate) const GOAL: &str = "vmpatch-list";

/// What stands before the objects of a folder in the answer.
const OBJECTS: &str = "vmpatch-objects:";

/// A makefile that answers which objects are built in these folders and those above them. It is read by the kernel's
/// top-level makefile, which knows no folder, and by scripts/Makefile.build in each (Linux v6.12; `real-obj-y` and the others
/// are made in scripts/Makefile.lib, `subdir-ym` too; 6.1 has them alike).
pub(crate) fn question(files: &[PathBuf]) -> String {
    let mut folders = BTreeSet::new();
    for file in files {
        folders.extend(file.ancestors().skip(1).map(Path::to_owned));
    }
    let mut text = format!("ifndef {GOAL}-known\n{GOAL}-known := y\n{GOAL}-folders :=");
    for folder in folders.iter().filter(|it| !it.as_os_str().is_empty()) {
        // Both ways to write it; writing to a string cannot fail.
        let _ = write!(text, " {0} ./{0}", folder.display());
    }
    let objects = "$(real-obj-y) $(real-obj-m) $(lib-y) $(extra-y) $(always-y)";
    let _ = write!(
        text,
        "\n\
         {GOAL}:\n\
         \t@$(if $(obj),$(info {OBJECTS} {objects})\
         set -e; for d in $(filter $({GOAL}-folders),$(subdir-ym)); do $(MAKE) $(build)=$$d {GOAL}; done,\
         $(MAKE) $(build)=. {GOAL})\n\
         endif\n"
    );
    text
}

/// The objects of an answer.
#[derive(Debug, Default)]
pub(crate) struct Configured(HashSet<PathBuf>);

impl Configured {
    /// Reads what `make` said to the question.
    pub(crate) fn read(answer: &str) -> Self {
        let lines = answer.lines().filter_map(|line| line.strip_prefix(OBJECTS));
        let objects = lines.flat_map(str::split_ascii_whitespace);
        Self(
            objects
                .map(|object| PathBuf::from(object.trim_start_matches("./")))
                .collect(),
        )
    }

    /// Whether this file is compiled to an object of its own.
    pub(crate) fn builds(&self, file: &Path) -> bool {
        self.0.contains(&file.with_extension("o"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_folder_above_a_file_is_asked_once() {
        let text = question(&["fs/ext4/a.c".into(), "fs/b.c".into(), "c.c".into()]);
        let folders = text
            .lines()
            .find(|line| line.contains("folders :="))
            .unwrap();
        assert!(
            folders.ends_with(":= fs ./fs fs/ext4 ./fs/ext4"),
            "{folders}"
        );
    }

    #[test]
    fn objects_are_read_from_among_what_else_is_said() {
        let answer = "make: noise\nvmpatch-objects: fs/a.o ./fs/b.o  \nvmpatch-objects:\nfs/c.o\n";
        let built = Configured::read(answer);
        for (file, known) in [("fs/a.c", true), ("fs/b.S", true), ("fs/c.c", false)] {
            assert_eq!(built.builds(Path::new(file)), known, "{file}");
        }
    }
}
