//! What was measured, as JSON for programs, as a table for people, and as a picture.
//!
//! `{"fabric":"shm","verified":true,…,"cases":[{"name":"randread-4k-qd1","native":{"iops":…},"remote":{…},"p50_ratio":1.21}]}` is one demo;
//! a suite is `{"suite":"shm","rows":[…]}`, each row with its reference and whether it meets its target.

mod compare;
mod machine;
mod picture;
mod table;

use serde::Serialize;

pub use compare::{Change, Kept, Verdict};
pub use machine::Machine;
pub use picture::{Distribution, PictureError, latency_picture};
pub use table::{changes_table, demo_table, duration, suite_row, suite_table};

use crate::measure::{Latencies, Pairs, Series};
use crate::workload::{Case, CaseRun};

/// One side of one case: medians over the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SideReport {
    /// Commands per second.
    pub iops: f64,
    /// Median latency in nanoseconds.
    pub p50_ns: u64,
    /// What one command in a hundred exceeds, in nanoseconds.
    pub p99_ns: u64,
}

/// One case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CaseReport {
    /// "randread-4k-qd1", say.
    pub name: String,
    /// The device in this process.
    pub native: SideReport,
    /// The same device, borrowed.
    pub remote: SideReport,
    /// Remote over native, of the medians above.
    pub iops_ratio: f64,
    /// Remote over native, of the medians above.
    pub p50_ratio: f64,
    /// How far the rounds' own ratios lie apart ([`Series::spread`]), or `iops_ratio` from their median, whichever is more.
    pub iops_ratio_spread: f64,
    /// The same for `p50_ratio`.
    pub p50_ratio_spread: f64,
}

/// The spread of the rounds' ratios above which their middle says nothing: half of the rounds lie further apart than 15 % of it. With seven
/// rounds the middle is then known to a tenth or so at best, and a ratio of 1.1 cannot be told from none.
pub const NOISE_BOUND: f64 = 0.15;

/// Whether a ratio means nothing, because the rounds' own ratios lie too far apart.
pub fn is_noise(spread: f64) -> bool {
    spread.is_nan() || spread > NOISE_BOUND
}

/// One demo.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DemoReport {
    /// What carried the remote device: "shm".
    pub fabric: String,
    /// Every block read was equal to what had to be there, before and after the writes.
    pub verified: bool,
    /// Bytes read and compared.
    pub bytes_verified: u64,
    /// The cases, in the order they ran.
    pub cases: Vec<CaseReport>,
    /// Where and when.
    pub machine: Machine,
}

/// What a row is held against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// The ratio must not be over this.
    AtMost(f64),
    /// The ratio must not be under this.
    AtLeast(f64),
    /// The value itself must be zero.
    Zero,
    /// The value itself must be this.
    Exactly(f64),
    /// The value itself must not be over this.
    ValueAtMost(f64),
    /// The row is for information: any ratio will do.
    None,
}

/// One row of a suite.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub case: String,
    /// The figure; `None`: not measured.
    pub value: Option<f64>,
    /// Its unit, and the reference's.
    pub unit: String,
    /// What it is compared with.
    pub reference: String,
    /// The reference's figure, from the same run.
    pub reference_value: Option<f64>,
    /// The value over the reference.
    pub ratio: Option<f64>,
    /// "<= 2.0", say.
    pub target: String,
    /// Whether it is met; `None`: not measured, or too noisy to say.
    pub meets: Option<bool>,
    /// Between what the median of the pairs' ratios lies; left out where a row has no pairs, or does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_between: Option<(f64, f64)>,
    /// Why it was not measured or not judged; left out where it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// One suite.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SuiteReport {
    /// "shm", say.
    pub suite: String,
    /// Its rows.
    pub rows: Vec<Row>,
}

impl CaseReport {
    /// The medians of `pairs`, native first.
    pub fn new(case: Case, pairs: &Pairs<CaseRun>) -> Self {
        let iops = |run: &CaseRun| run.iops();
        let p50 = |run: &CaseRun| run.latencies.p50_ns() as f64;
        let p99 = |run: &CaseRun| run.latencies.p99_ns() as f64;
        let (native_iops, remote_iops) = pairs.series(iops, iops);
        let (native_p50, remote_p50) = pairs.series(p50, p50);
        let (native_p99, remote_p99) = pairs.series(p99, p99);
        let side = |iops: f64, p50: f64, p99: f64| SideReport {
            iops: round_to(iops, 1),
            p50_ns: p50.round() as u64,
            p99_ns: p99.round() as u64,
        };
        let iops_ratio = remote_iops.median() / native_iops.median();
        let p50_ratio = remote_p50.median() / native_p50.median();
        Self {
            name: case.name.to_owned(),
            native: side(native_iops.median(), native_p50.median(), native_p99.median()),
            remote: side(remote_iops.median(), remote_p50.median(), remote_p99.median()),
            iops_ratio: round_to(iops_ratio, 3),
            p50_ratio: round_to(p50_ratio, 3),
            iops_ratio_spread: round_to(spread(iops_ratio, &pairs.ratios(iops, iops)), 3),
            p50_ratio_spread: round_to(spread(p50_ratio, &pairs.ratios(p50, p50)), 3),
        }
    }
}

