//! Which files a configuration builds, asked of the kernel's own makefiles: folder by folder from the root, for a folder that
//! the configuration leaves out may have a makefile that would build all of it. Owns the question and the reading of the
//! answer.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt::Write;
use std::fs;
use std::path::{Component, Path, PathBuf};

use memchr::memmem;

use crate::diff::Part;
use crate::error::{At, BuildError};
use crate::includes::normal;

/// The goal of the question.
pub(crate) const GOAL: &str = "vmpatch-list";

/// What stands before the objects of a folder in the answer.
const OBJECTS: &str = "vmpatch-objects:";

/// What stands before the programs of a folder that the build runs.
const PROGRAMS: &str = "vmpatch-programs:";

/// A makefile that answers which objects and programs are built in these folders and those above them. It is read by the kernel's
/// top-level makefile, which knows no folder, and by scripts/Makefile.build in each (Linux v6.12; `real-obj-y` and the others
/// are made in scripts/Makefile.lib, `subdir-ym` too; the programs in scripts/Makefile.host; 6.1 has them alike).
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
    let programs = "$(host-csingle) $(host-cobjs)";
    let _ = write!(
        text,
        "\n\
         {GOAL}:\n\
         \t@$(if $(obj),$(info {OBJECTS} {objects})$(info {PROGRAMS} {programs})\
         set -e; for d in $(filter $({GOAL}-folders),$(subdir-ym)); do $(MAKE) $(build)=$$d {GOAL}; done,\
         $(MAKE) $(build)=. {GOAL})\n\
         endif\n"
    );
    text
}

/// The folders whose makefile may name files of other folders, as that of arch/x86/kvm does of virt/kvm: by a way up, or by
/// what it includes.
pub(crate) fn reaching_out(source: &Path) -> Result<Vec<PathBuf>, BuildError> {
    let mut found = Vec::new();
    let mut next = vec![PathBuf::new()];
    while let Some(folder) = next.pop() {
        let at = source.join(&folder);
        for entry in fs::read_dir(&at).at(&at)? {
            let entry = entry.at(&at)?;
            let path = folder.join(entry.file_name());
            if entry.file_type().at(&at)?.is_dir() {
                next.extend(Some(path).filter(|path| Part::of(path) != Part::None));
            } else if ["Makefile", "Kbuild"]
                .iter()
                .any(|name| entry.file_name() == *name)
            {
                let text = fs::read(entry.path()).at(entry.path())?;
                let has = |what: &[u8]| memmem::find(&text, what).is_some();
                if has(b"../") || has(b"include $(src") {
                    found.push(folder.clone());
                }
            }
        }
    }
    Ok(found)
}

/// Objects that the makefile of another folder names, each with the name it has there, by which alone they are compiled.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere(HashMap<PathBuf, PathBuf>);

impl Elsewhere {
    /// Reads what `make` said to the question, or what [`Self::text`] made.
    pub(crate) fn read(text: &str) -> Self {
        let objects = objects(text).filter(|name| name.contains("/../"));
        let pairs =
            objects.filter_map(|name| Some((normal(Path::new(name))?, PathBuf::from(name))));
        Self(pairs.collect())
    }

    /// To be kept.
    pub(crate) fn text(&self) -> String {
        let names = self.0.values().map(|name| name.display().to_string());
        format!("{OBJECTS} {}\n", Vec::from_iter(names).join(" "))
    }

    /// The folders whose makefiles name them.
    pub(crate) fn folders(&self) -> BTreeSet<PathBuf> {
        let down = |part: &Component<'_>| matches!(part, Component::Normal(_));
        let names = self.0.values();
        names
            .map(|name| name.components().take_while(down).collect())
            .collect()
    }

    /// By which name a file is compiled.
    pub(crate) fn target(&self, file: &Path) -> PathBuf {
        let object = file.with_extension("o");
        self.0.get(&object).cloned().unwrap_or(object)
    }
}

fn objects(answer: &str) -> impl Iterator<Item = &str> {
    told(answer, OBJECTS)
}

