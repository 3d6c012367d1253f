//! The diff of a fix: which files it changes, and which of them matter to the running kernel. Does not apply it;
//! `patch` does.

use std::fmt;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

/// A unified diff, as `git format-patch`, `git diff` and `diff -u` write it, with one folder before each path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diff {
    /// What it does to the files that count.
    text: Vec<u8>,
    /// Files that are compiled, or included by those that are, relative to the root of the source.
    compiled: Vec<PathBuf>,
    /// Headers.
    headers: Vec<PathBuf>,
    /// Files that no kernel is made of.
    ignored: Vec<PathBuf>,
}

/// Why a diff cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiffError {
    /// It changes no file.
    #[error(
        "the diff changes no file: a unified diff is expected, with lines `--- a/FILE` and `+++ b/FILE`"
    )]
    Empty,
    /// It ends or goes on where it should not.
    #[error("line {line} of the diff: {what}")]
    Malformed {
        /// From 1.
        line: usize,
        /// What was expected.
        what: &'static str,
    },
    /// A path leads out of the source, or is no path.
    #[error("line {line} of the diff names {path:?}, which is no path within a source")]
    Path {
        /// From 1.
        line: usize,
        /// The path.
        path: String,
    },
    /// Nothing in it is compiled.
    #[error("the diff changes nothing that a kernel for x86 is made of, only {}", Files(.0))]
    NothingCompiled(Vec<PathBuf>),
    /// It changes files in ways that are not understood yet.
    #[error("the diff changes {}: {why}", Files(files))]
    NotYet {
        /// Which.
        files: Vec<PathBuf>,
        /// What they are.
        why: &'static str,
    },
}

/// Names of files, for people.
pub(crate) struct Files<'a>(pub(crate) &'a [PathBuf]);

impl fmt::Display for Files<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self
            .0
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        f.write_str(&names.join(", "))
    }
}

/// What a file is to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Compiled to an object of its own, or included by one that is.
    Source,
    /// Included by others.
    Header,
    /// Code that is no part of the kernel's text: it runs before the kernel, or in user space.
    Apart,
    /// Tells how it is built.
    Rule,
    /// No part of it.
    None,
}

/// Folders of such code, and of its headers.
const APART: [&str; 7] = [
    "arch/x86/boot",
    "arch/x86/entry/vdso",
    "arch/x86/include/asm/vdso",
    "arch/x86/purgatory",
    "arch/x86/realmode/rm",
    "drivers/firmware/efi/libstub",
    "include/vdso",
];
/// Files in them that are part of the kernel all the same (Linux v6.12 arch/x86/entry/vdso/Makefile, obj-y).
const NOT_APART: [&str; 2] = ["arch/x86/entry/vdso/extable.c", "arch/x86/entry/vdso/vma.c"];

impl Part {
    pub(crate) fn of(path: &Path) -> Self {
        let mut parts = path
            .components()
            .map(|part| part.as_os_str().to_string_lossy());
        let (first, second) = (parts.next(), parts.next());
        match (first.as_deref(), second.as_deref()) {
            (Some("Documentation" | "tools" | "samples" | "LICENSES" | "debian"), _)
            | (Some("MAINTAINERS" | "CREDITS"), None) => return Self::None,
            (Some("arch"), Some(other)) if other != "x86" && parts.next().is_some() => {
                return Self::None;
            }
            (Some("scripts"), _) => return Self::Rule,
            _ => {}
        }
        let apart = APART.iter().any(|folder| path.starts_with(folder));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ending = path.extension().unwrap_or_default().to_string_lossy();
        match &*ending {
            "c" | "S" | "h" if apart && !NOT_APART.iter().any(|it| path == Path::new(it)) => {
                Self::Apart
            }
            "c" => Self::Source,
            "S" if !name.ends_with(".lds.S") => Self::Source,
            "h" => Self::Header,
            "rst" | "txt" | "yaml" | "md" => Self::None,
            _ => Self::Rule,
        }
    }
}

