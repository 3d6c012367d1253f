//! The hunks of a diff: read line by line, written for `patch`, and where else in a file their lines stand. Owns no names of
//! files.

use std::iter::{Enumerate, Peekable};
use std::slice::Split;

use crate::diff::DiffError;

/// One hunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hunk {
    /// Where it stands in the old file, from 1.
    line: u32,
    /// Its head and its lines, as they stand, each without its end.
    lines: Vec<Vec<u8>>,
}

type Splitter = fn(&u8) -> bool;

/// The lines of a text with their numbers, from 1.
pub(crate) struct Lines<'a>(Peekable<Enumerate<Split<'a, u8, Splitter>>>);

impl<'a> Lines<'a> {
    pub(crate) fn of(text: &'a [u8]) -> Self {
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        let split: Split<'a, u8, Splitter> = text.split(|byte| *byte == b'\n');
        Self(split.enumerate().peekable())
    }

    fn peek(&mut self) -> Option<&'a [u8]> {
        self.0.peek().map(|(_, line)| *line)
    }

    /// What stands behind this in the next line, if it begins with it; it is then passed.
    pub(crate) fn next_with(&mut self, begin: &[u8]) -> Option<(usize, &'a [u8])> {
        let rest = self.peek()?.strip_prefix(begin)?;
        self.next().map(|(number, _)| (number, rest))
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = (usize, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|(before, line)| (before + 1, line))
    }
}

/// Reads the hunks that stand directly below the head of a file, the last line of which is `head`.
pub(crate) fn all(head: usize, lines: &mut Lines<'_>) -> Result<Vec<Hunk>, DiffError> {
    let mut found = Vec::new();
    let mut last = head;
    while let Some((number, line)) = lines.next_with(b"@@ ") {
        let (hunk, end) = Hunk::read(number, line, lines)?;
        found.push(hunk);
        last = end;
    }
    let malformed = |line, what| Err(DiffError::Malformed { line, what });
    let beyond = |line: &[u8]| match line.first() {
        Some(b'+' | b' ') => true,
        // Not the next file's head, nor what ends a mail.
        Some(b'-') => !line.starts_with(b"--"),
        _ => false,
    };
    match lines.peek() {
        _ if found.is_empty() => malformed(last, "no hunk stands below the head of a file"),
        Some(line) if beyond(line) => {
            malformed(last + 1, "a hunk has more lines than its head says")
        }
        _ => Ok(found),
    }
}

impl Hunk {
    /// Reads the lines of a hunk, which may look like anything; `head` stands behind its `@@ `. Tells the number of the last.
    fn read(number: usize, head: &[u8], lines: &mut Lines<'_>) -> Result<(Self, usize), DiffError> {
        let malformed = |line, what| DiffError::Malformed { line, what };
        let (line, counts) = ranges(head).ok_or_else(|| {
            malformed(number, "a hunk begins with `@@ -LINE,COUNT +LINE,COUNT @@`")
        })?;
        let [mut old, mut new] = counts;
        let mut hunk = Self {
            line,
            lines: vec![[b"@@ ", head].concat()],
        };
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
            hunk.lines.push(line.to_owned());
        }
        // "No newline at end of file", of the last line.
        if let Some((at, rest)) = lines.next_with(b"\\ ") {
            hunk.lines.push([b"\\ ", rest].concat());
            last = at;
        }
        Ok((hunk, last))
    }

    /// Where it stands in the old file, from 1.
    pub(crate) fn line(&self) -> u32 {
        self.line
    }

    /// At how many places of a file its old lines stand.
    pub(crate) fn places(&self, file: &[u8]) -> usize {
        let body = self.lines.iter().skip(1);
        let old: Vec<&[u8]> = body
            .filter_map(|line| match line.split_first() {
                None => Some(&b""[..]),
                Some((b' ' | b'-', line)) => Some(line),
                _ => None,
            })
            .collect();
        let file: Vec<_> = file.split(|byte| *byte == b'\n').collect();
        match old.is_empty() {
            // What only adds, with nothing around it, stands anywhere.
            true => file.len(),
            false => file.windows(old.len()).filter(|it| **it == *old).count(),
        }
    }

    /// Adds it to a text.
    pub(crate) fn write(&self, text: &mut Vec<u8>) {
        for line in &self.lines {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
    }
}

/// Where the old side begins, and how many lines the old and the new one have.
fn ranges(head: &[u8]) -> Option<(u32, [u32; 2])> {
    let text = str::from_utf8(head.get(..head.len().min(128))?).ok()?;
    let mut words = text.split(' ');
    let range = |word: &str, sign| {
        let range = word.strip_prefix(sign)?;
        let (line, count) = range.split_once(',').unwrap_or((range, "1"));
        Some((line.parse().ok()?, count.parse().ok()?))
    };
    let (line, old) = range(words.next()?, '-')?;
    let (_, new): (u32, _) = range(words.next()?, '+')?;
    Some((line, [old, new]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Hunk>, DiffError> {
        all(0, &mut Lines::of(text.as_bytes()))
    }

    #[test]
    fn the_places_where_a_hunk_fits_are_counted() {
        let hunks = read("@@ -7,3 +7,3 @@ int f(void)\n a\n-b\n+c\n\n@@ -9,0 +9 @@\n+d\n").unwrap();
        let [hunk, bare] = hunks.as_slice() else {
            panic!("{hunks:?}")
        };
        assert_eq!(hunk.line(), 7);
        for (file, places) in [("a\nb\n\n", 1), ("a\nb\n\nx\na\nb\n\n", 2), ("a\nc\n\n", 0)] {
            assert_eq!(hunk.places(file.as_bytes()), places, "{file}");
        }
        assert!(bare.places(b"a\nb\n") > 1);
    }

    #[test]
    fn lines_that_a_head_does_not_count_are_refused() {
        let why = |text: &str| read(text).unwrap_err().to_string();
        for more in ["+d\n", "-d\n", " d\n"] {
            let told = why(&format!("@@ -1 +1 @@\n-a\n+b\n{more}"));
            assert!(
                told.contains("line 4") && told.contains("more lines"),
                "{told}"
            );
        }
        for end in ["-- \n2.39\n", "--\n", "\n+d\n", "diff --git a/b b/b\n"] {
            assert!(
                read(&format!("@@ -1 +1 @@\n-a\n+b\n{end}")).is_ok(),
                "{end}"
            );
        }
        assert!(why("").contains("no hunk"));
    }
}
