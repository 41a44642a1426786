//! The machine of the suites `migrate` and `faults`: a guest that verifies what it reads, its borrowed drive, and the lender's process.
//!
//! `LenderProcess::start` runs `farbus lend` over an image of 2 MiB and says when it listened; `borrow` connects to it and keeps a second descriptor of the link's
//! socket, by which the link can be cut while both processes live; `Machine::run(30, …)` has the guest read 30 blocks, each of the generation it wrote last.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use farbus_pci_shim::{Embedded, Restored};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::{Attachment, Claim, DeviceDescription};
use farbus_transport::link::hello::{Hello, Role, SPOKEN, exchange};
use farbus_transport::link::verdict::hear;
use farbus_transport::shm::{HELLO_LIMIT, ShmFabric, ShmOptions, Side};
use farbus_transport::{Memory, Nanos};
use thiserror::Error;

use crate::scripted_guest::{BLOCK_BYTES, BLOCKS, Device, FlagSink, Guest, MEMORY_BYTES, Wrong, generation_of};

/// Commands that the guest keeps under way.
pub(super) const DEPTH: u64 = 24;
/// How long the guest may stand still before an interrupt, or a command, counts as lost.
pub(super) const STANDS_STILL: Duration = Duration::from_secs(20);
/// How long what must happen may take.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// Where things are.
#[derive(Clone, Debug)]
pub struct Places {
    /// The program that is measured, which also is the other processes.
    pub farbus: PathBuf,
    /// An empty folder, for the image and the sockets.
    pub scratch: PathBuf,
}

/// What must never happen to a guest.
#[derive(Debug, Error)]
pub enum Harm {
    /// It read what it should not have, or was told what cannot be.
    #[error("{0}")]
    Wrong(#[from] Wrong),
    /// It waits in vain.
    #[error("the guest stands still with {0} commands under way: an interrupt or a command was lost")]
    Still(u64),
}

/// A guest and its drive.
pub(super) struct Machine {
    pub(super) guest: Guest,
    pub(super) device: Device<FlagSink>,
}

impl Machine {
    /// A guest that boots.
    pub(super) fn boot(memory: &Arc<Memory>, attachment: Box<dyn Attachment>, seed: u64) -> Result<Self> {
        Self::off(memory, attachment)?.on(seed)
    }

    /// A guest that does not run yet.
    pub(super) fn off(memory: &Arc<Memory>, attachment: Box<dyn Attachment>) -> Result<Self> {
        let guest = Guest::new(Arc::clone(memory));
        let device = Embedded::new(attachment, FlagSink(Arc::clone(memory)), guest.slice())?;
        Ok(Self { guest, device })
    }

    /// Boots it.
    pub(super) fn on(mut self, seed: u64) -> Result<Self> {
        self.guest.boot(&mut self.device, seed)?;
        Ok(self)
    }

    /// One that goes on from its memory and its function's state; nothing is said to it before `resume`.
    pub(super) fn restore(memory: &Arc<Memory>, attachment: Box<dyn Attachment>, state: &[u8]) -> Result<(Self, Restored)> {
        let guest = Guest::new(Arc::clone(memory));
        let (device, restored) = Embedded::restore(attachment, FlagSink(Arc::clone(memory)), guest.slice(), state)?;
        Ok((Self { guest, device }, restored))
    }

    /// Commands that have ended so far.
    pub(super) fn ended(&self) -> u64 {
        self.guest.verified() + self.guest.written()
    }

    pub(super) fn step(&mut self) -> Result<(), Harm> {
        self.guest.step(&mut self.device, DEPTH)?;
        self.device.poll(Nanos::now());
        Ok(())
    }

    /// Works while `goes_on`.
    pub(super) fn work_while(&mut self, mut goes_on: impl FnMut(&Self) -> bool) -> Result<(), Harm> {
        let (mut ended, mut since) = (self.ended(), Instant::now());
        while goes_on(self) {
            self.step()?;
            if self.ended() != ended {
                (ended, since) = (self.ended(), Instant::now());
            } else if since.elapsed() > STANDS_STILL {
                return Err(Harm::Still(self.guest.in_flight()));
            }
        }
        Ok(())
    }

