//! `farbus bench`: a suite of figures, each beside its reference from the same run.
//!
//! `farbus bench shm --seconds 0.5` measures for a quarter of the usual time or so and prints a line for each row, or one JSON object with
//! `--json`. A target that is missed is a finding, not a failure: the exit status says only whether the suite ran.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use farbus_bench::measure::LEAST_ROUNDS;
use farbus_bench::report::{Kept, SuiteReport, changes_table, suite_row, suite_table};
use farbus_bench::suite::{
    BankSeries, Heard, MachinePlaces, ShmSession, SoftRoce, Step, bank, faults, migrate, run_part, shm, soft_roce,
};
use farbus_transport::verbs::DeviceChoice;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::{BenchArgs, BenchCommand, CompareArgs, Suite};
use crate::failure::{Advise, misuse};
use crate::output::print_line;

/// Rows of the suite `bank` that are measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BankPart {
    /// Images in and out, beside programs that others wrote
    Peers,
    /// A machine that starts at once, beside a restic restore
    Start,
    /// Faults that the cache answers
    Faults,
    /// A large machine
    Large,
}

/// Runs a suite.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    match &args.command {
        Some(BenchCommand::Compare(args)) => return compare(args),
        Some(BenchCommand::Part { words }) => return run_part(words),
        None => {}
    }
    let report = match args.suite {
        // clap asks for it where there is no command.
        None => return Err(misuse("no suite is named", "farbus bench --help lists them")),
        Some(Suite::Shm) => {
            if args.dev.is_some() || args.pairs.is_some() || args.only.is_some() {
                return Err(misuse(
                    "--dev is for the suite soft-roce, --pairs for soft-roce and bank, --only for bank",
                    "leave them out, or run such a suite",
                ));
            }
            let mut subjects = ShmSession::new().context("the suite measures between two cores")?;
            let bar = Bar::new();
            shm::run(&mut subjects, &shm_effort(args.seconds.unwrap_or(1.0)), |heard| bar.hear(heard))
        }
        Some(Suite::Bank) => bank(args)?,
        Some(suite @ (Suite::Migrate | Suite::Faults)) => machine(args, suite)?,
        Some(Suite::SoftRoce) if args.only.is_some() => {
            return Err(misuse("--only is for the suite bank", "leave it out, or run that suite"));
        }
        Some(Suite::SoftRoce) => {
            let effort = soft_roce_effort(args);
            let choice = DeviceChoice { device: args.dev.clone(), ..DeviceChoice::default() };
            let mut subjects = SoftRoce::new(&choice).advise(
                "the suite measures over an RDMA device, beside perftest",
                "in the lab, which has both: ci/softroce --seconds 900 target/release/farbus bench soft-roce",
            )?;
            let bar = Bar::new();
            soft_roce::run(&mut subjects, &effort, |heard| bar.hear(heard))
        }
    };
    if args.json {
        print_line(&serde_json::to_string(&report)?);
    } else {
        print_line(suite_table(&report).trim_end());
    }
    Ok(())
}

/// Two reports side by side.
fn compare(args: &CompareArgs) -> anyhow::Result<()> {
    let report = |path: &Path| {
        let text = farbus_control::read::read_text(path)
            .advise(format!("cannot read {}", path.display()), "name a file with what farbus bench SUITE --json printed")?;
        Kept::parse(&text).advise(
            format!("{} is no report of a suite", path.display()),
            "name a file with what farbus bench SUITE --json printed",
        )
    };
    let (before, after) = (report(&args.before)?, report(&args.after)?);
    if before.suite != after.suite {
        let what = format!("one report is of the suite {}, the other of {}", before.suite, after.suite);
        return Err(misuse(what, "name two reports of one suite"));
    }
    let changes = before.changes(&after);
    if args.json {
        print_line(&serde_json::json!({ "suite": before.suite, "changes": changes }).to_string());
    } else {
        print_line(changes_table(&before.suite, &changes).trim_end());
    }
    Ok(())
}

/// The suite `bank`, in a scratch folder where temporary files are (TMPDIR).
fn bank(args: &BenchArgs) -> anyhow::Result<SuiteReport> {
    if args.dev.is_some() || args.seconds.is_some() {
        return Err(misuse("--dev and --seconds are not for the suite bank", "leave them out, or run another suite"));
    }
    if !(0.0625..=1024.0).contains(&args.large_gib) {
        return Err(misuse("--large-gib takes 0.0625 to 1024", "choose a number between, 10 say"));
    }
    let full = bank::Effort::default();
    let effort = bank::Effort {
        rounds: args.pairs.unwrap_or(full.rounds),
        large: (args.large_gib * f64::from(1 << 30)) as u64 / 4096 * 4096,
        only: args.only.map(|part| match part {
            BankPart::Peers => bank::Part::Peers,
            BankPart::Start => bank::Part::Start,
            BankPart::Faults => bank::Part::Faults,
            BankPart::Large => bank::Part::Large,
        }),
    };
    let scratch = tempfile::tempdir().context("the suite needs a folder for temporary files: set TMPDIR")?;
    let farbus = std::env::current_exe().context("where is this program?")?;
    let series = match &args.series {
        Some(folder) => BankSeries::of(&std::path::absolute(folder)?, scratch.path()),
        None => BankSeries::small(scratch.path(), 16_384, 1),
    };
    let places = bank::Places { farbus, scratch: scratch.path().to_owned() };
    let bar = Bar::new();
    Ok(bank::run(&series.context("the suite needs images")?, &places, &effort, |heard| bar.hear(heard)))
}

