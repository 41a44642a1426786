//! `farbus demo`: the whole of it in one command, with the proof that every byte is right and the price in figures.
//!
//! It packs real files into an image, lends a copy from a second process, drives that through a borrowed function with the built-in NVMe
//! driver, drives another copy natively in this process, compares every byte, and prints six cases side by side.

mod far_side;
mod lender;
mod sides;

use std::fs::File;
use std::io::{IsTerminal, Seek};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use farbus_bench::image::{DEMO_BYTES, pack, sources};
use farbus_bench::measure::interleave;
use farbus_bench::report::{CaseReport, DemoReport, Distribution, Machine, all_latencies, demo_table, latency_picture};
use farbus_bench::workload::{Budget, CASES, Progress, UNIT_BYTES};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use self::far_side::FarSide;
use self::sides::{Cores, DriverSide, native, remote};
use crate::cli::DemoArgs;
use crate::failure::Advise;
use crate::output::print_line;

/// Rounds of each case and side: more than the fewest, because a demo is seldom alone on its machine.
const ROUNDS: usize = 7;

/// Runs the demo.
pub fn run(args: &DemoArgs) -> anyhow::Result<()> {
    if !(0.0..=3600.0).contains(&args.seconds) {
        bail!("--seconds takes 0 to 3600");
    }
    let machine = Machine::here();
    // The native copy; a remote one where the lender is ours; the original where it is packed here.
    let copies = 1 + u64::from(args.from.is_none()) + u64::from(args.image.is_none());
    let length = args.image.as_deref().map_or(Ok(DEMO_BYTES), image_bytes)?;
    // Before half a minute of measuring, not after it.
    File::create(&args.svg)
        .advise(format!("cannot leave the picture at {}", args.svg.display()), "name another place with --svg")?;
    let folder = scratch_folder(copies * length)?;
    let original = original_image(args, folder.path())?;
    let (native_copy, remote_copy) = (folder.path().join("native.img"), folder.path().join("remote.img"));
    let cores = Cores::new();
    let far = match &args.from {
        Some(from) => {
            copy_with_progress(&original, &[&native_copy])?;
            FarSide::elsewhere(from, args)
        }
        None => {
            copy_with_progress(&original, &[&native_copy, &remote_copy])?;
            FarSide::here(args, &remote_copy, folder.path(), cores.device())?
        }
    };
    let mut remote = remote(&far, &original)?;
    let mut native = native(&native_copy, &original, cores)?;
    let pinned = cores.drive()?;
    let mut bytes_verified = verify(&mut remote, "verifying every block, remote")?;
    bytes_verified += verify(&mut native, "verifying every block, native")?;

    let report = measure(args, &mut native, &mut remote)?;
    bytes_verified += verify(&mut remote, "verifying what was written, remote")?;
    bytes_verified += verify(&mut native, "verifying what was written, native")?;
    drop(pinned);
    native.shut_down()?;
    remote.shut_down()?;
    let (fabric, link) = (far.fabric(), far.link());
    far.end()?;

    let (cases, distributions) = report;
    let report = DemoReport { fabric: fabric.to_owned(), verified: true, bytes_verified, cases, machine };
    latency_picture(&args.svg, &format!("NVMe latency, native and remote over {link}"), &report.machine, &distributions)?;
    if args.json {
        print_line(&serde_json::to_string(&report)?);
    } else {
        print_line(&demo_table(&report));
        print_line("native: the same device model on a thread of this process; remote: borrowed over the link");
        print_line(&format!("both latency distributions: {}", args.svg.display()));
    }
    Ok(())
}

/// A folder for `needed` bytes of images: in memory where there is room, so that the disk does not decide the comparison.
fn scratch_folder(needed: u64) -> anyhow::Result<tempfile::TempDir> {
    let in_memory = Path::new("/dev/shm");
    let room = rustix::fs::statvfs(in_memory).map(|stat| stat.f_bavail * stat.f_frsize).unwrap_or(0);
    let builder = |folder: &Path| tempfile::Builder::new().prefix("farbus-demo-").tempdir_in(folder);
    if room >= needed
        && let Ok(folder) = builder(in_memory)
    {
        return Ok(folder);
    }
    let hint = format!("set TMPDIR to a folder with {} MiB of room", needed.div_ceil(1 << 20));
    builder(&std::env::temp_dir()).advise("cannot make a folder for the images", hint)
}

/// The length of an image that the demo can use.
fn image_bytes(image: &Path) -> anyhow::Result<u64> {
    let length = std::fs::metadata(image).with_context(|| format!("cannot read {}", image.display()))?.len();
    if length < 2 * 1024 * 1024 || length % UNIT_BYTES != 0 {
        bail!("{} has {length} bytes: the demo needs a multiple of {UNIT_BYTES}, at least 2 MiB", image.display());
    }
    Ok(length)
}

fn original_image(args: &DemoArgs, folder: &Path) -> anyhow::Result<PathBuf> {
    if let Some(image) = &args.image {
        return Ok(image.clone());
    }
    let path = folder.join("original.img");
    let mut file = File::create_new(&path).context("cannot make the image")?;
    let bar = progress_bar("packing files of this machine");
    let packed = pack(&mut file, DEMO_BYTES, &sources(), |progress| show(&bar, progress))?;
    bar.finish_and_clear();
    tracing::info!(?packed, "the image");
    Ok(path)
}

fn copy_with_progress(from: &Path, to: &[&Path]) -> anyhow::Result<()> {
    let mut source = File::open(from).with_context(|| format!("cannot read {}", from.display()))?;
    let bar = progress_bar("copying the image");
    let length = source.metadata()?.len();
    bar.set_length(length * to.len() as u64);
    for path in to {
        source.rewind()?;
        let mut target = File::create_new(path).with_context(|| format!("cannot make {}", path.display()))?;
        let copied = std::io::copy(&mut source, &mut target).with_context(|| format!("cannot write {}", path.display()))?;
        if copied != length {
            bail!("{} changed while it was copied: {copied} of {length} bytes", from.display());
        }
        bar.inc(copied);
    }
    bar.finish_and_clear();
    Ok(())
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
