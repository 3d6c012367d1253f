//! Line numbers of a changed file: what the change does not touch keeps those it had. A warning, a lock class or a message
//! that tells its line is then the same before and after, and functions that the fix does not touch are the same too. What it
//! touches has those of the changed file, where whoever reads a warning of it will look. Owns where a `#line` may stand.

use similar::{Algorithm, DiffOp, capture_diff_slices};

/// The new text with `#line` before each piece, between lines where nothing can be in the middle, whose numbers would be others.
pub(crate) fn kept(old: &[u8], new: &[u8]) -> Vec<u8> {
    let (old, new) = (lines(old), lines(new));
    let was = origins(&old, &new);
    let mut text = Vec::new();
    // The line that comes next, from 0, as the compiler counts.
    let mut counted = 0;
    let mut start = 0;
    while start < new.len() {
        let rest = start.saturating_add(1)..new.len();
        let end = rest.into_iter().find(|at| is_between(&new, *at));
        let end = end.unwrap_or(new.len());
        let number = moved_to(was.get(start..end).unwrap_or_default()).unwrap_or(start);
        if number != counted {
            text.extend_from_slice(format!("#line {}\n", number + 1).as_bytes());
        }
        let piece = new.get(start..end).unwrap_or_default();
        text.extend(piece.concat());
        counted = number.saturating_add(piece.len());
        start = end;
    }
    text
}

/// Which line of the old text each of the new one is, if it was there.
fn origins(old: &[&[u8]], new: &[&[u8]]) -> Vec<Option<usize>> {
    let ops = capture_diff_slices(Algorithm::Myers, old, new);
    let of = |op: DiffOp| {
        let first = match op {
            DiffOp::Equal { old_index, .. } => Some(old_index),
            _ => None,
        };
        let lines = 0..op.new_range().len();
        lines.map(move |offset| first.map(|first| first.saturating_add(offset)))
    };
    ops.into_iter().flat_map(of).collect()
}

/// Where a piece began in the old text, if it is all as it was there.
fn moved_to(was: &[Option<usize>]) -> Option<usize> {
    let first = was.first().copied().flatten()?;
    let same = |(offset, was): (usize, &Option<usize>)| *was == first.checked_add(offset);
    was.iter().enumerate().all(same).then_some(first)
}

fn lines(text: &[u8]) -> Vec<&[u8]> {
    text.split_inclusive(|byte| *byte == b'\n').collect()
}

/// Whether the line begins something at the top level: it stands at the margin, below an empty line or a closing brace,
/// and what is above is at its end. Within a comment or a body such a line is no harm.
fn is_between(lines: &[&[u8]], at: usize) -> bool {
    let begins = |line: &&[u8]| {
        let first = line.first().copied().unwrap_or_default();
        first.is_ascii_alphabetic() || matches!(first, b'_' | b'/')
    };
    let before = lines.get(..at).unwrap_or_default();
    let above = before.last().map_or(&b""[..], |line| line.trim_ascii());
    let apart = matches!(above, b"" | b"}" | b"};");
    let mut upwards = before.iter().rev().map(|line| line.trim_ascii_end());
    let last = upwards.find(|line| !line.is_empty());
    let ended = last.is_some_and(|line| {
        let directive = line.starts_with(b"#") && !line.ends_with(b"\\");
        directive || line.ends_with(b";") || line.ends_with(b"}") || line.ends_with(b"*/")
    });
    apart && ended && lines.get(at).is_some_and(begins)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "\
#include <a.h>

static int one(void)
{
	return WARN_ON(1);
}

static int two(void)
{
	return WARN_ON(2);
}
int three;
";

    /// The text, with each line's number as the compiler counts before it.
    fn numbered(text: &[u8]) -> Vec<(usize, String)> {
        let mut next = 1;
        let mut found = Vec::new();
        for line in str::from_utf8(text).unwrap().lines() {
            match line.strip_prefix("#line ") {
                Some(number) => next = number.parse().unwrap(),
                None => {
                    found.push((next, line.to_owned()));
                    next += 1;
                }
            }
        }
        found
    }

    fn line_of(text: &[u8], what: &str) -> usize {
        let found = numbered(text);
        found
            .iter()
            .find(|(_, line)| line.contains(what))
            .unwrap()
            .0
    }

    #[test]
    fn what_stands_below_a_change_keeps_its_numbers() {
        for (from, to) in [
            ("return WARN_ON(1);", "one_more();\n\treturn WARN_ON(1);"),
            ("{\n\treturn WARN_ON(1);\n}", "{ return 0; }"),
            ("#include <a.h>\n", "#include <a.h>\n#include <b.h>\n"),
        ] {
            let new = kept(OLD.as_bytes(), OLD.replacen(from, to, 1).as_bytes());
            for same in ["WARN_ON(2)", "int two", "int three"] {
                assert_eq!(line_of(&new, same), line_of(OLD.as_bytes(), same), "{to}");
            }
        }
        let new = kept(
            OLD.as_bytes(),
            OLD.replace("<a.h>", "<a.h>\n#include <b.h>").as_bytes(),
        );
        assert_eq!(line_of(&new, "WARN_ON(1)"), 5);
    }

    #[test]
    fn what_is_changed_has_the_numbers_of_the_changed_file() {
        let include = OLD.replace("<a.h>", "<a.h>\n#include <b.h>");
        for (from, to, what) in [
            ("return WARN_ON(2)", "more();\n\treturn BUG()", "BUG()"),
            ("return WARN_ON(2)", "return BUG()", "BUG()"),
            ("\treturn WARN_ON(2);\n", "", "int three"),
            (
                "static int two",
                "static int between;\n\nstatic int two",
                "between",
            ),
        ] {
            let new = include.replacen(from, to, 1);
            let true_line = new.lines().position(|line| line.contains(what));
            let made = kept(OLD.as_bytes(), new.as_bytes());
            assert_eq!(line_of(&made, what), true_line.unwrap() + 1, "{to}");
            assert_eq!(line_of(&made, "WARN_ON(1)"), 5, "{to}");
        }
    }

    #[test]
    fn nothing_else_of_the_text_is_touched() {
        assert_eq!(kept(OLD.as_bytes(), OLD.as_bytes()), OLD.as_bytes());
        let new = OLD.replace("return WARN_ON(1);", "a(\n\n\tb);\n\n\treturn 1;");
        let made = kept(OLD.as_bytes(), new.as_bytes());
        let text: Vec<_> = numbered(&made).into_iter().map(|(_, line)| line).collect();
        assert_eq!(text, new.lines().collect::<Vec<_>>());
        assert_eq!(kept(b"", b"\xff\xfe"), b"\xff\xfe");
    }

    #[test]
    fn no_directive_stands_in_the_middle_of_something() {
        for (text, at) in [
            ("#define A \\\n\nint a;\n", 2),
            ("int a(int b,\n\nint c);\n", 2),
            ("\tcall();\n\n\treturn 0;\n", 2),
            ("int a;\nint b;\n", 1),
            ("int b;\n", 0),
        ] {
            assert!(!is_between(&lines(text.as_bytes()), at), "{text}");
        }
        assert!(is_between(&lines(b"/* a */\n\nint a;\n"), 2));
    }
}
