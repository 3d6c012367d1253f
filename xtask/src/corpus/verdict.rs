//! What came of each entry against what was expected of it: the table and the last line. Decides nothing on the way.

use serde::Serialize;

use super::build::{Built, REFUSED};
use super::plan::Outcome;
use super::{Entry, Expected};

/// At least this share of what a human calls patchable must go through.
const ENOUGH: f64 = 0.95;

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    pub name: String,
    object: String,
    functions: usize,
    build_s: f64,
    link_verify_ms: f64,
    stop_us: f64,
    /// What it is and where it is from.
    provenance: String,
    /// What came of it.
    pub verdict: Verdict,
}

/// What came of one entry.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// In and out of a running kernel; `true` where a probe saw it come and go.
    Through { exercised: bool },
    /// A patch, not tried in a guest because no guest was asked for.
    Built,
    /// Refused, as it must be.
    Refused,
    /// Refused, as it need not be: a known limit.
    Limit,
    /// Another way than expected.
    Wrong(String),
}

/// The last line.
#[derive(Debug, Serialize)]
pub(crate) struct Line {
    corpus: &'static str,
    total: usize,
    patchable: usize,
    built: usize,
    verified: usize,
    applied: usize,
    rolled_back: usize,
    exercised: usize,
    refused: usize,
    wrong: usize,
}

/// Judges one entry.
pub(crate) fn row(entry: &Entry, built: &Built, outcome: Option<&Outcome>) -> Row {
    let none = Outcome::default();
    let seen = outcome.unwrap_or(&none);
    Row {
        name: entry.name.clone(),
        object: object(entry, built),
        functions: seen.functions,
        build_s: built.seconds,
        link_verify_ms: seen.link_verify_ms,
        stop_us: seen.stop_us,
        provenance: entry.provenance(),
        verdict: match &entry.expected {
            Expected::Patchable => patchable(entry, built, outcome),
            Expected::Refused(reason) => refusal(reason, Verdict::Refused, built, outcome),
            Expected::Limit(reason) => refusal(reason, Verdict::Limit, built, outcome),
        },
    }
}

fn patchable(entry: &Entry, built: &Built, outcome: Option<&Outcome>) -> Verdict {
    if !built.is_patch() {
        return Verdict::Wrong(format!("not built: {}", built.reason()));
    }
    match outcome {
        None => Verdict::Wrong("not tried in a guest".to_owned()),
        Some(Outcome {
            trouble: Some(trouble),
            ..
        }) => Verdict::Wrong(trouble.clone()),
        Some(seen) if !seen.rolled_back => Verdict::Wrong("not rolled back".to_owned()),
        Some(seen) if entry.probe.is_some() && !seen.exercised => {
            Verdict::Wrong("its probe did not see it".to_owned())
        }
        Some(seen) => Verdict::Through {
            exercised: seen.exercised,
        },
    }
}

/// A refusal counts where it is made when the patch is built or when it is checked against a guest.
fn refusal(reason: &str, expected: Verdict, built: &Built, outcome: Option<&Outcome>) -> Verdict {
    let trouble = outcome.and_then(|seen| seen.trouble.as_ref().map(|it| (seen.refused, it)));
    let told = match (built.is_patch(), trouble) {
        (false, _) if built.code == Some(REFUSED) => built.reason(),
        (false, _) => return Verdict::Wrong(format!("failed: {}", built.reason())),
        (true, Some((true, trouble))) => trouble.clone(),
        (true, Some((false, trouble))) => return Verdict::Wrong(format!("failed: {trouble}")),
        (true, None) => return Verdict::Wrong("not refused".to_owned()),
    };
    if told.contains(reason) {
        expected
    } else {
        Verdict::Wrong(format!("refused, but not for {reason:?}: {told}"))
    }
}

impl Row {
    /// Judges an entry that was only built: a patch is as good as it can be, for some are refused by a guest alone.
    pub(crate) fn only_built(entry: &Entry, built: &Built) -> Self {
        let mut row = row(entry, built, None);
        if built.is_patch() {
            row.verdict = Verdict::Built;
        }
        row
    }
}

/// Module or vmlinux, as the product says, or as the entry does where there is no patch.
fn object(entry: &Entry, built: &Built) -> String {
    let objects = built.answer["objects"].as_array().into_iter().flatten();
    let told: Vec<_> = objects.filter_map(|object| object.as_str()).collect();
    match (told.is_empty(), entry.modules.first()) {
        (false, _) => told.join("+"),
        (true, Some(module)) => module.clone(),
        (true, None) => "vmlinux".to_owned(),
    }
}

/// The table as text.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<26} {:<22} {:>9} {:>8} {:>11} {:>8}  verdict\n",
        "entry", "object", "functions", "build s", "link+ver ms", "stop µs"
    );
    for row in rows {
        let verdict = match &row.verdict {
            Verdict::Through { exercised: true } => "through, exercised",
            Verdict::Through { exercised: false } => "through",
            Verdict::Built => "built",
            Verdict::Refused => "refused",
            Verdict::Limit => "refused: a limit",
            Verdict::Wrong(_) => "WRONG",
        };
        text.push_str(&format!(
            "{:<26} {:<22} {:>9} {:>8.1} {:>11.1} {:>8.0}  {verdict}\n",
            row.name, row.object, row.functions, row.build_s, row.link_verify_ms, row.stop_us
        ));
    }
    for row in rows {
        if let Verdict::Wrong(why) = &row.verdict {
            text.push_str(&format!(
                "\nwrong: {}: {}\n  {why}\n",
                row.name, row.provenance
            ));
        }
    }
    text
}

