//! How long until a machine that is in a bank runs: lazily out of the bank, beside a restic restore of all of it and the same start.
//!
//! S2 with a guest of a few instructions in it ([`Guest`]) takes ours 16 ms from opening the bank to what its guest says, and restic 1.4 s to a file that the
//! same machine starts on. Where there is no /dev/kvm only the pages are read that such a guest would use, and the row of the guest says why it is not measured.

use std::fs::{self, File};
use std::time::Instant;

use anyhow::{Context, Result};
use farbus_transport::Memory;

use super::bank::Places;
use super::bank_lazy;
use super::bank_peers::{Bank, Place};
use super::bank_series::Series;
use super::bank_vm::{Guest, possible};
use crate::measure::Series as Figures;
use crate::report::{Row, Target};

const RESTORE: &str = "a restic restore of all";
const TARGET: Target = Target::AtMost(0.1);
/// What is measured, and beside what.
const GUEST: (&str, &str) = ("lazy withdrawal, to a guest's first instructions", "a restic restore of all, and the same start");
const PAGES: (&str, &str) = ("lazy withdrawal, to the first 8 pages", RESTORE);

/// Seconds of each round.
#[derive(Default)]
struct Seconds {
    pages: Vec<f64>,
    guest: Vec<f64>,
    restore: Vec<f64>,
    restore_and_guest: Vec<f64>,
}

/// Both rows.
pub fn rows(series: &Series, places: &Places, rounds: usize) -> Vec<Row> {
    let machine = possible().map_err(|error| format!("{error:#}"));
    let missing = |(case, peer): (&str, &str), why: &str| Row::missing(case, "s", peer, TARGET, why.to_owned());
    let row = |(case, peer): (&str, &str), ours: Vec<f64>, theirs: Vec<f64>| {
        let ratios = Figures::new(ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect());
        Row::judged(case, "s", (&Figures::new(ours), peer, &Figures::new(theirs)), &ratios, TARGET)
    };
    match measure(series, places, rounds, machine.is_ok()) {
        Ok(seconds) => vec![
            match machine {
                Ok(()) => row(GUEST, seconds.guest, seconds.restore_and_guest),
                Err(why) => missing(GUEST, &why),
            },
            row(PAGES, seconds.pages, seconds.restore),
        ],
        Err(error) => [GUEST, PAGES].map(|row| missing(row, &format!("{error:#}"))).into(),
    }
}

fn measure(series: &Series, places: &Places, rounds: usize, machine: bool) -> Result<Seconds> {
    let folder = places.scratch.join("start");
    fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let image = folder.join("S2.ram");
    let guest = Guest::prepare(&series.image("S2"), &image)?;
    let bank = Bank::new(&places.farbus, &folder, "bank")?;
    bank.deposit("vm", "--memory", &series.image("S0"))?;
    bank.deposit("vm", "--memory", &image)?;
    let restic = Place::restic(&places.farbus, folder.join("restic"), &image)?;
    let mut seconds = Seconds::default();
    for round in 0..rounds {
        seconds.pages.push(bank_lazy::pages(&bank.path, "vm", &image)?);
        if machine {
            seconds.guest.push(bank_lazy::guest(&bank.path, "vm", guest)?);
        }
        let start = Instant::now();
        let restored = restic.restored(&format!("out{round}"), &image)?;
        seconds.restore.push(start.elapsed().as_secs_f64());
        if machine {
            let file = File::options().read(true).write(true).open(&restored)?;
            let len = file.metadata()?.len();
            guest.run(&*Memory::map_file(file.into(), 0, len, true)?)?;
            seconds.restore_and_guest.push(start.elapsed().as_secs_f64());
        }
        fs::remove_file(&restored).with_context(|| format!("cannot remove {}", restored.display()))?;
    }
    fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    Ok(seconds)
}
