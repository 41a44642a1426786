//! One seed's play: a link, a lender that is polled more or less eagerly, and a program of register accesses, DMAs, maps and resets.
//!
//! Seed 7 might write 300 bytes across two windows, raise vector 900, read VALUE while both are under way, and find at the answer that all
//! has landed, as PCI's ordering wants it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::LenderSession;
use farbus_remote_dma::wait::Patience;
use farbus_remote_dma::{Attachment, AttachmentError, Iova, MapError, MediationAnswer, ResetKind, Width, Window, WindowMemory};
use farbus_transport::sim::one_thread::{Wire, wires};
use farbus_transport::sim::{Seed, SimOptions, World};
use farbus_transport::{Access, CloseReason, Memory, Nanos};

use super::guest::{AREA_BYTES, BASE, Expected, Guest, Kind, Piece, Seat, Write, pages};
use crate::common::{
    COMMAND, CopyEngine, DONE, FAULTS, FROM, IOVA, LEN, POLLED_WORD, RAISE, READ, STAMP, Told, VALUE, WRITE, bar0, description,
};

mod device;
mod ending;
mod platform;

const SLOTS: usize = 16;
const SLOT_BYTES: u64 = 4096;
/// Mediations of one direction under way at once.
const STAGING_SLOTS: usize = 16;
const READ_DEADLINE: Duration = Duration::from_secs(2);
const CONTROL_DEADLINE: Duration = Duration::from_secs(10);
/// How much later than a deadline an answer may come: one step of the clock, and one of the wait.
const SLACK: Duration = Duration::from_millis(50);

/// What a play is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub options: SimOptions,
    pub steps: u64,
    pub ending: Ending,
}

/// How a play ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The lender leaves, in order.
    LenderLeaves,
    /// The link is cut at this step, with everything under way.
    Cut(u64),
    /// The borrower gives up a lender that does not answer, and uses its memory for something else.
    GiveUp,
    /// The borrower's session is dropped with everything under way, and the memory used for something else.
    Leave,
}

impl Plan {
    /// All of it from one seed.
    pub fn drawn(seed: u64) -> Self {
        let mut choices = Seed::new(seed);
        let mut options = SimOptions::drawn(&mut choices);
        options.immediate = choices.chance(300);
        options.peer_mappable = choices.chance(300);
        let steps = choices.between(30, 150);
        let ending = match choices.below(10) {
            0..3 => Ending::Cut(choices.below(steps)),
            3 => Ending::GiveUp,
            4 => Ending::Leave,
            _ => Ending::LenderLeaves,
        };
        if choices.chance(300) {
            // Whoever waits meets the deadline before the link is known to be dead.
            options.detection_ns = (3_000_000_000, 15_000_000_000);
        }
        Self { seed, options, steps, ending }
    }
}

/// The lender's side and the clock.
struct Machine {
    lender: Option<LenderSession<Wire>>,
    world: World,
    choices: Seed,
    /// Polls in a thousand that the lender misses.
    lazy: u32,
    frozen_until: Nanos,
}

impl Machine {
    fn pump(&mut self) {
        let now = self.world.now();
        if now >= self.frozen_until
            && !self.choices.chance(self.lazy)
            && let Some(lender) = &mut self.lender
        {
            lender.pump(now);
        }
    }
}

/// A borrower that waits is the time in which everything else happens.
struct Patient {
    machine: Arc<Mutex<Machine>>,
    guest: Arc<Mutex<Guest>>,
}

impl Patience for Patient {
    fn begin(&mut self) -> Nanos {
        self.machine.lock().unwrap().world.now()
    }

    fn idle(&mut self) -> Nanos {
        let mut machine = self.machine.lock().unwrap();
        machine.pump();
        if machine.world.next_at().is_none() || machine.world.now() < machine.frozen_until {
            machine.world.advance(Duration::from_millis(1));
        }
        self.guest.lock().unwrap().glance();
        machine.world.now()
    }

    fn wants_sleep(&self) -> bool {
        false
    }
}

struct Play {
    session: BorrowerSession<Wire>,
    machine: Arc<Mutex<Machine>>,
    guest: Arc<Mutex<Guest>>,
    buffer: Arc<Memory>,
    buffer_model: Vec<u8>,
    /// What the device was told is done, since its slots were last used anew.
    told: Arc<Mutex<Vec<Told>>>,
    choices: Seed,
    world: World,
    busy: [bool; SLOTS],
    /// What the device reads of guest memory and may not have read yet, and whether directly.
    reading: Vec<(Piece, bool)>,
    done: u64,
    faults: u64,
    value: u64,
    stamp: u64,
    master: bool,
    proven: bool,
    cut: bool,
    written_pages: Vec<(usize, u64)>,
}

