//! The guest's side as its judge: what memory must hold, which interrupts must come, and what each of them promises.
//!
//! At vector 3 of a write of 100 bytes at 0x10_0ff8 the bytes, the polled word behind them and the dirty marks of pages 0 and 1 are looked at,
//! at that moment and not later.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use farbus_remote_dma::dirty_log::{DirtyLog, PAGE_BYTES};
use farbus_remote_dma::{Host, Iova, Mediation, Ticket};
use farbus_transport::Memory;

/// Bytes of each area of DMA addresses; the areas lie side by side.
pub const AREA_BYTES: u64 = 16 << 10;
/// The first DMA address.
pub const BASE: u64 = 0x10_0000;

/// How the device reaches an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Direct,
    Unproven,
    Mediated,
}

/// A window of the guest.
#[derive(Clone, Debug)]
pub struct Area {
    pub memory: usize,
    pub offset: u64,
    pub kind: Kind,
    pub mapped: bool,
}

/// A piece of one of the guest's memories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub memory: usize,
    pub range: Range<u64>,
}

impl Piece {
    pub fn meets(&self, other: &Self) -> bool {
        self.memory == other.memory && self.range.start < other.range.end && other.range.start < self.range.end
    }
}

/// A device write that its vector has not announced yet.
#[derive(Clone, Debug)]
pub struct Write {
    pub pieces: Vec<Piece>,
    pub bytes: Vec<u8>,
    pub polled: Piece,
    pub word: u64,
    pub direct: bool,
    /// Dirty marks that were taken with its bytes in place already.
    pub marks: BTreeSet<(usize, u64)>,
    /// A later write goes to the same place, so that what is seen at the vector may be that one's.
    pub overwritten: bool,
}

/// What the next interrupt must be.
#[derive(Clone, Debug)]
pub enum Expected {
    Write(Write),
    Vector(u16),
}

pub struct Guest {
    pub areas: Vec<Area>,
    pub memories: Vec<Arc<Memory>>,
    /// What the memories hold when everything has landed.
    pub model: Vec<Vec<u8>>,
    pub expected: VecDeque<Expected>,
    /// Dirty logs by memory, where it has one.
    pub logs: Vec<Option<DirtyLog>>,
    /// Whether marks are taken at each announcement, or only when somebody asks for them.
    pub eager: bool,
    /// Marks taken since the last look, by memory.
    pub marked: BTreeSet<(usize, u64)>,
    /// Pages that the guest's side stored to itself, which is its own mark.
    pub stored: BTreeSet<(usize, u64)>,
    /// Asked and not answered.
    pub tickets: Vec<(Ticket, Option<(Iova, u32)>)>,
    /// Mediations asked for since all was done.
    pub asked: usize,
    /// A reset is under way or the link is cut: announcements of mediated writes may come without their data.
    pub lenient: bool,
    pub wrong: Vec<String>,
}

impl Guest {
    pub fn new() -> Self {
        let memories: Vec<_> =
            [64 << 10, 16 << 10, 16 << 10, 16 << 10].map(|len: u64| Memory::memfd("guest", len).unwrap()).into_iter().collect();
        let model = memories.iter().map(|memory| vec![0; memory.len() as usize]).collect();
        let area = |memory, offset, kind| Area { memory, offset, kind, mapped: false };
        let areas = vec![
            area(0, 32 << 10, Kind::Direct),
            area(0, 0, Kind::Direct),
            area(1, 0, Kind::Direct),
            area(2, 0, Kind::Unproven),
            area(3, 0, Kind::Mediated),
        ];
        let logs = memories.iter().map(|_| None).collect();
        Self {
            areas,
            memories,
            model,
            expected: VecDeque::new(),
            logs,
            eager: true,
            marked: BTreeSet::new(),
            stored: BTreeSet::new(),
            tickets: Vec::new(),
            asked: 0,
            lenient: false,
            wrong: Vec::new(),
        }
    }

    pub fn complain(&mut self, what: impl Into<String>) {
        self.wrong.push(what.into());
    }

    pub fn end() -> u64 {
        BASE + 5 * AREA_BYTES
    }

    /// Where `len` bytes at `iova` lie, and whether all of it is reached directly; `None` where a part is not mapped.
    pub fn resolve(&self, iova: u64, len: u64) -> Option<(Vec<Piece>, bool)> {
        let (mut at, mut left, mut pieces, mut direct) = (iova, len, Vec::new(), true);
        while left > 0 {
            let area = self.areas.get(at.checked_sub(BASE)?.checked_div(AREA_BYTES)? as usize).filter(|area| area.mapped)?;
            let into = (at - BASE) % AREA_BYTES;
            let part = left.min(AREA_BYTES - into);
            direct &= area.kind == Kind::Direct;
            pieces.push(Piece { memory: area.memory, range: area.offset + into..area.offset + into + part });
            at += part;
            left -= part;
        }
        Some((pieces, direct))
    }

    pub fn read(&self, pieces: &[Piece]) -> Vec<u8> {
        let mut all = Vec::new();
        for piece in pieces {
            let mut bytes = vec![0; (piece.range.end - piece.range.start) as usize];
            self.memories[piece.memory].read(piece.range.start, &mut bytes).unwrap();
            all.extend(bytes);
        }
        all
    }

