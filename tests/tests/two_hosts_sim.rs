//! Two hosts, a guest at work and a drive that DMAs at the worst moment, in one thread and one clock, everything drawn from a seed: cuts, crashes and moves.
//!
//! Seed 7 might cut the link with nine commands outstanding, crash the lender while the function is being brought back, and then move the guest. Every block that
//! the guest reads is the one that it wrote last, every command ends, the image holds what was acknowledged, and memory that the guest has left stays as it is.
//! FARBUS_SEEDS=10000 plays more of them, FARBUS_SEED=7 only that one. Each rule has a twin here: a recovery that breaks it must be found out.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farbus_pci_shim::profile::RecoveryRule;
use farbus_pci_shim::reattach::{Found, Reattach};
use farbus_pci_shim::{Embedded, FunctionState};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::guest_memory::SliceMemory;
use farbus_remote_dma::lender::LenderSession;
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::wait::{Patience, Waker};
use farbus_remote_dma::{Attachment, Backend, BarAddress, DeviceDescription, GuestAddress, Kept, RestToken, Width};
use farbus_tests::scripted_guest::{BLOCK_BYTES, BLOCKS, Device, FlagSink, Guest, MEMORY_BYTES, generation_of};
use farbus_transport::sim::one_thread::{Wire, wires};
use farbus_transport::sim::{Seed, SimOptions, World};
use farbus_transport::{CloseReason, Memory, Nanos};

/// Seeds of a normal run.
const SEEDS: u64 = 200;
/// Seeds within which a broken rule must be found out.
const TWIN_SEEDS: u64 = 60;
/// Turns after which what has not ended never will.
const TURNS: u64 = 400_000;
const LEASE: Duration = Duration::from_secs(60);
/// What memory is filled with that nobody may touch any more.
const LEFT_BEHIND: u8 = 0xee;

/// The host with the drive.
struct Lender {
    image: Arc<Memory>,
    session: Option<LenderSession<Wire>>,
    device: Option<Drive>,
    world: Option<World>,
    choices: Seed,
    /// Polls in a thousand that it misses.
    lazy: u32,
    description: DeviceDescription,
}

enum Drive {
    Reset(Box<dyn Backend>),
    Kept(Kept),
}

/// The same drive, to its guest, whoever lends it.
fn drive(image: &Arc<Memory>) -> Nvme {
    let options = NvmeOptions { serial: Some("two-hosts".into()), ..NvmeOptions::default() };
    Nvme::in_memory(Arc::clone(image), options).unwrap()
}

impl Lender {
    fn turn_on(image: &Arc<Memory>) -> Drive {
        Drive::Reset(Box::new(drive(image)))
    }

    fn now(&self) -> Nanos {
        self.world.as_ref().map_or(Nanos(0), World::now)
    }

    fn pump(&mut self) {
        let (now, lazy) = (self.now(), self.lazy);
        if let Some(session) = &mut self.session
            && !self.choices.chance(lazy)
        {
            session.pump(now);
            if session.closed().is_some() {
                self.end_session();
            }
        }
    }

    fn end_session(&mut self) {
        let Some(session) = self.session.take() else { return };
        self.device = Some(match session.into_kept() {
            Ok(kept) => Drive::Kept(kept),
            Err(session) => Drive::Reset(session.end().unwrap()),
        });
    }

    /// Its process is killed, and started again: the drive knows of nothing but its image.
    fn crash(&mut self) {
        if let Some(world) = &self.world {
            world.cut();
        }
        self.session = None;
        self.device = Some(Self::turn_on(&self.image));
    }

