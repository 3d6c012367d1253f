//! Which files of a source may include which: read off their `#include` lines, without regard to what is configured. May
//! find too many, for a line that is not compiled counts too; what is compiled in the end tells. Owns no decision.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use memchr::memmem;

use crate::diff::{Part, is_plain};
use crate::error::{At, BuildError};
use crate::tree::LINKER_SCRIPT;

/// Where `<FILE>` is looked for (Linux v6.12 Makefile, LINUXINCLUDE and USERINCLUDE). Generated headers are left out: those of
/// `asm` lead to `asm-generic`, the others include nothing.
const FOLDERS: [&str; 4] = [
    "arch/x86/include",
    "include",
    "arch/x86/include/uapi",
    "include/uapi",
];

/// Headers that every file includes (Linux v6.12 Makefile, USERINCLUDE; scripts/Makefile.lib, `c_flags`).
const FORCED: [&str; 3] = [
    "include/linux/compiler-version.h",
    "include/linux/kconfig.h",
    "include/linux/compiler_types.h",
];

/// One `#include` line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    by: usize,
    /// As written between the quotes.
    name: String,
    /// In `""`, which looks beside the file first.
    quoted: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Includes {
    files: Vec<PathBuf>,
    known: HashSet<PathBuf>,
    /// By the last part of the name.
    lines: HashMap<String, Vec<Line>>,
}

impl Includes {
    /// Reads every file of the source that the kernel may be made of.
    pub(crate) fn scan(source: &Path) -> Result<Self, BuildError> {
        let mut files = Vec::new();
        list(source, Path::new(""), &mut files)?;
        files.sort();
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let share = files.len().div_ceil(workers).max(1);
        let found: Vec<_> = std::thread::scope(|scope| {
            let parts = files.chunks(share).enumerate();
            let running = parts
                .map(|(part, files)| scope.spawn(move || lines_of(source, files, part * share)));
            let running: Vec<_> = running.collect();
            let ended = running.into_iter().map(std::thread::ScopedJoinHandle::join);
            ended.collect()
        });
        let mut made = Self {
            known: files.iter().cloned().collect(),
            files,
            lines: HashMap::new(),
        };
        let mut all = Found::default();
        for part in found {
            // A reader that panicked has found nothing; none can.
            let part = part.unwrap_or_else(|_| Ok(Found::default()))?;
            all.lines.extend(part.lines);
            all.words.extend(part.words);
            all.defined.extend(part.defined);
        }
        let through_words = all.through_words();
        for line in all.lines.into_iter().chain(through_words) {
            let last = line.name.rsplit('/').next().unwrap_or_default().to_owned();
            made.lines.entry(last).or_default().push(line);
        }
        Ok(made)
    }

    /// The files that may include this one, directly or not, sorted; without itself.
    pub(crate) fn all_includers(&self, file: &Path) -> BTreeSet<PathBuf> {
        let mut seen: HashSet<&Path> = HashSet::from([file]);
        let mut next = vec![file];
        while let Some(file) = next.pop() {
            if FORCED.iter().any(|forced| file == Path::new(forced)) {
                return self.files.iter().cloned().collect();
            }
            for by in self.includers(file) {
                if seen.insert(by) {
                    next.push(by);
                }
            }
        }
        seen.remove(file);
        seen.into_iter().map(Path::to_owned).collect()
    }

    /// Whether a file includes another by the way from it to there.
    pub(crate) fn is_beside(&self, by: &Path, file: &Path) -> bool {
        let last = file.file_name().unwrap_or_default().to_string_lossy();
        let lines = self.lines.get(&*last).into_iter().flatten();
        let folder = by.parent().unwrap_or(Path::new(""));
        let mut quoted =
            lines.filter(|line| line.quoted && self.files.get(line.by).is_some_and(|it| it == by));
        quoted.any(|line| normal(&folder.join(&line.name)).as_deref() == Some(file))
    }