/// Plays `plan`; the error says what went wrong first.
///
/// # Errors
/// What a guest would have seen.
pub fn run(plan: &Plan) -> Result<(), String> {
    let mut play = Play::new(plan)?;
    for step in 0..plan.steps {
        if plan.ending == Ending::Cut(step) {
            play.ahead_of_the_cut();
            play.world.cut();
            play.cut = true;
            play.after_the_cut(Duration::from_nanos(plan.options.detection_ns.1));
            return play.verdict(step);
        }
        play.step();
        play.verdict(step)?;
    }
    match plan.ending {
        Ending::GiveUp => play.give_up(),
        Ending::Leave => return play.leave(plan.steps),
        Ending::LenderLeaves | Ending::Cut(_) => play.finish(),
    }
    play.verdict(plan.steps)
}

fn verdict(step: u64, world: &World, guest: &Mutex<Guest>) -> Result<(), String> {
    match guest.lock().unwrap().wrong.first() {
        None => Ok(()),
        Some(wrong) => Err(format!("step {step}, {} ns: {wrong}", world.now().0)),
    }
}

impl Play {
    fn new(plan: &Plan) -> Result<Self, String> {
        let mut choices = Seed::new(plan.seed ^ 0x5e55_1045);
        let (lender, borrower, world) = wires(plan.seed, plan.options.clone());
        let engine = CopyEngine::new();
        let (buffer, told) = (Arc::clone(&engine.buffer), Arc::clone(&engine.told));
        let lender = LenderSession::new(lender, Box::new(engine)).map_err(|(error, _)| error.to_string())?;
        let lazy = if choices.chance(500) { 0 } else { choices.below(900) as u32 };
        let machine =
            Machine { lender: Some(lender), world: world.clone(), choices: choices.split(), lazy, frozen_until: Nanos(0) };
        let machine = Arc::new(Mutex::new(machine));
        let guest = Arc::new(Mutex::new(Guest::new()));
        let patience = Patient { machine: Arc::clone(&machine), guest: Arc::clone(&guest) };
        let options = BorrowerOptions { read_deadline: READ_DEADLINE, control_deadline: CONTROL_DEADLINE, ..Default::default() };
        let session = BorrowerSession::with_patience(borrower, description(), options, Box::new(patience));
        let session = session.map_err(|error| error.to_string())?;
        let buffer_model = vec![0; buffer.len() as usize];
        let mut play = Self {
            session,
            machine,
            guest,
            buffer,
            buffer_model,
            told,
            choices,
            world,
            busy: [false; SLOTS],
            reading: Vec::new(),
            done: 0,
            faults: 0,
            value: 0,
            stamp: 0,
            master: true,
            proven: false,
            cut: false,
            written_pages: Vec::new(),
        };
        let eager = play.choices.chance(600);
        play.guest().eager = eager;
        play.session.set_bus_master(true, &mut play.seat());
        for area in 0..5 {
            play.map(area);
        }
        play.verdict(0)?;
        Ok(play)
    }

    fn seat(&self) -> Seat {
        Seat(Arc::clone(&self.guest))
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap()
    }

    fn verdict(&self, step: u64) -> Result<(), String> {
        verdict(step, &self.world, &self.guest)
    }

    fn step(&mut self) {
        match self.choices.below(100) {
            0..28 => {
                let (iova, len) = self.place();
                self.device_writes(iova, len);
            }
            28..30 => self.storm(),
            30..48 => self.device_reads(),
            48..56 => self.raise(),
            56..66 => self.write_value(),
            66..74 => self.read_value(),
            74..80 => self.guest_writes(),
            80..84 => self.sync(),
            84..88 => self.remap(),
            88..90 => self.reset(),
            90..92 => self.toggle_master(),
            92..94 => self.dirty(),
            94..95 => self.prove(),
            95..96 => self.freeze(),
            _ => self.burst(),
        }
        for _ in 0..self.choices.below(3) {
            self.let_pass();
        }
    }