/// The names in the lines of an answer that begin so.
fn told<'a>(answer: &'a str, begin: &'static str) -> impl Iterator<Item = &'a str> {
    let lines = answer
        .lines()
        .filter_map(move |line| line.strip_prefix(begin));
    let objects = lines.flat_map(str::split_ascii_whitespace);
    objects.map(|object| object.trim_start_matches("./"))
}

/// The objects of an answer.
#[derive(Debug, Default)]
pub(crate) struct Configured {
    objects: HashSet<PathBuf>,
    /// Without their endings.
    programs: HashSet<PathBuf>,
}

impl Configured {
    /// Reads what `make` said to the question.
    pub(crate) fn read(answer: &str, elsewhere: &Elsewhere) -> Self {
        let mut objects: HashSet<_> = objects(answer).map(PathBuf::from).collect();
        objects.extend(elsewhere.0.keys().cloned());
        let programs = told(answer, PROGRAMS).map(|name| Path::new(name).with_extension(""));
        let programs = programs.collect();
        Self { objects, programs }
    }

    /// Whether this file is compiled to an object of its own.
    pub(crate) fn builds(&self, file: &Path) -> bool {
        self.objects.contains(&file.with_extension("o"))
    }

    /// Whether this file is compiled to a program that the build runs, such as one that makes a table.
    pub(crate) fn runs(&self, file: &Path) -> bool {
        self.programs.contains(&file.with_extension(""))
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
    fn what_another_folder_builds_is_compiled_by_its_name_there() {
        let answer = "vmpatch-objects: fs/a.o arch/x86/kvm/../../../virt/kvm/main.o a/../../b.o\n";
        let elsewhere = Elsewhere::read(&Elsewhere::read(answer).text());
        let (file, there) = (
            Path::new("virt/kvm/main.c"),
            "arch/x86/kvm/../../../virt/kvm/main.o",
        );
        assert_eq!(elsewhere.target(file), Path::new(there));
        assert_eq!(elsewhere.target(Path::new("fs/a.c")), Path::new("fs/a.o"));
        assert!(Configured::read("", &elsewhere).builds(file));
        assert_eq!(
            Vec::from_iter(elsewhere.folders()),
            [Path::new("arch/x86/kvm")]
        );
        assert_eq!(elsewhere.0.len(), 1);
    }

    #[test]
    fn makefiles_that_reach_out_are_found() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("a/Makefile", "obj-y += ../b/c.o\n"),
            ("k/Makefile", "include $(srctree)/virt/Makefile.k\n"),
            ("b/Makefile", "obj-y += c.o\n"),
            ("tools/Makefile", "obj-y += ../b/c.o\n"),
        ] {
            let at = folder.path().join(name);
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            fs::write(at, text).unwrap();
        }
        let mut found = reaching_out(folder.path()).unwrap();
        found.sort();
        assert_eq!(found, [PathBuf::from("a"), PathBuf::from("k")]);
    }

    #[test]
    fn programs_are_told_from_objects() {
        let answer = "vmpatch-objects: lib/crc32.o\nvmpatch-programs: lib/gen lib/part.o\n";
        let built = Configured::read(answer, &Elsewhere::default());
        for (file, runs) in [
            ("lib/gen.c", true),
            ("lib/part.c", true),
            ("lib/crc32.c", false),
        ] {
            let file = Path::new(file);
            assert_eq!(
                (built.runs(file), built.builds(file)),
                (runs, !runs),
                "{file:?}"
            );
        }
    }

    #[test]
    fn objects_are_read_from_among_what_else_is_said() {
        let answer = "make: noise\nvmpatch-objects: fs/a.o ./fs/b.o  \nvmpatch-objects:\nfs/c.o\n";
        let built = Configured::read(answer, &Elsewhere::default());
        for (file, known) in [("fs/a.c", true), ("fs/b.S", true), ("fs/c.c", false)] {
            assert_eq!(built.builds(Path::new(file)), known, "{file}");
        }
    }
}
