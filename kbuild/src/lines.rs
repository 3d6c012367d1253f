//! Line numbers of a changed file: what stands below a change keeps those it had. A warning, a lock class or a message
//! that tells its line is then the same before and after, and functions that the fix does not touch are the same too.
//! Owns where a `#line` may stand.

use similar::{Algorithm, DiffOp, capture_diff_slices};

/// The new text with `#line` below each change, before the first line where nothing can be in the middle.
pub(crate) fn kept(old: &[u8], new: &[u8]) -> Vec<u8> {
    let (old, new) = (lines(old), lines(new));
    let mut text = Vec::new();
    // The line that comes next, from 0, as the compiler counts.
    let mut counted = 0;
    for op in capture_diff_slices(Algorithm::Myers, &old, &new) {
        for (offset, at) in op.new_range().enumerate() {
            let was = match op {
                DiffOp::Equal { old_index, .. } => Some(old_index + offset),
                _ => None,
            };
            if let Some(was) = was.filter(|was| *was != counted && is_between(&new, at)) {
                text.extend_from_slice(format!("#line {}\n", was + 1).as_bytes());
                counted = was;
            }
            text.extend_from_slice(new.get(at).copied().unwrap_or_default());
            counted += 1;
        }
    }
    text
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
