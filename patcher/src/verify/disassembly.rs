//! Two versions of the same code side by side, as lines for a report. Decides nothing.

use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};
use vmpatch_introspect::Gva;

/// Instructions shown before and after the one in question.
const BEFORE: usize = 3;
const AFTER: usize = 4;
/// Width of one column in characters.
const COLUMN: usize = 58;

/// Both versions around `offset`, one instruction a line: what was built left, what runs right. The lines
/// that hold `offset` are marked.
#[must_use]
pub fn side_by_side(at: Gva, built: &[u8], running: &[u8], offset: usize) -> Vec<String> {
    let (left, left_mark) = column(at, built, offset);
    let (right, right_mark) = column(at, running, offset);
    let mut lines = vec![row(
        ' ',
        "built (as this kernel would have booted it)",
        "running",
    )];
    for index in 0..left.len().max(right.len()) {
        let mark = if index == left_mark || index == right_mark {
            '>'
        } else {
            ' '
        };
        let cell = |cells: &[String]| cells.get(index).cloned().unwrap_or_default();
        lines.push(row(mark, &cell(&left), &cell(&right)));
    }
    lines
}

fn row(mark: char, left: &str, right: &str) -> String {
    let left: String = left.chars().take(COLUMN).collect();
    format!("{mark} {left:COLUMN$} | {right}")
        .trim_end()
        .to_owned()
}

/// The instructions around `offset`, and which of them holds it.
fn column(at: Gva, code: &[u8], offset: usize) -> (Vec<String>, usize) {
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let mut formatter = NasmFormatter::new();
    let mut cells = Vec::new();
    let mut mark = 0;
    while decoder.can_decode() {
        let start = decoder.position();
        if start <= offset {
            mark = cells.len();
        } else if cells.len() > mark + AFTER {
            break;
        }
        let instruction = decoder.decode();
        let mut text = String::new();
        formatter.format(&instruction, &mut text);
        let bytes = code.get(start..decoder.position()).unwrap_or_default();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        cells.push(format!("+{start:04x} {hex:<20} {text}"));
    }
    let skip = mark.saturating_sub(BEFORE);
    (cells.split_off(skip.min(cells.len())), mark - skip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_differs_is_marked_on_both_sides() {
        // xor eax,eax; mov ebx,1 / mov ebx,2; ret
        let built = [0x31, 0xc0, 0xbb, 1, 0, 0, 0, 0xc3];
        let running = [0x31, 0xc0, 0xbb, 2, 0, 0, 0, 0xc3];
        let lines = side_by_side(Gva(0x1000), &built, &running, 3);
        assert_eq!(lines.len(), 4);
        assert!(lines[1].starts_with("  +0000 31c0"));
        assert!(lines[2].starts_with("> +0002 bb01000000"), "{}", lines[2]);
        assert!(lines[2].contains("| +0002 bb02000000"), "{}", lines[2]);
    }

    #[test]
    fn code_that_ends_early_or_does_not_decode_is_still_shown() {
        assert_eq!(side_by_side(Gva(0), &[], &[0x06], 0).len(), 2);
        assert_eq!(side_by_side(Gva(u64::MAX), &[0xe9], &[], 9).len(), 2);
    }
}
