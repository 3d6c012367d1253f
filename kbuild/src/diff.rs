//! The diff of a fix: which files it changes, and which of them matter to the running kernel. Does not apply it;
//! `patch` does.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use crate::hunk::{self, Hunk};

/// A unified diff, as `git format-patch`, `git diff` and `diff -u` write it, with one folder before each path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diff {
    /// What it does to the files that count.
    text: Vec<u8>,
    /// The same, file by file.
    changes: Vec<(PathBuf, Vec<Hunk>)>,
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
    /// A path leads out of the source, or is none that the kernel's build can be asked about.
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

/// Why files of [`Part::Apart`] are refused.
pub(crate) const APART: &str =
    "this runs before the kernel, or in user space, and is no part of the kernel's text";

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

/// Whether a path has only what the kernel's own have, which a makefile and a command take as it stands.
pub(crate) fn is_plain(path: &Path) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._,+@-/".contains(byte);
    let option = |part: Component<'_>| part.as_os_str().as_encoded_bytes().starts_with(b"-");
    path.as_os_str().as_encoded_bytes().iter().all(plain) && !path.components().any(option)
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
    /// Lies among the tools, and the kernel is made of it.
    Linked,
    /// Tells how it is built.
    Rule,
    /// No part of it.
    None,
}

/// Folders of such code, and of its headers.
const APART_FOLDERS: [&str; 7] = [
    "arch/x86/boot",
    "arch/x86/entry/vdso",
    "arch/x86/include/asm/vdso",
    "arch/x86/purgatory",
    "arch/x86/realmode/rm",
    "drivers/firmware/efi/libstub",
    "include/vdso",
];
/// Files in them that are part of the kernel all the same (Linux v6.12 arch/x86/entry/vdso/Makefile, obj-y and
/// obj-$(CONFIG_COMPAT_32)).
const NOT_APART: [&str; 4] = [
    "arch/x86/entry/vdso/extable.c",
    "arch/x86/entry/vdso/extable.h",
    "arch/x86/entry/vdso/vdso32-setup.c",
    "arch/x86/entry/vdso/vma.c",
];
/// Files of the tools that the kernel's own include (Linux v6.12 kernel/bpf/relo_core.c, btf_iter.c, btf_relocate.c, btf.c).
const LINKED: [&str; 4] = [
    "tools/lib/bpf/btf_iter.c",
    "tools/lib/bpf/btf_relocate.c",
    "tools/lib/bpf/relo_core.c",
    "tools/lib/bpf/relo_core.h",
];
/// A table of instructions is made of it (Linux v6.12 arch/x86/lib/Makefile, inat_tables_maps).
const TABLE: &str = "arch/x86/lib/x86-opcode-map.txt";

