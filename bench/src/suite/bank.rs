//! `farbus bench bank`: what it takes to keep a machine, each figure held against programs that others wrote, in the same run on the same images.
//!
//! The second deposit of a machine of which 41 % changed is held against restic's second backup: 0.7 s beside 4.8 s is the row "second deposit, 0.7 s,
//! restic 4.8 s, 0.146, <= 0.15, yes". A peer that is not there makes its rows "not measured", and says how to get it.
//!
//! Every tool keeps S0, S1 and S2 in this order in a store of its own, once a round, and gives S2 out again, which is compared. All are programs, ours too, and
//! images are in the page cache. Rows of times are judged by their pairs, as those of the suite soft-roce are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};

use super::bank_large::{Large, large};
use super::bank_lazy;
use super::bank_peers::{Bank, Round, Tool};
use super::bank_series::Series;
use super::bank_start;
use super::bank_wire;
use super::{Heard, Step};
use crate::measure::Series as Figures;
use crate::report::{Row, SuiteReport, Target};

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Rounds, at least 5.
    pub rounds: usize,
    /// Bytes of the synthetic machine.
    pub large: u64,
    /// Only these rows; `None`: all.
    pub only: Option<Part>,
}

/// Rows that are measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Images in and out, beside the peers, and what is in the bank already.
    Peers,
    /// A machine that starts at once.
    Start,
    /// Faults that the cache answers.
    Faults,
    /// A large machine.
    Large,
}

impl Default for Effort {
    fn default() -> Self {
        Self { rounds: 5, large: 10 << 30, only: None }
    }
}

/// Where things are.
#[derive(Clone, Debug)]
pub struct Places {
    /// The program that is measured.
    pub farbus: PathBuf,
    /// An empty folder, which stores and what is restored are in.
    pub scratch: PathBuf,
}

/// All rounds of a tool, or why there are none.
type Rounds = BTreeMap<Tool, Result<Vec<Round>, String>>;