/// The suites `migrate` and `faults`, whose other processes are this program.
fn machine(args: &BenchArgs, suite: Suite) -> anyhow::Result<SuiteReport> {
    if args.dev.is_some() || args.seconds.is_some() || args.pairs.is_some() || args.only.is_some() {
        return Err(misuse("--dev, --seconds, --pairs and --only are not for this suite", "leave them out, or say --effort"));
    }
    let scratch = tempfile::tempdir().context("the suite needs a folder for temporary files: set TMPDIR")?;
    let farbus = std::env::current_exe().context("where is this program?")?;
    let places = MachinePlaces { farbus, scratch: scratch.path().to_owned() };
    let (effort, bar) = (args.effort.unwrap_or(1.0), Bar::new());
    Ok(match suite {
        Suite::Faults => faults::run(&places, effort, |heard| bar.hear(heard)),
        _ => migrate::run(&places, effort, |heard| bar.hear(heard)),
    })
}

/// Progress: each row as it comes, and a bar on a terminal, which goes when this is dropped, elsewhere a line for each group of rows.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        if let Ok(style) = ProgressStyle::with_template("{msg:36} {wide_bar} {percent:>3} % {elapsed}, {eta} left") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// What was measured is shown at once: a suite may be ended before its end.
    fn hear(&self, heard: Heard<'_>) {
        match heard {
            Heard::Begins(step) => self.show(step),
            Heard::Measured(rows) => {
                self.0.suspend(|| rows.iter().for_each(|row| eprintln!("  {}", suite_row(row))));
            }
        }
    }

    fn show(&self, Step { what, done, total }: Step) {
        if self.0.is_hidden() {
            eprintln!("farbus: {}/{total} {what}", done + 1);
        }
        self.0.set_length(total as u64);
        self.0.set_position(done as u64);
        self.0.set_message(what);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// `--seconds` of a row and side, in `--pairs` parts.
fn soft_roce_effort(args: &BenchArgs) -> soft_roce::Effort {
    let full = soft_roce::Effort::default();
    let pairs = args.pairs.unwrap_or(full.pairs);
    let seconds = args.seconds.unwrap_or(full.side.as_secs_f64() * full.pairs as f64);
    soft_roce::Effort { pairs, side: Duration::from_secs_f64(seconds / pairs as f64), ..full }
}

/// What `--seconds` for each NVMe case and side means for the other rows: in proportion, and never too few to mean something.
fn shm_effort(seconds: f64) -> shm::Effort {
    let full = shm::Effort::default();
    let scaled = |count: u64, least: u64| ((count as f64 * seconds) as u64).max(least);
    let rounds = if seconds < 0.5 { LEAST_ROUNDS } else { full.rounds };
    shm::Effort {
        rounds,
        samples: scaled(full.samples, 5000),
        stream_bytes: scaled(full.stream_bytes, 128 << 20),
        nvme: Duration::from_secs_f64(seconds / rounds as f64),
        operations: scaled(full.operations, 10_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::hint;

    fn refused(args: BenchArgs) -> String {
        match run(&args) {
            Ok(()) => panic!("a suite without its device ran"),
            Err(error) => format!("{error:#}; {:?}", hint(&error)),
        }
    }

    fn args(suite: Suite) -> BenchArgs {
        BenchArgs {
            command: None,
            suite: Some(suite),
            seconds: None,
            pairs: None,
            dev: None,
            series: None,
            large_gib: 10.0,
            effort: None,
            only: None,
            json: false,
        }
    }

    #[test]
    fn a_suite_without_its_device_says_where_there_is_one() {
        let said = refused(BenchArgs { dev: Some("no-such-device".to_owned()), ..args(Suite::SoftRoce) });
        assert!(said.contains("ci/softroce --seconds 900 target/release/farbus bench soft-roce"), "{said}");
        // Either the device is missing or, more often, all of RDMA is.
        assert!(said.contains("no-such-device") || said.contains("RDMA"), "{said}");
    }

    #[test]
    fn arguments_that_mean_nothing_are_refused() {
        assert!(refused(BenchArgs { dev: Some("rxe0".to_owned()), ..args(Suite::Shm) }).contains("soft-roce"));
        assert!(refused(BenchArgs { seconds: Some(1.0), ..args(Suite::Bank) }).contains("not for the suite bank"));
        assert!(refused(BenchArgs { series: Some("/nowhere".into()), ..args(Suite::Bank) }).contains("needs images"));
    }
}