    /// Works until it has read `blocks` more.
    pub(super) fn run(&mut self, blocks: u64) -> Result<(), Harm> {
        let until = self.guest.verified() + blocks;
        self.work_while(|machine| machine.guest.verified() < until)
    }

    /// Works until all that is under way has ended.
    pub(super) fn drain(&mut self) -> Result<(), Harm> {
        self.guest.begin_at_most(0);
        self.work_while(|machine| machine.guest.in_flight() > 0)
    }
}

/// Memory for a guest.
pub(super) fn guest_memory() -> Result<Arc<Memory>> {
    Ok(Memory::memfd("guest", MEMORY_BYTES)?)
}

/// Blocks of an image that are not what the guest knows: its reader gives a block's bytes.
pub(super) fn wrong_blocks(guest: &Guest, mut block: impl FnMut(u64) -> Result<Vec<u8>>) -> Result<u64> {
    let mut wrong = 0;
    for number in 0..BLOCKS {
        wrong += u64::from(generation_of(number, &block(number)?) != Some(guest.generation(number)));
    }
    Ok(wrong)
}

/// The same, of an image in a file.
pub(super) fn wrong_blocks_of(guest: &Guest, image: &Path) -> Result<u64> {
    let bytes = std::fs::read(image).context("cannot read the image")?;
    ensure!(bytes.len() as u64 == BLOCKS * BLOCK_BYTES, "the image has another length");
    wrong_blocks(guest, |number| {
        let at = (number * BLOCK_BYTES) as usize;
        Ok(bytes.get(at..at + BLOCK_BYTES as usize).unwrap_or_default().to_vec())
    })
}

/// An empty image.
pub(super) fn empty_image(path: &Path) -> Result<()> {
    let file = std::fs::File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(file.set_len(BLOCKS * BLOCK_BYTES)?)
}

/// By what a link is cut.
pub(super) type Cutter = UnixStream;

/// Borrows the drive at `path`, for and as what `claim` says.
pub(super) fn borrow(path: &Path, claim: &Claim) -> Result<(Box<dyn Attachment>, Cutter)> {
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: claim.encode() };
    let mut stream = UnixStream::connect(path)?;
    let agreed = exchange(&mut stream, &hello, HELLO_LIMIT)?;
    hear(&mut stream, HELLO_LIMIT)?.map_err(|refusal| anyhow!("{refusal}"))?;
    let cutter = stream.try_clone()?;
    let fabric = ShmFabric::establish(stream, Side::Borrower, ShmOptions::default())?;
    let device = DeviceDescription::decode(&agreed.peer.description)?;
    let session = BorrowerSession::new(fabric, device, BorrowerOptions::default())?;
    Ok((
        Box::new(match claim.rest {
            Some(token) => session.continuing(token),
            None => session,
        }),
        cutter,
    ))
}

/// As [`borrow`], again and again while the lender is not ready.
pub(super) fn borrow_soon(path: &Path, claim: &Claim) -> Result<(Box<dyn Attachment>, Cutter)> {
    let began = Instant::now();
    loop {
        match borrow(path, claim) {
            Ok(borrowed) => return Ok(borrowed),
            Err(error) if began.elapsed() > LIMIT => return Err(error.context("the lender lends nothing")),
            Err(_) => std::thread::yield_now(),
        }
    }
}

/// A process that is killed when this is dropped.
pub(super) struct Process(Child);