/// A ratio of medians that lies outside of the rounds' own ratios is as doubtful as rounds that disagree: it compares one side's good rounds
/// with the other's bad ones.
fn spread(ratio: f64, of_rounds: &Series) -> f64 {
    let aside = (ratio / of_rounds.median() - 1.0).abs();
    let apart = of_rounds.spread();
    if aside.is_nan() || apart.is_nan() { f64::NAN } else { aside.max(apart) }
}

/// All rounds' latencies together, for the picture.
pub fn all_latencies(runs: &[CaseRun]) -> Latencies {
    let mut all = Latencies::new();
    for run in runs {
        all.add(&run.latencies);
    }
    all
}

impl Row {
    /// A row that was measured; `ratio` is the value over the reference.
    pub fn measured(case: &str, unit: &str, value: f64, reference: (&str, f64), ratio: f64, target: Target) -> Self {
        let meets = match target {
            Target::AtMost(limit) => ratio <= limit,
            Target::AtLeast(limit) => ratio >= limit,
            Target::Zero => value == 0.0,
            Target::Exactly(wanted) => value == wanted,
            Target::ValueAtMost(limit) => value <= limit,
            Target::None => true,
        };
        // A ratio that is no number (nothing over nothing) meets nothing, and JSON has no word for it.
        let number = |figure: f64, digits| figure.is_finite().then(|| round_to(figure, digits));
        Self {
            case: case.to_owned(),
            value: number(value, 3),
            unit: unit.to_owned(),
            reference: reference.0.to_owned(),
            reference_value: number(reference.1, 3),
            ratio: number(ratio, 3),
            target: target.to_string(),
            meets: Some(meets),
            ratio_between: None,
            note: None,
        }
    }

    /// A row of pairs that may be too noisy to say. The target is met, or missed, where all of the interval in which the median of the pairs'
    /// ratios lies ([`Series::interval`]) meets it, or misses it, and the ratio of the medians with it.
    pub fn judged(
        case: &str,
        unit: &str,
        (subjects, reference, references): (&Series, &str, &Series),
        ratios: &Series,
        target: Target,
    ) -> Self {
        let (value, of) = (subjects.median(), references.median());
        let mut row = Self::measured(case, unit, value, (reference, of), value / of, target);
        let (low, high) = ratios.interval();
        let verdicts = [low, high].map(|ratio| Self::measured(case, unit, value, (reference, of), ratio, target).meets);
        row.ratio_between = Some((round_to(low, 3), round_to(high, 3)));
        if verdicts.iter().any(|verdict| *verdict != row.meets) {
            row.meets = None;
            row.note = Some(format!("too noisy to say: the pairs' ratios lie between {low:.2} and {high:.2}"));
        }
        row
    }

    /// A row that has no reference: a count. A figure that is not zero is never rounded to it.
    pub fn exact(case: &str, unit: &str, value: f64, reference: &str, target: Target) -> Self {
        let mut row = Self::measured(case, unit, value, (reference, f64::NAN), f64::NAN, target);
        row.value = value.is_finite().then_some(value);
        row
    }

    /// A row that could not be measured, and why.
    pub fn missing(case: &str, unit: &str, reference: &str, target: Target, why: String) -> Self {
        Self {
            case: case.to_owned(),
            value: None,
            unit: unit.to_owned(),
            reference: reference.to_owned(),
            reference_value: None,
            ratio: None,
            target: target.to_string(),
            meets: None,
            ratio_between: None,
            note: Some(why),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "<= {limit}"),
            Self::AtLeast(limit) => write!(f, ">= {limit}"),
            Self::Zero => f.write_str("0"),
            Self::Exactly(wanted) => write!(f, "{wanted}"),
            Self::ValueAtMost(limit) => write!(f, "<= {limit}"),
            Self::None => f.write_str("none"),
        }
    }
}

