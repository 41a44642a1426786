//! The guest memory that a test's client answers from: a range of its own that remembers who wrote it, or a memfd that the server maps too.
//!
//! After a polled store of 16 bytes `guest.writes` has 12 bytes, then 4 behind them.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::Arc;

use farbus_pci_shim::vfio_user::client::ClientMemory;
use farbus_transport::Memory;
use rustix::io::Errno;

/// Guest memory of one range of addresses.
pub struct Guest {
    pub base: u64,
    pub bytes: Vec<u8>,
    pub writes: Vec<(u64, usize)>,
}

impl Guest {
    pub fn new(base: u64, len: usize) -> Self {
        Self { base, bytes: vec![0; len], writes: vec![] }
    }

    fn range(&self, iova: u64, len: usize) -> Result<std::ops::Range<usize>, Errno> {
        let from = iova.checked_sub(self.base).ok_or(Errno::NODEV)? as usize;
        let end = from.checked_add(len).filter(|end| *end <= self.bytes.len()).ok_or(Errno::NODEV)?;
        Ok(from..end)
    }
}

impl ClientMemory for Guest {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        into.copy_from_slice(&self.bytes[self.range(iova, into.len())?]);
        Ok(())
    }

    fn write(&mut self, iova: u64, bytes: &[u8]) -> Result<(), Errno> {
        let range = self.range(iova, bytes.len())?;
        self.bytes[range].copy_from_slice(bytes);
        self.writes.push((iova, bytes.len()));
        Ok(())
    }
}

/// Guest memory in a memfd that the server maps too.
pub struct SharedGuest {
    pub base: u64,
    pub memory: Arc<Memory>,
}

impl ClientMemory for SharedGuest {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.memory.read(iova - self.base, into).map_err(|_| Errno::NODEV)
    }

    fn write(&mut self, iova: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.memory.write(iova - self.base, bytes).map_err(|_| Errno::NODEV)
    }
}
