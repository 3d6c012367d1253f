//! Tables for people: left-aligned columns, no borders, as `ps` prints them.

use comfy_table::{ContentArrangement, Table, TableStyle};
use vmpatch_patcher::arena::CallbackRecord;

/// A table of `rows` under `head`.
pub(crate) fn table<R, C>(head: &[&str], rows: R) -> String
where
    R: IntoIterator<Item = C>,
    C: IntoIterator<Item = String>,
{
    let mut table = Table::new();
    table
        .load_style(TableStyle::new())
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(head.iter().map(|column| column.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    let lines = table.lines();
    lines
        .map(|line| trimmed(&line))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Without the padding that the style puts around every cell.
fn trimmed(line: &str) -> String {
    line.strip_prefix(' ').unwrap_or(line).trim_end().to_owned()
}

/// A list of names and values.
pub(crate) fn pairs(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter()
        .map(|(name, value)| format!("{name:width$}  {value}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Callbacks in one line.
pub(crate) fn callbacks(callbacks: &[CallbackRecord]) -> String {
    let named = |it: &CallbackRecord| format!("{} ({})", it.kind, it.function);
    let all: Vec<_> = callbacks.iter().map(named).collect();
    all.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_at_the_left_edge() {
        let shown = table(&["id", "pid"], [["web1".to_owned(), "7".to_owned()]]);
        assert_eq!(shown, "ID    PID\nweb1  7");
    }

    #[test]
    fn values_line_up_behind_the_longest_name() {
        let shown = pairs(&[("id", "web1".to_owned()), ("release", "6.12".to_owned())]);
        assert_eq!(shown, "id       web1\nrelease  6.12");
    }
}
