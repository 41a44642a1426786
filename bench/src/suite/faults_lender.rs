//! A guest whose lender is killed, or whose link is cut, again and again while it works: how long it waits, and that it reads what it wrote.
//!
//! A cut shuts the link's socket down while both processes live, and for 1 to 100 ms nobody can connect; the lender fences and resets the drive meanwhile. A kill
//! is SIGKILL to `farbus lend`, which is started again at once.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use farbus_pci_shim::{NotFound, Reconnector, Search};
use farbus_remote_dma::{Claim, HolderToken, Holding};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::faults::Blocks;
use super::machine::{
    Cutter, Harm, LIMIT, LenderProcess, Machine, Places, borrow, borrow_soon, empty_image, guest_memory, nanos, wrong_blocks_of,
};

/// What is done to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// SIGKILL to the lender, which is started again.
    Lender,
    /// The link is cut, and restored later.
    Link,
}

/// A guest's wait, from the moment at which its device could be had again to the first command that ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pause {
    /// In nanoseconds.
    pub(super) judged: u64,
    /// Its parts, which add up to it.
    pub(super) parts: Vec<(&'static str, u64)>,
}

/// What the reconnector says, with when.
#[derive(Debug, Default)]
struct Said {
    cutter: Option<Cutter>,
    lost: Option<Instant>,
    connected: Option<Instant>,
    gave_up: Option<String>,
}

struct Rig<'a> {
    places: &'a Places,
    image: PathBuf,
    socket: PathBuf,
    lender: Option<LenderProcess>,
    said: Arc<Mutex<Said>>,
    /// The link can be made.
    open: Arc<AtomicBool>,
    machine: Machine,
    random: SmallRng,
}

/// `count` faults, each one of `kinds`, at random instants.
pub(super) fn faults(places: &Places, name: &str, count: u64, kinds: &[Fault]) -> Result<(Vec<Pause>, Blocks)> {
    let mut rig = Rig::new(places, name)?;
    let (mut pauses, mut blocks) = (Vec::new(), Blocks::default());
    for _ in 0..count {
        let kind = kinds.get(rig.random.random_range(0..kinds.len())).copied().unwrap_or(Fault::Link);
        match rig.fault(kind) {
            Ok(pause) => pauses.push(pause),
            Err(error) => {
                blocks.harmed(error)?;
                break;
            }
        }
    }
    blocks.faults = pauses.len() as u64;
    blocks.verified = rig.machine.guest.verified();
    if blocks.wrong == 0 {
        match rig.machine.drain() {
            Ok(()) => blocks.wrong = wrong_blocks_of(&rig.machine.guest, &rig.image)?,
            Err(harm) => blocks.harmed(harm.into())?,
        }
    }
    Ok((pauses, blocks))
}

impl<'a> Rig<'a> {
    fn new(places: &'a Places, name: &str) -> Result<Self> {
        let (image, socket) = (places.scratch.join(format!("{name}.image")), places.scratch.join(name));
        empty_image(&image)?;
        let lender = LenderProcess::start(places, &image, &socket)?;
        lender.listening()?;
        let (said, open) = (Arc::new(Mutex::new(Said::default())), Arc::new(AtomicBool::new(true)));
        let holder = HolderToken::random()?;
        let (attachment, cutter) = borrow_soon(&socket, &Claim { rest: None, holding: Some(Holding::First(holder)) })?;
        said.lock().unwrap_or_else(PoisonError::into_inner).cutter = Some(cutter);
        let (tell, hear, may, at) = (Arc::clone(&said), Arc::clone(&said), Arc::clone(&open), socket.clone());
        let again = Claim { rest: None, holding: Some(Holding::Again(holder)) };
        let connect = move || {
            if !may.load(Ordering::Acquire) {
                return Err(NotFound::Yet("the link is cut".to_owned()));
            }
            let (attachment, cutter) = borrow(&at, &again).map_err(|error| NotFound::Yet(format!("{error:#}")))?;
            let mut tell = tell.lock().unwrap_or_else(PoisonError::into_inner);
            (tell.cutter, tell.connected) = (Some(cutter), Some(Instant::now()));
            Ok(attachment)
        };
        let reconnector = Reconnector::new(LIMIT, connect).telling(move |search| {
            let mut said = hear.lock().unwrap_or_else(PoisonError::into_inner);
            match search {
                Search::Lost(_) => said.lost = Some(Instant::now()),
                Search::Back(_) => {}
                Search::GaveUp(why) => said.gave_up = Some(why),
            }
        });
        let mut machine = Machine::off(&guest_memory()?, attachment)?;
        // Before the guest uses it: what it is told from now on is kept.
        machine.device.function_mut().reattach_by(Box::new(reconnector));
        let machine = machine.on(77)?;
        Ok(Self { places, image, socket, lender: Some(lender), said, open, machine, random: SmallRng::seed_from_u64(77) })
    }