/// Measures all rows.
pub fn run(series: &Series, places: &Places, effort: &Effort, mut hear: impl FnMut(Heard<'_>)) -> SuiteReport {
    let wanted = |part| effort.only.is_none_or(|only| only == part);
    let total = effort.rounds + 4;
    let mut rows = Vec::new();
    let mut rounds: Rounds = BTreeMap::new();
    if wanted(Part::Peers) {
        for round in 0..effort.rounds {
            hear(Heard::Begins(Step { what: "images in and out", done: round, total }));
            one_round(round, series, places, &mut rounds);
        }
        tell(&mut rows, against_peers(&rounds), &mut hear);
        hear(Heard::Begins(Step { what: "what is in the bank already", done: effort.rounds, total }));
        let mut shared = shared(series, places, &rounds);
        shared.push(bank_wire::row(series, &places.farbus, &places.scratch));
        tell(&mut rows, shared, &mut hear);
    }
    if wanted(Part::Start) {
        hear(Heard::Begins(Step { what: "a machine that starts at once", done: effort.rounds + 1, total }));
        tell(&mut rows, bank_start::rows(series, places, effort.rounds), &mut hear);
    }
    if wanted(Part::Faults) {
        hear(Heard::Begins(Step { what: "faults", done: effort.rounds + 2, total }));
        tell(&mut rows, bank_lazy::rows(effort.rounds), &mut hear);
    }
    if wanted(Part::Large) {
        hear(Heard::Begins(Step { what: "a large machine", done: effort.rounds + 3, total }));
        tell(&mut rows, of_large(large(&places.scratch.join("large"), effort.large)), &mut hear);
    }
    SuiteReport { suite: "bank".to_owned(), rows }
}

fn tell(rows: &mut Vec<Row>, more: Vec<Row>, hear: &mut impl FnMut(Heard<'_>)) {
    hear(Heard::Measured(&more));
    rows.extend(more);
}

/// All tools once; every other time in the opposite order.
fn one_round(round: usize, series: &Series, places: &Places, rounds: &mut Rounds) {
    let mut tools: Vec<_> = [Tool::Farbus].into_iter().chain(Tool::PEERS).collect();
    if round % 2 == 1 {
        tools.reverse();
    }
    for tool in tools {
        let of_tool = rounds.entry(tool).or_insert_with(|| Ok(Vec::new()));
        if let Ok(so_far) = of_tool {
            match tool.round(&places.farbus, series, &places.scratch) {
                Ok(figures) => so_far.push(figures),
                Err(error) => *of_tool = Err(format!("{error:#}")),
            }
        }
    }
}

/// A figure of a round.
type Figure = fn(&Round) -> f64;

fn against_peers(rounds: &Rounds) -> Vec<Row> {
    let (first, idle, second, restore): (Figure, Figure, Figure, Figure) =
        (|round| round.first_s, |round| round.idle_s, |round| round.second_s, |round| round.restore_s);
    let (idle_bytes, second_bytes): (Figure, Figure) = (|round| round.idle_bytes, |round| round.second_bytes);
    vec![
        row(rounds, "second deposit", "s", Tool::Restic, second, Target::AtMost(0.15)),
        row(rounds, "second deposit", "s", Tool::Borg, second, Target::AtMost(0.25)),
        row(rounds, "second deposit, bytes added", "bytes", Tool::Restic, second_bytes, Target::AtMost(0.75)),
        row(rounds, "idle deposit, tracked", "s", Tool::Restic, idle, Target::AtMost(0.02)),
        row(rounds, "idle deposit, tracked, bytes added", "bytes", Tool::Restic, idle_bytes, Target::AtMost(0.1)),
        row(rounds, "first deposit", "s", Tool::Restic, first, Target::AtMost(0.2)),
        row(rounds, "whole withdrawal", "s", Tool::Casync, restore, Target::AtMost(0.5)),
        // For information: whoever only copies need not find anything again.
        row(rounds, "second deposit", "s", Tool::Cp, second, Target::None),
        row(rounds, "second deposit", "s", Tool::QemuImg, second, Target::None),
        row(rounds, "whole withdrawal", "s", Tool::Restic, restore, Target::None),
        row(rounds, "whole withdrawal", "s", Tool::Cp, restore, Target::None),
    ]
}

fn row(rounds: &Rounds, case: &str, unit: &str, peer: Tool, figure: Figure, target: Target) -> Row {
    let of = |tool: Tool| match rounds.get(&tool) {
        Some(Ok(rounds)) if !rounds.is_empty() => Ok(rounds.iter().map(figure).collect::<Vec<_>>()),
        Some(Ok(_)) | None => Err("no round was run".to_owned()),
        Some(Err(why)) => Err(why.clone()),
    };
    match (of(Tool::Farbus), of(peer)) {
        (Ok(ours), Ok(theirs)) => {
            let ratios = Figures::new(ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect());
            let (ours, theirs) = (Figures::new(ours), Figures::new(theirs));
            Row::judged(case, unit, (&ours, peer.name(), &theirs), &ratios, target)
        }
        (Err(why), _) | (_, Err(why)) => Row::missing(case, unit, peer.name(), target, why),
    }
}

/// What a bank that holds other images need not store again.
fn shared(series: &Series, places: &Places, rounds: &Rounds) -> Vec<Row> {
    let disk_target = Target::AtMost(0.4);
    let disk = "second deposit with the disks in the bank, bytes added";
    let restic = row(rounds, disk, "bytes", Tool::Restic, |round| round.second_bytes, disk_target);
    let with_disks = with_disks(series, places).and_then(|bytes| {
        let of = restic.reference_value.ok_or_else(|| anyhow!("{}", restic.note.clone().unwrap_or_default()))?;
        Ok(Row::measured(disk, "bytes", bytes, ("restic", of), bytes / of, disk_target))
    });
    let other_target = Target::ValueAtMost(50.0);
    let other = "second machine of the same image, pages that were not stored";
    vec![
        with_disks.unwrap_or_else(|error| Row::missing(disk, "bytes", "restic", disk_target, format!("{error:#}"))),
        match other_machine(series, places) {
            Ok(part) => Row::exact(other, "%", part, "none", other_target),
            Err(error) => Row::missing(other, "%", "none", other_target, format!("{error:#}")),
        },
    ]
}

fn number(report: &serde_json::Value, path: &str) -> Result<f64> {
    report.pointer(path).and_then(serde_json::Value::as_f64).with_context(|| format!("a deposit does not say {path}"))
}

fn with_disks(series: &Series, places: &Places) -> Result<f64> {
    let bank = Bank::new(&places.farbus, &places.scratch, "disks")?;
    let disks = series.disk("S0").zip(series.disk("S2")).context("the series has no disks")?;
    bank.deposit("vm", "--memory", &series.image("S0"))?;
    bank.deposit("disk", "--disk", &disks.0)?;
    bank.deposit("disk", "--disk", &disks.1)?;
    let report = bank.deposit("vm", "--memory", &series.image("S2"))?;
    Ok(number(&report, "/pack_bytes")? + number(&report, "/manifest_bytes")?)
}

fn other_machine(series: &Series, places: &Places) -> Result<f64> {
    let bank = Bank::new(&places.farbus, &places.scratch, "other")?;
    bank.deposit("vm", "--memory", &series.image("S0"))?;
    let report = bank.deposit("other", "--memory", &series.image("T0"))?;
    let stored = number(&report, "/counts/pages")? - number(&report, "/counts/zero")?;
    Ok(100.0 * number(&report, "/counts/new")? / stored)
}

fn of_large(large: Result<Large>) -> Vec<Row> {
    let memory = ("large machine, memory of the depositing process beyond its buffers", Target::ValueAtMost(64.0));
    let manifest = ("large machine, manifest bytes per changed page", Target::ValueAtMost(48.0));
    match large {
        Ok(Large { memory_mib, manifest_bytes }) => vec![
            Row::exact(memory.0, "MiB", memory_mib, "none", memory.1),
            Row::exact(manifest.0, "bytes", manifest_bytes, "none", manifest.1),
        ],
        Err(error) => vec![
            Row::missing(memory.0, "MiB", "none", memory.1, format!("{error:#}")),
            Row::missing(manifest.0, "bytes", "none", manifest.1, format!("{error:#}")),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_is_missing_leaves_its_rows_unmeasured_and_says_why() {
        let round = Round { second_s: 0.1, second_bytes: 7.0, ..Round::default() };
        let slow = Round { second_s: 1.0, second_bytes: 70.0, ..Round::default() };
        let rounds = Rounds::from([
            (Tool::Farbus, Ok(vec![round; 5])),
            (Tool::Restic, Ok(vec![slow; 5])),
            (Tool::Borg, Err("borg does not start".to_owned())),
        ]);
        let rows = against_peers(&rounds);
        let find = |case: &str, peer: &str| rows.iter().find(|row| row.case == case && row.reference == peer).unwrap();
        assert_eq!((find("second deposit", "restic").ratio, find("second deposit", "restic").meets), (Some(0.1), Some(true)));
        assert_eq!(find("second deposit, bytes added", "restic").meets, Some(true));
        assert_eq!(find("second deposit", "borg").note.as_deref(), Some("borg does not start"));
        assert_eq!(find("whole withdrawal", "casync").note.as_deref(), Some("no round was run"));
    }
}