impl Part {
    pub(crate) fn of(path: &Path) -> Self {
        let is_one = |names: &[&str]| names.iter().any(|it| path == Path::new(it));
        if is_one(&LINKED) {
            return Self::Linked;
        }
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
        let apart = APART_FOLDERS.iter().any(|folder| path.starts_with(folder));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ending = path.extension().unwrap_or_default().to_string_lossy();
        match &*ending {
            "c" | "S" | "h" if apart && !is_one(&NOT_APART) => Self::Apart,
            "c" => Self::Source,
            "S" if !name.ends_with(".lds.S") => Self::Source,
            "h" => Self::Header,
            "rst" | "txt" | "yaml" | "md" if !is_one(&[TABLE]) => Self::None,
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
        let changes = changes(&without_returns(text))?;
        if changes.is_empty() {
            return Err(DiffError::Empty);
        }
        let (mut compiled, mut ignored) = (Vec::new(), Vec::new());
        let (mut headers, mut rules, mut moved) = (Vec::new(), Vec::new(), Vec::new());
        let (mut apart, mut linked) = (Vec::new(), Vec::new());
        let (mut kept, mut kept_changes) = (Vec::new(), Vec::new());
        for Change { old, new, hunks } in changes {
            let (path, whole) = match (old, new) {
                (Side::File(old), Side::File(new)) if old == new => (new, false),
                (Side::File(path), _) | (Side::Absent, Side::File(path)) => (path, true),
                (Side::Absent, Side::Absent) => continue,
            };
            let list = match Part::of(&path) {
                Part::None => {
                    ignored.push(path);
                    continue;
                }
                Part::Apart => &mut apart,
                Part::Linked => &mut linked,
                _ if whole => &mut moved,
                Part::Source => &mut compiled,
                Part::Header => &mut headers,
                Part::Rule => &mut rules,
            };
            list.push(path.clone());
            // Heads of our own: what else stands in one, such as a time, has a meaning to `patch` too.
            let head = format!("--- a/{0}\n+++ b/{0}\n", path.display());
            kept.extend_from_slice(head.as_bytes());
            hunks.iter().for_each(|hunk| hunk.write(&mut kept));
            kept_changes.push((path, hunks));
        }
        for (files, why) in [
            (moved, "files that come, go or move are not understood yet"),
            (apart, APART),
            (
                linked,
                "the kernel is made of this too, in a way that is not understood yet",
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
            changes: kept_changes,
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

    /// The same, file by file in its order.
    pub(crate) fn changes(&self) -> &[(PathBuf, Vec<Hunk>)] {
        &self.changes
    }

    /// All files that are changed by [`Self::text`], sorted.
    pub(crate) fn files(&self) -> BTreeSet<&Path> {
        let files = self.compiled.iter().chain(&self.headers);
        files.map(PathBuf::as_path).collect()
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
    hunks: Vec<Hunk>,
}

/// A text without the carriage returns that a mailer put at the end of every line.
fn without_returns(text: &[u8]) -> Cow<'_, [u8]> {
    let lines = || text.split_inclusive(|byte| *byte == b'\n');
    let bare = |line: &[u8]| line.strip_suffix(b"\r\n").map(<[u8]>::to_vec);
    match lines().map(bare).collect::<Option<Vec<_>>>() {
        Some(bare) => Cow::Owned(bare.join(&b'\n')),
        None => Cow::Borrowed(text),
    }
}

/// Each file's change in its order. What stands around them is passed over, where it cannot be taken for a part of one.
fn changes(text: &[u8]) -> Result<Vec<Change>, DiffError> {
    let mut found: Vec<Change> = Vec::new();
    let mut lines = hunk::Lines::of(text);
    while let Some((number, line)) = lines.next() {
        let malformed = |what| DiffError::Malformed { line: number, what };
        if let Some(old) = line.strip_prefix(b"--- ") {
            // Also the line that ends the text of a mail.
            if let Some((at, new)) = lines.next_with(b"+++ ") {
                let (old, new) = (side(number, old)?, side(at, new)?);
                let hunks = hunk::all(at, &mut lines)?;
                found.push(Change { old, new, hunks });
            }
        } else if line.starts_with(b"@@ -") {
            return Err(malformed("a hunk stands apart from the head of its file"));
        } else if line.starts_with(b"GIT binary patch") || line.starts_with(b"Binary files ") {
            return Err(malformed("a change of a binary file is no text"));
        } else if line.starts_with(b"rename from ") || line.starts_with(b"copy from ") {
            return Err(malformed(
                "a file that is moved or copied is not understood yet",
            ));
        }
    }
    Ok(found)
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
    // What is no part of the kernel is only told.
    let usable = |path: &PathBuf| is_plain(path) || Part::of(path) == Part::None;
    match inside.filter(|path| normal(path) && usable(path)) {
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
            text.starts_with("--- a/fs/a.c\n+++ b/fs/a.c\n@@ "),
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
        for path in [
            "a/../x.c",
            "/etc/x.c",
            "x.c",
            "a//x.c/../../y.c",
            "a/",
            // What means something to a makefile or to `make`.
            "a/$(shell touch x)/x.c",
            "a/fs/#x.c",
            "a/fs:x.c",
            "a/fs/%.c",
            "a/fs/a x.c",
            "a/-f/x.c",
            "a/fs=/x.c",
            "a/fs;/x.c",
            "a/fs\\/x.c",
        ] {
            let why = why(&of(path, path));
            assert!(why.contains("no path within"), "{path}: {why}");
        }
    }

    #[test]
    fn paths_as_the_kernel_has_them_are_taken() {
        for path in ["net/l3mdev/a,b.c", "a+b/c@d.c", "fs/x_y-z.c"] {
            let diff = Diff::parse(of(&format!("a/{path}"), &format!("b/{path}")).as_bytes());
            assert_eq!(diff.unwrap().compiled(), [PathBuf::from(path)]);
        }
        let board = "tools/testing/Dell Inc.,XPS.yaml";
        let text = of("a/fs/a.c", "b/fs/a.c") + &of(&format!("a/{board}"), &format!("b/{board}"));
        let diff = Diff::parse(text.as_bytes()).unwrap();
        assert_eq!(diff.ignored(), [PathBuf::from(board)]);
    }

    #[test]
    fn no_text_around_the_hunks_reaches_patch() {
        let first = of("a/fs/a.c", "b/fs/a.c");
        let second = of("a/fs/b.c", "b/fs/b.c");
        let between = "*** x/fs/c.c\nIndex: fs/c.c\n--- a/fs/x.c\n1c1\n< a\n---\n> b\n";
        // A head that no `+++` follows does not hide the one behind it.
        let text = format!("{between}{first}{between}--- not\n{second}");
        let diff = Diff::parse(text.as_bytes()).unwrap();
        assert_eq!(
            str::from_utf8(diff.text()),
            Ok(&*format!("{first}{second}"))
        );
        let apart = format!("{first}\n@@ -9 +9 @@\n-a\n+b\n");
        assert!(why(&apart).contains("apart from the head"), "{apart}");
    }

    #[test]
    fn what_a_mailer_did_to_the_ends_of_lines_is_undone() {
        let text = of("a/fs/a.c", "b/fs/a.c");
        let diff = Diff::parse(text.replace('\n', "\r\n").as_bytes()).unwrap();
        assert_eq!(str::from_utf8(diff.text()), Ok(&*text));
    }

    #[test]
    fn what_the_kernel_is_made_of_is_not_taken_for_no_part_of_it() {
        for path in LINKED.iter().chain([&TABLE]) {
            let text = of("a/fs/a.c", "b/fs/a.c") + &of(&format!("a/{path}"), &format!("b/{path}"));
            assert!(why(&text).contains(path), "{path}");
        }
        let of_vdso = "arch/x86/entry/vdso/vdso32-setup.c";
        assert_eq!(Part::of(Path::new(of_vdso)), Part::Source);
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
