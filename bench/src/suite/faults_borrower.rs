//! A borrower that is killed: its machine restarts at home from what it last put aside, and the drive's journal says what it wrote meanwhile.
//!
//! The borrower, a process of its own, puts its memory and its function's state aside every 50 blocks. It gets SIGKILL 17 ms later; "62 writes acknowledged since"
//! names every block that the memory does not know, and no other; the guest is told of these, goes on with the drive attached here, and reads what is there.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use farbus_pci_shim::FunctionState;
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::native::Native;
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Backend, BlockRange, Claim, Since};
use farbus_transport::Memory;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::shm::{Greeted, Listener, ShmOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::faults::Blocks;
use super::machine::{Harm, LIMIT, Machine, Places, Process, borrow_soon, guest_memory, part, wrong_blocks};
use crate::scripted_guest::{BLOCK_BYTES, BLOCKS, Guest, LOGICAL, MEMORY_BYTES, Wrong, generation_of};

const REST: Duration = Duration::from_secs(10);

/// Lends `device` to the next who comes, until that one is gone; the device, reset.
pub(super) fn lend_once(listener: &Listener, device: Box<dyn Backend>) -> Result<Box<dyn Backend>> {
    let description = device.description().encode()?;
    let hello = Hello { versions: SPOKEN, role: Role::Lender, features: 0, epoch: 0, description };
    let fabric = Greeted::greet(listener.accept()?, &hello, listener.path())?.link(ShmOptions::default())?.fabric;
    let mut session = LenderSession::new(fabric, device).map_err(|(error, _)| error)?;
    session.run(PollOptions::default(), &Waker::new()?);
    session.end().map_err(|wedged| anyhow!("the device does not end {} accesses", wedged.in_flight()))
}

/// A drive on an image in memory.
pub(super) fn drive(image: &Arc<Memory>) -> Result<Box<dyn Backend>> {
    Ok(Box::new(Nvme::in_memory(Arc::clone(image), NvmeOptions::default())?))
}

/// An image in memory, all zero.
pub(super) fn memory_image() -> Result<Arc<Memory>> {
    Ok(Memory::memfd("image", BLOCKS * BLOCK_BYTES)?)
}

fn block(image: &Memory, number: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    image.read(number * BLOCK_BYTES, &mut bytes)?;
    Ok(bytes)
}

/// Kills `count` borrowers.
pub(super) fn killed_borrowers(places: &Places, count: u64) -> Result<Blocks> {
    let mut random = SmallRng::seed_from_u64(23);
    let mut blocks = Blocks::default();
    for round in 0..count {
        match killed_borrower(places, round, Duration::from_micros(random.random_range(0..40_000))) {
            Ok(verified) => blocks.verified += verified,
            Err(error) => {
                blocks.harmed(error)?;
                break;
            }
        }
        blocks.faults += 1;
    }
    Ok(blocks)
}

fn killed_borrower(places: &Places, round: u64, after: Duration) -> Result<u64> {
    let (socket, aside) = (places.scratch.join("home"), places.scratch.join(format!("aside.{round}")));
    let image = memory_image()?;
    let (listener, device) = (Listener::bind(&socket)?, drive(&image)?);
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a scratch folder with odd letters in its name");
    let lending = std::thread::Builder::new().name("bench-home".into()).spawn(move || lend_once(&listener, device))?;
    let mut command = part(places, &["aside", &text(&socket)?, &text(&aside)?, &round.to_string()]);
    let mut borrower = Process::start(command.stdin(Stdio::null()).stdout(Stdio::null()))?;
    let began = Instant::now();
    while !aside.exists() {
        if began.elapsed() > LIMIT || lending.is_finished() {
            bail!("the borrower puts nothing aside");
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    std::thread::sleep(after);
    borrower.kill()?;
    let device = lending.join().map_err(|_| anyhow!("the lender's thread failed"))??;

    let bytes = fs::read(&aside).context("what was put aside is gone")?;
    fs::remove_file(&aside)?;
    let (kept, state) = bytes.split_at_checked(MEMORY_BYTES as usize).context("what was put aside is cut")?;
    let mark = FunctionState::parse(state)?.rest().mark.context("a device without a journal")?;
    let since = device.journal().and_then(|journal| journal.since(mark)).context("the journal does not go back so far")?;
    let memory = guest_memory()?;
    memory.write(0, kept)?;
    tell(&Guest::new(Arc::clone(&memory)), &image, &since)?;
    let here = Native::threaded(device, PollOptions::default())?;
    let (mut machine, restored) = Machine::restore(&memory, Box::new(here), state)?;
    ensure!(restored.revived, "a device whose borrower was killed was not reset");
    machine.device.resume();
    let verified = machine.guest.verified();
    machine.run(100)?;
    machine.drain()?;
    let wrong = wrong_blocks(&machine.guest, |number| block(&image, number))?;
    if wrong > 0 {
        bail!(Harm::Wrong(Wrong(format!("{wrong} blocks are not as the guest left them"))));
    }
    Ok(machine.guest.verified() - verified)
}

fn among(ranges: &[BlockRange], block: u64) -> bool {
    ranges.iter().any(|range| range.first < (block + 1) * LOGICAL && block * LOGICAL < range.first + range.blocks)
}

/// Tells the guest what its memory does not know, and finds out whether the journal tells the truth about every block.
fn tell(guest: &Guest, image: &Memory, since: &Since) -> Result<()> {
    ensure!(since.unlisted == 0, "the journal only counts {} writes", since.unlisted);
    for number in 0..BLOCKS {
        let (found, known) = (generation_of(number, &block(image, number)?), guest.acknowledged_generation(number));
        let Some(found) = found else { bail!(Harm::Wrong(Wrong(format!("block {number} is torn")))) };
        let true_to_it = match (among(&since.ranges, number), among(&since.torn, number)) {
            (false, false) => found == known,
            (true, false) => found > known,
            (_, true) => found >= known,
        };
        if !true_to_it {
            let what =
                format!("block {number} is of generation {found} where {known} was put aside, and the journal says otherwise");
            bail!(Harm::Wrong(Wrong(what)));
        }
        guest.learn(number, found);
    }
    Ok(())
}

/// The borrower's process: works and puts aside, until it is killed.
pub(super) fn put_aside(socket: &Path, aside: &Path, seed: u64) -> Result<()> {
    let memory = guest_memory()?;
    let mut machine = Machine::boot(&memory, borrow_soon(socket, &Claim::default())?.0, seed)?;
    let new = aside.with_extension("new");
    let mut bytes = vec![0; MEMORY_BYTES as usize];
    loop {
        machine.run(50)?;
        machine.device.quiesce(REST)?;
        memory.read(0, &mut bytes)?;
        let state = machine.device.save()?;
        machine.device.resume();
        fs::write(&new, [&bytes[..], &state].concat())?;
        // Whole or not at all.
        fs::rename(&new, aside)?;
    }
}
