//! What we need of a VMM's memory, as its consumer: where the regions are, and reading and writing them.
//!
//! A region of 512 MiB at guest address 0 backed by a memfd is granted to the lender by descriptor; a region without one is reached by
//! `read` and `write`. Implemented for `vm_memory::GuestMemoryMmap` (feature `vm-memory`) and for a single [`Memory`].

#[cfg(feature = "vm-memory")]
mod vm_memory;

use std::sync::Arc;

use farbus_transport::Memory;
use thiserror::Error;

use crate::address::GuestAddress;

#[cfg(feature = "vm-memory")]
pub use self::vm_memory::VmMemory;

/// Why guest memory could not be reached.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("guest address {at:#x} + {len:#x} is not memory")]
pub struct GuestMemoryError {
    /// First address.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

/// One contiguous region.
#[derive(Clone, Debug)]
pub struct GuestRegion {
    /// First guest address.
    pub start: GuestAddress,
    /// Bytes.
    pub len: u64,
    /// The memory itself, where it has a descriptor and can be granted.
    pub memory: Option<(Arc<Memory>, u64)>,
}

/// A VMM's guest memory.
pub trait GuestMemory: Send {
    /// All regions, in any order.
    fn regions(&self) -> Vec<GuestRegion>;

    /// Copies guest memory out.
    ///
    /// # Errors
    /// [`GuestMemoryError`]; `into` may be partly filled.
    fn read(&self, at: GuestAddress, into: &mut [u8]) -> Result<(), GuestMemoryError>;

    /// Copies into guest memory; in one region, the last aligned 32-bit word becomes visible last where the end is 4-byte aligned.
    ///
    /// # Errors
    /// [`GuestMemoryError`]; nothing was written.
    fn write(&self, at: GuestAddress, from: &[u8]) -> Result<(), GuestMemoryError>;
}

/// A single piece of memory at one guest address: for tests, for bare guests, for programs that drive a function themselves.
#[derive(Clone, Debug)]
pub struct SliceMemory {
    start: GuestAddress,
    memory: Arc<Memory>,
}

impl SliceMemory {
    /// `memory` as the guest's memory from `start`.
    pub fn new(start: GuestAddress, memory: Arc<Memory>) -> Self {
        Self { start, memory }
    }

    fn offset(&self, at: GuestAddress, len: usize) -> Result<u64, GuestMemoryError> {
        at.0.checked_sub(self.start.0).ok_or(GuestMemoryError { at: at.0, len: len as u64 })
    }
}

impl GuestMemory for SliceMemory {
    fn regions(&self) -> Vec<GuestRegion> {
        let memory = self.memory.file().is_some().then(|| (Arc::clone(&self.memory), 0));
        vec![GuestRegion { start: self.start, len: self.memory.len(), memory }]
    }

    fn read(&self, at: GuestAddress, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        let offset = self.offset(at, into.len())?;
        let len = into.len() as u64;
        self.memory.read(offset, into).map_err(|_| GuestMemoryError { at: at.0, len })
    }

    fn write(&self, at: GuestAddress, from: &[u8]) -> Result<(), GuestMemoryError> {
        let fault = |_| GuestMemoryError { at: at.0, len: from.len() as u64 };
        let offset = self.offset(at, from.len())?;
        if from.len().is_multiple_of(4) && offset.is_multiple_of(4) && !from.is_empty() {
            return self.memory.store_last_word_last(offset, from).map_err(fault);
        }
        self.memory.write(offset, from).map_err(fault)
    }
}
