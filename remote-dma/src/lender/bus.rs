//! The bus a device sees at the lender: DMA as one-sided operations on the borrower's memory, interrupts as messages behind them.
//!
//! `dma_write` of 4 KiB at iova 0x2_3f00_1000 finds its window, posts one write, and, where the peer's memory is mapped, marks the page in the
//! dirty log before anything can announce it. What cannot go directly (no descriptor, not proven, two windows of unlike kind) is mediated.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use farbus_transport::{
    Access, CloseReason, Events, Fabric, Grant, LocalRegion, LocalSpan, Mapped, Memory, Nanos, Op, OpId, RegisterError, Signal,
};

use super::InUse;
use super::mediation::{Chunk, ChunkKind, Mediator};
use super::windows::Windows;
use crate::address::Iova;
use crate::attachment::Ticket;
use crate::backend::{AttachError, Bus, DmaFault, DmaTag, MAX_POLLED_WRITE, Progress};
use crate::endpoint::Endpoint;
use crate::message::{Outcome, ToBorrower};

/// What a session did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Register reads served.
    pub bar_reads: u64,
    /// Register writes served.
    pub bar_writes: u64,
    /// DMA reads and writes that went directly.
    pub direct_dma: u64,
    /// Bytes of those.
    pub direct_bytes: u64,
    /// Pieces of DMA that went through the guest's side.
    pub mediated: u64,
    /// DMA that was refused.
    pub faults: u64,
    /// Interrupts sent.
    pub interrupts: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// A DMA of several operations or mediations.
struct Pending {
    tag: DmaTag,
    left: u32,
    fault: Option<DmaFault>,
    generation: u32,
    /// Keeps an unmap waiting while the fabric may still touch guest memory; mediated DMA never does.
    in_use: Option<InUse>,
}

pub(super) struct LenderBus<F> {
    link: Endpoint<F>,
    now: Nanos,
    windows: Windows,
    mediator: Mediator,
    bus_master: bool,
    pending: Vec<Option<Pending>>,
    free: Vec<u32>,
    generation: u32,
    finished: VecDeque<(DmaTag, Result<(), DmaFault>)>,
    fault: Option<CloseReason>,
    pub(super) counters: Counters,
}

impl<F: Fabric> LenderBus<F> {
    pub(super) fn new(mut fabric: F) -> Result<Self, AttachError> {
        let mediator = Mediator::new(&mut fabric)?;
        // As many operations as the queue holds: direct DMA that is under way never makes these grow.
        let depth = fabric.limits().queue_depth as usize;
        let mut bus = Self {
            link: Endpoint::new(fabric),
            now: Nanos::now(),
            windows: Windows::new(),
            mediator,
            bus_master: false,
            pending: Vec::with_capacity(depth),
            free: Vec::with_capacity(depth),
            generation: 0,
            finished: VecDeque::with_capacity(depth),
            fault: None,
            counters: Counters::default(),
        };
        let staging = bus.mediator.fetch_grant();
        bus.post_message(ToBorrower::Staging(staging));
        bus.flush();
        Ok(bus)
    }

    pub(super) fn set_now(&mut self, now: Nanos) {
        self.now = now;
    }

    pub(super) fn poll(&mut self, events: &mut Events) {
        self.link.poll(self.now, events);
    }

    pub(super) fn flush(&mut self) {
        self.link.flush();
    }

    pub(super) fn arm(&mut self) -> bool {
        self.finished.is_empty() && self.link.arm()
    }

