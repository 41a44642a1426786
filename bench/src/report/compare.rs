//! Two runs of a suite side by side: what is better, what is worse, and what is only noise.
//!
//! "second deposit, restic: 0.18, then 0.10: better" where neither run's interval reaches into the other's; "dma read 4 KiB: 1.21, then 1.24: noise".
//! Ratios are compared, because each was measured within one run; absolute times of two runs on a shared machine say nothing of the program.

use serde::{Deserialize, Serialize};

use super::NOISE_BOUND;

/// A suite's report, as `--json` printed it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Kept {
    /// "shm", say.
    pub suite: String,
    rows: Vec<KeptRow>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct KeptRow {
    case: String,
    unit: String,
    reference: String,
    target: String,
    value: Option<f64>,
    ratio: Option<f64>,
    ratio_between: Option<(f64, f64)>,
}

/// What became of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is better.
    Better,
    /// It is worse.
    Worse,
    /// The difference may be chance, or there is none.
    Noise,
    /// One of the runs does not have it, or has no figure.
    Missing,
}

/// A row of both runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// What was measured.
    pub case: String,
    /// What it was compared with.
    pub reference: String,
    /// "ratio", or the unit of a row that has none.
    pub of: String,
    /// The figure of the first run.
    pub before: Option<f64>,
    /// That of the second.
    pub after: Option<f64>,
    /// What this means.
    pub verdict: Verdict,
}

impl Kept {
    /// From what `--json` printed.
    ///
    /// # Errors
    /// It is no report of a suite.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// Row by row, in this one's order, and then what only the other has.
    pub fn changes(&self, after: &Self) -> Vec<Change> {
        let same = |one: &KeptRow, other: &KeptRow| one.case == other.case && one.reference == other.reference;
        let ours = self.rows.iter().map(|row| change(Some(row), after.rows.iter().find(|other| same(row, other))));
        let theirs = after.rows.iter().filter(|row| !self.rows.iter().any(|other| same(row, other)));
        ours.chain(theirs.map(|row| change(None, Some(row)))).collect()
    }
}

fn change(before: Option<&KeptRow>, after: Option<&KeptRow>) -> Change {
    let by_ratio = [before, after].iter().flatten().any(|row| row.ratio.is_some());
    let figure = |row: Option<&KeptRow>| row.and_then(|row| if by_ratio { row.ratio } else { row.value });
    let (from, to) = (figure(before), figure(after));
    let verdict = match (before.zip(after), from.zip(to)) {
        (Some((before, after)), Some((from, to))) => verdict(before, after, from, to),
        _ => Verdict::Missing,
    };
    let row = before.or(after);
    let text = |of: fn(&KeptRow) -> &String| row.map(of).cloned().unwrap_or_default();
    let of = if by_ratio { "ratio".to_owned() } else { text(|row| &row.unit) };
    Change { case: text(|row| &row.case), reference: text(|row| &row.reference), of, before: from, after: to, verdict }
}

fn verdict(before: &KeptRow, after: &KeptRow, from: f64, to: f64) -> Verdict {
    let apart = match (before.ratio_between, after.ratio_between) {
        (Some((low, high)), Some((other_low, other_high))) => high < other_low || other_high < low,
        // Times without an interval differ by chance; counts, bytes and parts hardly do.
        _ if matches!(&*before.unit, "ns" | "us" | "s" | "iops" | "bytes/s") => (to / from - 1.0).abs() > NOISE_BOUND,
        _ => (to - from).abs() > 0.01 * from.abs(),
    };
    if !apart {
        return Verdict::Noise;
    }
    let more_is_better =
        before.target.starts_with(">=") || (before.target == "none" && matches!(&*before.unit, "iops" | "bytes/s"));
    if (to > from) == more_is_better { Verdict::Better } else { Verdict::Worse }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Series;
    use crate::report::{Row, SuiteReport, Target};

    fn kept(rows: Vec<Row>) -> Kept {
        Kept::parse(&serde_json::to_string(&SuiteReport { suite: "shm".to_owned(), rows }).unwrap()).unwrap()
    }

    fn judged(case: &str, ratios: [f64; 5], target: Target) -> Row {
        let (ones, ratios) = (Series::new(vec![1.0; 5]), Series::new(ratios.to_vec()));
        Row::judged(case, "ns", (&ratios, "a copy", &ones), &ratios, target)
    }

    #[test]
    fn intervals_that_meet_are_noise_and_others_say_which_run_is_better() {
        let quiet = |middle: f64| [middle - 0.02, middle - 0.01, middle, middle + 0.01, middle + 0.02];
        let before = kept(vec![
            judged("read", quiet(1.2), Target::AtMost(1.3)),
            judged("stream", quiet(0.9), Target::AtLeast(0.95)),
            judged("noisy", [0.5, 0.8, 1.0, 1.5, 2.0], Target::AtMost(1.3)),
            Row::exact("allocations", "", 0.0, "none", Target::Zero),
            Row::exact("gone", "", 0.0, "none", Target::Zero),
        ]);
        let after = kept(vec![
            judged("read", quiet(1.4), Target::AtMost(1.3)),
            judged("stream", quiet(1.1), Target::AtLeast(0.95)),
            judged("noisy", [0.6, 0.9, 1.3, 1.7, 2.5], Target::AtMost(1.3)),
            Row::exact("allocations", "", 1.0, "none", Target::Zero),
            Row::exact("new", "", 0.0, "none", Target::Zero),
        ]);
        let verdicts: Vec<_> = before.changes(&after).into_iter().map(|change| (change.case, change.verdict)).collect();
        let wanted = [
            ("read", Verdict::Worse),
            ("stream", Verdict::Better),
            ("noisy", Verdict::Noise),
            ("allocations", Verdict::Worse),
            ("gone", Verdict::Missing),
            ("new", Verdict::Missing),
        ];
        assert_eq!(verdicts, wanted.map(|(case, verdict)| (case.to_owned(), verdict)));
        assert!(before.changes(&before).iter().all(|change| change.verdict == Verdict::Noise));
    }

    #[test]
    fn what_is_no_report_is_refused() {
        for text in ["", "{}", "[]", r#"{"suite":"shm"}"#, r#"{"suite":"shm","rows":[{"case":"read"}]}"#] {
            assert!(Kept::parse(text).is_err(), "{text}");
        }
    }
}
