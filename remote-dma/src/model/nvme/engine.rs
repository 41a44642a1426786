//! What drives a command from its slot to its completion: the steps of one slot, ended DMAs, background work.
//!
//! Slot 0 holds a read of 12 KiB: `Start` judges it, `Move` needs its PRP list and leaves it in `List`; the list's DMA ends, `Move` starts two
//! more, `Settle` sees that nothing must be awaited, and the completion is posted behind the data. On a bus where all is done at
//! once, this is one call.

use std::cmp::Reverse;

use farbus_transport::Access;

use super::command::Status;
use super::prp::{Cursor, Step};
use super::slots::{ADMIN_RESERVE, Local, Phase, Slot, Then};
use super::{BYTES_PER_CALL, Life, Nvme};
use crate::backend::{Bus, DmaFault, DmaTag, Progress};

/// What a DMA was for; the tag carries it with the life it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Data or a PRP list of a slot.
    Slot(u32),
    /// Entries of a submission queue.
    Entries(u16),
    /// A completion entry.
    Completion,
}

const EPOCH_MASK: u32 = 0x00ff_ffff;

impl Purpose {
    #[inline]
    pub(super) fn tag(self, epoch: u32) -> DmaTag {
        let (kind, index) = match self {
            Self::Slot(index) => (0, index),
            Self::Entries(queue) => (1, u32::from(queue)),
            Self::Completion => (2, 0),
        };
        DmaTag(kind << 56 | u64::from(epoch & EPOCH_MASK) << 32 | u64::from(index))
    }

    fn of(tag: DmaTag, epoch: u32) -> Option<Self> {
        if (tag.0 >> 32) as u32 & EPOCH_MASK != epoch & EPOCH_MASK {
            return None;
        }
        let index = tag.0 as u32;
        match tag.0 >> 56 {
            0 => Some(Self::Slot(index)),
            1 => u16::try_from(index).ok().map(Self::Entries),
            2 => Some(Self::Completion),
            _ => None,
        }
    }
}

/// Whether a slot goes on at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// Its phase says how.
    Again,
    /// Somebody will bring it.
    Parked,
    /// It lacks a buffer or a job; its phase is as before.
    Lacking,
}

impl Nvme {
    /// Takes a slot as far as it gets.
    pub(super) fn step(&mut self, index: u32, bus: &mut dyn Bus) {
        loop {
            if !self.running() {
                return;
            }
            let Some(slot) = self.slots.get(index) else { return };
            let flow = match slot.phase {
                Phase::Start if slot.queue == 0 => self.begin_admin(index, bus),
                Phase::Start => self.begin_io(index, bus),
                Phase::Move => self.move_data(index, bus),
                Phase::Map => self.map_pages(index, bus),
                Phase::Settle => self.settle(index, bus),
                Phase::Submit => self.submit(index),
                Phase::Free
                | Phase::List { .. }
                | Phase::Media
                | Phase::Timer
                | Phase::Full
                | Phase::Event
                | Phase::Delete { .. }
                | Phase::Drain => Flow::Parked,
            };
            match flow {
                Flow::Again => {}
                Flow::Parked => return,
                Flow::Lacking => {
                    self.counters.waits += 1;
                    self.waiting.push_back(index);
                    return;
                }
            }
        }
    }

