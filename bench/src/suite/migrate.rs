//! `farbus bench migrate`: a machine moves back and forth between two processes under verified IO, and the time for which it stands still as the sum of its parts.
//!
//! 200 moves with 24 commands under way: the device comes to rest in 0.1 ms, the state is saved in 0.02 ms, and so on to the first interrupt on the other side; of
//! 200 such sums the row "downtime p99, 1.4 ms, <= 5, yes" is made. The guest's memory is one object that both processes map, so no copy of it counts.
//!
//! The drive is lent by a third process, `farbus lend`. Between the two sides a unix socket carries a tag, and behind it: 8 numbers of 8 bytes and the function's
//! state, of a machine that leaves; 8 numbers, of how it came; or a text, of harm to the guest.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use farbus_pci_shim::FunctionState;
use farbus_remote_dma::Claim;
use farbus_transport::{Memory, Nanos};

use super::machine::{
    Harm, LenderProcess, Machine, Places, STANDS_STILL, at_ms, borrow_soon, empty_image, guest_memory, nanos, part, scaled,
    wrong_blocks_of,
};
use super::{Heard, Step};
use crate::report::{Row, SuiteReport, Target};
use crate::scripted_guest::MEMORY_BYTES;

/// Moves in a run of the usual size.
const MOVES: u64 = 200;
/// Blocks that the guest reads between two moves, beside as many that it writes.
const BETWEEN: u64 = 60;
const REST: Duration = Duration::from_secs(10);
const LEASE: Duration = Duration::from_secs(60);
/// The parts of a move, in order: the first three on the side that it leaves.
const PARTS: [&str; 8] = ["quiesce", "save", "leave", "hand over", "borrow", "restore", "resume", "first interrupt"];
/// More than any state.
const MOST_STATE: u64 = 1 << 24;

/// Nanoseconds of each part.
type Parts = [u64; PARTS.len()];

const LEAVES: u8 = 1;
const CAME: u8 = 2;
const HARM: u8 = 3;
const STILL: u8 = 4;

/// What a run of moves found.
#[derive(Debug, Default)]
struct Moves {
    parts: Vec<Parts>,
    verified: u64,
    wrong: u64,
    lost_interrupts: u64,
    why: Option<String>,
}

