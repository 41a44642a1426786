//! Which 4 KiB pages of a piece of memory a device has written, one byte a page, shared between two sides.
//!
//! A DMA write of 4 KiB at offset 0x3000 stores 1 in byte 3; `take` hands each such page out once. The bytes lie in memory of their own that
//! a lender can be granted, because neither KVM's log nor a bitmap in the VMM sees what another process or an RNIC writes.
//!
//! A byte and not a bit, because a bit is set by a locked read-modify-write, which waits until all bytes of the DMA before it have left the
//! store buffer: a quarter of what the copy of 4 KiB itself costs. A plain store of a byte waits for nothing.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use farbus_transport::{Memory, MemoryError};

/// Nothing was written.
const CLEAN: u8 = 0;
/// Written since the mark was taken last.
const MARKED: u8 = 1;
/// May be written at any time.
const HELD: u8 = 2;

/// Bytes that one mark stands for.
pub const PAGE_BYTES: u64 = 4096;

/// A shared map of written pages.
#[derive(Clone, Debug)]
pub struct DirtyLog {
    marks: Arc<Memory>,
    pages: u64,
}

impl DirtyLog {
    /// A clean log for `len` bytes of memory.
    ///
    /// # Errors
    /// [`MemoryError`] where the marks cannot be allocated.
    pub fn new(len: u64) -> Result<Self, MemoryError> {
        let pages = len.div_ceil(PAGE_BYTES);
        Ok(Self { marks: Memory::memfd("farbus-dirty-log", Self::log_bytes(len))?, pages })
    }

    /// A log over marks that exist already: a grant of the peer's, say.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] where they are too few for `len` bytes of memory, [`MemoryError::ReadOnly`].
    pub fn over(marks: Arc<Memory>, len: u64) -> Result<Self, MemoryError> {
        if !marks.writable() {
            return Err(MemoryError::ReadOnly);
        }
        marks.at(0, Self::log_bytes(len))?;
        Ok(Self { marks, pages: len.div_ceil(PAGE_BYTES) })
    }

    /// Bytes of marks for `len` bytes of memory: at least 1.
    pub fn log_bytes(len: u64) -> u64 {
        len.div_ceil(PAGE_BYTES).max(1)
    }

    /// The marks themselves, to grant them.
    pub fn marks(&self) -> &Arc<Memory> {
        &self.marks
    }

    /// Marks every page that `len` bytes from `offset` touch. Pages past the end are ignored. Call it after the bytes are written: a reader
    /// that takes the mark then copies the page sees them.
    #[inline(always)]
    pub fn mark(&self, offset: u64, len: u64) {
        // Most DMA is inside one page, and its mark is one store.
        if len.wrapping_sub(1) < PAGE_BYTES - offset % PAGE_BYTES && offset / PAGE_BYTES < self.pages {
            if let Some([mark]) = self.marks.atomic_bytes(offset / PAGE_BYTES, 1) {
                mark.store(MARKED, Ordering::Release);
            }
            return;
        }
        self.mark_pages(offset, len);
    }

    #[inline(never)]
    fn mark_pages(&self, offset: u64, len: u64) {
        self.set(offset, len, MARKED);
    }

    /// Counts every page that `len` bytes from `offset` touch as written, however often it is taken, until [`DirtyLog::mark`] marks it once
    /// more: for memory that hardware writes whenever it likes. Only whoever marks the log holds in it.
    pub fn hold(&self, offset: u64, len: u64) {
        self.set(offset, len, HELD);
    }