    /// Starts the DMA of every range that is known.
    fn move_data(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        let tag = Purpose::Slot(index).tag(self.epoch);
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        loop {
            let before = slot.cursor;
            let (scratch, list) = (&self.scratch, slot.list);
            let step = slot.cursor.step(|at| list.map_or(0, |list| scratch.qword(list, at)));
            match step {
                Ok(Step::Range { iova, len }) => {
                    let access = if slot.to_guest { Access::READ } else { Access::WRITE };
                    let span = match slot.local {
                        Local::Image => {
                            self.image.and_then(|image| image.span(slot.offset + u64::from(slot.moved), len, access).ok())
                        }
                        Local::Buffer => slot.buffer.and_then(|buffer| self.scratch.span(buffer, slot.moved, len, access)),
                    };
                    let Some(span) = span else {
                        slot.status = Status::INTERNAL_ERROR;
                        break;
                    };
                    let progress = if slot.to_guest {
                        self.counters.bytes_to_guest += u64::from(len);
                        bus.dma_write(tag, iova, span)
                    } else {
                        self.counters.bytes_from_guest += u64::from(len);
                        bus.dma_read(tag, iova, span)
                    };
                    slot.moved += len;
                    self.call_bytes += u64::from(len);
                    match progress {
                        Ok(Progress::Done) => {}
                        Ok(Progress::Pending) => {
                            slot.outstanding += 1;
                            self.dmas += 1;
                        }
                        Err(_) => {
                            slot.status = Status::DATA_TRANSFER_ERROR;
                            break;
                        }
                    }
                }
                Ok(Step::Done) => break,
                Ok(Step::List { iova, entries }) => {
                    let Some(list) = slot.list.or_else(|| self.scratch.list()) else {
                        slot.cursor = before;
                        return Flow::Lacking;
                    };
                    slot.list = Some(list);
                    let Some(span) = self.scratch.span(list, 0, entries * 8, Access::WRITE) else {
                        slot.status = Status::INTERNAL_ERROR;
                        break;
                    };
                    match bus.dma_read(tag, iova, span) {
                        Ok(Progress::Done) => {}
                        Ok(Progress::Pending) => {
                            slot.outstanding += 1;
                            self.dmas += 1;
                            slot.phase = Phase::List { mapping: false };
                            return Flow::Parked;
                        }
                        Err(_) => {
                            slot.status = Status::DATA_TRANSFER_ERROR;
                            break;
                        }
                    }
                }
                Err(_) => {
                    slot.status = Status::PRP_OFFSET_INVALID;
                    break;
                }
            }
        }
        slot.phase = Phase::Settle;
        Flow::Again
    }

    /// After the last DMA was started: reads of the guest are awaited; writes are posted, and all that is posted later arrives later.
    fn settle(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let posted = slot.to_guest && slot.status.is_success();
        if slot.outstanding > 0 && !posted {
            return Flow::Parked;
        }
        if !slot.status.is_success() {
            return self.finish(index, bus);
        }
        match slot.then {
            Then::Complete => self.finish(index, bus),
            Then::Submit => {
                slot.then = Then::Complete;
                slot.phase = Phase::Submit;
                Flow::Again
            }
            Then::Deliver => {
                let page = 1 << self.registers.configuration.page_shift();
                slot.cursor = Cursor::new(slot.command.prp1, slot.command.prp2, slot.len, page);
                slot.local = Local::Buffer;
                slot.to_guest = true;
                slot.moved = 0;
                slot.then = Then::Complete;
                slot.phase = Phase::Move;
                Flow::Again
            }
            Then::Ranges => self.next_range(index),
        }
    }

    /// The end of a slot's work: buffers go back, the modelled latency is kept, the completion is posted.
    fn finish(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        self.release(index);
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        if slot.due.0 > 0 && slot.due > bus.now() {
            slot.phase = Phase::Timer;
            self.timers.push(Reverse((slot.due, index)));
            return Flow::Parked;
        }
        self.complete(index, bus);
        Flow::Parked
    }