    pub(super) fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.link.wake_fd()
    }

    /// Says goodbye.
    pub(super) fn close(&mut self) {
        self.link.close();
    }

    /// Carries out no DMA and sends nothing from now on.
    pub(super) fn refuse(&mut self) {
        self.link.refuse();
    }

    pub(super) fn fault(&mut self) -> Option<CloseReason> {
        self.fault.take().or_else(|| self.link.stalled())
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    pub(super) fn set_bus_master(&mut self, enabled: bool) {
        self.bus_master = enabled;
    }

    pub(super) fn offer(&mut self, memory: Grant, dirty: Grant, proven: bool) -> Outcome {
        self.windows.offer(&mut self.link.fabric, memory, dirty, proven).unwrap_or_else(|missing| {
            tracing::error!(%missing, "the borrower announced memory that it did not deliver");
            self.fault = Some(CloseReason::Protocol("memory that was announced and not delivered"));
            Outcome::Grant
        })
    }

    pub(super) fn map_window(&mut self, iova: Iova, len: u64, key: Option<u64>, offset: u64, access: Access) -> Outcome {
        self.windows.map(iova, len, key, offset, access)
    }

    pub(super) fn unmap_windows(&mut self, iova: Iova, len: u64) -> Result<Weak<()>, Outcome> {
        let in_use = self.windows.unmap(iova, len)?;
        // What was asked of the guest's side is ahead of the acknowledgement; what waits for a slot would come behind it.
        for (index, generation) in self.mediator.withdraw(iova, len) {
            self.part_done(index, generation, Err(DmaFault::Unmapped { iova, len }));
        }
        self.advance();
        Ok(in_use)
    }

    pub(super) fn withdraw(&mut self, key: u64) -> Outcome {
        self.windows.withdraw(&mut self.link.fabric, key)
    }

    pub(super) fn prove(&mut self, key: u64) {
        self.windows.prove(key);
    }

    pub(super) fn set_store_staging(&mut self, grant: &Grant) {
        if let Err(error) = self.mediator.set_store_staging(&mut self.link.fabric, grant) {
            tracing::error!(%error, "the borrower's staging memory cannot be used");
            self.fault = Some(CloseReason::Protocol("staging memory that cannot be used"));
        }
    }

    pub(super) fn next_finished(&mut self) -> Option<(DmaTag, Result<(), DmaFault>)> {
        self.finished.pop_front()
    }

    /// Whether DMA is in flight that has not been handed back.
    pub(super) fn has_pending(&self) -> bool {
        !self.finished.is_empty() || self.pending.iter().any(Option::is_some)
    }

    /// Ends as fenced what the guest's side was asked to do; with `all` also what the fabric still does, because its link is gone.
    pub(super) fn fail_pending(&mut self, all: bool) {
        self.mediator.forget();
        for (index, slot) in self.pending.iter_mut().enumerate() {
            if let Some(pending) = slot.take_if(|pending| all || pending.in_use.is_none()) {
                self.finished.push_back((pending.tag, Err(DmaFault::Fenced)));
                self.free.push(index as u32);
            }
        }
        // What waited behind them waits for nothing now.
        self.advance();
    }

    /// An operation of a pending DMA ended.
    pub(super) fn operation_done(&mut self, id: OpId, result: Result<(), DmaFault>) {
        let (index, generation) = (id.0 as u32, (id.0 >> 32) as u32);
        self.part_done(index, generation, result);
    }

    pub(super) fn fetched(&mut self, ticket: Ticket, ok: bool) {
        match self.mediator.fetched(&self.link.fabric, ticket, ok) {
            Some((index, generation, result)) => self.part_done(index, generation, result),
            None => self.fault = Some(CloseReason::Protocol("an answer to a read that was not asked for")),
        }
        self.advance();
    }

    pub(super) fn stored(&mut self, ticket: Ticket, ok: bool) {
        match self.mediator.stored(ticket, ok) {
            Some((index, generation, result)) => self.part_done(index, generation, result),
            None => self.fault = Some(CloseReason::Protocol("an answer to a write that was not asked for")),
        }
        self.advance();
    }

    /// Sends a message that must not pass mediated writes which still wait for a staging slot.
    #[inline]
    pub(super) fn send_in_order(&mut self, message: ToBorrower) {
        if self.mediator.is_idle() {
            self.post_message(message);
        } else if !self.mediator.hold(message) {
            self.fault = Some(CloseReason::Protocol("stores that are never answered"));
        }
    }

    /// Sends an answer to a question of the borrower. It may pass mediated writes that wait for a staging slot, for who waits for the answer
    /// is who frees slots; the device has not been told that those writes are done.
    #[inline]
    pub(super) fn send_answer(&mut self, message: ToBorrower) {
        self.post_message(message);
    }

    fn part_done(&mut self, index: u32, generation: u32, result: Result<(), DmaFault>) {
        let Some(slot) = self.pending.get_mut(index as usize) else {
            return;
        };
        let Some(pending) = slot.as_mut().filter(|pending| pending.generation == generation) else {
            return;
        };
        pending.left = pending.left.saturating_sub(1);
        if let Err(fault) = result {
            pending.fault.get_or_insert(fault);
        }
        if pending.left == 0 {
            let outcome = pending.fault.map_or(Ok(()), Err);
            self.counters.faults += u64::from(outcome.is_err());
            self.finished.push_back((pending.tag, outcome));
            *slot = None;
            self.free.push(index);
        }
    }

    fn start(&mut self, tag: DmaTag, left: u32, in_use: Option<InUse>) -> (u32, u32) {
        self.generation = self.generation.wrapping_add(1);
        let pending = Pending { tag, left, fault: None, generation: self.generation, in_use };
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.pending.push(None);
                (self.pending.len() - 1) as u32
            }
        };
        if let Some(slot) = self.pending.get_mut(index as usize) {
            *slot = Some(pending);
        }
        (index, self.generation)
    }

    #[inline]
    fn post_message(&mut self, message: ToBorrower) {
        let encoded = message.encode();
        self.link.send(encoded.as_slice());
    }

    fn transfer(&mut self, tag: DmaTag, iova: Iova, local: LocalSpan, direction: Direction) -> Result<Progress, DmaFault> {
        let len = u64::from(local.len());
        let needed = if direction == Direction::Read { Access::READ } else { Access::WRITE };
        if len == 0 {
            return Ok(Progress::Done);
        }
        self.windows.map.check(iova, len, needed)?;
        let (mut at, mut left, mut pieces, mut direct) = (iova, len, 0_u32, true);
        let most = u64::from(self.link.fabric.limits().max_op_len);
        while left > 0 {
            let piece = self.windows.map.piece(at, left, needed)?;
            direct &= piece.target.direct.is_some();
            pieces += u32::try_from(piece.len.div_ceil(most)).unwrap_or(u32::MAX);
            left -= piece.len;
            at = Iova(at.0.wrapping_add(piece.len));
        }
        if !direct {
            return Ok(self.mediate(tag, iova, local, direction));
        }
        let immediate = self.link.fabric.limits().immediate;
        let id = if immediate { None } else { Some(self.start(tag, pieces, Some(Arc::clone(&self.windows.in_use)))) };
        let signal = id.map_or(Signal::No, |(index, generation)| Signal::Yes(OpId(u64::from(index) | u64::from(generation) << 32)));
        let (mut at, mut done) = (iova, 0);
        while done < len {
            let piece = self.windows.map.piece(at, (len - done).min(most), needed)?;
            let unmapped = DmaFault::Unmapped { iova, len };
            let direct = piece.target.direct.as_ref().ok_or(unmapped)?;
            let (offset, part) = (piece.target.offset + piece.offset, piece.len);
            let remote = direct.region.span(offset, part as u32, needed).map_err(|_| unmapped)?;
            let ours = local.part(done as u32, part as u32).ok_or(unmapped)?;
            let log = direct.dirty.clone();
            let op = match direction {
                Direction::Read => Op::Read { from: remote, into: ours },
                Direction::Write => Op::Write { from: ours, to: remote },
            };
            if !self.link.post(signal, op) {
                // Never "done": the device would take its own stale bytes for the guest's, or announce data that is not there. What is pending
                // is failed when the session ends, which it does now.
                return if immediate { Err(DmaFault::Fenced) } else { Ok(Progress::Pending) };
            }
            if let (Direction::Write, Some(log)) = (direction, log) {
                log.mark(offset, part);
            }
            done += part;
            at = Iova(at.0.wrapping_add(part));
        }
        self.counters.direct_dma += 1;
        self.counters.direct_bytes += len;
        if direction == Direction::Write && !self.link.fabric.limits().peer_mappable {
            // The bytes are on their way already, whatever else waits.
            self.post_message(ToBorrower::Dirty { iova, len });
        }
        Ok(if immediate { Progress::Done } else { Progress::Pending })
    }

    fn mediate(&mut self, tag: DmaTag, iova: Iova, local: LocalSpan, direction: Direction) -> Progress {
        let (index, generation) = self.start(tag, 0, None);
        let mut parts = 0;
        let (mut at, mut done) = (iova, 0_u32);
        while done < local.len() {
            let part = Chunk::fitting(at, local.len() - done);
            let Some(bytes) = local.part(done, part) else { break };
            let kind = if direction == Direction::Read { ChunkKind::Fetch(bytes) } else { ChunkKind::Store(bytes) };
            self.mediator.queue(Chunk { pending: (index, generation), iova: at, len: part, kind });
            parts += 1;
            done += part;
            at = Iova(at.0.wrapping_add(u64::from(part)));
        }
        if let Some(Some(pending)) = self.pending.get_mut(index as usize) {
            pending.left = parts;
        }
        self.counters.mediated += u64::from(parts);
        self.advance();
        Progress::Pending
    }

    /// Sends what waits for staging slots, as far as there are some.
    fn advance(&mut self) {
        while self.fault.is_none() {
            let Some(step) = self.mediator.next(&self.link.fabric) else {
                break;
            };
            if let Some((from, to)) = step.write {
                self.link.post(Signal::No, Op::Write { from, to });
            }
            self.post_message(step.message);
        }
    }

    /// The link's end may lie in the same batch of events as the doorbell that starts a DMA: it is known before the doorbell is obeyed.
    #[inline]
    fn allowed(&mut self) -> Result<(), DmaFault> {
        if self.bus_master && self.link.is_open() {
            return Ok(());
        }
        self.counters.faults += 1;
        Err(if self.link.is_open() { DmaFault::NotBusMaster } else { DmaFault::Fenced })
    }

    fn counted<T>(&mut self, result: Result<T, DmaFault>) -> Result<T, DmaFault> {
        self.counters.faults += u64::from(result.is_err());
        result
    }

    /// The common case: one window, memory that may be accessed directly, a fabric that is done at once.
    #[inline(always)]
    fn try_immediate(&mut self, iova: Iova, local: LocalSpan, direction: Direction) -> bool {
        let len = u64::from(local.len());
        let needed = if direction == Direction::Read { Access::READ } else { Access::WRITE };
        let Self { link: Endpoint { fabric, .. }, windows, .. } = self;
        if !fabric.limits().immediate || len > u64::from(fabric.limits().max_op_len) {
            return false;
        }
        let Ok(piece) = windows.map.piece(iova, len, needed) else {
            return false;
        };
        let Some(direct) = piece.target.direct.as_ref().filter(|_| piece.len == len && len > 0) else {
            return false;
        };
        let offset = piece.target.offset + piece.offset;
        let Ok(remote) = direct.region.span(offset, local.len(), needed) else {
            return false;
        };
        let op = match direction {
            Direction::Read => Op::Read { from: remote, into: local },
            Direction::Write => Op::Write { from: local, to: remote },
        };
        if fabric.post(Signal::No, op).is_err() {
            return false;
        }
        if let (Direction::Write, Some(log)) = (direction, &direct.dirty) {
            log.mark(offset, len);
        }
        self.counters.direct_dma += 1;
        self.counters.direct_bytes += len;
        true
    }
}

