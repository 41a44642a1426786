//! What the server asks of the guest's memory: each `DMA_READ` and `DMA_WRITE` becomes one-sided operations, through memory of ours that is
//! registered once, and is answered when they are done.
//!
//! `DMA_WRITE` 7 of 16 bytes at 0x1_0450_0000 is copied into slot 0 and stored by a CPU, the word with the phase bit last; then reply 7 goes
//! back. `DMA_READ` 8 of 4 KiB meanwhile fills slot 1. Sixteen are under way at most; what comes behind them waits in the socket.

use std::sync::Arc;

use farbus_remote_dma::{AttachError, Bus, DmaFault, DmaTag, Iova, Progress};
use farbus_transport::{Access, LocalRegion, Memory};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::link::Link;
use super::reply::dma_request;
use crate::vfio_user::wire::{Command, DmaAccess, Header};

/// Bytes of the longest `DMA_READ` or `DMA_WRITE` that is taken.
pub(super) const SLOT_BYTES: u32 = 256 << 10;
const SLOTS: usize = 16;
/// Writes of at most this many bytes are stored by a CPU from the first to the last word, because a guest may be polling any of them: a device
/// that posts several completion entries at once writes no more.
const POLLED_BYTES: u32 = 256;
const POLLED_PIECE: u32 = 32;

/// One request under way.
#[derive(Clone, Copy, Debug)]
struct Request {
    header: Header,
    address: u64,
    len: u32,
    write: bool,
    /// Operations of it that the bus has not ended.
    left: u32,
    fault: Option<DmaFault>,
    /// A read that may not pass the writes before it.
    waits: bool,
}

/// What happened, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaCounters {
    /// `DMA_READ`s carried out.
    pub reads: u64,
    /// `DMA_WRITE`s carried out.
    pub writes: u64,
    /// Either, refused.
    pub refused: u64,
}

/// The requests and their memory.
pub(super) struct Dma {
    staging: Arc<Memory>,
    region: Option<LocalRegion>,
    slots: [Option<Request>; SLOTS],
    writes: u32,
    buffer: Vec<u8>,
    pub(super) fenced: bool,
    pub(super) counters: DmaCounters,
}

impl Dma {
    pub(super) fn new() -> Result<Self, farbus_transport::MemoryError> {
        Ok(Self {
            staging: Memory::memfd("farbus-vfio-user", SLOTS as u64 * u64::from(SLOT_BYTES))?,
            region: None,
            slots: [None; SLOTS],
            writes: 0,
            buffer: vec![0; SLOT_BYTES as usize],
            fenced: true,
            counters: DmaCounters::default(),
        })
    }