    /// Lets go of every page that is held: nobody writes them any more, but all of them may have been written.
    pub fn let_go(&self) {
        for mark in self.all() {
            // One that was marked meanwhile has been let go of.
            let _was = mark.compare_exchange(HELD, MARKED, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    fn set(&self, offset: u64, len: u64, value: u8) {
        let (first, end) = (offset / PAGE_BYTES, offset.saturating_add(len).div_ceil(PAGE_BYTES).min(self.pages));
        if len == 0 || first >= end {
            return;
        }
        // Inside the log, because `end` is not over its pages; always the store, never a look first: a reader may take the mark between the
        // look and our return.
        for mark in self.marks.atomic_bytes(first, end - first).unwrap_or_default() {
            mark.store(value, Ordering::Release);
        }
    }

    /// Takes all marks and clears them, but not those of held pages; `visit` gets each page's number once.
    pub fn take(&self, mut visit: impl FnMut(u64)) {
        for (page, mark) in (0..).zip(self.all()) {
            let seen = mark.load(Ordering::Acquire);
            if seen == CLEAN {
                continue;
            }
            // What is held stays held, also where that begins between the look and the taking.
            let taken = seen == HELD
                || mark.compare_exchange(seen, CLEAN, Ordering::AcqRel, Ordering::Acquire).is_ok()
                || mark.load(Ordering::Acquire) != CLEAN;
            if taken {
                visit(page);
            }
        }
    }

    /// Whether no page is marked.
    pub fn is_clean(&self) -> bool {
        self.all().iter().all(|mark| mark.load(Ordering::Acquire) == 0)
    }

    fn all(&self) -> &[AtomicU8] {
        // The constructors made sure that every page has its mark.
        self.marks.atomic_bytes(0, self.pages).unwrap_or_default()
    }
}

/// The logs of several memories. One outlives the windows of its memory until its marks are taken: whoever copies dirty pages may ask only
/// after the device has let go of them.
#[derive(Clone, Debug, Default)]
pub struct DirtyLogs(Vec<(Weak<Memory>, DirtyLog)>);

impl DirtyLogs {
    /// The log of a memory, where it has one.
    pub fn of(&self, memory: &Arc<Memory>) -> Option<&DirtyLog> {
        self.0.iter().find(|(known, _)| std::ptr::eq(known.as_ptr(), Arc::as_ptr(memory))).map(|(_, log)| log)
    }

    /// The log of a memory, made where it has none.
    ///
    /// # Errors
    /// [`MemoryError`] where the marks cannot be allocated.
    pub fn of_or_new(&mut self, memory: &Arc<Memory>) -> Result<DirtyLog, MemoryError> {
        if let Some(log) = self.of(memory) {
            return Ok(log.clone());
        }
        let log = DirtyLog::new(memory.len())?;
        self.0.push((Arc::downgrade(memory), log.clone()));
        Ok(log)
    }

    /// Forgets logs from which nothing will be taken: of memories that nobody has any more, and of those that are not `in_use` and have no mark.
    pub(crate) fn prune(&mut self, in_use: impl Fn(&Arc<Memory>) -> bool) {
        self.0.retain(|(memory, log)| memory.upgrade().is_some_and(|memory| in_use(&memory) || !log.is_clean()));
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
        let log = DirtyLog::new(3 * PAGE_BYTES - 1).unwrap();
        log.mark(2 * PAGE_BYTES, u64::MAX);
        log.mark(u64::MAX, 5);
        assert_eq!(taken(&log), [2]);
    }

    #[test]
    fn what_is_held_is_taken_again_and_again_until_it_is_let_go() {
        let log = DirtyLog::new(8 * PAGE_BYTES).unwrap();
        log.hold(2 * PAGE_BYTES, 3 * PAGE_BYTES);
        log.mark(6 * PAGE_BYTES, 1);
        assert_eq!(taken(&log), [2, 3, 4, 6]);
        assert_eq!(taken(&log), [2, 3, 4]);
        log.mark(2 * PAGE_BYTES, PAGE_BYTES);
        assert_eq!(taken(&log), [2, 3, 4]);
        assert_eq!(taken(&log), [3, 4]);
        log.let_go();
        assert_eq!(taken(&log), [3, 4]);
        assert!(log.is_clean());
    }

    #[test]
    fn a_log_is_kept_until_its_marks_are_taken_or_its_memory_is_gone() {
        let memories = [(); 3].map(|()| Memory::memfd("guest", PAGE_BYTES).unwrap());
        let mut logs = DirtyLogs::default();
        for memory in &memories {
            logs.of_or_new(memory).unwrap();
        }
        logs.of_or_new(&memories[0]).unwrap().mark(0, 1);
        logs.of_or_new(&memories[2]).unwrap().mark(0, 1);
        let [marked, clean, gone] = memories;
        drop(gone);
        logs.prune(|_| true);
        assert_eq!(logs.0.len(), 2);
        logs.prune(|_| false);
        assert!(logs.of(&clean).is_none());
        assert_eq!(taken(logs.of(&marked).unwrap()), [0]);
        logs.prune(|_| false);
        assert!(logs.of(&marked).is_none());
    }
}