    /// The last parts of the names of all that is included though it looks like a file that is compiled.
    pub(crate) fn included_sources(&self) -> BTreeSet<String> {
        let names = self.lines.keys().filter(|name| is_source(name));
        names.cloned().collect()
    }

    /// The files with a line that may lead to this one.
    pub(crate) fn includers<'a>(&'a self, file: &'a Path) -> impl Iterator<Item = &'a Path> + 'a {
        let last = file.file_name().unwrap_or_default().to_string_lossy();
        let lines = self.lines.get(&*last).into_iter().flatten();
        lines.filter_map(move |line| {
            let by = self.files.get(line.by)?;
            self.leads(line, by, file).then_some(by.as_path())
        })
    }

    fn leads(&self, line: &Line, by: &Path, file: &Path) -> bool {
        let name = Path::new(&line.name);
        let beside = || normal(&by.parent().unwrap_or(Path::new("")).join(name));
        if line.quoted
            && let Some(at) = beside().filter(|at| self.known.contains(at))
        {
            return at == file;
        }
        let places = FOLDERS.iter().map(|folder| Path::new(folder).join(name));
        if let Some(at) = places.into_iter().find(|at| self.known.contains(at)) {
            return at == file;
        }
        if let Ok(generic) = name.strip_prefix("asm") {
            let places = ["include/asm-generic", "include/uapi/asm-generic"];
            return places.iter().any(|at| Path::new(at).join(generic) == file);
        }
        // By a folder that only the makefile of the file knows.
        let parts = name
            .components()
            .filter(|part| matches!(part, Component::Normal(_)));
        file.ends_with(parts.collect::<PathBuf>())
    }
}

/// Lists the files of a folder and those below that may be part of a kernel, relative to the source.
fn list(source: &Path, folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), BuildError> {
    let at = source.join(folder);
    for entry in fs::read_dir(&at).at(&at)? {
        let entry = entry.at(&at)?;
        let path = folder.join(entry.file_name());
        let kind = entry.file_type().at(&at)?;
        let deeper = kind.is_dir() && !path.starts_with(".git") && Part::of(&path) != Part::None;
        if deeper {
            list(source, &path, files)?;
        } else if kind.is_file() && counts(&path) {
            files.push(path);
        }
    }
    Ok(())
}

/// Whether a file may be included or compiled. What an editor leaves has a name that the kernel's files never have.
fn counts(path: &Path) -> bool {
    let part = Part::of(path);
    let script = path == Path::new(LINKER_SCRIPT).with_added_extension("S");
    (matches!(part, Part::Source | Part::Header | Part::Apart) || script) && is_plain(path)
}

/// What some files have to do with including.
#[derive(Default)]
struct Found {
    lines: Vec<Line>,
    /// `#include WORD`, with the file that has it.
    words: Vec<(usize, String)>,
    /// `#define WORD "FILE"` or `<FILE>`, with whether in `""`.
    defined: Vec<(String, (String, bool))>,
}

impl Found {
    /// The lines that say by a word what they include: each may be anything that the word is defined as.
    fn through_words(&self) -> Vec<Line> {
        let mut found = Vec::new();
        for (by, word) in &self.words {
            let meant = self.defined.iter().filter(|(it, _)| it == word);
            found.extend(meant.map(|(_, (name, quoted))| Line {
                by: *by,
                name: name.clone(),
                quoted: *quoted,
            }));
        }
        found.dedup();
        found
    }
}

/// What these files have, the first of which has the number `first`.
fn lines_of(source: &Path, files: &[PathBuf], first: usize) -> Result<Found, BuildError> {
    let mut found = Found::default();
    for (by, file) in (first..).zip(files) {
        let at = source.join(file);
        let text = fs::read(&at).at(&at)?;
        for rest in directives(&text, b"include") {
            if let Some((name, quoted)) = named(rest) {
                found.lines.push(Line { by, name, quoted });
            } else if let Some((word, _)) = word(rest) {
                found.words.push((by, word.to_owned()));
            }
        }
        let defined = directives(&text, b"define").filter_map(|rest| {
            let (word, rest) = word(rest)?;
            Some((word.to_owned(), named(rest.trim_ascii_start())?))
        });
        found.defined.extend(defined);
    }
    Ok(found)
}