/// What is read of one side of a change.
enum Side {
    Absent,
    File(PathBuf),
}

impl Diff {
    /// Reads a diff.
    ///
    /// # Errors
    /// [`DiffError`].
    pub fn parse(text: &[u8]) -> Result<Self, DiffError> {
        let (text, changes) = changes(text)?;
        if changes.is_empty() {
            return Err(DiffError::Empty);
        }
        let (mut compiled, mut ignored) = (Vec::new(), Vec::new());
        let (mut headers, mut rules, mut moved) = (Vec::new(), Vec::new(), Vec::new());
        let (mut apart, mut kept) = (Vec::new(), Vec::new());
        for Change { old, new, lines } in changes {
            let (path, whole) = match (old, new) {
                (Side::File(old), Side::File(new)) if old == new => (new, false),
                (Side::File(path), _) | (Side::Absent, Side::File(path)) => (path, true),
                (Side::Absent, Side::Absent) => continue,
            };
            match Part::of(&path) {
                Part::None => {
                    ignored.push(path);
                    continue;
                }
                Part::Apart => apart.push(path),
                _ if whole => moved.push(path),
                Part::Source => compiled.push(path),
                Part::Header => headers.push(path),
                Part::Rule => rules.push(path),
            }
            for line in text.get(lines).into_iter().flatten() {
                kept.extend_from_slice(line);
                kept.push(b'\n');
            }
        }
        for (files, why) in [
            (moved, "files that come, go or move are not understood yet"),
            (
                apart,
                "this runs before the kernel, or in user space, and is no part of the kernel's text",
            ),
            (rules, "how the kernel is built cannot change yet"),
        ] {
            if !files.is_empty() {
                return Err(DiffError::NotYet { files, why });
            }
        }
        for files in [&mut compiled, &mut headers, &mut ignored] {
            files.sort();
            files.dedup();
        }
        if compiled.is_empty() && headers.is_empty() {
            return Err(DiffError::NothingCompiled(ignored));
        }
        Ok(Self {
            text: kept,
            compiled,
            headers,
            ignored,
        })
    }

    /// What it does to sources and headers, as `patch` reads it.
    #[must_use]
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// The headers, sorted, relative to the root of the source.
    #[must_use]
    pub fn headers(&self) -> &[PathBuf] {
        &self.headers
    }

    /// The files that are compiled, sorted, relative to the root of the source.
    #[must_use]
    pub fn compiled(&self) -> &[PathBuf] {
        &self.compiled
    }

    /// The files that no kernel is made of.
    #[must_use]
    pub fn ignored(&self) -> &[PathBuf] {
        &self.ignored
    }
}

/// What is done to one file.
struct Change {
    old: Side,
    new: Side,
    /// Its lines in the diff, from 0.
    lines: Range<usize>,
}

/// The lines of a diff, and each file's change in its order.
fn changes(text: &[u8]) -> Result<(Vec<&[u8]>, Vec<Change>), DiffError> {
    let mut found: Vec<Change> = Vec::new();
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let all: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
    let mut lines = (1..).zip(all.iter().copied());
    while let Some((number, line)) = lines.next() {
        let malformed = |line, what| DiffError::Malformed { line, what };
        if line.starts_with(b"@@ ") {
            let last = skip_hunk(number, line, &mut lines)?;
            if let Some(change) = found.last_mut() {
                change.lines.end = last;
            }
        } else if line.starts_with(b"\\ ") {
            // "No newline at end of file", of the last line of a hunk.
            if let Some(change) = found.last_mut() {
                change.lines.end = number;
            }
        } else if line.starts_with(b"GIT binary patch") || line.starts_with(b"Binary files ") {
            return Err(malformed(number, "a change of a binary file is no text"));
        } else if let Some(old) = line.strip_prefix(b"--- ") {
            // Also the line that ends the text of a mail.
            let next = lines.next();
            let Some((at, new)) =
                next.and_then(|(at, next)| Some((at, next.strip_prefix(b"+++ ")?)))
            else {
                continue;
            };
            found.push(Change {
                old: side(number, old)?,
                new: side(at, new)?,
                lines: number - 1..at,
            });
        } else if line.starts_with(b"rename from ") || line.starts_with(b"copy from ") {
            return Err(malformed(
                number,
                "a file that is moved or copied is not understood yet",
            ));
        }
    }
    Ok((all, found))
}