/// Measures all rows; `effort` 1 is the usual number of moves.
pub fn run(places: &Places, effort: f64, mut hear: impl FnMut(Heard<'_>)) -> SuiteReport {
    let count = scaled(MOVES, effort);
    // In portions, so that the time that is left can be told.
    let total = 10;
    let moved = moves(places, count, |done| {
        if (done * total).is_multiple_of(count.max(total)) || done == 0 {
            hear(Heard::Begins(Step { what: "moves", done: (done * total / count) as usize, total: total as usize }));
        }
    });
    let rows = rows(moved, count);
    hear(Heard::Measured(&rows));
    SuiteReport { suite: "migrate".to_owned(), rows }
}

fn rows(moved: Result<Moves>, count: u64) -> Vec<Row> {
    let limit = Target::ValueAtMost(5.0);
    let (p99, wrong, lost) = ("downtime p99", "lost, duplicated or torn blocks", "lost interrupts");
    let moved = match moved {
        Ok(moved) => moved,
        Err(error) => {
            let missing = |case, unit, target| Row::missing(case, unit, "none", target, format!("{error:#}"));
            return vec![missing(p99, "ms", limit), missing(wrong, "blocks", Target::Zero), missing(lost, "", Target::Zero)];
        }
    };
    let sums: Vec<u64> = moved.parts.iter().map(|parts| parts.iter().sum()).collect();
    let mean = |figures: &mut dyn Iterator<Item = u64>| figures.sum::<u64>() as f64 / sums.len().max(1) as f64 / 1e6;
    let whole = mean(&mut sums.iter().copied());
    let mut rows = vec![
        Row::exact(p99, "ms", at_ms(&sums, 99), &format!("{} moves", sums.len()), limit),
        Row::exact("downtime p50", "ms", at_ms(&sums, 50), "the same", Target::None),
        Row::exact("downtime mean", "ms", whole, "the same", Target::None),
    ];
    for (at, name) in PARTS.iter().enumerate() {
        let figures: Vec<u64> = moved.parts.iter().filter_map(|parts| parts.get(at)).copied().collect();
        let value = mean(&mut figures.iter().copied());
        let case = format!("- {name} mean (p99 {:.2} ms)", at_ms(&figures, 99));
        rows.push(Row::measured(&case, "ms", value, ("downtime mean", whole), value / whole, Target::None));
    }
    let blocks = format!("{} blocks read in {} of {count} moves", moved.verified, sums.len());
    let mut harm = Row::exact(wrong, "blocks", moved.wrong as f64, &blocks, Target::Zero);
    harm.note = moved.why;
    rows.push(harm);
    rows.push(Row::exact(lost, "interrupts", moved.lost_interrupts as f64, &blocks, Target::Zero));
    rows
}

/// Moves the machine `count` times, away from here first.
fn moves(places: &Places, count: u64, mut hear: impl FnMut(u64)) -> Result<Moves> {
    let (image, socket) = (places.scratch.join("image"), places.scratch.join("lender"));
    empty_image(&image)?;
    let lender = LenderProcess::start(places, &image, &socket)?;
    lender.listening()?;
    let memory = guest_memory()?;
    let (file, _) = memory.file().context("memory without a descriptor")?;
    let (mut stream, theirs) = UnixStream::pair()?;
    let (process, fd) = (std::process::id().to_string(), file.as_raw_fd().to_string());
    let socket_text = socket.to_str().context("a scratch folder with odd letters in its name")?;
    let mut command = part(places, &["migrate", &process, &fd, socket_text]);
    let mut other = super::machine::Process::start(command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()))?;
    drop(command);

    let mut moved = Moves::default();
    let mut machine = Some(Machine::boot(&memory, borrow_soon(&socket, &Claim::default())?.0, 77)?);
    for at in 0..count {
        hear(at);
        let step = match machine.take() {
            Some(machine) => {
                work_and_leave(machine, &mut stream).and_then(|()| came(&mut stream)).map(|parts| moved.parts.push(parts))
            }
            None => arrive(&memory, &mut stream, &socket).map(|(arrived, parts)| {
                moved.parts.push(parts);
                machine = Some(arrived);
            }),
        };
        if let Err(error) = step {
            return harmed(moved, error);
        }
    }
    let mut machine = match machine {
        Some(machine) => machine,
        // It has to come home to be looked at; this move is not one that was asked for.
        None => match arrive(&memory, &mut stream, &socket) {
            Ok((machine, _)) => machine,
            Err(error) => return harmed(moved, error),
        },
    };
    if let Err(harm) = machine.drain() {
        return harmed(moved, harm.into());
    }
    drop(stream);
    other.end()?;
    moved.verified = machine.guest.verified();
    moved.wrong = wrong_blocks_of(&machine.guest, &image)?;
    Ok(moved)
}

/// What was done to the guest is a finding; whatever else went wrong is not.
fn harmed(mut moved: Moves, error: anyhow::Error) -> Result<Moves> {
    match error.downcast_ref::<Harm>() {
        Some(Harm::Wrong(_)) => moved.wrong += 1,
        Some(Harm::Still(_)) => moved.lost_interrupts += 1,
        None => return Err(error),
    }
    moved.why = Some(format!("{error:#}"));
    Ok(moved)
}

/// The other process: until this one has no more to send.
pub(super) fn other_side(process: &str, fd: &str, socket: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(format!("/proc/{process}/fd/{fd}"));
    let memory = Memory::map_file(file.context("the guest's memory is gone")?.into(), 0, MEMORY_BYTES, true)?;
    let mut stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    loop {
        let moved = arrive(&memory, &mut stream, socket).and_then(|(machine, parts)| {
            stream.write_all(&[CAME])?;
            stream.write_all(parts.map(u64::to_le_bytes).as_flattened())?;
            work_and_leave(machine, &mut stream)
        });
        match moved {
            Ok(()) => {}
            Err(error)
                if error
                    .downcast_ref::<std::io::Error>()
                    .is_some_and(|error| error.kind() == std::io::ErrorKind::UnexpectedEof) =>
            {
                return Ok(());
            }
            Err(error) => {
                let tag = match error.downcast_ref() {
                    Some(Harm::Wrong(_)) => HARM,
                    Some(Harm::Still(_)) => STILL,
                    None => return Err(error),
                };
                let text = format!("{error:#}").into_bytes();
                stream.write_all(&[tag])?;
                stream.write_all(&(text.len() as u64).to_le_bytes())?;
                return Ok(stream.write_all(&text)?);
            }
        }
    }
}

