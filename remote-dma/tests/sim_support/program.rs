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
use farbus_transport::sim::{Seed, SimOptions, World};
use farbus_transport::{Access, CloseReason, Memory, Nanos};

use super::guest::{AREA_BYTES, BASE, Expected, Guest, Kind, Piece, Seat, Write, pages};
use super::wire::{Wire, wires};
use crate::common::{
    COMMAND, CopyEngine, DONE, FAULTS, FROM, IOVA, LEN, POLLED_WORD, RAISE, READ, STAMP, VALUE, WRITE, bar0, description,
};

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
    /// The step at which the link is cut.
    pub cut: Option<u64>,
}

impl Plan {
    /// All of it from one seed.
    pub fn drawn(seed: u64) -> Self {
        let mut choices = Seed::new(seed);
        let mut options = SimOptions::drawn(&mut choices);
        let steps = choices.between(30, 150);
        let cut = choices.chance(300).then(|| choices.below(steps));
        if choices.chance(300) {
            // Whoever waits meets the deadline before the link is known to be dead.
            options.detection_ns = (3_000_000_000, 15_000_000_000);
        }
        Self { seed, options, steps, cut }
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
        if plan.cut == Some(step) {
            play.world.cut();
            play.cut = true;
            play.after_the_cut(Duration::from_nanos(plan.options.detection_ns.1));
            return play.verdict(step);
        }
        play.step();
        play.verdict(step)?;
    }
    play.finish();
    play.verdict(plan.steps)
}

