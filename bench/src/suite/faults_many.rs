//! 64 functions over one lender process: whether all of them together do as much as one of them alone.
//!
//! One process lends 64 drives in memory, each at a socket and on a thread of its own; one guest works for half a second, then all 64 in turns, and so on: 190,000
//! blocks a second beside 200,000 are the row "64 functions, 0.95, >= 0.9, yes".

use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use farbus_remote_dma::Claim;
use farbus_transport::shm::Listener;

use super::faults_borrower::{drive, lend_once, memory_image};
use super::machine::{Machine, Places, Process, borrow_soon, guest_memory, part};
use crate::measure::{Series, interleave};

/// Functions.
pub(super) const MANY: usize = 64;
const ROUNDS: usize = 7;
const ROUND: Duration = Duration::from_millis(700);

/// Commands a second of one function, of all together, and the rounds' ratios.
pub(super) fn many(places: &Places, effort: f64) -> Result<(Series, Series, Series)> {
    let folder = places.scratch.join("many");
    std::fs::create_dir(&folder)?;
    let text = folder.to_str().context("a scratch folder with odd letters in its name")?;
    let mut lender = Process::start(part(places, &["lend-many", text]).stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let said = lender.child().stdout.as_mut().context("the lender has no voice")?;
    said.read_exact(&mut [0]).context("the lender of many does not start")?;
    let machine =
        |at: usize| Machine::boot(&guest_memory()?, borrow_soon(&folder.join(at.to_string()), &Claim::default())?.0, at as u64 + 1);
    let machines = std::cell::RefCell::new((0..MANY).map(machine).collect::<Result<Vec<_>>>()?);
    let round = ROUND.mul_f64(effort.clamp(0.1, 1.0));
    let rate = |count: usize| {
        let mut machines = machines.borrow_mut();
        let machines = machines.get_mut(..count).unwrap_or_default();
        let ended = |machines: &[Machine]| machines.iter().map(Machine::ended).sum::<u64>();
        let (before, began) = (ended(machines), Instant::now());
        while began.elapsed() < round {
            for machine in &mut *machines {
                machine.step()?;
            }
        }
        anyhow::Ok((ended(machines) - before) as f64 / began.elapsed().as_secs_f64())
    };
    let pairs = interleave(ROUNDS, |_| rate(1), |_| rate(MANY))?;
    for machine in machines.borrow_mut().iter_mut() {
        machine.drain()?;
    }
    let (one, all) = pairs.series(|rate| *rate, |rate| *rate);
    Ok((one, all, pairs.ratios(|rate| *rate, |rate| *rate)))
}

/// The lender's process: until it is killed.
pub(super) fn lend_many(folder: &Path) -> Result<()> {
    let mut threads = Vec::new();
    for at in 0..MANY {
        let (listener, device) = (Listener::bind(folder.join(at.to_string()))?, drive(&memory_image()?)?);
        let lend = move || lend_once(&listener, device).map(drop);
        threads.push(std::thread::Builder::new().name(format!("bench-lender-{at}")).spawn(lend)?);
    }
    let mut out = std::io::stdout();
    out.write_all(&[1])?;
    out.flush()?;
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a lender's thread failed"))??;
    }
    Ok(())
}