/// The last parts of the names of all sources that these files say to include, or may by a word.
pub(crate) fn sources_named_in(
    source: &Path,
    files: &[&Path],
) -> Result<BTreeSet<String>, BuildError> {
    let files: Vec<_> = files.iter().map(|file| file.to_path_buf()).collect();
    let found = lines_of(source, &files, 0)?;
    let lines = found.lines.into_iter().map(|line| line.name);
    let names = lines.chain(found.defined.into_iter().map(|(_, (name, _))| name));
    let last = names.map(|name| name.rsplit('/').next().unwrap_or_default().to_owned());
    Ok(last.filter(|name| is_source(name)).collect())
}

fn is_source(name: &str) -> bool {
    name.ends_with(".c") || name.ends_with(".S")
}

/// What stands behind a directive of this kind, to the end of the text, for each in it.
fn directives<'a>(text: &'a [u8], kind: &'static [u8]) -> impl Iterator<Item = &'a [u8]> {
    memmem::find_iter(text, kind).filter_map(move |at| {
        let before = text.get(..at)?;
        // A blank or two may stand before the word.
        let sign = before.trim_ascii_end().strip_suffix(b"#")?;
        let begins = sign.iter().rev().find(|byte| !matches!(byte, b' ' | b'\t'));
        if begins.is_some_and(|byte| *byte != b'\n') || before.ends_with(b"\n") {
            return None;
        }
        Some(text.get(at + kind.len()..)?.trim_ascii_start())
    })
}

/// The file that a text begins with, in `""` or `<>`, and whether in `""`.
fn named(text: &[u8]) -> Option<(String, bool)> {
    let (quoted, end) = match text.first()? {
        b'"' => (true, b'"'),
        b'<' => (false, b'>'),
        _ => return None,
    };
    let rest = text.get(1..)?;
    let length = rest
        .iter()
        .position(|byte| *byte == end || *byte == b'\n')?;
    let whole = rest.get(length) == Some(&end);
    let name = str::from_utf8(rest.get(..length)?).ok()?;
    whole.then(|| (name.to_owned(), quoted))
}

/// The word that a text begins with, and the rest.
fn word(text: &[u8]) -> Option<(&str, &[u8])> {
    let of_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let end = text.iter().position(|byte| !of_word(byte));
    let (word, rest) = text.split_at(end.unwrap_or(text.len()));
    let word = str::from_utf8(word).ok().filter(|word| !word.is_empty())?;
    Some((word, rest))
}

