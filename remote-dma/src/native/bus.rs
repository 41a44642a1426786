//! The bus of a device in the guest's own process: DMA is one copy between its memory and the guest's.
//!
//! `dma_write` of 4 KiB at iova 0x2_3f00_1000 finds the window, copies, marks the page; nothing is ever pending.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use farbus_transport::local::LocalRegions;
use farbus_transport::{Access, LocalRegion, LocalSpan, Mapped, Memory, MemoryError, Nanos, RegisterError};

use crate::address::Iova;
use crate::attachment::{AttachmentError, MapError, Window, WindowMemory};
use crate::backend::{Bus, DmaFault, DmaTag, MAX_POLLED_WRITE, Progress};
use crate::dirty_log::{DirtyLog, DirtyLogs};
use crate::dma_buffer::DmaBuffer;
use crate::iova_map::IovaMap;

/// What the device raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Raised {
    Vector(u16),
    Pin(bool),
}

/// A piece of guest memory and the log of what the device wrote in all of it.
#[derive(Clone, Debug)]
pub(super) struct Target {
    memory: Arc<Memory>,
    offset: u64,
    log: DirtyLog,
}

/// Logs by memory, shared with the function's side.
pub(super) type Logs = Arc<Mutex<DirtyLogs>>;

#[derive(Default)]
pub(super) struct DirectBus {
    locals: LocalRegions,
    windows: IovaMap<Target>,
    logs: DirtyLogs,
    raised: VecDeque<Raised>,
    bus_master: bool,
    now: Nanos,
}

impl DirectBus {
    pub(super) fn set_now(&mut self, now: Nanos) {
        self.now = now;
    }

    pub(super) fn set_bus_master(&mut self, enabled: bool) {
        self.bus_master = enabled;
    }

    pub(super) fn next_raised(&mut self) -> Option<Raised> {
        self.raised.pop_front()
    }

    pub(super) fn first_raised(&self) -> Option<Raised> {
        self.raised.front().copied()
    }

    pub(super) fn has_raised(&self) -> bool {
        !self.raised.is_empty()
    }

    pub(super) fn map(&mut self, window: &Window) -> Result<(), MapError> {
        let Window { iova, len, access, ref memory } = *window;
        let WindowMemory::Mapped { memory, offset, .. } = memory else {
            return Err(AttachmentError::Refused("a device in this process needs memory that is mapped").into());
        };
        if offset.checked_add(len).is_none_or(|end| end > memory.len()) {
            return Err(MapError::Range { iova, len });
        }
        let log = self.logs.of_or_new(memory).map_err(farbus_transport::GrantError::from)?;
        self.windows.insert(iova, len, access, Target { memory: Arc::clone(memory), offset: *offset, log })
    }

    pub(super) fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), MapError> {
        self.windows.remove(iova, len)?;
        Ok(())
    }

    /// Ends every window. Only with nothing in flight.
    pub(super) fn let_go_of_all(&mut self) {
        self.windows = IovaMap::default();
        self.bus_master = false;
        self.raised.clear();
    }

    /// Forgets logs from which nothing will be taken. Only with nothing in flight, which could still mark.
    pub(super) fn prune_logs(&mut self) {
        let windows = &self.windows;
        self.logs.prune(|memory| windows.targets().any(|target| Arc::ptr_eq(&target.memory, memory)));
    }

    pub(super) fn log_of(&self, memory: &Arc<Memory>) -> Option<&DirtyLog> {
        self.logs.of(memory)
    }

    /// Publishes the logs where the function's side can find them.
    pub(super) fn share_logs(&self, shared: &Logs) {
        shared.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&self.logs);
    }

    /// Calls `each` for every window's part of the range: target memory, offset in it, bytes done before, bytes of the part.
    fn walk(
        &self,
        iova: Iova,
        len: u64,
        needed: Access,
        mut each: impl FnMut(&Target, u64, u64, u64) -> Result<(), MemoryError>,
    ) -> Result<(), DmaFault> {
        if !self.bus_master {
            return Err(DmaFault::NotBusMaster);
        }
        if len == 0 {
            return Ok(());
        }
        self.windows.check(iova, len, needed)?;
        let (mut at, mut done) = (iova, 0);
        while done < len {
            let piece = self.windows.piece(at, len - done, needed)?;
            each(piece.target, piece.target.offset + piece.offset, done, piece.len)
                .map_err(|_| DmaFault::Unmapped { iova, len })?;
            done += piece.len;
            at = Iova(at.0.wrapping_add(piece.len));
        }
        Ok(())
    }

    fn local(&self, span: LocalSpan) -> Result<(&Memory, u64), DmaFault> {
        self.locals.resolve(span).ok_or(DmaFault::LocalBuffer { local: 0, len: u64::from(span.len()) })
    }
}

impl Bus for DirectBus {
    fn now(&self) -> Nanos {
        self.now
    }

    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.locals.register(memory, access)
    }

    fn dma_read(&mut self, _tag: DmaTag, iova: Iova, into: LocalSpan) -> Result<Progress, DmaFault> {
        let (ours, start) = self.local(into)?;
        self.walk(iova, u64::from(into.len()), Access::READ, |target, offset, done, len| {
            ours.copy_from(start + done, &target.memory, offset, len)
        })?;
        Ok(Progress::Done)
    }

    fn dma_write(&mut self, _tag: DmaTag, iova: Iova, from: LocalSpan) -> Result<Progress, DmaFault> {
        let (ours, start) = self.local(from)?;
        self.walk(iova, u64::from(from.len()), Access::WRITE, |target, offset, done, len| {
            target.memory.copy_from(offset, ours, start + done, len)?;
            target.log.mark(offset, len);
            Ok(())
        })?;
        Ok(Progress::Done)
    }

    fn dma_write_polled(&mut self, _tag: DmaTag, iova: Iova, bytes: &[u8]) -> Result<Progress, DmaFault> {
        let len = bytes.len() as u64;
        if bytes.len() > MAX_POLLED_WRITE || iova.0 % 4096 + len > 4096 {
            return Err(DmaFault::LocalBuffer { local: MAX_POLLED_WRITE as u64, len });
        }
        self.walk(iova, len, Access::WRITE, |target, offset, _, part| {
            if part != len {
                return Err(MemoryError::OutOfBounds { offset, len, mapped: part });
            }
            target.memory.store_last_word_last(offset, bytes)?;
            target.log.mark(offset, len);
            Ok(())
        })?;
        Ok(Progress::Done)
    }

    fn map(&mut self, iova: Iova, len: u64, access: Access) -> Result<Option<DmaBuffer>, DmaFault> {
        let mut found = None;
        self.walk(iova, len, access, |target, offset, _, part| {
            if part < len {
                return Ok(());
            }
            let mapped = Mapped::new(Arc::clone(&target.memory), offset, len)?;
            found = Some(if access.write {
                DmaBuffer::written(mapped, target.log.clone(), offset, None)
            } else {
                DmaBuffer::read(mapped, None)
            });
            Ok(())
        })?;
        Ok(found)
    }

    fn interrupt(&mut self, vector: u16) {
        // One that nobody has taken announces this data too; so there are never more than the device has vectors.
        if !self.raised.contains(&Raised::Vector(vector)) {
            self.raised.push_back(Raised::Vector(vector));
        }
    }

    fn set_pin(&mut self, asserted: bool) {
        // A level, not an event: only the last one counts.
        self.raised.retain(|raised| !matches!(raised, Raised::Pin(_)));
        self.raised.push_back(Raised::Pin(asserted));
    }
}
