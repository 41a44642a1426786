//! `farbus bench`: a suite of figures, each beside its reference from the same run.
//!
//! `farbus bench shm --seconds 0.5` measures for a quarter of the usual time or so and prints a line for each row, or one JSON object with
//! `--json`. A target that is missed is a finding, not a failure: the exit status says only whether the suite ran.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, bail};
use farbus_bench::measure::LEAST_ROUNDS;
use farbus_bench::report::suite_table;
use farbus_bench::suite::ShmSession;
use farbus_bench::suite::shm::{Effort, Step, run as run_shm};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::{BenchArgs, Suite};
use crate::output::print_line;

/// Runs a suite.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    if !(0.0..=3600.0).contains(&args.seconds) {
        bail!("--seconds takes 0 to 3600");
    }
    let Suite::Shm = args.suite;
    let mut subjects = ShmSession::new().context("the suite measures between two cores")?;
    let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(1), target);
    if let Ok(style) = ProgressStyle::with_template("{msg:36} {wide_bar} {percent:>3} % {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    let report = run_shm(&mut subjects, &effort(args.seconds), |Step { what, done, total }| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        bar.set_message(what);
    });
    bar.finish_and_clear();
    if args.json {
        print_line(&serde_json::to_string(&report)?);
    } else {
        print_line(suite_table(&report).trim_end());
    }
    Ok(())
}

/// What `--seconds` for each NVMe case and side means for the other rows: in proportion, and never too few to mean something.
fn effort(seconds: f64) -> Effort {
    let full = Effort::default();
    let scaled = |count: u64, least: u64| ((count as f64 * seconds) as u64).max(least);
    let rounds = if seconds < 0.5 { LEAST_ROUNDS } else { full.rounds };
    Effort {
        rounds,
        samples: scaled(full.samples, 5000),
        stream_bytes: scaled(full.stream_bytes, 128 << 20),
        nvme: Duration::from_secs_f64(seconds / rounds as f64),
        operations: scaled(full.operations, 10_000),
    }
}
