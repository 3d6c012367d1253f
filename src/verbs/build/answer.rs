//! What a build answers: for people short, or with all that was seen; for programs always all.

use std::fmt::Write;

use serde::Serialize;
use vmpatch_patcher::build::{BuildReport, FileReport};

use super::objects::{Ignored, Moved, Origin};

/// The answer of a build that made a patch.
#[derive(Serialize)]
pub(super) struct Answer {
    pub(super) result: &'static str,
    pub(super) patch: String,
    pub(super) digest: String,
    /// The patch file.
    pub(super) file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) compiled: Option<Origin>,
    #[serde(flatten)]
    pub(super) report: BuildReport,
}

impl Answer {
    /// For people; `explain` tells what is as before too.
    pub(super) fn text(&self, explain: bool) -> String {
        let origin = self.compiled.as_ref();
        let origin = origin.map_or_else(String::new, |it| it.text(explain));
        let report = report(&self.report, explain);
        format!("{origin}{report}\nwritten to {}", self.file)
    }
}

impl Origin {
    /// For people; files that need not have been compiled are only counted unless all is to be told.
    fn text(&self, explain: bool) -> String {
        let mut text = format!("compiled by {}\n", self.compiler);
        for Moved { file, line, by } in &self.moved {
            let way = if *by < 0 { "up" } else { "down" };
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "moved     {file}: the hunk of line {line} was applied {} lines further {way}",
                by.unsigned_abs()
            );
        }
        let told = |it: &&Ignored| explain || !it.same;
        for ignored in self.ignored.iter().filter(told) {
            let _ = writeln!(text, "ignored   {}: {}", ignored.file, ignored.reason);
        }
        let same = self.ignored.iter().filter(|it| !told(it)).count();
        if same > 0 {
            let _ = writeln!(
                text,
                "ignored   {same} files that include what is changed and come out the same"
            );
        }
        text
    }
}

/// What was found, file by file.
pub(super) fn report(report: &BuildReport, explain: bool) -> String {
    let named = explain || report.files.len() > 1;
    let files = report.files.iter();
    let told = files.filter(|file| explain || !is_silent(file));
    told.map(|file| {
        let head = match named {
            true => format!("{} ({})\n", file.file, file.object),
            false => String::new(),
        };
        match explain {
            true => format!("{head}{file:#}"),
            false => format!("{head}{file}"),
        }
    })
    .collect()
}

/// Whether a short report has nothing to say of a file.
fn is_silent(file: &FileReport) -> bool {
    file.to_string().is_empty()
}

#[cfg(test)]
mod tests {
    use vmpatch_patcher::build::{self, Replaced};

    use super::*;

    fn two_files() -> BuildReport {
        let replaced = Replaced {
            function: "f".to_owned(),
            difference: "instructions".to_owned(),
            old_bytes: 1,
            new_bytes: 2,
        };
        let ignored = build::Ignored {
            what: "g".to_owned(),
            reason: "moved".to_owned(),
        };
        let file = |file: &str, object: &str| FileReport {
            file: file.to_owned(),
            object: object.to_owned(),
            unchanged: 7,
            layouts: Some(0),
            ..FileReport::default()
        };
        let changed = FileReport {
            replaced: vec![replaced],
            ignored: vec![ignored],
            ..file("fs/a.c", "vmlinux")
        };
        BuildReport {
            files: vec![changed, file("fs/ext4/b.c", "ext4")],
        }
    }

    #[test]
    fn short_is_what_changed_and_the_whole_is_told_when_asked() {
        let short = report(&two_files(), false);
        assert_eq!(
            short,
            "fs/a.c (vmlinux)\nreplaced  f (1 to 2 bytes): instructions\nignored   g: moved\n"
        );
        let all = report(&two_files(), true);
        assert!(
            all.contains("fs/ext4/b.c (ext4)\nunchanged 7 functions"),
            "{all}"
        );
        assert_eq!(all.matches("unchanged").count(), 2);
    }

    #[test]
    fn files_that_came_out_the_same_are_counted_and_named_when_asked() {
        let ignored = |file: &str, same| Ignored {
            file: file.to_owned(),
            reason: "why".to_owned(),
            same,
        };
        let origin = Origin {
            compiler: "gcc".to_owned(),
            release: None,
            ignored: vec![ignored("a.rst", false), ignored("b.c", true)],
            moved: vec![Moved {
                file: "c.c".to_owned(),
                line: 7,
                by: -3,
            }],
        };
        let short = origin.text(false);
        assert!(
            short.contains("a.rst: why") && short.contains(" 1 files"),
            "{short}"
        );
        assert!(!short.contains("b.c"), "{short}");
        let moved = "c.c: the hunk of line 7 was applied 3 lines further up";
        assert!(short.contains(moved), "{short}");
        assert!(origin.text(true).contains("b.c: why"));
    }
}
