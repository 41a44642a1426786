//! Admin commands (NVMe 1.4, section 5): queues come and go, pages of data are answered from a buffer.
//!
//! Create I/O Submission Queue 3 with 1,024 entries at 0x1_0450_0000 for completion queue 3 checks every field in the order of the
//! specification, then the queue's doorbell at BAR0 + 0x1018 has a meaning.

use super::command::{Status, admin};
use super::engine::Flow;
use super::queues::{CompletionQueue, SubmissionQueue};
use super::registers::MAX_QUEUE_ENTRIES;
use super::slots::{Local, Phase, Then};
use super::{MAX_TRANSFER_BYTES, Nvme, QUEUE_COUNT, VECTORS};
use crate::address::Iova;
use crate::backend::Bus;

/// Bytes of an Identify structure and of the longest log page.
pub(super) const PAGE_BYTES: usize = 4096;

impl Nvme {
    pub(super) fn begin_admin(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let command = slot.command;
        if command.unsupported_flags() {
            return slot.refuse(Status::INVALID_FIELD);
        }
        let flow = match command.opcode {
            admin::IDENTIFY => self.identify(index),
            admin::LOG_PAGE => self.log_page(index, bus),
            admin::FEATURES => self.read_feature(index),
            admin::SET_FEATURES => self.set_feature(index, bus),
            admin::CREATE_COMPLETION_QUEUE => self.create_completion_queue(index),
            admin::CREATE_SUBMISSION_QUEUE => self.create_submission_queue(index),
            admin::DELETE_COMPLETION_QUEUE => self.delete_completion_queue(index),
            admin::DELETE_SUBMISSION_QUEUE => self.delete_submission_queue(index, bus),
            admin::ABORT => self.abort(index, bus),
            admin::EVENT_REQUEST => self.request_event(index, bus),
            _ => slot.refuse(Status::INVALID_OPCODE),
        };
        // A command that lacks a buffer is begun again.
        self.counters.admin += u64::from(flow != Flow::Lacking);
        flow
    }

    /// Sends the first `len` bytes of `page`, and zeroes behind it.
    pub(super) fn reply(&mut self, index: u32, page: &[u8; PAGE_BYTES], len: u32) -> Flow {
        let page_bytes = self.page_bytes();
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        if len > MAX_TRANSFER_BYTES {
            return slot.refuse(Status::INVALID_FIELD);
        }
        let Some(buffer) = self.scratch.buffer(len) else {
            return Flow::Lacking;
        };
        slot.buffer = Some(buffer);
        let mut at = 0;
        while at < len {
            let part = (len - at).min(PAGE_BYTES as u32);
            let bytes = if at == 0 { page } else { &[0; PAGE_BYTES] };
            if self
                .scratch
                .write(buffer, at, bytes.get(..part as usize).unwrap_or_default())
                .is_err()
            {
                return slot.refuse(Status::INTERNAL_ERROR);
            }
            at += part;
        }
        slot.transfer(Local::Buffer, true, len, page_bytes, Then::Complete)
    }

    /// Section 5.3.
    fn create_completion_queue(&mut self, index: u32) -> Flow {
        let page = self.page_bytes();
        let entry_shift = self.registers.configuration.completion_entry_shift();
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let command = slot.command;
        let (queue, last) = ((command.dword10 & 0xffff) as u16, command.dword10 >> 16);
        let (contiguous, interrupts, vector) = (
            command.dword11 & 1 != 0,
            command.dword11 & 2 != 0,
            (command.dword11 >> 16) as u16,
        );
        let Some(completion) = self
            .completion
            .get_mut(usize::from(queue))
            .filter(|completion| queue != 0 && !completion.exists())
        else {
            return slot.refuse(Status::INVALID_QUEUE_IDENTIFIER);
        };
        if let Err(status) = check_queue(last, entry_shift, 4, contiguous, command.prp1, page) {
            return slot.refuse(status);
        }
        if vector >= VECTORS {
            return slot.refuse(Status::INVALID_INTERRUPT_VECTOR);
        }
        *completion = CompletionQueue::new(Iova(command.prp1), last + 1, interrupts.then_some(vector));
        slot.answer(0)
    }

