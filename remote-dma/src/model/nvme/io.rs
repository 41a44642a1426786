//! IO commands (NVMe 1.4, section 6): judged against the namespace, then moved straight between guest and image or made a job.
//!
//! A read of blocks 8 to 15 from memory is a DMA from byte 4,096 of the image; from a file it is a `preadv` on the guest's own page, or, where
//! that cannot be mapped, on a buffer from which DMA goes on.

use farbus_transport::Access;

use super::command::{Command, NSID_ALL, Status, io};
use super::control::NO_SLOT;
use super::engine::{Flow, Purpose};
use super::media::{BLOCK_BYTES, Job, JobError, JobKind};
use super::prp::{Cursor, Step};
use super::registers::Shutdown;
use super::slots::{Local, Phase, Then};
use super::{Life, MAX_TRANSFER_BYTES, Nvme};
use crate::address::Iova;
use crate::backend::{Bus, Progress};

/// Bytes of one range of dataset management (figure 363).
const RANGE_BYTES: u32 = 16;

impl Nvme {
    #[inline]
    pub(super) fn begin_io(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        let page = self.page_bytes();
        let in_memory = self.image.is_some();
        let size = self.media.len();
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let command = slot.command;
        let judged = judge(&command, size, self.options.read_only);
        let (offset, len) = match judged {
            Ok(judged) => judged,
            Err(status) => return slot.refuse(status),
        };
        slot.offset = offset;
        // A command that lacked a buffer comes here again, with its time running.
        if !self.options.latency.is_zero() && slot.due.0 == 0 {
            slot.due = bus.now() + self.options.latency;
        }
        let flow = match command.opcode {
            io::READ | io::WRITE if in_memory => {
                let to_guest = command.opcode == io::READ;
                slot.transfer(Local::Image, to_guest, len, page, Then::Complete)
            }
            io::READ | io::WRITE => self.begin_file_io(index, len, bus),
            io::COMPARE => {
                let Some(buffer) = self.scratch.buffer(len) else {
                    return Flow::Lacking;
                };
                slot.buffer = Some(buffer);
                slot.transfer(Local::Buffer, false, len, page, Then::Submit)
            }
            io::FLUSH if in_memory => slot.answer(0),
            io::FLUSH | io::WRITE_ZEROES => {
                slot.phase = Phase::Submit;
                Flow::Again
            }
            // Attribute deallocate (dword 11 bit 2); the others are hints that change nothing.
            io::DATASET_MANAGEMENT if command.dword11 & 4 == 0 => slot.answer(0),
            io::DATASET_MANAGEMENT => {
                let bytes = ((command.dword10 & 0xff) + 1) * RANGE_BYTES;
                let Some(buffer) = self.scratch.buffer(bytes) else {
                    return Flow::Lacking;
                };
                slot.buffer = Some(buffer);
                slot.transfer(Local::Buffer, false, bytes, page, Then::Ranges)
            }
            _ => slot.refuse(Status::INVALID_OPCODE),
        };
        if flow != Flow::Lacking {
            if matches!(command.opcode, io::WRITE | io::WRITE_ZEROES)
                && let Some(slot) = self.slots.get_mut(index)
            {
                slot.journaled = Some(self.journal.begin(command.first_lba(), command.block_count() as u32));
            }
            match command.opcode {
                io::READ => self.counters.reads += 1,
                io::WRITE => self.counters.writes += 1,
                io::FLUSH => self.counters.flushes += 1,
                _ => self.counters.other_io += 1,
            }
        }
        flow
    }