/// Passes over the lines of a hunk, which may look like anything. Returns the number of the last.
fn skip_hunk<'a>(
    number: usize,
    head: &[u8],
    lines: &mut impl Iterator<Item = (usize, &'a [u8])>,
) -> Result<usize, DiffError> {
    let malformed = |line, what| DiffError::Malformed { line, what };
    let counts = hunk(head)
        .ok_or_else(|| malformed(number, "a hunk begins with `@@ -LINE,COUNT +LINE,COUNT @@`"))?;
    let [mut old, mut new] = counts;
    let mut last = number;
    while old > 0 || new > 0 {
        let end = malformed(last, "the diff ends within a hunk");
        let (at, line) = lines.next().ok_or(end)?;
        last = at;
        let (of_old, of_new) = match line.first() {
            // A mailer may have stripped the blank of an empty line.
            Some(b' ') | None => (1, 1),
            Some(b'-') => (1, 0),
            Some(b'+') => (0, 1),
            Some(b'\\') => (0, 0),
            Some(_) => {
                return Err(malformed(
                    at,
                    "a line of a hunk begins with a blank, `+` or `-`",
                ));
            }
        };
        let left = |count: u32, used| count.checked_sub(used);
        (old, new) = left(old, of_old)
            .zip(left(new, of_new))
            .ok_or_else(|| malformed(at, "a hunk has more lines than its head says"))?;
    }
    Ok(last)
}

/// Lines of the old and of the new side.
fn hunk(head: &[u8]) -> Option<[u32; 2]> {
    let text = str::from_utf8(head.get(..head.len().min(128))?).ok()?;
    let mut words = text.split(' ').skip(1);
    let count = |word: &str, sign| {
        let range = word.strip_prefix(sign)?;
        range
            .split_once(',')
            .map_or(Some(1), |(_, count)| count.parse().ok())
    };
    Some([count(words.next()?, '-')?, count(words.next()?, '+')?])
}

