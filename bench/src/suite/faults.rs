//! `farbus bench faults`: what it costs a guest when its lender is killed, when its link is cut, and when nothing happens at all.
//!
//! 50 times the lender gets SIGKILL with 24 commands under way and is started again: from the moment at which it listens to the first command that ends, 12 ms in
//! one of a hundred, is the row "lender killed, pause beyond its start p99, 12 ms, <= 100, yes", and below it are its parts.

use std::collections::BTreeMap;

use anyhow::Result;

use super::faults_borrower::killed_borrowers;
use super::faults_idle::{Idle, idle};
use super::faults_lender::{Fault, Pause, faults};
use super::faults_many::{MANY, many};
use super::machine::{Places, at_ms, scaled};
use super::{Heard, Step};
use crate::report::{Row, SuiteReport, Target};

/// Faults in a run of the usual size.
const LENDER_KILLS: u64 = 50;
const LINK_CUTS: u64 = 100;
/// Of each: lender, link and borrower.
const RANDOM: u64 = 100;

/// What became of blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Blocks {
    pub(super) faults: u64,
    pub(super) verified: u64,
    pub(super) wrong: u64,
    /// What was found first.
    pub(super) why: Option<String>,
}

impl Blocks {
    /// Takes harm to a guest as a finding; whatever else went wrong is an error still.
    pub(super) fn harmed(&mut self, error: anyhow::Error) -> Result<()> {
        if error.downcast_ref::<super::machine::Harm>().is_none() {
            return Err(error);
        }
        self.wrong += 1;
        self.why.get_or_insert(format!("{error:#}"));
        Ok(())
    }

    fn and(mut self, other: Self) -> Self {
        self.faults += other.faults;
        self.verified += other.verified;
        self.wrong += other.wrong;
        self.why = self.why.or(other.why);
        self
    }
}