/// Counts.
pub(crate) fn line(entries: &[Entry], built: &[Built], outcomes: &[Outcome], rows: &[Row]) -> Line {
    let patchable: Vec<_> = entries
        .iter()
        .filter(|entry| entry.is_patchable())
        .collect();
    let tried = |holds: fn(&Outcome) -> bool| {
        let of = |entry: &&&Entry| {
            outcomes
                .iter()
                .any(|seen| seen.name == entry.name && holds(seen))
        };
        patchable.iter().filter(of).count()
    };
    let all = entries.iter().zip(built);
    let count =
        |wanted: fn(&Verdict) -> bool| rows.iter().filter(|row| wanted(&row.verdict)).count();
    let wrong = count(|verdict| matches!(verdict, Verdict::Wrong(_)));
    let good = |row: &&Row| matches!(row.verdict, Verdict::Through { .. } | Verdict::Built);
    let judged = entries.iter().zip(rows);
    let through = judged.filter(|(entry, row)| entry.is_patchable() && good(row));
    let through = through.count();
    let enough = through as f64 >= ENOUGH * patchable.len() as f64;
    Line {
        corpus: if wrong == 0 && enough { "pass" } else { "fail" },
        total: entries.len(),
        patchable: patchable.len(),
        built: all
            .filter(|(entry, built)| entry.is_patchable() && built.is_patch())
            .count(),
        verified: tried(|seen| seen.verified),
        applied: tried(|seen| seen.applied),
        rolled_back: tried(|seen| seen.rolled_back),
        exercised: count(|verdict| *verdict == Verdict::Through { exercised: true }),
        refused: count(|verdict| *verdict == Verdict::Refused),
        wrong,
    }
}

impl Line {
    /// Whether all is as expected.
    pub(crate) fn passes(&self) -> bool {
        self.corpus == "pass"
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(expected: Expected) -> Entry {
        Entry {
            name: "e".to_owned(),
            title: "t".to_owned(),
            commit: None,
            cve: None,
            release: "r".to_owned(),
            files: Vec::new(),
            expected,
            why: "w".to_owned(),
            modules: Vec::new(),
            probe: None,
        }
    }

    fn built(code: i32, reason: &str) -> Built {
        Built {
            code: Some(code),
            answer: json!({"reason": reason}),
            said: String::new(),
            seconds: 1.0,
        }
    }

    fn through() -> Outcome {
        Outcome {
            name: "e".to_owned(),
            verified: true,
            applied: true,
            rolled_back: true,
            ..Outcome::default()
        }
    }

    #[test]
    fn a_refusal_for_another_reason_is_wrong() {
        let expected = entry(Expected::Refused("layout".to_owned()));
        let verdict = |built: &Built, seen: Option<&Outcome>| row(&expected, built, seen).verdict;
        assert_eq!(verdict(&built(3, "layout of x"), None), Verdict::Refused);
        assert!(matches!(
            verdict(&built(3, "no compiler"), None),
            Verdict::Wrong(_)
        ));
        assert!(matches!(
            verdict(&built(1, "layout"), None),
            Verdict::Wrong(_)
        ));
        assert!(matches!(
            verdict(&built(0, ""), Some(&through())),
            Verdict::Wrong(_)
        ));
        let at_check = Outcome {
            trouble: Some("check: layout of x".to_owned()),
            refused: true,
            ..Outcome::default()
        };
        assert_eq!(verdict(&built(0, ""), Some(&at_check)), Verdict::Refused);
        // Any other trouble is none, whatever it says.
        let other = Outcome {
            refused: false,
            ..at_check
        };
        let wrong = verdict(&built(0, ""), Some(&other));
        assert!(matches!(wrong, Verdict::Wrong(_)), "{wrong:?}");
    }

    #[test]
    fn one_that_is_wrong_fails_the_corpus() {
        let entries = [entry(Expected::Patchable)];
        let good = [built(0, "")];
        let rows = [row(&entries[0], &good[0], Some(&through()))];
        let line_of = |rows: &[Row], outcomes: &[Outcome]| line(&entries, &good, outcomes, rows);
        let pass = line_of(&rows, &[through()]);
        assert!(pass.passes() && pass.rolled_back == 1 && pass.wrong == 0);
        let rows = [row(&entries[0], &good[0], None)];
        let fail = line_of(&rows, &[]);
        assert!(!fail.passes() && fail.wrong == 1);
    }

    #[test]
    fn what_must_be_refused_and_is_only_built_lifts_no_share() {
        let mut entries = vec![entry(Expected::Patchable); 2];
        entries[0] = entry(Expected::Refused("layout".to_owned()));
        let built = [built(0, ""), built(3, "why not")];
        let rows: Vec<_> = entries
            .iter()
            .zip(&built)
            .map(|(entry, built)| Row::only_built(entry, built))
            .collect();
        assert!(!line(&entries, &built, &[], &rows).passes());
    }

    #[test]
    fn a_known_limit_is_not_wrong_and_counts_as_not_through() {
        let mut entries = vec![entry(Expected::Patchable); 20];
        entries[0] = entry(Expected::Limit("jump".to_owned()));
        let mut built = vec![built(0, ""); 20];
        built[0] = self::built(3, "no jump there");
        let verdicts = |entries: &[Entry], built: &[Built]| {
            let seen = through();
            let all = entries.iter().zip(built);
            let rows: Vec<_> = all
                .map(|(entry, built)| row(entry, built, Some(&seen)))
                .collect();
            line(entries, built, &[seen], &rows)
        };
        let line = verdicts(&entries, &built);
        assert!(line.passes() && line.wrong == 0 && line.patchable == 20 && line.built == 19);
        assert!(
            !verdicts(&entries[..19], &built[..19]).passes(),
            "18 of 19 are not enough"
        );
    }
}