    fn fault(&mut self, kind: Fault) -> Result<Pause> {
        let works = Duration::from_micros(self.random.random_range(0..16_000));
        let (began, verified) = (Instant::now(), self.machine.guest.verified());
        self.machine.work_while(|machine| began.elapsed() < works || machine.guest.verified() == verified)?;
        let before = self.machine.device.function().recoveries();
        let struck = Instant::now();
        let back_at = match kind {
            Fault::Lender => {
                if let Some(lender) = self.lender.take() {
                    lender.kill()?;
                }
                self.lender = Some(LenderProcess::start(self.places, &self.image, &self.socket)?);
                None
            }
            Fault::Link => {
                self.open.store(false, Ordering::Release);
                let cutter = self.said.lock().unwrap_or_else(PoisonError::into_inner).cutter.take();
                if let Some(cutter) = cutter {
                    cutter.shutdown(std::net::Shutdown::Both)?;
                }
                let cut = Duration::from_micros(self.random.random_range(1_000..100_000));
                self.wait(|_| struck.elapsed() >= cut)?;
                self.open.store(true, Ordering::Release);
                Some(Instant::now())
            }
        };
        // The guest runs on: it may submit, and read registers, while there is no device.
        self.wait(|machine| machine.device.function().recoveries() > before)?;
        let recovered = Instant::now();
        let ended = self.machine.ended();
        self.machine.work_while(|machine| machine.ended() == ended)?;
        let answered = Instant::now();
        let back_at = match (back_at, &self.lender) {
            (Some(at), _) => at,
            (None, Some(lender)) => lender.listening()?,
            (None, None) => bail!("there is no lender"),
        };
        let took = self.machine.device.function().recovery_took();
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let (lost, connected) = (said.lost.unwrap_or(struck), said.connected.unwrap_or(recovered));
        let since = |later: Instant, earlier: Instant| nanos(later.saturating_duration_since(earlier));
        // Noticing goes on while the lender starts: it counts only as far as it lasts longer.
        let noticed = lost.max(back_at);
        let connected = connected.max(noticed);
        let parts = vec![
            ("noticed late", since(noticed, back_at)),
            ("connect", since(connected, noticed)),
            ("take over", since(recovered, connected).saturating_sub(nanos(took.reset + took.revive + took.tell))),
            ("reset", nanos(took.reset)),
            ("revive", nanos(took.revive)),
            ("tell again", nanos(took.tell)),
            ("first answer", since(answered, recovered)),
        ];
        Ok(Pause { judged: since(answered, back_at), parts })
    }

    /// Works until `over`, without an answer if need be.
    fn wait(&mut self, over: impl Fn(&Machine) -> bool) -> Result<()> {
        let began = Instant::now();
        while !over(&self.machine) {
            self.machine.step().map_err(anyhow::Error::from)?;
            if let Some(why) = self.said.lock().unwrap_or_else(PoisonError::into_inner).gave_up.take() {
                bail!("the lender is given up: {why}");
            }
            if began.elapsed() > LIMIT {
                bail!(Harm::Still(self.machine.guest.in_flight()));
            }
        }
        Ok(())
    }
}
