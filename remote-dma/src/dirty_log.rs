//! Which 4 KiB pages of a piece of memory a device has written, one bit a page, shared between two sides.
//!
//! A DMA write of 4 KiB at offset 0x3000 sets bit 3 of word 0; `take` hands each set bit out once. The bits lie in memory of their own that
//! a lender can be granted, because neither KVM's log nor a bitmap in the VMM sees what another process or an RNIC writes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use farbus_transport::{Memory, MemoryError};

/// Bytes that one bit stands for.
pub const PAGE_BYTES: u64 = 4096;

/// A shared bitmap of written pages.
#[derive(Clone, Debug)]
pub struct DirtyLog {
    bits: Arc<Memory>,
    pages: u64,
}

impl DirtyLog {
    /// A clean log for `len` bytes of memory.
    ///
    /// # Errors
    /// [`MemoryError`] where the bitmap cannot be allocated.
    pub fn new(len: u64) -> Result<Self, MemoryError> {
        let pages = len.div_ceil(PAGE_BYTES);
        Ok(Self { bits: Memory::memfd("farbus-dirty-log", Self::bitmap_bytes(len))?, pages })
    }

    /// A log over bits that exist already: a grant of the peer's, say.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] where the bitmap is too short for `len` bytes of memory.
    pub fn over(bits: Arc<Memory>, len: u64) -> Result<Self, MemoryError> {
        bits.at(0, Self::bitmap_bytes(len))?;
        Ok(Self { bits, pages: len.div_ceil(PAGE_BYTES) })
    }

    /// Bytes of bitmap for `len` bytes of memory: a multiple of 8, at least 8.
    pub fn bitmap_bytes(len: u64) -> u64 {
        len.div_ceil(PAGE_BYTES).div_ceil(64).max(1) * 8
    }

    /// The bitmap itself, to grant it.
    pub fn bits(&self) -> &Arc<Memory> {
        &self.bits
    }

    /// Marks every page that `len` bytes from `offset` touch. Pages past the end are ignored. Call it after the bytes are written: a reader
    /// that takes the bit then copies the page sees them.
    pub fn mark(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = offset / PAGE_BYTES;
        let last = (offset.saturating_add(len - 1) / PAGE_BYTES).min(self.pages.saturating_sub(1));
        for page in first..=last {
            let Ok(word) = self.bits.atomic_u64(page / 64 * 8) else {
                return;
            };
            // Always the read-modify-write, never a test first: a reader may take the bit between the test and our return.
            word.fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    /// Takes all marks and clears them; `visit` gets each page's number once.
    pub fn take(&self, mut visit: impl FnMut(u64)) {
        for index in 0..self.pages.div_ceil(64) {
            let Ok(word) = self.bits.atomic_u64(index * 8) else { return };
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::AcqRel);
            while bits != 0 {
                visit(index * 64 + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }

    /// Whether any page is marked.
    pub fn is_clean(&self) -> bool {
        (0..self.pages.div_ceil(64))
            .all(|index| self.bits.atomic_u64(index * 8).is_ok_and(|word| word.load(Ordering::Acquire) == 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(log: &DirtyLog) -> Vec<u64> {
        let mut pages = Vec::new();
        log.take(|page| pages.push(page));
        pages
    }

    #[test]
    fn every_touched_page_is_marked_and_no_other() {
        let log = DirtyLog::new(200 * PAGE_BYTES).unwrap();
        log.mark(0x3fff, 2);
        log.mark(65 * PAGE_BYTES, PAGE_BYTES);
        log.mark(100 * PAGE_BYTES, 0);
        assert_eq!(taken(&log), [3, 4, 65]);
        assert!(log.is_clean());
    }

    #[test]
    fn a_mark_past_the_end_neither_panics_nor_counts() {
        let log = DirtyLog::new(3 * PAGE_BYTES).unwrap();
        log.mark(2 * PAGE_BYTES, u64::MAX);
        log.mark(u64::MAX, 5);
        assert_eq!(taken(&log), [2]);
    }
}