/// Measures all rows; `effort` 1 is the usual number of faults.
pub fn run(places: &Places, effort: f64, mut hear: impl FnMut(Heard<'_>)) -> SuiteReport {
    type Group = fn(&Places, f64) -> Vec<Row>;
    let groups: [(&'static str, Group); 6] = [
        ("lender killed", lender_killed),
        ("link cut", link_cut),
        ("link cut over RDMA", link_cut_rdma),
        ("kills at random", random_kills),
        ("an idle device", idle_rows),
        ("64 functions", many_rows),
    ];
    let mut rows = Vec::new();
    for (done, (what, group)) in groups.iter().enumerate() {
        hear(Heard::Begins(Step { what, done, total: groups.len() }));
        let measured = group(places, effort);
        hear(Heard::Measured(&measured));
        rows.extend(measured);
    }
    SuiteReport { suite: "faults".to_owned(), rows }
}

const BLOCKS: (&str, &str, Target) = ("lost, duplicated or torn blocks", "blocks", Target::Zero);

fn missing((case, unit, target): (&str, &str, Target), error: &anyhow::Error) -> Row {
    Row::missing(case, unit, "none", target, format!("{error:#}"))
}

fn blocks_row(what: &str, blocks: &Blocks) -> Row {
    let reference = format!("{} faults, {} blocks read", blocks.faults, blocks.verified);
    let case = format!("{what}: {}", BLOCKS.0);
    let mut row = Row::exact(&case, BLOCKS.1, blocks.wrong as f64, &reference, BLOCKS.2);
    row.note.clone_from(&blocks.why);
    row
}

/// The figure that is judged, its median, and for each part the mean, which add up to the mean of all.
fn pause_rows(case: &str, limit_ms: f64, pauses: &[Pause]) -> Vec<Row> {
    let judged: Vec<u64> = pauses.iter().map(|pause| pause.judged).collect();
    let count = format!("{} times", judged.len());
    let target = Target::ValueAtMost(limit_ms);
    let mean = |figures: &[u64]| figures.iter().sum::<u64>() as f64 / figures.len().max(1) as f64 / 1e6;
    let whole = mean(&judged);
    let mut rows = vec![
        Row::exact(&format!("{case} p99"), "ms", at_ms(&judged, 99), &count, target),
        Row::exact(&format!("{case} p50"), "ms", at_ms(&judged, 50), &count, Target::None),
        Row::exact(&format!("{case} mean"), "ms", whole, &count, Target::None),
    ];
    let mut parts: BTreeMap<usize, (&str, Vec<u64>)> = BTreeMap::new();
    for pause in pauses {
        for (at, (name, ns)) in pause.parts.iter().enumerate() {
            parts.entry(at).or_insert((name, Vec::new())).1.push(*ns);
        }
    }
    for (name, figures) in parts.values() {
        let case = format!("- {name} mean (p99 {:.2} ms)", at_ms(figures, 99));
        let value = mean(figures);
        rows.push(Row::measured(&case, "ms", value, ("mean", whole), value / whole, Target::None));
    }
    rows
}

fn lender_killed(places: &Places, effort: f64) -> Vec<Row> {
    let (case, limit) = ("lender killed, pause beyond its start", 100.0);
    match faults(places, "killed", scaled(LENDER_KILLS, effort), &[Fault::Lender]) {
        Ok((pauses, blocks)) => {
            let mut rows = pause_rows(case, limit, &pauses);
            rows.push(blocks_row("lender killed", &blocks));
            rows
        }
        Err(error) => vec![missing((&format!("{case} p99"), "ms", Target::ValueAtMost(limit)), &error)],
    }
}

fn link_cut(places: &Places, effort: f64) -> Vec<Row> {
    let (case, limit) = ("link cut, restored to first answer", 38.0);
    match faults(places, "cut", scaled(LINK_CUTS, effort), &[Fault::Link]) {
        Ok((pauses, blocks)) => {
            let mut rows = pause_rows(case, limit, &pauses);
            rows.push(blocks_row("link cut", &blocks));
            rows
        }
        Err(error) => vec![missing((&format!("{case} p99"), "ms", Target::ValueAtMost(limit)), &error)],
    }
}

fn link_cut_rdma(_: &Places, _: f64) -> Vec<Row> {
    let case = "link cut over RDMA, restored to first answer p99";
    let why = "not run: it needs two hosts whose link can be cut (ci/softroce --two-hosts)".to_owned();
    vec![Row::missing(case, "ms", "none", Target::ValueAtMost(38.0), why)]
}

fn random_kills(places: &Places, effort: f64) -> Vec<Row> {
    let count = scaled(RANDOM, effort);
    let both = faults(places, "random", 2 * count, &[Fault::Lender, Fault::Link])
        .and_then(|(_, blocks)| Ok(blocks.and(killed_borrowers(places, count)?)));
    match both {
        Ok(blocks) => vec![blocks_row("lender, link and borrower killed", &blocks)],
        Err(error) => vec![missing(BLOCKS, &error)],
    }
}

fn idle_rows(places: &Places, effort: f64) -> Vec<Row> {
    let (cpu, wakes) = (
        ("idle CPU, the worse of both processes", "%", Target::ValueAtMost(0.5)),
        ("idle wake-ups, the worse of both processes", "/s", Target::ValueAtMost(2.0)),
    );
    match idle(places, effort) {
        Ok(Idle { seconds, cpu_percent, wakes_a_second }) => {
            let over = format!("over {seconds:.0} s");
            vec![Row::exact(cpu.0, cpu.1, cpu_percent, &over, cpu.2), Row::exact(wakes.0, wakes.1, wakes_a_second, &over, wakes.2)]
        }
        Err(error) => vec![missing(cpu, &error), missing(wakes, &error)],
    }
}

fn many_rows(places: &Places, effort: f64) -> Vec<Row> {
    let (case, target) = (format!("{MANY} functions of one lender process"), Target::AtLeast(0.9));
    match many(places, effort) {
        Ok((one, all, ratios)) => vec![Row::judged(&case, "iops", (&all, "one function of it", &one), &ratios, target)],
        Err(error) => vec![missing((&case, "iops", target), &error)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::machine::Harm;

    #[test]
    fn parts_add_up_to_what_is_judged_and_harm_fails_the_row() {
        let pause =
            |ms: u64| Pause { judged: 3 * ms * 1_000_000, parts: vec![("connect", ms * 1_000_000), ("tell", 2 * ms * 1_000_000)] };
        let rows = pause_rows("x", 38.0, &[pause(1), pause(2), pause(20)]);
        assert_eq!(rows[0].meets, Some(false), "{rows:?}");
        let parts: f64 = rows.iter().filter(|row| row.case.starts_with("- ")).filter_map(|row| row.value).sum();
        assert!((parts - rows[2].value.unwrap()).abs() < 0.01);
        let mut blocks = Blocks::default();
        blocks.harmed(Harm::Still(1).into()).unwrap();
        assert_eq!(blocks_row("x", &blocks).meets, Some(false));
        assert!(blocks.harmed(anyhow::anyhow!("no lender")).is_err());
    }
}