    /// Section 5.4.
    fn create_submission_queue(&mut self, index: u32) -> Flow {
        let page = self.page_bytes();
        let entry_shift = self.registers.configuration.submission_entry_shift();
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let command = slot.command;
        let (queue, last) = ((command.dword10 & 0xffff) as u16, command.dword10 >> 16);
        let (contiguous, completions) = (command.dword11 & 1 != 0, (command.dword11 >> 16) as u16);
        let Some(submission) = self
            .submission
            .get_mut(usize::from(queue))
            .filter(|submission| queue != 0 && !submission.exists())
        else {
            return slot.refuse(Status::INVALID_QUEUE_IDENTIFIER);
        };
        if completions == 0 || completions >= QUEUE_COUNT {
            return slot.refuse(Status::INVALID_QUEUE_IDENTIFIER);
        }
        let Some(completion) = self
            .completion
            .get_mut(usize::from(completions))
            .filter(|completion| completion.exists())
        else {
            return slot.refuse(Status::COMPLETION_QUEUE_INVALID);
        };
        if let Err(status) = check_queue(last, entry_shift, 6, contiguous, command.prp1, page) {
            return slot.refuse(status);
        }
        completion.users += 1;
        *submission = SubmissionQueue::new(Iova(command.prp1), last + 1, completions);
        slot.answer(0)
    }

    /// Section 5.5.
    fn delete_completion_queue(&mut self, index: u32) -> Flow {
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let queue = (slot.command.dword10 & 0xffff) as u16;
        let Some(completion) = self
            .completion
            .get_mut(usize::from(queue))
            .filter(|completion| queue != 0 && completion.exists())
        else {
            return slot.refuse(Status::INVALID_QUEUE_IDENTIFIER);
        };
        if completion.users > 0 {
            return slot.refuse(Status::INVALID_QUEUE_DELETION);
        }
        *completion = CompletionQueue::ABSENT;
        slot.answer(0)
    }

    /// Section 5.6: done when the last command of the queue is.
    fn delete_submission_queue(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let queue = (slot.command.dword10 & 0xffff) as u16;
        let Some(submission) = self
            .submission
            .get_mut(usize::from(queue))
            .filter(|submission| queue != 0 && submission.exists() && submission.deleter.is_none())
        else {
            return slot.refuse(Status::INVALID_QUEUE_IDENTIFIER);
        };
        submission.deleter = Some(index);
        slot.phase = Phase::Delete { queue };
        self.drop_parked(queue, bus);
        self.deletion_progress(queue, bus);
        Flow::Parked
    }

    /// Section 5.1: bit 0 of the answer is 0 where the command was aborted. Commands whose data is on its way are not.
    fn abort(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        let Some(slot) = self.slots.get(index) else {
            return Flow::Parked;
        };
        let wanted = slot.command.dword10;
        let (queue, identifier) = ((wanted & 0xffff) as u16, (wanted >> 16) as u16);
        let victim = self
            .slots
            .iter()
            .find(|(other, slot)| {
                let parked = matches!(slot.phase, Phase::Event | Phase::Timer);
                *other != index && parked && slot.queue == queue && slot.command.identifier == identifier
            })
            .map(|(other, _)| other);
        if let Some(victim) = victim {
            self.withdraw_event_request(victim);
            self.timers.retain(|std::cmp::Reverse((_, timed))| *timed != victim);
            if let Some(slot) = self.slots.get_mut(victim) {
                slot.status = Status::ABORT_REQUESTED;
            }
            self.complete(victim, bus);
        }
        match self.slots.get_mut(index) {
            Some(slot) => slot.answer(u32::from(victim.is_none())),
            None => Flow::Parked,
        }
    }
}

/// What both kinds of queue have in common.
fn check_queue(last: u32, entry_shift: u32, expected_shift: u32, contiguous: bool, base: u64, page: u32) -> Result<(), Status> {
    // Entry sizes that were never set, or that nobody has (section 3.1.5, IOSQES and IOCQES).
    if last == 0 || last >= MAX_QUEUE_ENTRIES || entry_shift != expected_shift {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    // CAP.CQR: queues are contiguous.
    if !contiguous {
        return Err(Status::INVALID_FIELD);
    }
    if !base.is_multiple_of(u64::from(page)) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    // Slots are addressed without further checks: none may wrap around.
    if base.checked_add(u64::from(last + 1) << expected_shift).is_none() {
        return Err(Status::INVALID_FIELD);
    }
    Ok(())
}