fn round_to(figure: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (figure * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn run(commands: u64, ns: u64) -> CaseRun {
        let mut latencies = Latencies::new();
        (0..100).for_each(|_| latencies.record_ns(ns));
        CaseRun { commands, elapsed: Duration::from_secs(1), latencies }
    }

    #[test]
    fn a_demo_is_one_object_with_exactly_the_promised_fields() {
        let pairs = Pairs { first: vec![run(1000, 500); 5], second: vec![run(900, 600); 5] };
        let report = DemoReport {
            fabric: "shm".to_owned(),
            verified: true,
            bytes_verified: 4096,
            cases: vec![CaseReport::new(crate::workload::CASES[0], &pairs)],
            machine: Machine {
                date: "2026-11-14 09:30 UTC".to_owned(),
                cpu: "AMD EPYC".to_owned(),
                cores: 2,
                kernel: "Linux 6.18.44".to_owned(),
                farbus: "0.1.0".to_owned(),
                load_average: Some(0.5),
            },
        };
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(
            json,
            r#"{"fabric":"shm","verified":true,"bytes_verified":4096,"cases":[{"name":"randread-4k-qd1","native":{"iops":1000.0,"p50_ns":500,"p99_ns":500},"remote":{"iops":900.0,"p50_ns":600,"p99_ns":600},"iops_ratio":0.9,"p50_ratio":1.2,"iops_ratio_spread":0.0,"p50_ratio_spread":0.0}],"machine":{"date":"2026-11-14 09:30 UTC","cpu":"AMD EPYC","cores":2,"kernel":"Linux 6.18.44","farbus":"0.1.0","load_average":0.5}}"#
        );
    }

    #[test]
    fn rounds_that_disagree_are_noise_and_one_disturbed_round_is_not() {
        let case = |seconds: [u64; 7]| {
            let second = seconds.map(|ns| run(1_000_000 / ns, ns)).to_vec();
            CaseReport::new(crate::workload::CASES[0], &Pairs { first: vec![run(2000, 500); 7], second })
        };
        let quiet = case([600, 606, 5000, 594, 600, 603, 600]);
        assert!(!is_noise(quiet.p50_ratio_spread) && !is_noise(quiet.iops_ratio_spread), "{quiet:?}");
        let noisy = case([500, 900, 600, 1200, 500, 1000, 700]);
        assert!(is_noise(noisy.p50_ratio_spread) && is_noise(noisy.iops_ratio_spread), "{noisy:?}");
        // Each side fast in half of the rounds, and its middle one on another side of the gap.
        let rounds = |ns: [u64; 7]| ns.map(|ns| run(1_000_000 / ns, ns)).to_vec();
        let first = rounds([1000, 1000, 1000, 1000, 500, 500, 500]);
        let second = rounds([1000, 1000, 1000, 500, 500, 500, 500]);
        let two_speeds = CaseReport::new(crate::workload::CASES[0], &Pairs { first, second });
        assert!((two_speeds.p50_ratio - 0.5).abs() < 0.01 && is_noise(two_speeds.p50_ratio_spread), "{two_speeds:?}");
        assert!(is_noise(f64::NAN) && is_noise(0.151) && !is_noise(NOISE_BOUND));
    }

    #[test]
    fn a_row_meets_its_target_or_says_why_it_was_not_measured() {
        let row = Row::measured("mmio read", "ns", 250.0, ("cache line", 125.0), 2.0, Target::AtMost(2.0));
        assert_eq!(
            serde_json::to_string(&row).unwrap(),
            r#"{"case":"mmio read","value":250.0,"unit":"ns","reference":"cache line","reference_value":125.0,"ratio":2.0,"target":"<= 2","meets":true}"#
        );
        let meets = |ratio, target| Row::measured("", "", ratio, ("", 1.0), ratio, target).meets;
        assert_eq!(meets(2.01, Target::AtMost(2.0)), Some(false));
        assert_eq!(meets(0.94, Target::AtLeast(0.95)), Some(false));
        assert_eq!(meets(f64::NAN, Target::AtLeast(0.95)), Some(false), "no figure must not pass");
        assert_eq!(meets(0.0, Target::Zero), Some(true));
        assert_eq!(Row::exact("", "", 2.0, "", Target::Exactly(2.0)).meets, Some(true));
        assert_eq!(Row::exact("", "", 1.999, "", Target::Exactly(2.0)).meets, Some(false));
        assert_eq!(Row::exact("", "", 2.001, "", Target::ValueAtMost(2.0)).meets, Some(false));
        let missing = Row::missing("x", "ns", "y", Target::Zero, "no second core".to_owned());
        assert!(serde_json::to_string(&missing).unwrap().contains(r#""meets":null,"note":"no second core""#));
    }

    #[test]
    fn pairs_that_scatter_around_the_target_are_not_judged() {
        let judged = |subjects: [f64; 5]| {
            let (subjects, references) = (Series::new(subjects.to_vec()), Series::new(vec![100.0; 5]));
            let ratios = Series::new(subjects.figures().iter().map(|figure| figure / 100.0).collect());
            Row::judged("", "ns", (&subjects, "", &references), &ratios, Target::AtMost(1.2))
        };
        assert_eq!(judged([100.0, 110.0, 112.0, 115.0, 119.0]).meets, Some(true));
        assert_eq!(judged([121.0, 130.0, 140.0, 125.0, 190.0]).meets, Some(false));
        let noisy = judged([100.0, 110.0, 112.0, 115.0, 150.0]);
        assert_eq!((noisy.meets, noisy.ratio_between), (None, Some((1.0, 1.5))));
        assert_eq!(noisy.note.as_deref(), Some("too noisy to say: the pairs' ratios lie between 1.00 and 1.50"));
    }
}