fn side(line: usize, text: &[u8]) -> Result<Side, DiffError> {
    let name = text.split(|byte| *byte == b'\t').next().unwrap_or_default();
    let name = String::from_utf8_lossy(name);
    let name = name.trim_end();
    if name == "/dev/null" {
        return Ok(Side::Absent);
    }
    let inside = name.split_once('/').map(|(_, rest)| PathBuf::from(rest));
    let normal = |path: &PathBuf| {
        path.components()
            .all(|part| matches!(part, Component::Normal(_)))
            && !path.as_os_str().is_empty()
    };
    match inside.filter(normal) {
        Some(path) if !name.starts_with('/') => Ok(Side::File(path)),
        _ => Err(DiffError::Path {
            line,
            path: name.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIX: &str = "\
From 0123 Mon Sep 17 00:00:00 2001
Subject: [PATCH] fs: a fix

---
 fs/a.c | 2 +-

diff --git a/fs/a.c b/fs/a.c
--- a/fs/a.c
+++ b/fs/a.c\t2026-01-01
@@ -1,3 +1,3 @@ int a(void)
 one
--- a/not/a.c
++++ b/not/a.c
 three
diff --git a/Documentation/a.rst b/Documentation/a.rst
--- a/Documentation/a.rst
+++ b/Documentation/a.rst
@@ -1 +1 @@
-one
+two
--
2.39
";

    fn why(text: &str) -> String {
        Diff::parse(text.as_bytes()).unwrap_err().to_string()
    }

    fn of(old: &str, new: &str) -> String {
        format!("--- {old}\n+++ {new}\n@@ -1 +1 @@\n-a\n+b\n")
    }

    #[test]
    fn files_are_read_from_a_mail_and_lines_of_hunks_are_not_taken_for_heads() {
        let diff = Diff::parse(FIX.as_bytes()).unwrap();
        assert_eq!(diff.compiled(), [PathBuf::from("fs/a.c")]);
        assert_eq!(diff.ignored(), [PathBuf::from("Documentation/a.rst")]);
        let text = str::from_utf8(diff.text()).unwrap();
        assert!(
            text.starts_with("--- a/fs/a.c\n+++ b/fs/a.c\t2026-01-01\n@@ "),
            "{text}"
        );
        assert!(text.ends_with("\n++++ b/not/a.c\n three\n"), "{text}");
    }

    #[test]
    fn what_is_said_of_the_end_of_a_file_stays_with_its_hunk() {
        let text = of("a/fs/a.c", "b/fs/a.c") + "\\ No newline at end of file\n";
        let diff = Diff::parse(text.as_bytes()).unwrap();
        assert_eq!(str::from_utf8(diff.text()), Ok(&*text));
    }

    #[test]
    fn headers_are_told_apart_from_what_is_compiled() {
        let text = of("a/fs/a.h", "b/fs/a.h") + &of("a/fs/a.c", "b/fs/a.c");
        let diff = Diff::parse(text.as_bytes()).unwrap();
        assert_eq!(diff.headers(), [PathBuf::from("fs/a.h")]);
        assert_eq!(diff.compiled(), [PathBuf::from("fs/a.c")]);
        assert_eq!(str::from_utf8(diff.text()), Ok(&*text));
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (path, part) in [
            (
                "arch/x86/entry/vdso/vclock_gettime.c",
                "no part of the kernel's text",
            ),
            ("include/vdso/helpers.h", "no part of the kernel's text"),
            ("fs/Makefile", "how the kernel is built"),
            ("arch/x86/kernel/vmlinux.lds.S", "how the kernel is built"),
            ("scripts/sorttable.c", "how the kernel is built"),
        ] {
            let why = why(&of(&format!("a/{path}"), &format!("b/{path}")));
            assert!(why.contains(path) && why.contains(part), "{why}");
        }
        for text in [
            of("/dev/null", "b/fs/new.c"),
            of("a/fs/old.c", "/dev/null"),
            of("a/fs/a.c", "b/fs/b.c"),
        ] {
            assert!(why(&text).contains("come, go or move"), "{text}");
        }
        for path in ["Documentation/a.rst", "arch/arm/kernel/setup.c"] {
            let only = why(&of(&format!("a/{path}"), &format!("b/{path}")));
            assert!(only.contains(&format!("only {path}")), "{only}");
        }
    }

    #[test]
    fn a_path_out_of_the_source_is_refused() {
        for path in ["a/../x.c", "/etc/x.c", "x.c", "a//x.c/../../y.c", "a/"] {
            let why = why(&of(path, path));
            assert!(why.contains("no path within"), "{path}: {why}");
        }
    }

    #[test]
    fn a_diff_that_is_cut_short_or_none_is_told() {
        assert_eq!(Diff::parse(b""), Err(DiffError::Empty));
        assert_eq!(Diff::parse(b"\0\xff\n--- \n"), Err(DiffError::Empty));
        let cut = "--- a/a.c\n+++ b/a.c\n@@ -1,3 +1,3 @@\n one";
        assert!(why(cut).contains("ends within a hunk"), "{}", why(cut));
        let wrong = "--- a/a.c\n+++ b/a.c\n@@ -1,1 +1,1 @@\n-one\n-two\n+two\n";
        assert!(why(wrong).contains("more lines"), "{}", why(wrong));
        assert!(why("--- a/a.c\n+++ b/a.c\n@@ nonsense\n").contains("begins with"));
    }
}