    /// A new link, for who has this token.
    fn connect(lender: &Arc<Mutex<Self>>, token: Option<RestToken>) -> Option<Box<dyn Attachment>> {
        let mut this = lender.lock().unwrap();
        for _ in 0..TURNS {
            if this.session.is_none() {
                break;
            }
            let now = this.now();
            if let Some(session) = &mut this.session {
                session.pump(now);
                if session.closed().is_some() {
                    this.end_session();
                }
            }
        }
        // Nobody's lease runs out in virtual time: who does not come for what it left has it reset.
        let device = match (this.device.take()?, token) {
            (Drive::Kept(kept), Some(token)) => Drive::Kept(kept.claim(&token).ok().unwrap().keep_again(LEASE)),
            (Drive::Kept(kept), None) => Drive::Reset(kept.give_up()),
            (reset, _) => reset,
        };
        let before = this.now();
        let options = SimOptions::drawn(&mut this.choices);
        let (theirs, mut ours, world) = wires(this.choices.below(u64::MAX), options);
        world.advance(before.since(Nanos(0)));
        let (session, continues) = match (device, token) {
            (Drive::Kept(kept), Some(token)) => {
                (LenderSession::continued(theirs, kept.claim(&token).ok().unwrap()).ok().unwrap(), Some(token))
            }
            (Drive::Kept(kept), None) => (LenderSession::new(theirs, kept.give_up()).ok().unwrap(), None),
            (Drive::Reset(backend), _) => (LenderSession::new(theirs, backend).ok().unwrap(), None),
        };
        (this.session, this.world) = (Some(session), Some(world));
        let description = this.description.clone();
        drop(this);
        // A turn of the lender's before each look, whoever looks.
        let turn = Arc::clone(lender);
        ours.before_poll(move || turn.lock().unwrap().pump());
        let patience = Box::new(Waits(Arc::clone(lender)));
        let session = BorrowerSession::with_patience(ours, description, BorrowerOptions::default(), patience).unwrap();
        Some(match continues {
            Some(token) => Box::new(session.continuing(token)),
            None => Box::new(session),
        })
    }
}

/// A borrower that waits is the time in which everything else happens.
struct Waits(Arc<Mutex<Lender>>);

impl Patience for Waits {
    fn begin(&mut self) -> Nanos {
        self.0.lock().unwrap().now()
    }
    fn idle(&mut self) -> Nanos {
        self.0.lock().unwrap().now()
    }
    fn wants_sleep(&self) -> bool {
        false
    }
}

/// Finds the lender when it has noticed as well.
struct Meets {
    lender: Arc<Mutex<Lender>>,
    choices: Seed,
    gave_up: Arc<Mutex<Option<String>>>,
    /// Nobody sleeps here.
    awake: Waker,
}

impl Reattach for Meets {
    fn begin(&mut self, _why: CloseReason, _since: Instant) {}
    fn poll(&mut self) -> Found {
        if self.choices.chance(700) {
            return Found::NotYet;
        }
        let found = Lender::connect(&self.lender, None).map_or_else(|| Found::Nobody("nobody lends it".into()), Found::Device);
        if self.choices.chance(200) {
            // Lost once more while the function is being brought back.
            let lender = self.lender.lock().unwrap();
            lender.world.as_ref().unwrap().cut();
        }
        found
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.awake.fd())
    }
    fn gave_up(&mut self, why: &str) {
        *self.gave_up.lock().unwrap() = Some(why.to_owned());
    }
}

/// What a play did, so that a run can say that it was not idle.
#[derive(Clone, Copy, Debug, Default)]
struct Did {
    cuts: u64,
    crashes: u64,
    moves: u64,
    recoveries: u64,
    outstanding: u64,
    verified: u64,
}

struct Play {
    lender: Arc<Mutex<Lender>>,
    guest: Guest,
    device: Device<FlagSink>,
    choices: Seed,
    gave_up: Arc<Mutex<Option<String>>>,
    left: Vec<Arc<Memory>>,
    broken: Option<RecoveryRule>,
    did: Did,
}