impl Play {
    fn new(plan: &Plan) -> Result<Self, String> {
        let mut choices = Seed::new(plan.seed ^ 0x5e55_1045);
        let (lender, borrower, world) = wires(plan.seed, plan.options.clone());
        let engine = CopyEngine::new();
        let buffer = Arc::clone(&engine.buffer);
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
        match self.guest().wrong.first() {
            None => Ok(()),
            Some(wrong) => Err(format!("step {step}, {} ns: {wrong}", self.world.now().0)),
        }
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
            self.expect_all_landed("a register read was answered");
        }
        value
    }

    fn expect_all_landed(&mut self, when: &str) {
        let mut guest = self.guest();
        let Some(left) = guest.expected.front().cloned() else { return };
        // An answer does not wait for mediations that the one who asked would have to answer first.
        if guest.asked < STAGING_SLOTS {
            guest.complain(format!("{when} before {left:?} was seen"));
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

    // ---- what the device is told ----

    fn free_slot(&mut self) -> usize {
        if let Some(free) = self.busy.iter().position(|busy| !busy) {
            return free;
        }
        self.sync();
        0
    }

    fn place(&mut self) -> (u64, u64) {
        // Also a little outside the areas, on both sides.
        let iova = self.choices.between(BASE - 64, Guest::end() + 64);
        let len = if self.choices.chance(500) { self.choices.between(1, 64) } else { self.choices.between(1, SLOT_BYTES) };
        (iova, len)
    }

    fn command(&mut self, command: u64, slot: usize, iova: u64, len: u64) {
        for (register, value) in
            [(FROM, slot as u64 * SLOT_BYTES), (IOVA, iova), (LEN, len), (STAMP, self.stamp), (COMMAND, command)]
        {
            self.write(register, value);
        }
    }

    /// More pages at once than the guest's side takes by messages, then a register read in the middle of it.
    fn storm(&mut self) {
        for _ in 0..self.choices.between(4, 16) {
            let iova = self.choices.between(BASE + 3 * AREA_BYTES, Guest::end() - 2 * SLOT_BYTES);
            self.device_writes(iova, SLOT_BYTES - 8);
        }
        match self.choices.below(4) {
            0 => self.reset(),
            1 => self.remap_area(0),
            2 => self.dirty(),
            _ => self.read_value(),
        }
    }

    fn device_writes(&mut self, iova: u64, len: u64) {
        let slot = self.free_slot();
        // The polled word is aligned and stays inside its page and its window.
        let end = (iova + len) & !3;
        let (Some(len), true) = (end.checked_sub(iova).filter(|len| *len > 0), end % 4096 <= 4088) else { return };
        let mut bytes = vec![0; len as usize];
        self.choices.fill(&mut bytes);
        self.stamp += 1;
        let word = POLLED_WORD ^ self.stamp;
        let mut guest = self.guest.lock().unwrap();
        let allowed = if self.master { guest.resolve(iova, len) } else { None };
        if let Some((pieces, direct)) = allowed {
            let Some((polled, polled_direct)) = guest.resolve(end, 8) else { return };
            let polled = polled[0].clone();
            // What reaches guest memory in two ways has no order but that of the vectors.
            if direct != polled_direct || !may_write(&mut guest, &self.reading, &pieces, &polled, direct) {
                return;
            }
            guest.foresee(&pieces, &bytes);
            guest.foresee(std::slice::from_ref(&polled), &word.to_le_bytes());
            if direct {
                self.written_pages.extend(pages(&pieces).chain(pages(std::slice::from_ref(&polled))));
            }
            let write = Write { pieces, bytes: bytes.clone(), polled, word, direct, marks: BTreeSet::new(), overwritten: false };
            guest.expected.push_back(Expected::Write(write));
            self.done += 1;
            self.busy[slot] = true;
        } else {
            self.faults += 1;
        }
        drop(guest);
        self.fill_slot(slot, &bytes);
        self.command(WRITE, slot, iova, len);
    }

    fn fill_slot(&mut self, slot: usize, bytes: &[u8]) {
        let start = slot as u64 * SLOT_BYTES;
        self.buffer.write(start, bytes).unwrap();
        self.buffer_model[start as usize..start as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn device_reads(&mut self) {
        let slot = self.free_slot();
        let (iova, len) = self.place();
        let guest = self.guest.lock().unwrap();
        let allowed = if self.master { guest.resolve(iova, len) } else { None };
        if let Some((pieces, direct)) = allowed {
            let unordered = guest.expected.iter().any(|expected| match expected {
                Expected::Write(write) => pieces.iter().any(|piece| {
                    let data = write.pieces.iter().any(|other| other.meets(piece));
                    (data || write.polled.meets(piece)) && direct && !(write.direct && !write.polled.meets(piece))
                }),
                Expected::Vector(_) => false,
            });
            if unordered {
                return;
            }
            let bytes = guest.expected_at(&pieces);
            drop(guest);
            let start = slot * SLOT_BYTES as usize;
            self.buffer_model[start..start + bytes.len()].copy_from_slice(&bytes);
            self.reading.extend(pieces.into_iter().map(|piece| (piece, direct)));
            self.done += 1;
            self.busy[slot] = true;
        } else {
            drop(guest);
            self.faults += 1;
        }
        self.command(READ, slot, iova, len);
    }

    /// Waits until the device has done everything, and looks at all memory.
    fn sync(&mut self) {
        for _ in 0..2000 {
            if self.read(DONE) == self.done || self.cut {
                break;
            }
            // As a VMM does: what the device waits for is answered between two accesses of the guest.
            self.let_pass();
            self.answer();
        }
        let (done, faults) = (self.read(DONE), self.read(FAULTS));
        if (done, faults) != (self.done, self.faults) {
            let should = (self.done, self.faults);
            self.guest().complain(format!("the device has done and refused {:?}, not {should:?}", (done, faults)));
        }
        while !self.guest().tickets.is_empty() {
            self.answer();
        }
        self.busy = [false; SLOTS];
        self.reading.clear();
        self.guest().asked = 0;
        self.guest().compare("all is done");
        let mut is = vec![0; self.buffer_model.len()];
        self.buffer.read(0, &mut is).unwrap();
        if let Some(at) = is.iter().zip(&self.buffer_model).position(|(is, should)| is != should) {
            let should = self.buffer_model[at];
            self.guest().complain(format!("the device read {:#x} into {at:#x}, not {should:#x}", is[at]));
        }
    }

    // ---- what the guest's platform does ----

    fn map(&mut self, area: usize) {
        let (memory, window) = {
            let guest = self.guest();
            let found = &guest.areas[area];
            let memory = Arc::clone(&guest.memories[found.memory]);
            let proven = found.kind == Kind::Direct;
            let behind = match found.kind {
                Kind::Mediated => WindowMemory::Mediated,
                _ => WindowMemory::Mapped { memory: Arc::clone(&memory), offset: found.offset, proven },
            };
            let iova = Iova(BASE + area as u64 * AREA_BYTES);
            (found.memory, Window { iova, len: AREA_BYTES, access: Access::READ_WRITE, memory: behind })
        };
        let mut seat = self.seat();
        match self.session.map(window, &mut seat) {
            Ok(()) => self.guest().areas[area].mapped = true,
            Err(error) => return self.guest().complain(format!("area {area} cannot be mapped: {error}")),
        }
        let behind = Arc::clone(&self.guest().memories[memory]);
        let log = self.session.dirty_log(&behind, &mut seat).cloned();
        self.guest().logs[memory] = log;
    }

    fn remap(&mut self) {
        let area = self.choices.below(5) as usize;
        self.remap_area(area);
    }

    /// Takes a window away, with DMA to it under way, changes the memory, and gives it back.
    fn remap_area(&mut self, area: usize) {
        let (memory, offset) = {
            let guest = self.guest();
            (guest.areas[area].memory, guest.areas[area].offset)
        };
        let piece = Piece { memory, range: offset..offset + AREA_BYTES };
        // A fetch that is answered after its window has gone is a fault, rightly; the model would have to guess which.
        let crowded = self.guest().asked >= STAGING_SLOTS;
        let stored_later = self.guest().expected.iter().any(|expected| match expected {
            Expected::Write(write) => {
                (crowded || !write.direct) && write.pieces.iter().chain([&write.polled]).any(|other| other.meets(&piece))
            }
            Expected::Vector(_) => false,
        });
        if stored_later || self.reading.iter().any(|(other, direct)| !direct && other.meets(&piece)) {
            self.sync();
        }
        let asked = self.world.now();
        let mut seat = self.seat();
        if let Err(error) = self.session.unmap(Iova(BASE + area as u64 * AREA_BYTES), AREA_BYTES, &mut seat) {
            return self.guest().complain(format!("area {area} cannot be unmapped: {error}"));
        }
        if self.world.now().since(asked) > CONTROL_DEADLINE + SLACK {
            self.guest().complain("an unmap took longer than its deadline");
        }
        self.expect_all_landed("an unmap was acknowledged");
        self.guest().areas[area].mapped = false;
        // Reads that were under way have read: their memory is free too.
        self.reading.retain(|(other, _)| !other.meets(&piece));
        let mut bytes = vec![0; AREA_BYTES as usize];
        self.choices.fill(&mut bytes);
        {
            let mut guest = self.guest();
            guest.memories[memory].write(offset, &bytes).unwrap();
            guest.foresee(&[piece], &bytes);
        }
        for _ in 0..self.choices.below(20) {
            self.let_pass();
        }
        self.map(area);
        if area == 3 {
            let mut guest = self.guest();
            guest.areas[3].kind = if self.proven { Kind::Direct } else { Kind::Unproven };
        }
    }

    fn reset(&mut self) {
        // What mediated writes leave behind is not known; from the acknowledgement on nothing may change it.
        let unknown: Vec<Piece> = {
            let mut guest = self.guest();
            guest.lenient = true;
            let mediated = guest.expected.iter().flat_map(|expected| match expected {
                Expected::Write(write) if write.direct => vec![write.polled.clone()],
                Expected::Write(write) => write.pieces.iter().chain([&write.polled]).cloned().collect(),
                Expected::Vector(_) => Vec::new(),
            });
            mediated.collect()
        };
        let mut seat = self.seat();
        if let Err(error) = self.session.reset(ResetKind::Function, &mut seat) {
            return self.guest().complain(format!("the device cannot be reset: {error}"));
        }
        self.expect_all_landed("a reset was acknowledged");
        (self.done, self.faults, self.value) = (0, 0, 0);
        self.busy = [false; SLOTS];
        self.reading.clear();
        let mut guest = self.guest.lock().unwrap();
        guest.lenient = false;
        for piece in &unknown {
            let left = guest.read(std::slice::from_ref(piece));
            guest.foresee(std::slice::from_ref(piece), &left);
        }
        self.buffer.read(0, &mut self.buffer_model).unwrap();
        guest.compare("after a reset");
    }

    fn toggle_master(&mut self) {
        self.master = !self.master || self.choices.chance(500);
        let mut seat = self.seat();
        self.session.set_bus_master(self.master, &mut seat);
    }

    fn dirty(&mut self) {
        let mut missing = Vec::new();
        let mut seat = self.seat();
        for index in 0..3 {
            let memory = Arc::clone(&self.guest().memories[index]);
            if self.session.dirty_log(&memory, &mut seat).is_none() {
                self.guest().complain(format!("memory {index} has no dirty log"));
            }
        }
        let mut guest = self.guest.lock().unwrap();
        guest.take_marks();
        missing.extend(self.written_pages.drain(..).filter(|page| !guest.marked.contains(page)));
        guest.marked.clear();
        if !missing.is_empty() {
            guest.complain(format!("pages {missing:?} were written and are not in the dirty log"));
        }
    }

    /// The memory of area 3 is found to be the guest's own, at a moment when nothing goes by message.
    fn prove(&mut self) {
        self.sync();
        let memory = Arc::clone(&self.guest().memories[2]);
        let mut seat = self.seat();
        self.session.prove(&memory, &mut seat);
        self.proven = true;
        self.guest().areas[3].kind = Kind::Direct;
    }

    /// The lender's thread is not scheduled for seconds: reads meet their deadline, and late answers answer nothing.
    fn freeze(&mut self) {
        let until = self.world.now() + READ_DEADLINE + Duration::from_millis(self.choices.between(0, 900));
        self.machine.lock().unwrap().frozen_until = until;
        self.read(VALUE);
        while self.world.now() < until {
            self.world.advance(Duration::from_millis(10));
        }
        self.machine.lock().unwrap().frozen_until = Nanos(0);
        self.sync();
        self.read_value();
    }

    // ---- the end ----

    fn finish(&mut self) {
        self.sync();
        self.dirty();
        self.read_value();
        let lender = self.machine.lock().unwrap().lender.take();
        drop(lender.map(LenderSession::end));
        self.await_the_end(CloseReason::PeerClosed);
    }

    fn await_the_end(&mut self, reason: CloseReason) {
        let started = self.world.now();
        let mut seat = self.seat();
        while self.session.gone().is_none() && self.world.now().since(started) < Duration::from_secs(20) {
            self.session.poll(self.world.now(), &mut seat);
            if self.world.next_at().is_none() {
                self.world.advance(Duration::from_millis(100));
            }
        }
        if self.session.gone() != Some(reason) {
            let heard = self.session.gone();
            self.guest().complain(format!("the borrower heard {heard:?} of its lender's end, not {reason}"));
        }
        self.cut = true;
        if self.read(VALUE) != u64::MAX {
            self.guest().complain("a device that is gone has a register");
        }
        self.write(VALUE, 1);
        let unmapped = self.session.unmap(Iova(BASE), AREA_BYTES, &mut seat);
        if let Err(error) = unmapped {
            self.guest().complain(format!("memory cannot be taken from a lender that is gone: {error}"));
        }
        let is_gone = matches!(
            self.session.reset(ResetKind::Function, &mut seat),
            Err(AttachmentError::Gone(_)) if self.session.gone().is_some()
        );
        if !is_gone {
            self.guest().complain("a device that is gone was reset");
        }
    }

    /// The link is cut with everything under way.
    fn after_the_cut(&mut self, detection: Duration) {
        // A queue that was full has room again when the end is known; an access waits for that too.
        let limit = READ_DEADLINE.max(detection) + SLACK;
        let before = self.choices.below(4);
        for _ in 0..before {
            // Posted writes to nobody; reads end at the deadline or when the cut is noticed.
            self.write(VALUE, 7);
            let asked = self.world.now();
            let value = {
                let mut seat = self.seat();
                self.session.bar_read(bar0(VALUE), Width::B8, &mut seat)
            };
            let took = self.world.now().since(asked);
            if value != u64::MAX {
                self.guest().complain(format!("a cut link brought {value:#x}"));
            }
            if took > limit {
                self.guest().complain(format!("a read over a cut link took {took:?}"));
            }
        }
        if self.choices.chance(300) && self.session.gone().is_none() {
            let mut seat = self.seat();
            let asked = self.world.now();
            let refused = self.session.unmap(Iova(BASE), AREA_BYTES, &mut seat);
            let took = self.world.now().since(asked);
            if took > CONTROL_DEADLINE + limit || matches!(refused, Err(MapError::Overlap { .. } | MapError::Range { .. })) {
                self.guest().complain(format!("an unmap over a cut link took {took:?} and gave {refused:?}"));
            }
        } else {
            self.await_the_end(CloseReason::PeerGone);
        }
        // The lender notices too, lets go of the memory and has its device back.
        let started = self.world.now();
        let lender = self.machine.lock().unwrap().lender.take();
        let Some(mut lender) = lender else { return };
        while lender.closed().is_none() && self.world.now().since(started) < Duration::from_secs(20) {
            lender.pump(self.world.now());
            if self.world.next_at().is_none() {
                self.world.advance(Duration::from_millis(100));
            }
        }
        if lender.closed() != Some(CloseReason::PeerGone) {
            let heard = lender.closed();
            self.guest().complain(format!("the lender heard {heard:?} of the cut"));
        }
        drop(lender.end());
        self.nothing_else_changed();
    }

    /// Every byte is as foreseen, or was under way and is old or new.
    fn nothing_else_changed(&mut self) {
        let snapshot: Vec<Vec<u8>> = {
            let guest = self.guest();
            (0..4).map(|memory| guest.read(&[Piece { memory, range: 0..guest.model[memory].len() as u64 }])).collect()
        };
        self.world.advance(Duration::from_secs(60));
        let mut guest = self.guest.lock().unwrap();
        let under_way: Vec<Piece> = guest
            .expected
            .iter()
            .filter_map(|expected| match expected {
                Expected::Write(write) => Some(write.pieces.iter().chain([&write.polled]).cloned().collect::<Vec<_>>()),
                Expected::Vector(_) => None,
            })
            .flatten()
            .collect();
        for (memory, before) in snapshot.iter().enumerate() {
            let now = guest.read(&[Piece { memory, range: 0..before.len() as u64 }]);
            if now != *before {
                guest.complain(format!("memory {memory} changed after the lender had let go"));
            }
            let strayed = now.iter().zip(&guest.model[memory]).enumerate().find(|(at, (is, should))| {
                let byte = Piece { memory, range: *at as u64..*at as u64 + 1 };
                is != should && !under_way.iter().any(|piece| piece.meets(&byte))
            });
            if let Some((at, _)) = strayed {
                guest.complain(format!("memory {memory} changed at {at:#x}, where nothing was under way"));
            }
        }
    }
}

/// Whether a write may be asked for while others are under way; marks those whose place it takes.
fn may_write(guest: &mut Guest, reading: &[(Piece, bool)], pieces: &[Piece], polled: &Piece, direct: bool) -> bool {
    let all = || pieces.iter().chain([polled]);
    if all().any(|piece| reading.iter().any(|(other, _)| other.meets(piece))) {
        return false;
    }
    let meets = |other: &Piece| all().any(|piece| piece.meets(other));
    let refused = guest.expected.iter().any(|expected| match expected {
        Expected::Write(write) => {
            let data = write.pieces.iter().any(meets);
            // A polled word is stored by a CPU, later than one-sided writes behind it may land; a guest does not reuse its place before.
            (data || meets(&write.polled)) && (write.direct != direct || direct && meets(&write.polled))
        }
        Expected::Vector(_) => false,
    });
    if !refused {
        for expected in &mut guest.expected {
            if let Expected::Write(write) = expected {
                write.overwritten |= write.pieces.iter().any(meets) || meets(&write.polled);
            }
        }
    }
    !refused
}