    /// Asks with the first page whether the guest's memory can be used directly, before any list is fetched.
    fn begin_file_io(&mut self, index: u32, len: u32, bus: &mut dyn Bus) -> Flow {
        let page = self.page_bytes();
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let command = slot.command;
        let to_guest = command.opcode == io::READ;
        let access = if to_guest { Access::WRITE } else { Access::READ };
        let room = u64::from(page) - command.prp1 % u64::from(page);
        let probe = bus.map(Iova(command.prp1), room.min(u64::from(len)), access);
        match probe {
            Err(_) => slot.refuse(Status::DATA_TRANSFER_ERROR),
            Ok(Some(_)) => {
                let Some(job) = self.jobs.pop() else { return Flow::Lacking };
                slot.job = Some(job);
                slot.direct = true;
                slot.to_guest = to_guest;
                slot.len = len;
                slot.cursor = Cursor::new(command.prp1, command.prp2, len, page);
                slot.phase = Phase::Map;
                Flow::Again
            }
            Ok(None) => self.begin_bounce(index, len),
        }
    }

    /// As [`Nvme::begin_file_io`], with a buffer between.
    fn begin_bounce(&mut self, index: u32, len: u32) -> Flow {
        let page = self.page_bytes();
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let Some(buffer) = self.scratch.buffer(len) else {
            return Flow::Lacking;
        };
        slot.buffer = Some(buffer);
        slot.direct = false;
        slot.len = len;
        if slot.command.opcode == io::WRITE {
            return slot.transfer(Local::Buffer, false, len, page, Then::Submit);
        }
        slot.then = Then::Deliver;
        slot.phase = Phase::Submit;
        Flow::Again
    }

    /// Maps the guest's pages for a job, list by list.
    pub(super) fn map_pages(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        let tag = Purpose::Slot(index).tag(self.epoch);
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let access = if slot.to_guest { Access::WRITE } else { Access::READ };
        loop {
            let before = slot.cursor;
            let (scratch, list) = (&self.scratch, slot.list);
            match slot.cursor.step(|at| list.map_or(0, |list| scratch.qword(list, at))) {
                Ok(Step::Range { iova, len }) => match (bus.map(iova, u64::from(len), access), &mut slot.job) {
                    (Ok(Some(mapped)), Some(job)) => {
                        job.buffers.push(mapped);
                        job.guest_bytes += u64::from(len);
                    }
                    (Ok(None), _) => {
                        // Part of it cannot be mapped: all of it goes through a buffer. The walk starts again.
                        let len = slot.len;
                        if let Some(mut job) = slot.job.take() {
                            job.clear();
                            self.jobs.push(job);
                        }
                        let flow = self.begin_bounce(index, len);
                        if let (Flow::Lacking, Some(slot)) = (flow, self.slots.get_mut(index)) {
                            slot.phase = Phase::Start;
                        }
                        return flow;
                    }
                    _ => return slot.refuse(Status::DATA_TRANSFER_ERROR),
                },
                Ok(Step::Done) => {
                    slot.phase = Phase::Submit;
                    return Flow::Again;
                }
                Ok(Step::List { iova, entries }) => {
                    let Some(list) = slot.list.or_else(|| self.scratch.list()) else {
                        slot.cursor = before;
                        return Flow::Lacking;
                    };
                    slot.list = Some(list);
                    let Some(span) = self.scratch.span(list, 0, entries * 8, Access::WRITE) else {
                        return slot.refuse(Status::INTERNAL_ERROR);
                    };
                    match bus.dma_read(tag, iova, span) {
                        Ok(Progress::Done) => {}
                        Ok(Progress::Pending) => {
                            slot.outstanding += 1;
                            self.dmas += 1;
                            slot.phase = Phase::List { mapping: true };
                            return Flow::Parked;
                        }
                        Err(_) => return slot.refuse(Status::DATA_TRANSFER_ERROR),
                    }
                }
                Err(_) => return slot.refuse(Status::PRP_OFFSET_INVALID),
            }
        }
    }