    /// Time passes while the guest does other things.
    fn let_pass(&mut self) {
        self.machine.lock().unwrap().pump();
        let mut seat = self.seat();
        self.session.poll(self.world.now(), &mut seat);
        self.guest().glance();
        if self.choices.chance(600) {
            self.answer();
        }
    }

    fn answer(&mut self) {
        let count = self.guest().tickets.len();
        if count == 0 {
            return;
        }
        let at = self.choices.below(count as u64) as usize;
        let (ticket, fetch) = self.guest().tickets.remove(at);
        let bytes = fetch.map(|(iova, len)| {
            let guest = self.guest();
            guest.resolve(iova.0, u64::from(len)).map(|(pieces, _)| guest.read(&pieces))
        });
        let answer = match &bytes {
            None => MediationAnswer::Stored,
            Some(Some(bytes)) => MediationAnswer::Fetched(bytes),
            Some(None) => MediationAnswer::Fault,
        };
        let mut seat = self.seat();
        self.session.answer(ticket, answer, &mut seat);
    }

    // ---- what the guest's CPU does ----

    fn write(&mut self, offset: u64, value: u64) {
        let mut seat = self.seat();
        self.session.bar_write(bar0(offset), Width::B8, value, &mut seat);
    }

    /// Reads a register. Whatever was asked of the device before is over by the answer.
    fn read(&mut self, offset: u64) -> u64 {
        let asked = self.world.now();
        let mut seat = self.seat();
        let value = self.session.bar_read(bar0(offset), Width::B8, &mut seat);
        let took = self.world.now().since(asked);
        if took > READ_DEADLINE + SLACK {
            self.guest().complain(format!("a register read took {took:?}"));
        }
        if value == u64::MAX && !self.cut && self.machine.lock().unwrap().frozen_until == Nanos(0) {
            self.guest().complain(format!("a register read got all ones from a device that is there, after {took:?}"));
        } else if value != u64::MAX {
            // All that is before it goes first, however many messages that takes.
            self.expect_landed("a register read was answered");
        }
        value
    }

    fn expect_landed(&mut self, when: &str) {
        let mut guest = self.guest();
        let left = guest.expected.front().map(|left| match left {
            Expected::Write(write) => format!("a write of {} bytes", write.bytes.len()),
            Expected::Vector(vector) => format!("vector {vector}"),
        });
        if let Some(left) = left {
            guest.complain(format!("{when} before {left} was seen"));
        }
    }

    /// An acknowledgement does not wait for mediations that the one who asked would have to answer first.
    fn expect_landed_unless_crowded(&mut self, when: &str) {
        if self.guest().asked < STAGING_SLOTS {
            self.expect_landed(when);
        }
    }

    fn write_value(&mut self) {
        self.value = self.choices.draw();
        self.write(VALUE, self.value);
    }

    fn read_value(&mut self) {
        let value = self.read(VALUE);
        if value != self.value {
            let should = self.value;
            self.guest().complain(format!("VALUE is {value:#x}, not {should:#x}: a write was lost or passed another"));
        }
    }

    /// More posted writes than most queues hold, the last one counts.
    fn burst(&mut self) {
        for _ in 0..self.choices.between(1, 300) {
            self.write_value();
        }
        self.read_value();
    }

    fn raise(&mut self) {
        let vector = self.choices.below(1000) as u16;
        self.guest().expected.push_back(Expected::Vector(vector));
        self.write(FROM, 0);
        self.write(LEN, u64::from(vector));
        self.write(COMMAND, RAISE);
    }

    /// The guest's CPU changes memory that no DMA uses.
    fn guest_writes(&mut self) {
        let memory = self.choices.below(4) as usize;
        let len = self.choices.between(1, 2000);
        let mut guest = self.guest.lock().unwrap();
        let start = self.choices.below(guest.model[memory].len() as u64 - len);
        let piece = Piece { memory, range: start..start + len };
        let in_use = guest.expected.iter().any(|expected| match expected {
            Expected::Write(write) => write.polled.meets(&piece) || write.pieces.iter().any(|other| other.meets(&piece)),
            Expected::Vector(_) => false,
        });
        if in_use || self.reading.iter().any(|(other, _)| other.meets(&piece)) {
            return;
        }
        let mut bytes = vec![0; len as usize];
        self.choices.fill(&mut bytes);
        guest.memories[memory].write(start, &bytes).unwrap();
        guest.foresee(&[piece], &bytes);
    }
}
