//! The controller's own registered memory: fetched submission entries, PRP lists, and buffers for data that cannot go straight.
//!
//! Slot 16 of submission queue 3 is fetched to entry 0 of queue 3's 32; a PRP list of 31 entries takes one 4 KiB buffer, an Identify page
//! one of 16 KiB. Nothing here is ever reachable by a guest, so what was fetched cannot change while it is judged.

use std::sync::Arc;

use farbus_transport::{Access, LocalRegion, LocalSpan, Mapped, Memory, MemoryError};

use super::command::SQE_BYTES;
use super::{MAX_TRANSFER_BYTES, QUEUE_COUNT};

/// Submission entries fetched with one DMA.
pub(super) const FETCH_ENTRIES: u32 = 32;

const ENTRIES_BYTES: u64 = (QUEUE_COUNT as u64 * FETCH_ENTRIES as u64 * SQE_BYTES as u64).next_multiple_of(4096);
/// Few of each, because an RNIC pins them all as long as the device is lent; a command that finds none waits for the next that is given back.
const CLASSES: [Class; 4] = [
    // A list names at most MAX_TRANSFER_BYTES / 4 KiB + 1 pages, 8 bytes each.
    Class { bytes: 4 << 10, count: 128 },
    Class { bytes: 16 << 10, count: 64 },
    Class { bytes: 128 << 10, count: 16 },
    Class { bytes: MAX_TRANSFER_BYTES, count: 2 },
];
/// What a link may pin beyond the guest's memory is 8 MiB; the rest is for rings and staging.
const MOST_BYTES: u64 = 7 << 20;
const _: () = {
    let (mut sum, mut class) = (ENTRIES_BYTES, 0);
    while class < CLASSES.len() {
        sum += CLASSES[class].bytes as u64 * CLASSES[class].count as u64;
        class += 1;
    }
    assert!(sum <= MOST_BYTES);
};
const _: () = assert!((MAX_TRANSFER_BYTES / 4096 + 1) * 8 <= 4 << 10);

#[derive(Clone, Copy)]
struct Class {
    bytes: u32,
    count: u32,
}

/// A buffer of the controller's; given back with [`Scratch::release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffer {
    class: u8,
    offset: u64,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Scratch {
    memory: Arc<Memory>,
    region: Option<LocalRegion>,
    free: [Vec<Buffer>; CLASSES.len()],
}

impl Scratch {
    pub(super) fn new() -> Result<Self, MemoryError> {
        let mut offset = ENTRIES_BYTES;
        let mut class = 0;
        let free = CLASSES.map(|Class { bytes, count }| {
            let buffers = (0..u64::from(count)).map(|index| Buffer { class, offset: offset + index * u64::from(bytes) });
            let buffers = buffers.rev().collect();
            offset += u64::from(count) * u64::from(bytes);
            class += 1;
            buffers
        });
        Ok(Self { memory: Memory::memfd("farbus-nvme", offset)?, region: None, free })
    }

    pub(super) const fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    pub(super) const fn set_region(&mut self, region: Option<LocalRegion>) {
        self.region = region;
    }

    /// A buffer for a PRP list.
    pub(super) fn list(&mut self) -> Option<Buffer> {
        self.free.first_mut()?.pop()
    }

    /// A buffer of at least `bytes`.
    pub(super) fn buffer(&mut self, bytes: u32) -> Option<Buffer> {
        // The first class is for lists.
        let fitting = CLASSES.iter().zip(&mut self.free).skip(1).filter(|(class, _)| bytes <= class.bytes);
        fitting.map(|(_, free)| free).find_map(Vec::pop)
    }

    pub(super) fn release(&mut self, buffer: Buffer) {
        if let Some(free) = self.free.get_mut(usize::from(buffer.class)) {
            free.push(buffer);
        }
    }

    /// `len` bytes from `from` in a buffer.
    #[inline]
    pub(super) fn span(&self, buffer: Buffer, from: u32, len: u32, access: Access) -> Option<LocalSpan> {
        self.region?.span(buffer.offset + u64::from(from), len, access).ok()
    }

    /// Where the entries of queue `queue` are fetched to.
    #[inline]
    pub(super) fn entries_span(&self, queue: u16, count: u32) -> Option<LocalSpan> {
        self.region?.span(Self::entry_offset(queue, 0), count * SQE_BYTES, Access::WRITE).ok()
    }

    /// A copy of a fetched entry.
    #[inline]
    pub(super) fn entry(&self, queue: u16, index: u32) -> Result<[u8; SQE_BYTES as usize], MemoryError> {
        let mut entry = [0; SQE_BYTES as usize];
        self.memory.read(Self::entry_offset(queue, index), &mut entry)?;
        Ok(entry)
    }

    /// A qword of a fetched PRP list; zero outside.
    pub(super) fn qword(&self, list: Buffer, index: u32) -> u64 {
        let mut bytes = [0; 8];
        match self.memory.read(list.offset + u64::from(index) * 8, &mut bytes) {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(_) => 0,
        }
    }

    /// Copies out of a buffer.
    pub(super) fn read(&self, buffer: Buffer, from: u32, into: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(buffer.offset + u64::from(from), into)
    }

    /// Copies into a buffer.
    pub(super) fn write(&self, buffer: Buffer, from: u32, bytes: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(buffer.offset + u64::from(from), bytes)
    }

    /// A buffer as a worker sees it.
    pub(super) fn mapped(&self, buffer: Buffer, len: u32) -> Result<Mapped, MemoryError> {
        Mapped::new(Arc::clone(&self.memory), buffer.offset, u64::from(len))
    }

    const fn entry_offset(queue: u16, index: u32) -> u64 {
        (queue as u64 * FETCH_ENTRIES as u64 + index as u64) * SQE_BYTES as u64
    }
}
