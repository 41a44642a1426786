//! What the device asks of its bus at the lender: each DMA becomes one-sided operations, or, where they cannot be, mediations.
//!
//! `dma_write` of 4 KiB at iova 0x2_3f00_1000 finds its window, posts one write, and, where the peer's memory is mapped, marks the page in the
//! dirty log before anything can announce it. What cannot go directly (no descriptor, not proven, two windows of unlike kind) is mediated.

use std::sync::Arc;

use farbus_transport::{
    Access, CloseReason, Fabric, LocalRegion, LocalSpan, Memory, Nanos, Op, OpError, OpId, PostError, RegisterError, Signal,
};

use super::bus::LenderBus;
use super::mediation::{Chunk, ChunkKind};
use super::windows::Direct;
use crate::address::Iova;
use crate::backend::{Bus, DmaFault, DmaTag, MAX_POLLED_WRITE, Progress};
use crate::dma_buffer::DmaBuffer;
use crate::endpoint::Endpoint;
use crate::message::ToBorrower;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

impl<F: Fabric> LenderBus<F> {
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
                // Never "done": the device would take its own stale bytes for the guest's, or announce data that is not there. The session ends
                // now, and with it what is pending.
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

    /// The common case: one window, memory that may be accessed directly, a fabric that is done at once. `None` where it is not that case.
    #[inline(always)]
    fn try_immediate(&mut self, iova: Iova, local: LocalSpan, direction: Direction) -> Option<Result<Progress, DmaFault>> {
        let len = u64::from(local.len());
        let needed = if direction == Direction::Read { Access::READ } else { Access::WRITE };
        let Self { link: Endpoint { fabric, .. }, windows, .. } = self;
        if !fabric.limits().immediate || len > u64::from(fabric.limits().max_op_len) {
            return None;
        }
        let piece = windows.map.piece(iova, len, needed).ok()?;
        let direct = piece.target.direct.as_ref().filter(|_| piece.len == len && len > 0)?;
        let log = match direction {
            Direction::Read => None,
            // Where there is no log to mark, the borrower must be told.
            Direction::Write => Some(direct.dirty.as_ref()?),
        };
        let offset = piece.target.offset + piece.offset;
        let remote = direct.region.span(offset, local.len(), needed).ok()?;
        let op = match direction {
            Direction::Read => Op::Read { from: remote, into: local },
            Direction::Write => Op::Write { from: local, to: remote },
        };
        match fabric.post(Signal::No, op) {
            Ok(()) => {}
            Err(PostError::Full) => return None,
            // Answered here, because trying again would keep the arguments alive across every copy that succeeds.
            Err(PostError::Failed) => return Some(self.failed_at_once()),
        }
        if let Some(log) = log {
            log.mark(offset, len);
        }
        self.counters.direct_dma += 1;
        self.counters.direct_bytes += len;
        Some(Ok(Progress::Done))
    }

    /// A polled store was refused, which no event will say, unless the link ended.
    #[cold]
    fn not_stored(&mut self, error: OpError) -> Result<Progress, DmaFault> {
        if error != OpError::Closed {
            tracing::error!(%error, "a polled store to the borrower's memory failed");
            self.fault.get_or_insert(CloseReason::Protocol("an operation on the peer's memory failed"));
        }
        self.failed_at_once()
    }

    /// Never "done": the device would take its own stale bytes for the guest's, or announce data that is not there. The event that says why
    /// it failed ends the session.
    #[cold]
    fn failed_at_once(&mut self) -> Result<Progress, DmaFault> {
        self.counters.faults += 1;
        Err(DmaFault::Fenced)
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
        if let Some(progress) = self.try_immediate(iova, into, Direction::Read) {
            return progress;
        }
        let result = self.transfer(tag, iova, into, Direction::Read);
        self.counted(result)
    }

    fn dma_write(&mut self, tag: DmaTag, iova: Iova, from: LocalSpan) -> Result<Progress, DmaFault> {
        self.allowed()?;
        // It may pass a mediated one: bytes of several writes arrive in any order until the next polled write, which passes none.
        if let Some(progress) = self.try_immediate(iova, from, Direction::Write) {
            return progress;
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
        let Self { link: Endpoint { fabric, .. }, windows, mediator, .. } = self;
        let piece = match windows.map.piece(iova, len, Access::WRITE) {
            Ok(piece) if piece.len == len => piece,
            Ok(_) => return self.counted(Err(DmaFault::Unmapped { iova, len })),
            Err(fault) => return self.counted(Err(fault)),
        };
        // A store of the guest's side that is asked for is not yet made: polled bytes go the same way then, however near their memory is, because
        // only the guest's side knows when they may be seen.
        let direct = piece.target.direct.as_ref().filter(|_| mediator.is_quiet());
        let (progress, message) = match direct {
            Some(Direct { region, dirty: Some(log) }) => {
                let offset = piece.target.offset + piece.offset;
                let Ok(to) = region.span(offset, bytes.len() as u32, Access::WRITE) else {
                    return self.counted(Err(DmaFault::Unmapped { iova, len }));
                };
                if let Err(error) = fabric.store_polled(to, bytes) {
                    return self.not_stored(error);
                }
                log.mark(offset, len);
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

    fn map(&mut self, iova: Iova, len: u64, access: Access) -> Result<Option<DmaBuffer>, DmaFault> {
        self.allowed()?;
        let checked = self.windows.map.check(iova, len, access);
        self.counted(checked)?;
        let piece = self.windows.map.piece(iova, len, access)?;
        let direct = piece.target.direct.as_ref().filter(|_| piece.len == len);
        let Some((direct, log)) = direct.and_then(|direct| Some((direct, direct.dirty.as_ref()?))) else {
            return Ok(None);
        };
        if access.write && !self.mediator.is_idle() {
            return Ok(None);
        }
        let offset = piece.target.offset + piece.offset;
        let span = u32::try_from(len).ok().and_then(|len| direct.region.span(offset, len, access).ok());
        let Some(mapped) = span.and_then(|span| self.link.fabric.map_remote(span)) else {
            return Ok(None);
        };
        self.counters.lent_pieces += 1;
        self.counters.lent_bytes += len;
        let in_use = Some(Arc::clone(&self.windows.in_use));
        Ok(Some(if access.write {
            DmaBuffer::written(mapped, log.clone(), offset, in_use)
        } else {
            DmaBuffer::read(mapped, in_use)
        }))
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
