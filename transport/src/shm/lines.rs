//! The rings of a link in one piece of shared memory: where each word and slot lies.
//!
//! The lender's ring starts at 0 and the borrower's at [`RING_BYTES`]; slot 5 of the borrower's is at `RING_BYTES + 256 + 5 * 64`.

use std::sync::Arc;

use crate::memory::{Memory, MemoryError};
use crate::ring::{LINE_BYTES, Line, Lines};
use crate::sync::AtomicU64;

/// Slots of a ring: 16 KiB, so that both rings stay in a core's first-level cache.
pub(super) const SLOTS: u32 = 256;
const CONSUMED_AT: u64 = 0;
/// Two lines on, because CPUs fetch lines in pairs.
const ARMED_AT: u64 = 128;
const SLOTS_AT: u64 = 256;
/// Where the side that fills this ring says that it is inside the peer's memory.
const BUSY_AT: u64 = 192;
/// Bytes of one ring with its words, in whole pages.
pub(super) const RING_BYTES: u64 = (SLOTS_AT + SLOTS as u64 * LINE_BYTES as u64).next_multiple_of(4096);

/// One ring of a link.
pub(super) struct SharedLines {
    memory: Arc<Memory>,
    base: u64,
}

impl SharedLines {
    /// The ring at `base` of `memory`.
    ///
    /// # Errors
    /// [`MemoryError`] where it does not fit or is not writable.
    pub(super) fn new(memory: Arc<Memory>, base: u64) -> Result<Self, MemoryError> {
        memory.at(base, RING_BYTES)?;
        memory.atomic_u64(base)?;
        Ok(Self { memory, base })
    }

    #[inline]
    fn at(&self, offset: u64) -> *mut u8 {
        // SAFETY: `new` checked that RING_BYTES from `base` are mapped, and every caller stays below that.
        unsafe { self.memory.base().as_ptr().add((self.base + offset) as usize) }
    }
}

impl SharedLines {
    /// 1 while the side that fills this ring touches granted memory.
    #[inline]
    pub(super) fn busy(&self) -> &AtomicU64 {
        // SAFETY: inside the ring, aligned, and valid for every bit pattern.
        unsafe { AtomicU64::from_ptr(self.at(BUSY_AT).cast()) }
    }
}

impl Lines for SharedLines {
    fn capacity(&self) -> u32 {
        SLOTS
    }

    #[inline]
    fn line(&self, position: u32) -> &Line {
        let slot = u64::from(position % SLOTS);
        // SAFETY: inside the ring because slot < SLOTS; aligned to 64 because memory and base are aligned to pages; a `Line` is atomics only,
        // for which every bit pattern that the peer may write is valid.
        unsafe { &*self.at(SLOTS_AT + slot * LINE_BYTES as u64).cast::<Line>() }
    }

    #[inline]
    fn consumed(&self) -> &AtomicU64 {
        // SAFETY: inside the ring, aligned, and valid for every bit pattern.
        unsafe { AtomicU64::from_ptr(self.at(CONSUMED_AT).cast()) }
    }

    #[inline]
    fn armed(&self) -> &AtomicU64 {
        // SAFETY: inside the ring, aligned, and valid for every bit pattern.
        unsafe { AtomicU64::from_ptr(self.at(ARMED_AT).cast()) }
    }
}
