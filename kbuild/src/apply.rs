//! The diff put into the tree: `patch` does it, and what it says is checked: that it changes the listed files and no other, and
//! that a hunk which it puts elsewhere than the diff says could stand nowhere else. Does not take anything back.

use std::fs;
use std::path::{Path, PathBuf};

use crate::command;
use crate::diff::Diff;
use crate::error::{At, BuildError};
use crate::hunk::Hunk;
use crate::lines;
use crate::tree::Tree;

/// A hunk that stands elsewhere in the source than the diff says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The file, relative to the root of the source.
    pub file: PathBuf,
    /// Its line as the diff has it.
    pub line: u32,
    /// How many lines further down it was applied; further up where negative.
    pub by: i64,
}

impl Tree {
    /// That the source has all files that the diff changes.
    pub(crate) fn has_files_of(&self, diff: &Diff) -> Result<(), BuildError> {
        let mut files = diff.files().into_iter();
        match files.find(|it| !self.shadow.original(it).is_file()) {
            Some(absent) => Err(self.misfit(format!("it has no {}", absent.display()))),
            None => Ok(()),
        }
    }

    /// Applies the diff to the tree. Tells what stands elsewhere.
    pub(crate) fn apply(&self, diff: &Diff) -> Result<Vec<Moved>, BuildError> {
        let files: Vec<_> = diff.files().into_iter().map(Path::to_owned).collect();
        self.shadow.change(&files)?;
        let text = self.out.join("fix.patch");
        fs::write(&text, diff.text()).at(&text)?;
        let mut patch = command::plain("patch");
        patch.args([
            "-p1",
            "--unified",
            "--forward",
            "--batch",
            "--no-backup-if-mismatch",
            // Lines of a hunk that are not there show that the source is another one.
            "--fuzz=0",
            "--reject-file=-",
            "-i",
        ]);
        let output = self.run(patch.arg(&text).current_dir(self.shadow.root()))?;
        if !output.status.success() {
            return Err(self.misfit(command::last_words(&output)));
        }
        let said = String::from_utf8_lossy(&output.stdout);
        let changes = diff.changes();
        let moved = moves(&said, changes)
            .ok_or_else(|| self.misfit(format!("`patch` did something else with it:\n{said}")))?;
        let mut told = Vec::new();
        for (change, hunk, by) in moved {
            let Some((file, hunk)) = hunk_at(changes, change, hunk) else {
                continue;
            };
            self.stands_nowhere_else(file, hunk, by)?;
            let (file, line) = (file.to_owned(), hunk.line());
            told.push(Moved { file, line, by });
        }
        files.iter().try_for_each(|file| self.keep_lines(file))?;
        Ok(told)
    }

    fn misfit(&self, said: String) -> BuildError {
        BuildError::DoesNotApply {
            source_dir: self.source.clone(),
            said,
        }
    }

    /// Refuses a hunk that was moved to one of several places where its lines are.
    fn stands_nowhere_else(&self, file: &Path, hunk: &Hunk, by: i64) -> Result<(), BuildError> {
        let at = self.shadow.original(file);
        match hunk.places(&fs::read(&at).at(&at)?) {
            0 | 1 => Ok(()),
            places => Err(self.misfit(format!(
                "the lines of the hunk at line {} of {} are not there, and at {places} other places: `patch` would take \
                 those {by:+} lines away",
                hunk.line(),
                file.display()
            ))),
        }
    }

    /// Gives what stands below the changes of a file of C the numbers of its lines back.
    fn keep_lines(&self, file: &Path) -> Result<(), BuildError> {
        let ending = file.extension().unwrap_or_default();
        if ending != "c" && ending != "h" {
            return Ok(());
        }
        let (from, to) = (self.shadow.original(file), self.shadow.root().join(file));
        let (old, new) = (fs::read(&from).at(&from)?, fs::read(&to).at(&to)?);
        fs::write(&to, lines::kept(&old, &new)).at(&to)
    }
}

fn hunk_at(changes: &[(PathBuf, Vec<Hunk>)], change: usize, hunk: usize) -> Option<(&Path, &Hunk)> {
    let (file, hunks) = changes.get(change)?;
    Some((file, hunks.get(hunk)?))
}

/// Reads from what `patch` says which hunks of which changes it moved and by how much; `None` if it speaks of other files than
/// the changes in their order.
fn moves(said: &str, changes: &[(PathBuf, Vec<Hunk>)]) -> Option<Vec<(usize, usize, i64)>> {
    let mut found = Vec::new();
    let mut begun = 0;
    for line in said.lines() {
        if let Some(name) = line.strip_prefix("patching file ") {
            let (file, _) = changes.get(begun)?;
            begun = (Path::new(name) == file).then_some(begun + 1)?;
        } else if let Some((number, offset)) = moved(line) {
            found.push((begun.checked_sub(1)?, number.checked_sub(1)?, offset));
        }
    }
    (begun == changes.len()).then_some(found)
}

/// `Hunk #1 succeeded at 5 (offset -2 lines).`
fn moved(line: &str) -> Option<(usize, i64)> {
    let (number, rest) = line.strip_prefix("Hunk #")?.split_once(' ')?;
    let (_, offset) = rest.split_once("(offset ")?;
    let (offset, _) = offset.split_once(' ')?;
    Some((number.parse().ok()?, offset.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_patch_says_is_held_against_the_diff() {
        let text = "--- a/a.c\n+++ b/a.c\n@@ -1 +1 @@\n-a\n+b\n@@ -9 +9 @@\n-c\n+d\n\
                    --- a/b.c\n+++ b/b.c\n@@ -1 +1 @@\n-a\n+b\n";
        let diff = Diff::parse(text.as_bytes()).unwrap();
        let changes = diff.changes();
        let of = |said: &str| moves(said, changes);
        let plain = "patching file a.c\npatching file b.c\n";
        assert_eq!(of(plain), Some(vec![]));
        let moved = "patching file a.c\nHunk #2 succeeded at 5 (offset -4 lines).\npatching file b.c\n\
                     Hunk #1 succeeded at 2 (offset 1 line).\n";
        assert_eq!(of(moved), Some(vec![(0, 1, -4), (1, 0, 1)]));
        for other in [
            "patching file a.c\n",
            "patching file a.c\npatching file c.c\n",
            "patching file a.c\npatching file b.c\npatching file c.c\n",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