impl Play {
    fn new(seed: u64, broken: Option<RecoveryRule>) -> Result<Self, String> {
        let mut choices = Seed::new(seed);
        let image = Memory::memfd("image", BLOCKS * BLOCK_BYTES).unwrap();
        let lender = Arc::new(Mutex::new(Lender {
            device: Some(Lender::turn_on(&image)),
            session: None,
            world: None,
            lazy: choices.between(0, 900) as u32,
            choices: choices.split(),
            description: drive(&image).description().clone(),
            image,
        }));
        let gave_up = Arc::new(Mutex::new(None));
        let guest = Guest::new(Memory::memfd("guest", MEMORY_BYTES).unwrap());
        let attachment = Lender::connect(&lender, None).unwrap();
        let device =
            Embedded::new(attachment, FlagSink(Arc::clone(guest.memory())), guest.slice()).map_err(|error| error.to_string())?;
        let mut play = Self { lender, guest, device, choices, gave_up, left: Vec::new(), broken, did: Did::default() };
        play.look_when_lost();
        play.guest.boot(&mut play.device, seed).map_err(|wrong| wrong.0)?;
        Ok(play)
    }

    fn look_when_lost(&mut self) {
        let awake = Waker::new().unwrap();
        awake.set();
        let meets =
            Meets { lender: Arc::clone(&self.lender), choices: self.choices.split(), gave_up: Arc::clone(&self.gave_up), awake };
        let function = self.device.function_mut();
        function.reattach_by(Box::new(meets));
        if let Some(rule) = self.broken {
            function.break_recovery(rule);
        }
    }

    fn turn(&mut self, depth: u64) -> Result<(), String> {
        self.guest.step(&mut self.device, depth).map_err(|wrong| wrong.0)?;
        let now = self.lender.lock().unwrap().now();
        self.device.poll(now);
        match self.gave_up.lock().unwrap().take() {
            Some(why) => Err(format!("the device is gone: {why}")),
            None => Ok(()),
        }
    }

    fn run(&mut self) -> Result<(), String> {
        let depth = self.choices.between(1, 40);
        for _ in 0..self.choices.between(3, 12) {
            for _ in 0..self.choices.between(1, 400) {
                self.turn(depth)?;
                if self.choices.chance(20) {
                    let status =
                        self.device.bar_read(BarAddress { bar: 0, offset: 0x1c }, Width::B4).map_err(|error| error.to_string())?;
                    if status != 1 {
                        return Err(format!("CSTS reads {status:#x}"));
                    }
                }
            }
            match self.choices.below(4) {
                0 => self.cut(),
                1 => {
                    self.did.outstanding += self.guest.in_flight();
                    self.did.crashes += 1;
                    self.lender.lock().unwrap().crash();
                }
                2 => self.move_away()?,
                _ => {}
            }
        }
        self.finish()
    }

    fn cut(&mut self) {
        self.did.outstanding += self.guest.in_flight();
        self.did.cuts += 1;
        self.lender.lock().unwrap().world.as_ref().unwrap().cut();
    }

    /// The guest leaves this memory and goes on in another, with the device kept for it meanwhile; a cut in the middle leaves it where it was.
    fn move_away(&mut self) -> Result<(), String> {
        if self.choices.chance(200) {
            self.cut();
        }
        let recoveries = self.device.function().recoveries();
        let state = match self.save_and_leave() {
            Ok(state) => state,
            Err(_) if self.device.function().gone().is_none() => {
                self.device.resume();
                return Ok(());
            }
            Err(why) => return Err(format!("it can neither leave nor stay: {why}")),
        };
        self.did.moves += 1;
        self.did.recoveries += recoveries;
        let new = Memory::memfd("guest", MEMORY_BYTES).unwrap();
        let mut bytes = vec![0; MEMORY_BYTES as usize];
        self.guest.memory().read(0, &mut bytes).unwrap();
        new.write(0, &bytes).unwrap();
        bytes.fill(LEFT_BEHIND);
        self.guest.memory().write(0, &bytes).unwrap();
        self.left.push(Arc::clone(self.guest.memory()));
        self.guest = Guest::new(new);
        let token = FunctionState::parse(&state).unwrap().rest().token;
        let attachment = Lender::connect(&self.lender, Some(token)).ok_or("the lender does not have its device any more")?;
        let sink = FlagSink(Arc::clone(self.guest.memory()));
        let slice = SliceMemory::new(GuestAddress(0), Arc::clone(self.guest.memory()));
        self.device = Embedded::restore(attachment, sink, slice, &state).map_err(|error| error.to_string())?.0;
        self.look_when_lost();
        self.device.resume();
        Ok(())
    }