    /// The next range of a dataset management command that has any blocks.
    pub(super) fn next_range(&mut self, index: u32) -> Flow {
        let blocks = self.media.len() / BLOCK_BYTES;
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let count = (slot.command.dword10 & 0xff) + 1;
        while slot.ranges_done < count {
            let mut range = [0; RANGE_BYTES as usize];
            let read = slot.buffer.map(|buffer| self.scratch.read(buffer, slot.ranges_done * RANGE_BYTES, &mut range));
            let Some(Ok(())) = read else {
                return slot.refuse(Status::INTERNAL_ERROR);
            };
            let [_, _, _, _, a, b, c, d, first @ ..] = range;
            let (len, first) = (u64::from(u32::from_le_bytes([a, b, c, d])), u64::from_le_bytes(first));
            if first.checked_add(len).is_none_or(|end| end > blocks) {
                return slot.refuse(Status::LBA_OUT_OF_RANGE);
            }
            slot.ranges_done += 1;
            if len > 0 {
                // Each range is a write of its own in the journal; that this one begins says that the one before is done.
                if let Some(before) = slot.journaled.replace(self.journal.begin(first, len as u32)) {
                    self.journal.acknowledge(before);
                }
                slot.offset = first * BLOCK_BYTES;
                slot.then = Then::Ranges;
                slot.phase = Phase::Submit;
                return Flow::Again;
            }
        }
        slot.answer(0)
    }

    /// Hands a job to the media.
    pub(super) fn submit(&mut self, index: u32) -> Flow {
        let durable_writes = self.features.write_cache_present && !self.features.write_cache;
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let Some(mut job) = slot.job.take().or_else(|| self.jobs.pop()) else {
            return Flow::Lacking;
        };
        let command = slot.command;
        let durable = durable_writes || command.force_unit_access();
        (job.kind, job.len) = match command.opcode {
            io::READ => (JobKind::Read, u64::from(slot.len)),
            io::WRITE => (JobKind::Write { durable }, u64::from(slot.len)),
            io::COMPARE => (JobKind::Compare, u64::from(slot.len)),
            // DEAC, dword 12 bit 25.
            io::WRITE_ZEROES => {
                let deallocate = command.dword12 & 1 << 25 != 0;
                (JobKind::Zero { deallocate, durable }, command.block_count() * BLOCK_BYTES)
            }
            io::DATASET_MANAGEMENT => {
                let blocks = self.range_blocks(index);
                let kind = JobKind::Zero { deallocate: true, durable: durable_writes };
                (kind, blocks * BLOCK_BYTES)
            }
            _ => (JobKind::Flush, 0),
        };
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        job.slot = index;
        job.offset = slot.offset;
        if matches!(command.opcode, io::READ | io::WRITE | io::COMPARE) && !slot.direct {
            let mapped = slot.buffer.map(|buffer| self.scratch.mapped(buffer, slot.len));
            let Some(Ok(mapped)) = mapped else {
                self.jobs.push(job);
                return slot.refuse(Status::INTERNAL_ERROR);
            };
            job.buffers.push(mapped.into());
        }
        slot.phase = Phase::Media;
        if slot.direct {
            self.counters.direct_jobs += 1;
        } else {
            self.counters.buffered_jobs += 1;
        }
        self.start_job(job);
        Flow::Parked
    }

    /// Blocks of the range that was judged last.
    fn range_blocks(&self, index: u32) -> u64 {
        let Some(slot) = self.slots.get(index) else { return 0 };
        let mut bytes = [0; 4];
        let at = slot.ranges_done.saturating_sub(1) * RANGE_BYTES + 4;
        match slot.buffer.map(|buffer| self.scratch.read(buffer, at, &mut bytes)) {
            Some(Ok(())) => u64::from(u32::from_le_bytes(bytes)),
            _ => 0,
        }
    }

    pub(super) fn start_job(&mut self, mut job: Box<Job>) {
        job.epoch = self.epoch;
        job.outcome = None;
        self.jobs_running += 1;
        self.media.submit(job);
    }