/// Works for a while, and then leaves with commands under way.
fn work_and_leave(mut machine: Machine, stream: &mut UnixStream) -> Result<()> {
    machine.run(BETWEEN)?;
    machine.step()?;
    let stopped = Nanos::now();
    machine.device.quiesce(REST)?;
    let rested = Nanos::now();
    let state = machine.device.save()?;
    let saved = Nanos::now();
    machine.device.leave(LEASE)?;
    let left = Nanos::now();
    let mut numbers = [0; PARTS.len()];
    let known = [nanos(rested.since(stopped)), nanos(saved.since(rested)), nanos(left.since(saved)), left.0, state.len() as u64];
    numbers.iter_mut().zip(known).for_each(|(into, number)| *into = number);
    let mut message = vec![LEAVES];
    message.extend_from_slice(numbers.map(u64::to_le_bytes).as_flattened());
    message.extend_from_slice(&state);
    Ok(stream.write_all(&message)?)
}

/// Takes the machine that the other side sends, until its guest has heard the first interrupt here.
fn arrive(memory: &Arc<Memory>, stream: &mut UnixStream, socket: &Path) -> Result<(Machine, Parts)> {
    let [quiesce, save, leave, left, len, ..] = numbers(stream, LEAVES)?;
    ensure!(len <= MOST_STATE, "a state of {len} bytes");
    let mut state = vec![0; usize::try_from(len)?];
    stream.read_exact(&mut state)?;
    // One clock for all processes of a host.
    let here = Nanos::now();
    let token = FunctionState::parse(&state)?.rest().token;
    let (attachment, _) = borrow_soon(socket, &Claim { rest: Some(token), holding: None })?;
    let borrowed = Nanos::now();
    let (mut machine, restored) = Machine::restore(memory, attachment, &state)?;
    ensure!(!restored.revived, "a device that was kept was reset");
    let restored = Nanos::now();
    let ended = machine.ended();
    machine.device.resume();
    let resumed = Nanos::now();
    let began = Instant::now();
    while machine.ended() == ended {
        machine.step().map_err(anyhow::Error::from)?;
        if began.elapsed() > STANDS_STILL {
            bail!(Harm::Still(machine.guest.in_flight()));
        }
    }
    let heard = Nanos::now();
    let parts = [
        quiesce,
        save,
        leave,
        nanos(here.since(Nanos(left))),
        nanos(borrowed.since(here)),
        nanos(restored.since(borrowed)),
        nanos(resumed.since(restored)),
        nanos(heard.since(resumed)),
    ];
    Ok((machine, parts))
}

/// How the machine came that was sent.
fn came(stream: &mut UnixStream) -> Result<Parts> {
    numbers(stream, CAME)
}

/// The numbers behind `tag`, or what happened to the guest instead.
fn numbers(stream: &mut UnixStream, tag: u8) -> Result<Parts> {
    let mut found = [0];
    stream.read_exact(&mut found)?;
    if found[0] == HARM || found[0] == STILL {
        let mut len = [0; 8];
        stream.read_exact(&mut len)?;
        let mut text = vec![0; usize::try_from(u64::from_le_bytes(len).min(1 << 16))?];
        stream.read_exact(&mut text)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let harm = if found[0] == HARM { Harm::Wrong(crate::scripted_guest::Wrong(text)) } else { Harm::Still(0) };
        return Err(harm.into());
    }
    ensure!(found[0] == tag, "the other side says {} where {tag} was due", found[0]);
    let mut bytes = [[0; 8]; PARTS.len()];
    stream.read_exact(bytes.as_flattened_mut())?;
    Ok(bytes.map(u64::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_add_up_to_the_downtime_and_harm_is_a_row_that_fails() {
        let parts: Vec<Parts> = (1..=100).map(|at| [at * 10_000; 8]).collect();
        let moved = Moves { parts, verified: 6000, ..Moves::default() };
        let found = rows(Ok(moved), 100);
        let value = |case: &str| found.iter().find(|row| row.case.starts_with(case)).and_then(|row| row.value).unwrap();
        assert_eq!((value("downtime p50"), value("downtime p99")), (4.0, 7.92));
        let sum: f64 = found.iter().filter(|row| row.case.starts_with("- ")).filter_map(|row| row.value).sum();
        assert!((sum - value("downtime mean")).abs() < 0.01, "{sum}");
        assert_eq!(found[0].meets, Some(false));
        let harmed = harmed(Moves::default(), Harm::Still(3).into()).unwrap();
        let found = rows(Ok(harmed), 100);
        assert_eq!(found.last().unwrap().meets, Some(false));
        assert!(super::harmed(Moves::default(), anyhow::anyhow!("no lender")).is_err());
    }
}