    pub fn expected_at(&self, pieces: &[Piece]) -> Vec<u8> {
        pieces
            .iter()
            .flat_map(|piece| &self.model[piece.memory][piece.range.start as usize..piece.range.end as usize])
            .copied()
            .collect()
    }

    pub fn foresee(&mut self, pieces: &[Piece], bytes: &[u8]) {
        let mut bytes = bytes.iter();
        for piece in pieces {
            let into = &mut self.model[piece.memory][piece.range.start as usize..piece.range.end as usize];
            for (into, from) in into.iter_mut().zip(&mut bytes) {
                *into = *from;
            }
        }
    }

    /// A guest that polls: the word of a write may not be there before its data.
    pub fn glance(&mut self) {
        let mut early = 0;
        for expected in &self.expected {
            let Expected::Write(write) = expected else { continue };
            let word = self.read(std::slice::from_ref(&write.polled));
            if !write.overwritten && word == write.word.to_le_bytes() && self.read(&write.pieces) != write.bytes {
                early += 1;
            }
        }
        if early > 0 {
            self.complain("a polled word was there before its data");
        }
    }

    /// Takes all marks, as who copies dirty pages does: a mark that comes with its bytes counts for them.
    pub fn take_marks(&mut self) -> BTreeSet<(usize, u64)> {
        let mut taken = BTreeSet::new();
        for (memory, log) in self.logs.iter().enumerate() {
            if let Some(log) = log {
                log.take(|page| {
                    taken.insert((memory, page));
                });
            }
        }
        self.marked.extend(&taken);
        for at in 0..self.expected.len() {
            let Some(Expected::Write(write)) = self.expected.get(at) else { continue };
            let there = self.read(&write.pieces) == write.bytes;
            if let Some(Expected::Write(write)) = self.expected.get_mut(at).filter(|_| there) {
                write.marks.extend(&taken);
            }
        }
        taken
    }

    fn announced(&mut self, write: &Write) {
        let marks = if self.eager { self.take_marks() } else { BTreeSet::new() };
        if write.overwritten || self.lenient && !write.direct {
            return;
        }
        if self.read(&write.pieces) != write.bytes {
            self.complain("a vector came before the data it announces, or the data is wrong");
        }
        // The word of a direct write takes the messages' way too where they are crowded.
        if !self.lenient && self.read(std::slice::from_ref(&write.polled)) != write.word.to_le_bytes() {
            self.complain("a vector came before the polled word");
        }
        if self.eager && write.direct && pages(&write.pieces).any(|page| !marks.contains(&page) && !write.marks.contains(&page)) {
            self.complain("a vector came before the dirty marks of what it announces");
        }
    }

    /// Nothing may be under way: all memory is as foreseen.
    pub fn compare(&mut self, when: &str) {
        for index in 0..self.memories.len() {
            let len = self.model[index].len() as u64;
            let is = self.read(&[Piece { memory: index, range: 0..len }]);
            if let Some(at) = is.iter().zip(&self.model[index]).position(|(is, should)| is != should) {
                let should = self.model[index][at];
                self.complain(format!("{when}: memory {index} has {:#x} at {at:#x}, not {should:#x}", is[at]));
            }
        }
    }
}

/// The pages that pieces touch.
pub fn pages(pieces: &[Piece]) -> impl Iterator<Item = (usize, u64)> {
    pieces
        .iter()
        .flat_map(|piece| (piece.range.start / PAGE_BYTES..piece.range.end.div_ceil(PAGE_BYTES)).map(|page| (piece.memory, page)))
}

/// The guest as a session sees it.
#[derive(Clone)]
pub struct Seat(pub Arc<Mutex<Guest>>);

impl Host for Seat {
    fn interrupt(&mut self, vector: u16) {
        let mut guest = self.0.lock().unwrap();
        match guest.expected.pop_front() {
            Some(Expected::Write(write)) if vector == 3 => guest.announced(&write),
            Some(Expected::Vector(raised)) if vector == raised => {}
            other => guest.complain(format!("vector {vector} came where {other:?} was due")),
        }
    }

    fn pin(&mut self, asserted: bool) {
        self.0.lock().unwrap().complain(format!("the pin changed to {asserted}, and the device has none"));
    }

    fn mediate(&mut self, ticket: Ticket, mediation: Mediation<'_>) {
        let mut guest = self.0.lock().unwrap();
        guest.asked += 1;
        match mediation {
            Mediation::Fetch { iova, len } => guest.tickets.push((ticket, Some((iova, len)))),
            Mediation::Store { iova, bytes, .. } => {
                match guest.resolve(iova.0, bytes.len() as u64) {
                    Some((pieces, _)) => {
                        guest.stored.extend(pages(&pieces));
                        let mut from = bytes;
                        for piece in &pieces {
                            let (part, rest) = from.split_at((piece.range.end - piece.range.start) as usize);
                            guest.memories[piece.memory].write(piece.range.start, part).unwrap();
                            from = rest;
                        }
                    }
                    None => guest.complain(format!("a store at {iova} came after its window was taken away")),
                }
                guest.tickets.push((ticket, None));
            }
        }
    }
}