    /// A job came back.
    pub(super) fn job_done(&mut self, mut job: Box<Job>, bus: &mut dyn Bus) {
        self.jobs_running = self.jobs_running.saturating_sub(1);
        let (index, epoch, outcome, kind) = (job.slot, job.epoch, job.outcome, job.kind);
        self.call_bytes += job.guest_bytes;
        match kind {
            JobKind::Read => self.counters.bytes_to_guest += job.guest_bytes,
            JobKind::Write { .. } => self.counters.bytes_from_guest += job.guest_bytes,
            _ => {}
        }
        job.clear();
        self.jobs.push(job);
        self.released = true;
        if epoch != self.epoch || !self.running() {
            return;
        }
        if index == NO_SLOT {
            if self.registers.shutdown == Shutdown::Occurring {
                self.registers.shutdown = Shutdown::Complete;
            }
            if outcome.is_some() {
                // The driver must not power off in the belief that its writes are safe.
                self.fail();
            }
            return;
        }
        let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.phase == Phase::Media) else {
            return;
        };
        if let Some(error) = outcome {
            slot.status = match (error, kind) {
                (JobError::Different, _) => Status::COMPARE_FAILURE,
                (JobError::NoSpace, _) => Status::CAPACITY_EXCEEDED,
                (JobError::Failed, JobKind::Read | JobKind::Compare) => Status::UNRECOVERED_READ_ERROR,
                (JobError::Failed, _) => Status::WRITE_FAULT,
            };
        }
        slot.phase = Phase::Settle;
        self.step(index, bus);
    }

    /// Takes back the jobs that no worker has begun.
    pub(super) fn cancel_jobs(&mut self) {
        while let Some(mut job) = self.media.cancel() {
            self.jobs_running = self.jobs_running.saturating_sub(1);
            job.clear();
            self.jobs.push(job);
        }
    }

    /// Takes back the jobs that are done, for a controller that is fenced.
    pub(super) fn reap_without_effect(&mut self) {
        while let Some(mut job) = self.media.reap() {
            self.jobs_running = self.jobs_running.saturating_sub(1);
            job.clear();
            self.jobs.push(job);
        }
    }

    /// Waits until no worker is at work: only where the guest's memory is about to go away.
    pub(super) fn await_media(&mut self) {
        self.cancel_jobs();
        self.reap_without_effect();
        while self.jobs_running > 0 {
            if self.media.arm()
                && let Some(wake) = self.media.wake_fd()
            {
                let mut ready = [rustix::event::PollFd::new(&wake, rustix::event::PollFlags::IN)];
                // Interrupted or not: the loop looks again.
                let _woken = rustix::event::poll(&mut ready, None);
            }
            self.reap_without_effect();
        }
        debug_assert!(self.life != Life::Ready || self.fenced);
    }
}

/// Checks what can be checked without the guest's memory; first byte and bytes to move.
#[inline]
fn judge(command: &Command, size: u64, read_only: bool) -> Result<(u64, u32), Status> {
    let known =
        matches!(command.opcode, io::READ | io::WRITE | io::COMPARE | io::FLUSH | io::WRITE_ZEROES | io::DATASET_MANAGEMENT);
    if !known {
        return Err(Status::INVALID_OPCODE);
    }
    if command.unsupported_flags() {
        return Err(Status::INVALID_FIELD);
    }
    let everywhere = command.opcode == io::FLUSH && command.namespace == NSID_ALL;
    if command.namespace != 1 && !everywhere {
        return Err(Status::INVALID_NAMESPACE);
    }
    if read_only && matches!(command.opcode, io::WRITE | io::WRITE_ZEROES | io::DATASET_MANAGEMENT) {
        return Err(Status::WRITE_PROTECTED);
    }
    if matches!(command.opcode, io::FLUSH | io::DATASET_MANAGEMENT) {
        return Ok((0, 0));
    }
    let bytes = command.block_count() * BLOCK_BYTES;
    // MDTS does not bound write zeroes, which moves no data (section 6.16).
    if command.opcode != io::WRITE_ZEROES && bytes > u64::from(MAX_TRANSFER_BYTES) {
        return Err(Status::INVALID_FIELD);
    }
    let (first, blocks) = (command.first_lba(), size / BLOCK_BYTES);
    if first.checked_add(command.block_count()).is_none_or(|end| end > blocks) {
        return Err(Status::LBA_OUT_OF_RANGE);
    }
    Ok((first * BLOCK_BYTES, bytes as u32))
}
