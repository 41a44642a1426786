//! From submission queues to slots: which queue is next, how many entries one DMA brings, what happens when they arrive.
//!
//! Queue 3 has slots 9 to 16 written: one DMA of 512 bytes brings all eight, each is copied once and begun; while a fetch is pending, what
//! the driver adds meanwhile goes with the next one.

use super::command;
use super::engine::Purpose;
use super::scratch::FETCH_ENTRIES;
use super::slots::ADMIN_RESERVE;
use super::{BYTES_PER_CALL, COMMANDS_PER_CALL, Nvme};
use crate::backend::{Bus, DmaFault, Progress};

impl Nvme {
    /// Fetches and begins what queues hold, fairly, as far as this call may.
    pub(super) fn pump(&mut self, bus: &mut dyn Bus) {
        let mut left = COMMANDS_PER_CALL;
        while left > 0 && self.call_bytes < BYTES_PER_CALL && self.running() && !self.paused {
            let Some(queue) = self.next_queue() else { return };
            let fetched = self.fetch(queue, left, bus);
            if fetched == 0 {
                return;
            }
            left = left.saturating_sub(fetched);
        }
    }

    /// The next queue with commands: the admin queue first, so that IO can never starve it, then round robin (section 4.13.1).
    fn next_queue(&mut self) -> Option<u16> {
        if self.ready == 0 {
            return None;
        }
        if self.ready & 1 != 0 {
            return Some(0);
        }
        let ahead = self.ready & (u128::MAX << self.turn);
        let queue = if ahead == 0 { self.ready } else { ahead }.trailing_zeros() as u16;
        self.turn = (queue + 1) % super::QUEUE_COUNT;
        Some(queue)
    }

    /// Starts one fetch of `queue`; answers how many commands it is for, 0 where no slot is free.
    fn fetch(&mut self, queue: u16, limit: u32, bus: &mut dyn Bus) -> u32 {
        let free = self.slots.available().saturating_sub(self.slots_reserved);
        let free = if queue == 0 { free } else { free.saturating_sub(ADMIN_RESERVE) };
        let Some(submission) = self.submission.get_mut(usize::from(queue)) else {
            return 0;
        };
        let blocked =
            self.completion.get(usize::from(submission.completions)).is_none_or(|completion| completion.waiting.is_some());
        let pending = submission.contiguous();
        if !submission.exists() || pending == 0 || blocked || submission.deleter.is_some() {
            self.ready &= !(1 << queue);
            // Not a command, but another queue may have one: the caller goes on.
            return 1;
        }
        let count = pending.min(FETCH_ENTRIES).min(limit).min(free);
        if count == 0 {
            return 0;
        }
        let Some(span) = self.scratch.entries_span(queue, count) else {
            return 0;
        };
        match bus.dma_read(Purpose::Entries(queue).tag(self.epoch), submission.head_address(), span) {
            Ok(Progress::Done) => self.fetched(queue, count, bus),
            Ok(Progress::Pending) => {
                submission.fetching = count;
                self.ready &= !(1 << queue);
                self.slots_reserved += count;
                self.dmas += 1;
            }
            Err(fault) => self.queue_fault(queue, fault),
        }
        count
    }

    /// `count` entries of `queue` have arrived: takes a copy of each and begins it.
    fn fetched(&mut self, queue: u16, count: u32, bus: &mut dyn Bus) {
        let Some(submission) = self.submission.get_mut(usize::from(queue)) else {
            return;
        };
        submission.consume(count);
        submission.active += count;
        self.mark_ready(queue);
        self.counters.accepted += u64::from(count);
        for index in 0..count {
            // The buffer has room for all entries of a fetch, and the slots were counted before.
            let Ok(entry) = self.scratch.entry(queue, index) else { return };
            let Some(slot) = self.slots.take(queue, command::parse(&entry)) else {
                return;
            };
            if self.call_bytes < BYTES_PER_CALL && self.running() {
                self.step(slot, bus);
            } else {
                self.counters.waits += 1;
                self.waiting.push_back(slot);
                self.released = true;
            }
        }
    }

    /// Sets or clears the bit of `queue`.
    pub(super) fn mark_ready(&mut self, queue: u16) {
        let wants = self
            .submission
            .get(usize::from(queue))
            .is_some_and(|submission| submission.exists() && submission.fetching == 0 && submission.pending() > 0);
        if wants {
            self.ready |= 1 << queue;
        } else {
            self.ready &= !(1 << queue);
        }
    }

    /// The DMA of entries ended.
    pub(super) fn entries_arrived(&mut self, queue: u16, result: Result<(), DmaFault>, bus: &mut dyn Bus) {
        let running = self.running();
        let Some(submission) = self.submission.get_mut(usize::from(queue)) else {
            return;
        };
        let count = std::mem::take(&mut submission.fetching);
        self.slots_reserved -= count;
        match result {
            Err(fault) => self.queue_fault(queue, fault),
            Ok(()) if !running => {}
            Ok(()) if submission.deleter.is_some() => self.deletion_progress(queue, bus),
            Ok(()) => {
                self.fetched(queue, count, bus);
                self.pump(bus);
            }
        }
    }
}
