//! One queue pair: a submission ring, a completion ring, and the commands that are in flight between them.
//!
//! With 64 entries at most 63 commands are in flight; the completion ring is read by phase bit, so after its entry 63 the bit that means
//! "new" flips from 1 to 0. Nothing here allocates once the pair is made.

use std::sync::atomic::{Ordering, fence};

use farbus_remote_dma::Width;

use super::command::{COMPLETION_BYTES, Command, STATUS_WORD, SUBMISSION_BYTES, StatusWord};
use super::dma::{DmaBuffer, DmaMemory, PAGE_BYTES};
use super::error::{CommandStatus, DriverError};
use super::prp::{self, Prps};
use super::registers::{Capabilities, Registers};

/// A command that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the caller named it when submitting.
    pub token: u64,
    /// How it went.
    pub status: CommandStatus,
    /// Command specific result, word 0 of the entry.
    pub result: u32,
}

/// Whether a slot's command is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    InFlight { token: u64 },
}

/// A submission queue and the completion queue of the same number.
#[derive(Debug)]
pub(super) struct QueuePair {
    id: u16,
    depth: u16,
    submissions: DmaBuffer,
    completions: DmaBuffer,
    lists: DmaBuffer,
    list_pages: u64,
    submission_doorbell: u64,
    completion_doorbell: u64,
    tail: u16,
    rung_tail: u16,
    head: u16,
    phase: bool,
    slots: Vec<Slot>,
    free: Vec<u16>,
}

impl QueuePair {
    /// Queue pair `id` of `depth` entries (2 to 65,535), whose commands move at most `max_transfer` bytes each.
    pub(super) fn new(
        id: u16,
        depth: u16,
        max_transfer: u64,
        capabilities: &Capabilities,
        dma: &mut DmaMemory,
    ) -> Result<Self, DriverError> {
        let commands = depth.saturating_sub(1);
        let list_pages = prp::list_pages(max_transfer);
        let submissions = dma.allocate(u64::from(depth) * SUBMISSION_BYTES)?;
        let completions = dma.allocate(u64::from(depth) * COMPLETION_BYTES)?;
        // An old entry with the phase bit set would be taken for a new one.
        for entry in 0..u64::from(depth) {
            completions.write(entry * COMPLETION_BYTES, &[0; COMPLETION_BYTES as usize])?;
        }
        Ok(Self {
            id,
            depth,
            submissions,
            completions,
            lists: dma.allocate(u64::from(commands) * list_pages * PAGE_BYTES)?,
            list_pages,
            submission_doorbell: capabilities.submission_doorbell(id),
            completion_doorbell: capabilities.completion_doorbell(id),
            tail: 0,
            rung_tail: 0,
            head: 0,
            phase: true,
            slots: vec![Slot::Free; usize::from(commands)],
            free: (0..commands).rev().collect(),
        })
    }

    pub(super) fn id(&self) -> u16 {
        self.id
    }

    pub(super) fn depth(&self) -> u16 {
        self.depth
    }

    pub(super) fn submissions(&self) -> &DmaBuffer {
        &self.submissions
    }

    pub(super) fn completions(&self) -> &DmaBuffer {
        &self.completions
    }

    /// Commands that may be submitted now.
    pub(super) fn room(&self) -> usize {
        self.free.len()
    }

    /// Commands submitted and not yet reaped.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Puts a command into the next slot. The controller hears of it by [`QueuePair::ring`].
    pub(super) fn submit(&mut self, command: &Command, data: Option<&DmaBuffer>, token: u64) -> Result<(), DriverError> {
        let Some(&identifier) = self.free.last() else {
            return Err(DriverError::Full { queue: self.id });
        };
        let prps = match data {
            Some(data) => self.describe(identifier, data)?,
            None => Prps { prp1: 0, prp2: 0 },
        };
        let entry = command.encode(identifier, prps);
        self.submissions.write(u64::from(self.tail) * SUBMISSION_BYTES, &entry)?;
        self.free.pop();
        if let Some(slot) = self.slots.get_mut(usize::from(identifier)) {
            *slot = Slot::InFlight { token };
        }
        self.tail = self.after(self.tail);
        Ok(())
    }

    /// Tells the controller of everything submitted since the last time.
    pub(super) fn ring(&mut self, registers: &mut impl Registers) {
        if self.rung_tail != self.tail {
            // The entries must be in memory before the controller hears of them.
            fence(Ordering::Release);
            registers.write(self.submission_doorbell, Width::B4, u64::from(self.tail));
            self.rung_tail = self.tail;
        }
    }

    /// Hands every new completion to `each` and returns their slots to the controller with one doorbell. Returns how many there were.
    pub(super) fn reap(&mut self, registers: &mut impl Registers, mut each: impl FnMut(Completion)) -> Result<usize, DriverError> {
        let mut count = 0;
        // A ring holds at most `depth - 1` new entries before the doorbell, so a controller that writes wildly cannot keep us here.
        while count < self.slots.len() {
            let at = u64::from(self.head) * COMPLETION_BYTES;
            // Acquire: everything that the device wrote before this word, the data and the rest of the entry, is read after it.
            let word = StatusWord(self.completions.word(at + STATUS_WORD)?.load(Ordering::Acquire));
            if word.phase() != self.phase {
                break;
            }
            let completion = self.complete(word, at)?;
            self.head = self.after(self.head);
            self.phase ^= self.head == 0;
            count += 1;
            each(completion);
        }
        if count > 0 {
            registers.write(self.completion_doorbell, Width::B4, u64::from(self.head));
        }
        Ok(count)
    }

    fn complete(&mut self, word: StatusWord, at: u64) -> Result<Completion, DriverError> {
        let command = word.identifier();
        let stray = DriverError::StrayCompletion { queue: self.id, command };
        let slot = self.slots.get_mut(usize::from(command));
        let Some((slot, token)) = slot.and_then(|slot| match *slot {
            Slot::InFlight { token } => Some((slot, token)),
            Slot::Free => None,
        }) else {
            return Err(stray);
        };
        let result = self.completions.word(at)?.load(Ordering::Relaxed);
        *slot = Slot::Free;
        self.free.push(command);
        Ok(Completion { token, status: word.status(), result })
    }

    fn describe(&self, identifier: u16, data: &DmaBuffer) -> Result<Prps, DriverError> {
        let base = u64::from(identifier) * self.list_pages * PAGE_BYTES;
        let lists = farbus_remote_dma::Iova(self.lists.iova().0.wrapping_add(base));
        prp::build(data.iova(), data.len(), lists, self.list_pages, |offset, entry| {
            Ok(self.lists.write(base + offset, &entry.to_le_bytes())?)
        })
    }

    fn after(&self, index: u16) -> u16 {
        if index + 1 == self.depth { 0 } else { index + 1 }
    }
}