impl<F: Fabric> Bus for LenderBus<F> {
    fn now(&self) -> Nanos {
        self.now
    }

    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.link.fabric.register(memory, access)
    }

    fn dma_read(&mut self, tag: DmaTag, iova: Iova, into: LocalSpan) -> Result<Progress, DmaFault> {
        self.allowed()?;
        if self.try_immediate(iova, into, Direction::Read) {
            return Ok(Progress::Done);
        }
        let result = self.transfer(tag, iova, into, Direction::Read);
        self.counted(result)
    }

    fn dma_write(&mut self, tag: DmaTag, iova: Iova, from: LocalSpan) -> Result<Progress, DmaFault> {
        self.allowed()?;
        // It may pass a mediated one: bytes of several writes arrive in any order until the next polled write, which passes none.
        if self.try_immediate(iova, from, Direction::Write) {
            return Ok(Progress::Done);
        }
        let result = self.transfer(tag, iova, from, Direction::Write);
        self.counted(result)
    }

    fn dma_write_polled(&mut self, tag: DmaTag, iova: Iova, bytes: &[u8]) -> Result<Progress, DmaFault> {
        self.allowed()?;
        let len = bytes.len() as u64;
        let in_page = iova.0 % 4096 + len <= 4096;
        if bytes.len() > MAX_POLLED_WRITE || !len.is_multiple_of(4) || !iova.0.is_multiple_of(4) || !in_page || len == 0 {
            return self.counted(Err(DmaFault::LocalBuffer { local: MAX_POLLED_WRITE as u64, len }));
        }
        let piece = match self.windows.map.piece(iova, len, Access::WRITE) {
            Ok(piece) if piece.len == len => piece,
            Ok(_) => return self.counted(Err(DmaFault::Unmapped { iova, len })),
            Err(fault) => return self.counted(Err(fault)),
        };
        // A store of the guest's side that is asked for is not yet made: polled bytes go the same way then, however near their memory is, because
        // only the guest's side knows when they may be seen.
        let direct = piece.target.direct.as_ref().filter(|_| self.mediator.is_quiet());
        let (progress, message) = match direct {
            Some(direct) if direct.mapped.is_some() => {
                let offset = piece.target.offset + piece.offset;
                let stored = direct.mapped.as_ref().is_some_and(|mapped| {
                    let (memory, start) = mapped.parts();
                    memory.store_last_word_last(start + offset, bytes).is_ok()
                });
                if !stored {
                    return self.counted(Err(DmaFault::Unmapped { iova, len }));
                }
                if let Some(log) = &direct.dirty {
                    log.mark(offset, len);
                }
                (Progress::Done, None)
            }
            Some(_) => (Progress::Done, Some(ToBorrower::StorePolled { iova, len: bytes.len() as u8, bytes: padded(bytes) })),
            None => {
                let pending = self.start(tag, 1, None);
                self.mediator.queue(Chunk { pending, iova, len: bytes.len() as u32, kind: ChunkKind::StorePolled(padded(bytes)) });
                self.counters.mediated += 1;
                self.advance();
                (Progress::Pending, None)
            }
        };
        if let Some(message) = message {
            self.post_message(message);
        }
        Ok(progress)
    }

    fn map(&mut self, iova: Iova, len: u64, access: Access) -> Result<Option<Mapped>, DmaFault> {
        self.allowed()?;
        let checked = self.windows.map.check(iova, len, access);
        self.counted(checked)?;
        let piece = self.windows.map.piece(iova, len, access)?;
        let Some(mapped) = piece.target.direct.as_ref().filter(|_| piece.len == len).and_then(|direct| direct.mapped.as_ref())
        else {
            return Ok(None);
        };
        if access.write && !self.mediator.is_idle() {
            return Ok(None);
        }
        let (memory, start) = mapped.parts();
        let found = Mapped::new(Arc::clone(memory), start + piece.target.offset + piece.offset, len);
        Ok(found.ok().map(|found| found.guarded(Arc::clone(&self.windows.in_use))))
    }

    fn written_directly(&mut self, iova: Iova, len: u64) {
        // The window may have gone meanwhile; then nobody looks at its pages any more.
        let Ok(piece) = self.windows.map.piece(iova, len, Access::WRITE) else {
            return;
        };
        if let Some(log) = piece.target.direct.as_ref().and_then(|direct| direct.dirty.as_ref()) {
            log.mark(piece.target.offset + piece.offset, piece.len);
        }
    }

    fn interrupt(&mut self, vector: u16) {
        self.counters.interrupts += 1;
        self.send_in_order(ToBorrower::Interrupt { vector });
    }

    fn set_pin(&mut self, asserted: bool) {
        self.counters.interrupts += 1;
        self.send_in_order(ToBorrower::Pin { asserted });
    }
}

/// Polled bytes as a message carries them.
fn padded(bytes: &[u8]) -> [u8; MAX_POLLED_WRITE] {
    let mut padded = [0; MAX_POLLED_WRITE];
    for (to, from) in padded.iter_mut().zip(bytes) {
        *to = *from;
    }
    padded
}
