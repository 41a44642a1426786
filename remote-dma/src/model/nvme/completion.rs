//! Completion entries and the interrupts that announce them: data first, then the entry, then one vector for all entries of a call.
//!
//! Command 7 of queue 3 is done: 16 bytes go to slot 9 of completion queue 3 with the phase in their last word, and when the call ends, vector 3
//! is raised once for slots 9 to 16. A queue without room keeps its commands in order until the driver moves its head.

use std::cmp::Reverse;

use super::command::Completion;
use super::engine::Purpose;
use super::slots::Phase;
use super::{Life, Nvme};
use crate::backend::{Bus, DmaFault, InterruptMode, Progress};

impl Nvme {
    /// Ends a command: its entry is posted, or waits for room.
    pub(super) fn complete(&mut self, index: u32, bus: &mut dyn Bus) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(submission) = self.submission.get(usize::from(slot.queue)) else {
            return;
        };
        let queue = submission.completions;
        let deleting = submission.deleter.is_some();
        let Some(completion) = self.completion.get_mut(usize::from(queue)) else {
            return;
        };
        if completion.waiting.is_none() && !completion.full() {
            self.post(index, bus);
        } else if deleting {
            // The deletion of a queue may end its commands without an entry (section 5.6): nobody makes room any more.
            self.drop_command(index, bus);
        } else {
            self.counters.queue_full += 1;
            slot.phase = Phase::Full;
            slot.next = None;
            match &mut completion.waiting {
                Some((_, last)) => {
                    let before = std::mem::replace(last, index);
                    if let Some(before) = self.slots.get_mut(before) {
                        before.next = Some(index);
                    }
                }
                none => *none = Some((index, index)),
            }
        }
    }

    /// Posts the entry of a command whose queue has room, and lets its slot go.
    fn post(&mut self, index: u32, bus: &mut dyn Bus) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let queue = slot.queue;
        let Some(submission) = self.submission.get_mut(usize::from(queue)) else {
            return;
        };
        let Some(completion) = self.completion.get_mut(usize::from(submission.completions)) else {
            return;
        };
        let (place, phase) = completion.push();
        let entry = Completion {
            result: slot.result,
            queue_head: submission.head as u16,
            queue,
            identifier: slot.command.identifier,
            status: slot.status,
        };
        submission.active = submission.active.saturating_sub(1);
        let raised = completion.vector.map_or(0, |vector| 1_u128 << vector);
        let failed = !slot.status.is_success();
        self.counters.completed += 1;
        if let Some(number) = slot.journaled.take().filter(|_| !failed) {
            self.journal.acknowledge(number);
        }
        match bus.dma_write_polled(Purpose::Completion.tag(self.epoch), place, &entry.encode(phase)) {
            Ok(Progress::Done) => {}
            Ok(Progress::Pending) => self.dmas += 1,
            Err(fault) => return self.completion_fault(fault),
        }
        self.raised |= raised;
        if failed {
            self.command_failed(index);
        }
        self.let_go(index);
        self.deletion_progress(queue, bus);
    }

    fn command_failed(&mut self, index: u32) {
        self.counters.errors += 1;
        if let Some(slot) = self.slots.get(index) {
            self.errors.record(slot.queue, &slot.command, slot.status);
        }
    }

    /// Ends a command without an entry.
    fn drop_command(&mut self, index: u32, bus: &mut dyn Bus) {
        let Some(slot) = self.slots.get(index) else { return };
        let queue = slot.queue;
        if let Some(submission) = self.submission.get_mut(usize::from(queue)) {
            submission.active = submission.active.saturating_sub(1);
        }
        self.counters.dropped += 1;
        self.let_go(index);
        self.deletion_progress(queue, bus);
    }

    fn let_go(&mut self, index: u32) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        if slot.outstanding > 0 {
            slot.phase = Phase::Drain;
        } else {
            self.slots.put_back(index);
        }
    }

    /// The driver made room in completion queue `queue`.
    pub(super) fn room_made(&mut self, queue: u16, bus: &mut dyn Bus) {
        loop {
            if !self.running() {
                return;
            }
            let Some(completion) = self.completion.get_mut(usize::from(queue)) else {
                return;
            };
            let Some((first, last)) = completion.waiting else { break };
            if completion.full() {
                return;
            }
            let next = self.slots.get(first).and_then(|slot| slot.next);
            completion.waiting = next.map(|next| (next, last));
            self.post(first, bus);
        }
        for index in 0..super::QUEUE_COUNT {
            if self
                .submission
                .get(usize::from(index))
                .is_some_and(|submission| submission.exists() && submission.completions == queue)
            {
                self.mark_ready(index);
            }
        }
    }

    /// A queue that is being deleted lost a command: with the last one, and no fetch under way, it is gone.
    pub(super) fn deletion_progress(&mut self, queue: u16, bus: &mut dyn Bus) {
        let Some(submission) = self.submission.get_mut(usize::from(queue)) else {
            return;
        };
        let Some(deleter) = submission.deleter else { return };
        if submission.active > 0 || submission.fetching > 0 {
            return;
        }
        let completions = submission.completions;
        *submission = super::SubmissionQueue::ABSENT;
        self.ready &= !(1 << queue);
        if let Some(completion) = self.completion.get_mut(usize::from(completions)) {
            completion.users = completion.users.saturating_sub(1);
        }
        self.complete(deleter, bus);
    }

    /// Commands of a queue to be deleted that only wait for room or for the modelled latency end now.
    pub(super) fn drop_parked(&mut self, queue: u16, bus: &mut dyn Bus) {
        let Some(submission) = self.submission.get(usize::from(queue)) else {
            return;
        };
        let Some(completion) = self.completion.get_mut(usize::from(submission.completions)) else {
            return;
        };
        // The chain is shared with other submission queues, whose commands stay in their order.
        let mut rest = completion.waiting.take().map(|(first, _)| first);
        let completions = submission.completions;
        while let Some(index) = rest {
            let Some(slot) = self.slots.get(index) else { break };
            rest = slot.next;
            if slot.queue == queue {
                self.drop_command(index, bus);
            } else {
                self.wait_for_room(completions, index);
            }
        }
        loop {
            let timed =
                self.slots.iter().find(|(_, slot)| slot.queue == queue && slot.phase == Phase::Timer).map(|(index, _)| index);
            let Some(index) = timed else { return };
            self.timers.retain(|Reverse((_, timed))| *timed != index);
            self.complete(index, bus);
        }
    }

    fn wait_for_room(&mut self, queue: u16, index: u32) {
        if let Some(slot) = self.slots.get_mut(index) {
            slot.next = None;
        }
        let Some(completion) = self.completion.get_mut(usize::from(queue)) else {
            return;
        };
        match &mut completion.waiting {
            Some((_, last)) => {
                let before = std::mem::replace(last, index);
                if let Some(before) = self.slots.get_mut(before) {
                    before.next = Some(index);
                }
            }
            none => *none = Some((index, index)),
        }
    }

    /// A completion queue that cannot be written: the driver can only be told by CSTS.CFS (section 9.5).
    pub(super) fn completion_fault(&mut self, fault: DmaFault) {
        if fault != DmaFault::Fenced {
            tracing::warn!(%fault, "a completion entry could not be written");
            self.fail();
        }
    }

    /// A submission queue that cannot be read: no command identifier is known, so CSTS.CFS again.
    pub(super) fn queue_fault(&mut self, queue: u16, fault: DmaFault) {
        if fault != DmaFault::Fenced {
            tracing::warn!(queue, %fault, "a submission queue could not be read");
            self.fail();
        }
    }

    /// Controller fatal status: nothing is processed until the driver resets.
    pub(super) fn fail(&mut self) {
        if self.life == Life::Ready || self.life == Life::Disabled {
            self.life = Life::Failed;
            self.registers.fatal = true;
            self.counters.fatal += 1;
        }
    }

    /// The vectors that may be announced at present; by pin, all of which the level is not yet made.
    pub(super) fn raised_deliverable(&self) -> u128 {
        match self.mode {
            _ if self.fenced => 0,
            InterruptMode::Msix | InterruptMode::Pin => self.raised,
            // INTMS masks MSI (section 3.1.3).
            InterruptMode::Msi(_) => self.raised & !u128::from(self.registers.masked),
        }
    }

    /// Tells the driver what this call completed: one message a vector, or the pin's level.
    #[inline]
    pub(super) fn announce(&mut self, bus: &mut dyn Bus) {
        if self.fenced {
            return;
        }
        if self.mode == InterruptMode::Pin {
            self.announce_by_pin(bus);
            return;
        }
        let mut deliverable = self.raised_deliverable();
        self.raised &= !deliverable;
        while deliverable != 0 {
            let vector = deliverable.trailing_zeros() as u16;
            deliverable &= deliverable - 1;
            self.counters.interrupts += 1;
            bus.interrupt(match self.mode {
                InterruptMode::Msi(count) if vector >= u16::from(count) => 0,
                _ => vector,
            });
        }
    }

    fn announce_by_pin(&mut self, bus: &mut dyn Bus) {
        self.raised = 0;
        let asserted = self.completion.iter().any(|completion| {
            completion.exists()
                && completion
                    .vector
                    .is_some_and(|vector| completion.unread() > 0 && self.registers.masked >> (vector & 31) & 1 == 0)
        });
        if asserted != self.pin {
            self.pin = asserted;
            self.counters.interrupts += 1;
            bus.set_pin(asserted);
        }
    }
}