    /// Gives back what a slot holds, except what a DMA still uses.
    pub(super) fn release(&mut self, index: u32) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        if let Some(mut job) = slot.job.take() {
            job.clear();
            self.jobs.push(job);
            self.released = true;
        }
        if slot.outstanding == 0 && (slot.list.is_some() || slot.buffer.is_some()) {
            for buffer in [slot.list.take(), slot.buffer.take()].into_iter().flatten() {
                self.scratch.release(buffer);
            }
            self.released = true;
        }
    }

    /// A pending DMA ended.
    pub(super) fn dma_ended(&mut self, tag: DmaTag, result: Result<(), DmaFault>, bus: &mut dyn Bus) {
        // Of an earlier life: its slot belongs to somebody else now.
        let Some(purpose) = Purpose::of(tag, self.epoch) else {
            return;
        };
        self.dmas = self.dmas.saturating_sub(1);
        match purpose {
            Purpose::Entries(queue) => self.entries_arrived(queue, result, bus),
            Purpose::Completion => {
                if let Err(fault) = result {
                    self.completion_fault(fault);
                }
            }
            Purpose::Slot(index) => self.slot_dma_ended(index, result, bus),
        }
        if self.life == Life::Resetting {
            self.finish_reset();
        }
    }

    fn slot_dma_ended(&mut self, index: u32, result: Result<(), DmaFault>, bus: &mut dyn Bus) {
        let running = self.running();
        let Some(slot) = self.slots.get_mut(index) else { return };
        slot.outstanding = slot.outstanding.saturating_sub(1);
        if result.is_err() {
            // A command that failed anyway promised nothing, and one whose entry is still to be posted can say so in it.
            let promised = slot.phase == Phase::Drain && slot.to_guest && slot.status.is_success();
            if matches!(slot.phase, Phase::Drain | Phase::Full | Phase::Timer) {
                self.counters.late_faults += 1;
            }
            if slot.phase != Phase::Drain {
                slot.status = Status::DATA_TRANSFER_ERROR;
            }
            if promised && running {
                // The entry that says success is out and cannot be taken back: the driver must trust nothing of this controller.
                tracing::error!(index, "data was lost after its command was completed: the controller stops until it is reset");
                self.fail();
                return;
            }
        }
        if slot.outstanding > 0 || !running {
            return;
        }
        match slot.phase {
            Phase::List { mapping } => {
                slot.phase = match (slot.status.is_success(), mapping) {
                    (false, _) => Phase::Settle,
                    (true, true) => Phase::Map,
                    (true, false) => Phase::Move,
                };
                self.step(index, bus);
            }
            Phase::Settle => self.step(index, bus),
            Phase::Drain => {
                self.release(index);
                self.slots.put_back(index);
                self.released = true;
            }
            Phase::Full | Phase::Timer => self.release(index),
            _ => {}
        }
    }

    /// Whether a poll would do something.
    pub(super) fn has_work(&self) -> bool {
        if self.media.busy() || self.raised_deliverable() != 0 {
            return true;
        }
        self.running()
            && (self.shutdown_flush && !self.jobs.is_empty()
                || self.released && !self.waiting.is_empty()
                || self.ready & 1 != 0 && !self.paused
                || self.ready != 0 && !self.paused && self.slots.available().saturating_sub(self.slots_reserved) > ADMIN_RESERVE)
    }

    /// All that goes on without a register access or an ended DMA; true where something was done.
    pub(super) fn background(&mut self, bus: &mut dyn Bus) -> bool {
        let mut worked = false;
        while let Some(job) = self.media.reap() {
            worked = true;
            self.job_done(job, bus);
            if self.call_bytes >= BYTES_PER_CALL {
                break;
            }
        }
        if self.life == Life::Resetting {
            self.finish_reset();
        }
        if !self.running() {
            return worked;
        }
        worked |= self.expire(bus);
        if self.released {
            worked |= self.retry_waiting(bus);
        }
        if self.shutdown_flush {
            self.start_shutdown_flush();
        }
        if self.ready != 0 {
            let before = self.counters.accepted;
            self.pump(bus);
            worked |= self.counters.accepted != before;
        }
        worked
    }

    fn expire(&mut self, bus: &mut dyn Bus) -> bool {
        if self.timers.is_empty() {
            return false;
        }
        let now = bus.now();
        let mut worked = false;
        while let Some(&Reverse((due, index))) = self.timers.peek() {
            if due > now || !self.running() {
                break;
            }
            self.timers.pop();
            // An abort may have completed it already, and the slot may be another command's.
            if self.slots.get(index).is_some_and(|slot| slot.phase == Phase::Timer && slot.due == due) {
                worked = true;
                self.complete(index, bus);
            }
        }
        worked
    }

    fn retry_waiting(&mut self, bus: &mut dyn Bus) -> bool {
        /// Slots that may lack something again before the rest waits for the next release.
        const DISAPPOINTMENTS: u32 = 8;
        self.released = false;
        let mut disappointed = 0;
        for _ in 0..self.waiting.len() {
            if self.call_bytes >= BYTES_PER_CALL || disappointed == DISAPPOINTMENTS {
                self.released |= self.call_bytes >= BYTES_PER_CALL;
                break;
            }
            let Some(index) = self.waiting.pop_front() else { break };
            let before = self.waiting.len();
            self.step(index, bus);
            disappointed += u32::from(self.waiting.len() > before);
        }
        true
    }
}

impl Slot {
    /// A refusal: no data moves, the completion says why.
    pub(super) const fn refuse(&mut self, status: Status) -> Flow {
        self.status = status;
        self.phase = Phase::Settle;
        self.then = Then::Complete;
        Flow::Again
    }

    /// Success with `result` in dword 0.
    pub(super) const fn answer(&mut self, result: u32) -> Flow {
        self.result = result;
        self.phase = Phase::Settle;
        self.then = Then::Complete;
        Flow::Again
    }

    /// Moves `len` bytes, then `then`.
    pub(super) const fn transfer(&mut self, local: Local, to_guest: bool, len: u32, page: u32, then: Then) -> Flow {
        self.local = local;
        self.to_guest = to_guest;
        self.len = len;
        self.moved = 0;
        self.cursor = Cursor::new(self.command.prp1, self.command.prp2, len, page);
        self.then = then;
        self.phase = Phase::Move;
        Flow::Again
    }
}
