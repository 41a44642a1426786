//! The memory that the driver shares with the device: handed out in pages, addressed by the device through its IOVA.
//!
//! `DmaMemory::new(memory, Iova(0x1_0000_0000)).allocate(128 << 10)` is 32 pages that a PRP entry can name; byte 7 of the buffer is
//! byte 7 of those pages for the CPU and for the device.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use farbus_remote_dma::Iova;
use farbus_transport::{Memory, MemoryError};

use super::error::DriverError;

/// Bytes of a memory page: CC.MPS = 0.
pub const PAGE_BYTES: u64 = 4096;

/// Memory with a bump allocator: queues and buffers are made once and live as long as the driver.
#[derive(Debug)]
pub struct DmaMemory {
    memory: Arc<Memory>,
    base: Iova,
    used: u64,
}

impl DmaMemory {
    /// All of `memory`, which the device reaches from `base` on (a multiple of 4,096).
    pub fn new(memory: Arc<Memory>, base: Iova) -> Self {
        Self { memory, base, used: 0 }
    }

    /// A new buffer of `len` bytes that begins at a page.
    ///
    /// # Errors
    /// [`DriverError::DmaMemory`] where it does not fit any more.
    pub fn allocate(&mut self, len: u64) -> Result<DmaBuffer, DriverError> {
        let left = self.memory.len().saturating_sub(self.used);
        let too_much = DriverError::DmaMemory { needed: len, left };
        let Some(end) = self.used.checked_add(len).filter(|_| len <= left) else {
            return Err(too_much);
        };
        let Some(iova) = self.base.checked_add(self.used) else {
            return Err(too_much);
        };
        let buffer = DmaBuffer { memory: Arc::clone(&self.memory), offset: self.used, len, iova };
        self.used = end.next_multiple_of(PAGE_BYTES);
        Ok(buffer)
    }

    /// The memory itself.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Bytes handed out.
    pub fn used(&self) -> u64 {
        self.used
    }
}

/// A range of [`DmaMemory`].
#[derive(Clone, Debug)]
pub struct DmaBuffer {
    memory: Arc<Memory>,
    offset: u64,
    len: u64,
    iova: Iova,
}

impl DmaBuffer {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the device finds the first byte.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// The `len` bytes from `offset`; `None` where they are not inside.
    pub fn slice(&self, offset: u64, len: u64) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then_some(())?;
        Some(Self { memory: Arc::clone(&self.memory), offset: self.offset + offset, len, iova: self.iova.checked_add(offset)? })
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] where the range leaves the buffer.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(self.place(offset, into.len() as u64)?, into)
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] where the range leaves the buffer.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(self.place(offset, from.len() as u64)?, from)
    }

    /// A word that the device writes while we look at it; `offset` is a multiple of 4.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn word(&self, offset: u64) -> Result<&AtomicU32, MemoryError> {
        self.memory.atomic_u32(self.place(offset, 4)?)
    }

    fn place(&self, offset: u64, len: u64) -> Result<u64, MemoryError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(MemoryError::OutOfBounds { offset, len, mapped: self.len });
        }
        Ok(self.offset + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_begin_at_pages_and_never_overlap() {
        let mut dma = DmaMemory::new(Memory::memfd("test", 3 * PAGE_BYTES).unwrap(), Iova(0x1_0000_0000));
        let first = dma.allocate(1).unwrap();
        let second = dma.allocate(PAGE_BYTES).unwrap();
        assert_eq!(first.iova(), Iova(0x1_0000_0000));
        assert_eq!(second.iova(), Iova(0x1_0000_1000));
        assert!(matches!(dma.allocate(PAGE_BYTES + 1), Err(DriverError::DmaMemory { left: 4096, .. })));
        assert!(first.write(0, b"ab").is_err(), "the second byte is not the buffer's");
        second.write(PAGE_BYTES - 2, b"ab").unwrap();
        let tail = second.slice(PAGE_BYTES - 2, 2).unwrap();
        let mut seen = [0; 2];
        tail.read(0, &mut seen).unwrap();
        assert_eq!(&seen, b"ab");
        assert!(second.slice(PAGE_BYTES, 1).is_none());
    }
}