/// A path without `.` and `..`; `None` if it leads out of the source.
pub(crate) fn normal(path: &Path) -> Option<PathBuf> {
    let mut made = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => made.push(part),
            Component::ParentDir if made.pop() => {}
            Component::CurDir => {}
            _ => return None,
        }
    }
    Some(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scanned(files: &[(&str, &str)]) -> Includes {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let at = folder.path().join(name);
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            fs::write(at, text).unwrap();
        }
        Includes::scan(folder.path()).unwrap()
    }

    fn sources(includes: &Includes, file: &str) -> Vec<String> {
        let found = includes.all_includers(Path::new(file)).into_iter();
        let sources = found.filter(|it| Part::of(it) == Part::Source);
        sources.map(|it| it.display().to_string()).collect()
    }

    #[test]
    fn includers_are_found_through_other_headers_and_beside_the_file() {
        let includes = scanned(&[
            ("include/linux/a.h", ""),
            ("include/net/b.h", " # include <linux/a.h>\n"),
            ("fs/a.h", ""),
            ("fs/x.c", "#include \"a.h\"\n"),
            ("fs/y.c", "/* #include <linux/a.h> */\n#include <net/b.h>\n"),
            ("net/z.c", "#include <linux/a.h>"),
            ("net/w.S", "#include \"../fs/a.h\"\n"),
            ("tools/t.c", "#include <linux/a.h>\n"),
            ("arch/arm/t.c", "#include <linux/a.h>\n"),
        ]);
        assert_eq!(
            sources(&includes, "include/linux/a.h"),
            ["fs/y.c", "net/z.c"]
        );
        assert_eq!(sources(&includes, "fs/a.h"), ["fs/x.c", "net/w.S"]);
        assert_eq!(sources(&includes, "include/none.h"), [""; 0]);
    }

    #[test]
    fn a_folder_that_only_a_makefile_knows_is_found_by_the_name() {
        let includes = scanned(&[
            ("drivers/gpu/dc/inc/core.h", ""),
            (
                "drivers/gpu/dm/m.c",
                "#include \"inc/core.h\"\n#include <core.h>\n",
            ),
            ("drivers/gpu/dm/n.c", "#include \"other/core.h\"\n"),
            ("include/asm-generic/bug.h", ""),
            ("include/asm-generic/rwonce.h", ""),
            ("arch/x86/include/asm/bug.h", ""),
            ("mm/b.c", "#include <asm/bug.h>\n#include <asm/rwonce.h>\n"),
        ]);
        assert_eq!(
            sources(&includes, "drivers/gpu/dc/inc/core.h"),
            ["drivers/gpu/dm/m.c"]
        );
        assert_eq!(
            sources(&includes, "include/asm-generic/rwonce.h"),
            ["mm/b.c"]
        );
        assert_eq!(sources(&includes, "include/asm-generic/bug.h"), [""; 0]);
        assert_eq!(sources(&includes, "arch/x86/include/asm/bug.h"), ["mm/b.c"]);
    }

    #[test]
    fn sources_that_others_include_are_known() {
        let includes = scanned(&[
            ("fs/elf.c", "#include <linux/a.h>\n"),
            ("fs/compat_elf.c", "#include \"elf.c\"\n"),
        ]);
        assert_eq!(Vec::from_iter(includes.included_sources()), ["elf.c"]);
        assert_eq!(sources(&includes, "fs/elf.c"), ["fs/compat_elf.c"]);
    }

    #[test]
    fn what_is_included_by_a_word_is_found() {
        let includes = scanned(&[
            ("include/linux/genl.h", ""),
            (
                "include/linux/magic.h",
                "# include GENL_FILE\n#include OTHER(FILE)\n",
            ),
            (
                "include/linux/api.h",
                "#define GENL_FILE <linux/genl.h>\n#define OTHER(x) \"no.h\"\n#include <linux/magic.h>\n",
            ),
            ("fs/x.c", "#include <linux/api.h>\n"),
        ]);
        assert_eq!(sources(&includes, "include/linux/genl.h"), ["fs/x.c"]);
        assert_eq!(sources(&includes, "include/linux/no.h"), [""; 0]);
    }

    #[test]
    fn what_every_file_includes_is_included_by_all() {
        let includes = scanned(&[
            (
                "include/linux/compiler_types.h",
                "#include <linux/attr.h>\n",
            ),
            ("include/linux/attr.h", ""),
            ("fs/x.c", ""),
        ]);
        assert_eq!(sources(&includes, "include/linux/attr.h"), ["fs/x.c"]);
    }

    #[test]
    fn headers_that_include_each_other_end() {
        let includes = scanned(&[
            ("include/a.h", "#include <b.h>\n"),
            ("include/b.h", "#include <a.h>\n"),
            ("fs/x.c", "#include <a.h>\n"),
        ]);
        assert_eq!(sources(&includes, "include/b.h"), ["fs/x.c"]);
    }
}
