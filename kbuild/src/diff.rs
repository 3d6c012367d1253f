//! The diff of a fix: which files it changes, and which of them matter to the running kernel. Does not apply it;
//! `patch` does.

use std::fmt;
use std::path::{Component, Path, PathBuf};

/// A unified diff, as `git format-patch`, `git diff` and `diff -u` write it, with one folder before each path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diff {
    text: Vec<u8>,
    /// Files that are compiled, relative to the root of the source.
    compiled: Vec<PathBuf>,
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

struct Files<'a>(&'a [PathBuf]);

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
enum Part {
    /// Compiled to an object of its own.
    Source,
    /// Included by others.
    Header,
    /// Tells how it is built.
    Rule,
    /// No part of it.
    None,
}

impl Part {
    fn of(path: &Path) -> Self {
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
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ending = path.extension().unwrap_or_default().to_string_lossy();
        match &*ending {
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
        let changes = changes(text)?;
        if changes.is_empty() {
            return Err(DiffError::Empty);
        }
        let (mut compiled, mut ignored) = (Vec::new(), Vec::new());
        let (mut headers, mut rules, mut moved) = (Vec::new(), Vec::new(), Vec::new());
        for (old, new) in changes {
            let (path, whole) = match (old, new) {
                (Side::File(old), Side::File(new)) if old == new => (new, false),
                (Side::File(path), _) | (Side::Absent, Side::File(path)) => (path, true),
                (Side::Absent, Side::Absent) => continue,
            };
            match Part::of(&path) {
                Part::None => ignored.push(path),
                _ if whole => moved.push(path),
                Part::Source => compiled.push(path),
                Part::Header => headers.push(path),
                Part::Rule => rules.push(path),
            }
        }
        for (files, why) in [
            (moved, "files that come, go or move are not understood yet"),
            (headers, "which objects include a header is not known yet"),
            (rules, "how the kernel is built cannot change yet"),
        ] {
            if !files.is_empty() {
                return Err(DiffError::NotYet { files, why });
            }
        }
        compiled.sort();
        compiled.dedup();
        if compiled.is_empty() {
            return Err(DiffError::NothingCompiled(ignored));
        }
        Ok(Self {
            text: text.to_vec(),
            compiled,
            ignored,
        })
    }

    /// As it was read.
    #[must_use]
    pub fn text(&self) -> &[u8] {
        &self.text
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

/// Both sides of each file's change, in the order of the diff.
fn changes(text: &[u8]) -> Result<Vec<(Side, Side)>, DiffError> {
    let mut found = Vec::new();
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let mut lines = (1..).zip(text.split(|byte| *byte == b'\n'));
    while let Some((number, line)) = lines.next() {
        let malformed = |line, what| DiffError::Malformed { line, what };
        if line.starts_with(b"@@ ") {
            skip_hunk(number, line, &mut lines)?;
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
            found.push((side(number, old)?, side(at, new)?));
        } else if line.starts_with(b"rename from ") || line.starts_with(b"copy from ") {
            return Err(malformed(
                number,
                "a file that is moved or copied is not understood yet",
            ));
        }
    }
    Ok(found)
}

/// Passes over the lines of a hunk, which may look like anything.
fn skip_hunk<'a>(
    number: usize,
    head: &[u8],
    lines: &mut impl Iterator<Item = (usize, &'a [u8])>,
) -> Result<(), DiffError> {
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
    Ok(())
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
        assert_eq!(diff.text(), FIX.as_bytes());
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (path, part) in [
            ("include/net/sock.h", "include a header"),
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