impl Process {
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        Ok(Self(command.spawn().with_context(|| format!("{} does not start", command.get_program().display()))?))
    }

    pub(super) fn id(&self) -> u32 {
        self.0.id()
    }

    pub(super) fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// SIGKILL, and waits for its end.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.0.kill().context("cannot kill a process")?;
        self.0.wait().context("cannot wait for a process")?;
        Ok(())
    }

    /// Waits for its end by itself.
    pub(super) fn end(&mut self) -> Result<()> {
        let status = self.0.wait().context("cannot wait for a process")?;
        ensure!(status.success(), "a process of the suite ended with {status}");
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended is not there to be killed.
        if self.0.try_wait().is_ok_and(|status| status.is_none()) && self.0.kill().is_ok() {
            drop(self.0.wait());
        }
    }
}

/// A running `farbus lend` of the image.
pub(super) struct LenderProcess {
    process: Process,
    listens: Receiver<Instant>,
}

impl LenderProcess {
    /// Lends `image` at `socket`. Returns at once: [`LenderProcess::listening`] waits.
    pub(super) fn start(places: &Places, image: &Path, socket: &Path) -> Result<Self> {
        let text = |path: &Path| path.to_str().filter(|path| !path.contains(',')).map(str::to_owned);
        let (image, socket) = text(image).zip(text(socket)).context("a scratch folder with a comma or odd letters in its name")?;
        let mut command = Command::new(&places.farbus);
        command.args(["lend", "--json", "--device", &format!("nvme:{image}"), "--listen", &format!("shm:{socket}")]);
        let mut process = Process::start(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let said = process.child().stdout.take().context("the lender has no voice")?;
        let (tell, listens) = channel();
        // To its end, or the lender would wait for a reader one day.
        std::thread::Builder::new().name("bench-lender-says".into()).spawn(move || {
            for line in BufReader::new(said).lines().map_while(Result::ok) {
                if line.contains("\"listening\"") && tell.send(Instant::now()).is_err() {
                    tracing::debug!("nobody wants to know when the lender listened");
                }
            }
        })?;
        Ok(Self { process, listens })
    }

    /// When it listened; waits for that.
    pub(super) fn listening(&self) -> Result<Instant> {
        self.listens.recv_timeout(LIMIT).map_err(|_| anyhow!("the lender did not start"))
    }

    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    /// SIGKILL.
    pub(super) fn kill(mut self) -> Result<()> {
        self.process.kill()
    }
}

/// This program in another part.
pub(super) fn part(places: &Places, words: &[&str]) -> Command {
    let mut command = Command::new(&places.farbus);
    command.args(["bench", "part"]).args(words);
    command
}

/// `count` of `usual`, at least one.
pub(super) fn scaled(usual: u64, effort: f64) -> u64 {
    ((usual as f64 * effort).round() as u64).max(1)
}

/// Nanoseconds of a duration.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Of figures in nanoseconds: the one that `percent` of all do not exceed, in milliseconds.
pub(super) fn at_ms(figures: &[u64], percent: usize) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).map_or(f64::NAN, |ns| *ns as f64 / 1e6)
}

/// Carries out the part that `farbus bench part` names.
///
/// # Errors
/// There is no such part, or it failed.
pub fn run_part(words: &[String]) -> Result<()> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["migrate", process, fd, socket] => super::migrate::other_side(process, fd, Path::new(socket)),
        ["aside", socket, aside, seed] => super::faults_borrower::put_aside(Path::new(socket), Path::new(aside), seed.parse()?),
        ["idle", socket] => super::faults_idle::do_nothing(Path::new(socket)),
        ["lend-many", folder] => super::faults_many::lend_many(Path::new(folder)),
        _ => bail!("there is no such part"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_hundred_figures_the_ninety_ninth_is_the_p99() {
        let figures: Vec<u64> = (1..=100).rev().map(|ms| ms * 1_000_000).collect();
        assert_eq!([at_ms(&figures, 50), at_ms(&figures, 99), at_ms(&figures, 100)], [50.0, 99.0, 100.0]);
        assert!(at_ms(&[], 50).is_nan());
        assert_eq!((scaled(200, 0.1), scaled(200, 1e-9)), (20, 1));
    }
}
