//! `farbus demo`: the whole of it in one command, with the proof that every byte is right and the price in figures.
//!
//! It packs real files into an image, lends a copy from a second process, drives that through a borrowed function with the built-in NVMe
//! driver, drives another copy natively in this process, compares every byte, and prints six cases side by side.

mod copies;
mod far_side;
mod files;
mod lender;
mod scratch;
mod sides;

use std::fs::File;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use farbus_bench::image::{DEMO_BYTES, pack, sources};
use farbus_bench::measure::interleave;
use farbus_bench::report::{CaseReport, DemoReport, Distribution, Machine, all_latencies, demo_table, latency_picture};
use farbus_bench::workload::{Budget, CASES, Progress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use self::copies::Copy;
use self::far_side::FarSide;
use self::files::{Given, check_picture};
use self::scratch::Scratch;
use self::sides::{Cores, DriverSide, native, remote};
use crate::cli::DemoArgs;
use crate::output::print_line;

/// Rounds of each case and side: more than the fewest, because a demo is seldom alone on its machine.
const ROUNDS: usize = 7;

/// Runs the demo.
pub fn run(args: &DemoArgs) -> anyhow::Result<()> {
    far_side::check(args)?;
    let given = args.image.as_deref().map(Given::look).transpose()?;
    check_picture(&args.svg, given.as_ref())?;
    let run = run_over(args, given.as_ref());
    match &given {
        Some(given) => given.blame(run),
        None => run,
    }
}

fn run_over(args: &DemoArgs, given: Option<&Given>) -> anyhow::Result<()> {
    let machine = Machine::here();
    // The original, where it is packed here; the native copy; and a remote one where the lender is ours.
    let length = given.map_or(DEMO_BYTES, Given::bytes);
    let scratch = Scratch::new((1 + u64::from(given.is_none()) + u64::from(args.from.is_none())) * length)?;
    let original = match given {
        Some(given) => given.path().to_owned(),
        None => pack_original(scratch.path("original.img"))?,
    };
    let native_copy = Copy::of(&original, &scratch, "native.img")?;
    let cores = Cores::new();
    let mut far = match &args.from {
        Some(from) => FarSide::elsewhere(from, args),
        // The lender has it open when it listens, and keeps it.
        None => FarSide::here(args, Copy::of(&original, &scratch, "remote.img")?.path(), &scratch, cores.device())?,
    };
    let sides = || Ok((native(native_copy.path(), &original, cores)?, remote(&far, &original)?));
    let compared = sides().and_then(|(native, remote)| {
        scratch.remove_names();
        compare(args, native, remote, cores)
    });
    let (bytes_verified, (cases, distributions)) = far.blame(compared)?;
    given.map(Given::check_unchanged).transpose()?;
    let (fabric, link) = (far.fabric(), far.link());
    far.end()?;

    let report = DemoReport { fabric: fabric.to_owned(), verified: true, bytes_verified, cases, machine };
    let title = format!("NVMe latency, native and remote over {link}");
    let drawn = latency_picture(&args.svg, &title, &report.machine, &distributions);
    // The figures are worth more than the picture, and are there.
    if args.json {
        print_line(&serde_json::to_string(&report)?);
    } else {
        print_line(&demo_table(&report));
        print_line("native: the same device model on a thread of this process; remote: borrowed over the link");
    }
    drawn?;
    if !args.json {
        print_line(&format!("both latency distributions: {}", args.svg.display()));
    }
    Ok(())
}

/// Runs all cases on both sides, and compares every byte before and after; the bytes that were compared, and the figures.
fn compare(args: &DemoArgs, mut native: DriverSide, mut remote: DriverSide, cores: Cores) -> anyhow::Result<(u64, Measured)> {
    let pinned = cores.drive()?;
    let mut bytes_verified = verify(&mut remote, "verifying every block, remote")?;
    bytes_verified += verify(&mut native, "verifying every block, native")?;
    let measured = measure(args, &mut native, &mut remote)?;
    bytes_verified += verify(&mut remote, "verifying what was written, remote")?;
    bytes_verified += verify(&mut native, "verifying what was written, native")?;
    drop(pinned);
    native.shut_down()?;
    remote.shut_down()?;
    Ok((bytes_verified, measured))
}

fn pack_original(path: PathBuf) -> anyhow::Result<PathBuf> {
    let mut file = File::create_new(&path).context("cannot make the image")?;
    let bar = progress_bar("packing files of this machine");
    let packed = pack(&mut file, DEMO_BYTES, &sources(), |progress| show(&bar, progress))?;
    bar.finish_and_clear();
    tracing::info!(?packed, "the image");
    Ok(path)
}

fn verify(side: &mut DriverSide, what: &'static str) -> anyhow::Result<u64> {
    let bar = progress_bar(what);
    let verified = side.verify(|progress| show(&bar, progress))?;
    bar.finish_and_clear();
    Ok(verified.bytes)
}

type Measured = (Vec<CaseReport>, Vec<Distribution>);

fn measure(args: &DemoArgs, native: &mut DriverSide, remote: &mut DriverSide) -> anyhow::Result<Measured> {
    let round = Budget::Time(Duration::from_secs_f64(args.seconds / ROUNDS as f64));
    let bar = progress_bar("measuring");
    bar.set_length(2 * (CASES.len() * ROUNDS) as u64);
    let (mut reports, mut distributions) = (Vec::new(), Vec::new());
    for case in CASES {
        bar.set_message(case.name);
        let pairs = interleave(
            ROUNDS,
            |_| native.run(case, round).inspect(|_| bar.inc(1)),
            |_| remote.run(case, round).inspect(|_| bar.inc(1)),
        )?;
        reports.push(CaseReport::new(case, &pairs));
        distributions.push(Distribution {
            name: case.name.to_owned(),
            native: all_latencies(&pairs.first),
            remote: all_latencies(&pairs.second),
        });
    }
    bar.finish_and_clear();
    Ok((reports, distributions))
}

/// A bar on standard error, hidden where that is no terminal.
fn progress_bar(message: &'static str) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(1), target).with_message(message);
    if let Ok(style) = ProgressStyle::with_template("{msg:36} {wide_bar} {percent:>3} % {eta}") {
        bar.set_style(style);
    }
    bar
}

fn show(bar: &ProgressBar, progress: Progress) {
    bar.set_length(progress.total);
    bar.set_position(progress.done);
}