    pub(super) fn attach(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError> {
        self.region = Some(bus.register(Arc::clone(&self.staging), Access::READ_WRITE)?);
        self.fenced = false;
        Ok(())
    }

    pub(super) fn detach(&mut self) {
        self.region = None;
        self.fenced = true;
        self.slots = [None; SLOTS];
        self.writes = 0;
    }

    /// Whether one more request can be taken.
    pub(super) fn has_room(&self) -> bool {
        self.slots.iter().any(Option::is_none)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.slots.iter().flatten().filter(|request| request.left > 0).count()
    }

    /// Takes what a server asked, with its data; there is room.
    ///
    /// # Errors
    /// The errno for the server.
    pub(super) fn accept(&mut self, header: &Header, body: &[u8]) -> Result<usize, Errno> {
        let write = match Command::from_number(header.command) {
            Some(Command::DmaWrite) => true,
            Some(Command::DmaRead) => false,
            _ => return Err(Errno::NOSYS),
        };
        let request = dma_request(body, write, SLOT_BYTES).ok_or(Errno::INVAL)?;
        if self.fenced {
            return Err(Errno::CANCELED);
        }
        let index = self.slots.iter().position(Option::is_none).ok_or(Errno::NOBUFS)?;
        if let Some(data) = request.data {
            self.staging.write(index as u64 * u64::from(SLOT_BYTES), data).map_err(|_| Errno::INVAL)?;
        }
        let waits = !write && self.writes > 0;
        let (address, len) = (request.address, request.len);
        *self.slots.get_mut(index).ok_or(Errno::NOBUFS)? =
            Some(Request { header: *header, address, len, write, left: 0, fault: None, waits });
        Ok(index)
    }

    /// Begins it, unless it must wait for writes before it.
    pub(super) fn begin(&mut self, index: usize, link: &mut Link, bus: &mut dyn Bus) {
        if self.slots.get(index).is_some_and(|slot| slot.is_some_and(|request| !request.waits)) {
            self.start(index, link, bus);
        }
    }

    /// The bus ended an operation.
    pub(super) fn done(&mut self, tag: DmaTag, result: Result<(), DmaFault>, link: &mut Link, bus: &mut dyn Bus) {
        let index = tag.0 as usize;
        let Some(Some(request)) = self.slots.get_mut(index) else { return };
        request.left = request.left.saturating_sub(1);
        if let Err(fault) = result {
            request.fault.get_or_insert(fault);
        }
        if request.left > 0 {
            return;
        }
        self.writes -= u32::from(request.write);
        self.answer(index, link);
        if self.writes == 0 {
            for index in 0..SLOTS {
                let waited =
                    self.slots.get_mut(index).and_then(Option::as_mut).is_some_and(|request| std::mem::take(&mut request.waits));
                if waited {
                    self.start(index, link, bus);
                }
            }
        }
    }

    /// Nothing more is begun: what waits is refused.
    pub(super) fn fence(&mut self, link: &mut Link) {
        self.fenced = true;
        for index in 0..SLOTS {
            if let Some(request) = self.slots.get_mut(index).and_then(|slot| slot.take_if(|request| request.waits)) {
                self.refuse(&request.header, Errno::CANCELED, link);
            }
        }
    }

    fn start(&mut self, index: usize, link: &mut Link, bus: &mut dyn Bus) {
        let Some(request) = self.slots.get(index).copied().flatten() else { return };
        let (left, result) = if self.fenced { (0, Err(DmaFault::Fenced)) } else { self.post(index, &request, bus) };
        let Some(Some(slot)) = self.slots.get_mut(index) else { return };
        slot.left = left;
        slot.fault = result.err();
        if left == 0 {
            self.answer(index, link);
        } else {
            self.writes += u32::from(request.write);
        }
    }

    /// Posts the operations of a request; gives how many are pending.
    fn post(&self, index: usize, request: &Request, bus: &mut dyn Bus) -> (u32, Result<(), DmaFault>) {
        let (tag, iova, len) = (DmaTag(index as u64), Iova(request.address), request.len);
        let base = index as u64 * u64::from(SLOT_BYTES);
        let none = DmaFault::LocalBuffer { local: 0, len: u64::from(len) };
        let span = |from: u32, len: u32, access| {
            self.region.and_then(|region| region.span(base + u64::from(from), len, access).ok()).ok_or(none)
        };
        let mut pending = 0;
        let mut count =
            |progress: Result<Progress, DmaFault>| progress.map(|progress| pending += u32::from(progress == Progress::Pending));
        let result = if !request.write {
            span(0, len, Access::WRITE).and_then(|into| bus.dma_read(tag, iova, into)).and_then(|done| count(Ok(done)))
        } else {
            // What a guest may poll is stored by a CPU behind all else: a short write as a whole, of a long one its last words.
            let aligned = iova.0.is_multiple_of(4) && len.is_multiple_of(4);
            let polled = match len {
                _ if !aligned => 0,
                ..=POLLED_BYTES => len,
                _ => POLLED_PIECE,
            };
            let plain = len - polled;
            let first = match plain {
                0 => Ok(()),
                _ => span(0, plain, Access::READ).and_then(|from| bus.dma_write(tag, iova, from)).and_then(|done| count(Ok(done))),
            };
            first.and_then(|()| {
                let mut at = plain;
                while at < len {
                    let to = iova.0 + u64::from(at);
                    // In one page each.
                    let piece = POLLED_PIECE.min(len - at).min((4096 - to % 4096) as u32);
                    let mut bytes = [0; POLLED_PIECE as usize];
                    let bytes = bytes.get_mut(..piece as usize).ok_or(none)?;
                    self.staging.read(base + u64::from(at), bytes).map_err(|_| none)?;
                    count(bus.dma_write_polled(tag, Iova(to), bytes))?;
                    at += piece;
                }
                Ok(())
            })
        };
        (pending, result)
    }

    fn answer(&mut self, index: usize, link: &mut Link) {
        let Some(request) = self.slots.get_mut(index).and_then(Option::take) else { return };
        if let Some(fault) = request.fault {
            return self.refuse(&request.header, errno(fault), link);
        }
        let access = DmaAccess { address: request.address, count: u64::from(request.len) };
        let data = if request.write {
            self.counters.writes += 1;
            &[]
        } else {
            self.counters.reads += 1;
            let bytes = self.buffer.get_mut(..request.len as usize).unwrap_or_default();
            if self.staging.read(index as u64 * u64::from(SLOT_BYTES), bytes).is_err() {
                return self.refuse(&request.header, Errno::IO, link);
            }
            &*bytes
        };
        link.reply(&request.header, [access.as_bytes(), data]);
    }

    pub(super) fn refuse(&mut self, header: &Header, errno: Errno, link: &mut Link) {
        self.counters.refused += 1;
        tracing::debug!(command = header.command, %errno, "a dma of the server's was refused");
        link.refuse(header, errno);
    }
}

fn errno(fault: DmaFault) -> Errno {
    match fault {
        DmaFault::Unmapped { .. } => Errno::FAULT,
        DmaFault::Denied { .. } => Errno::ACCESS,
        DmaFault::NotBusMaster => Errno::PERM,
        DmaFault::Fenced => Errno::CANCELED,
        DmaFault::LocalBuffer { .. } => Errno::INVAL,
    }
}