    fn save_and_leave(&mut self) -> Result<Vec<u8>, String> {
        let text = |error: farbus_pci_shim::QuiesceError| error.to_string();
        self.device.function_mut().begin_quiesce().map_err(text)?;
        for turn in 0.. {
            let now = self.lender.lock().unwrap().now();
            self.device.poll(now);
            if self.device.function_mut().quiesced().map_err(text)?.is_some() {
                break;
            }
            if turn > TURNS {
                return Err("it does not come to rest".into());
            }
        }
        let state = self.device.save().map_err(text)?;
        self.device.leave(LEASE).map_err(text)?;
        Ok(state)
    }

    fn finish(&mut self) -> Result<(), String> {
        self.guest.begin_at_most(0);
        let mut turns = 0;
        while self.guest.in_flight() > 0 {
            self.turn(0)?;
            turns += 1;
            if turns > TURNS {
                return Err(format!("{} commands never end: an interrupt was lost, or a command", self.guest.in_flight()));
            }
        }
        self.did.recoveries += self.device.function().recoveries();
        self.did.verified = self.guest.verified();
        let lender = self.lender.lock().unwrap();
        for block in 0..BLOCKS {
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            lender.image.read(block * BLOCK_BYTES, &mut bytes).unwrap();
            if generation_of(block, &bytes) != Some(self.guest.generation(block)) {
                return Err(format!("block {block} is not of generation {}", self.guest.generation(block)));
            }
        }
        for memory in &self.left {
            let mut bytes = vec![0; MEMORY_BYTES as usize];
            memory.read(0, &mut bytes).unwrap();
            if let Some(at) = bytes.iter().position(|byte| *byte != LEFT_BEHIND) {
                return Err(format!("memory that the guest had left was written at {at:#x}"));
            }
        }
        Ok(())
    }
}

fn play(seed: u64, broken: Option<RecoveryRule>) -> Result<Did, String> {
    let mut play = Play::new(seed, broken)?;
    play.run()?;
    Ok(play.did)
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn no_block_is_lost_torn_or_brought_back_whatever_is_cut_crashed_or_moved() {
    let seeds = match number("FARBUS_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("FARBUS_SEEDS").unwrap_or(SEEDS),
    };
    let mut all = Did::default();
    for seed in seeds {
        match play(seed, None) {
            Ok(did) => {
                all.cuts += did.cuts;
                all.crashes += did.crashes;
                all.moves += did.moves;
                all.recoveries += did.recoveries;
                all.outstanding += did.outstanding;
                all.verified += did.verified;
            }
            Err(wrong) => panic!(
                "seed {seed}: {wrong}\nagain: FARBUS_SEED={seed} cargo test -p farbus-tests --test two_hosts_sim whatever_is_cut"
            ),
        }
    }
    println!("{all:?}");
    assert!(all.recoveries > 0 && all.moves > 0 && all.outstanding > 0, "nothing happened: {all:?}");
}

#[test]
fn a_recovery_that_breaks_a_rule_is_found_out() {
    let mut blind = Vec::new();
    for rule in RecoveryRule::ALL {
        let found = (0..TWIN_SEEDS).find_map(|seed| play(seed, Some(rule)).err().map(|wrong| (seed, wrong)));
        match found {
            Some((seed, wrong)) => println!("{rule:?}: seed {seed}: {wrong}"),
            None => blind.push(rule),
        }
    }
    assert!(blind.is_empty(), "not found in {TWIN_SEEDS} seeds: {blind:?}");
}
