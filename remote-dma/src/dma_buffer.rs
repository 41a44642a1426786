//! Memory that a system call fills or reads for a device: the guest's own, or a buffer of the device's.
//!
//! A worker's `preadv` fills 4 KiB of guest memory at iova 0x2_3f00_1000; when the worker drops the [`DmaBuffer`], the page goes into the dirty
//! log, and only after that does the session acknowledge that nothing touches the page any more.

use std::sync::Arc;

use farbus_transport::{Mapped, Memory};

use crate::dirty_log::DirtyLog;

/// Bytes that stay mapped as long as this lives. Guest memory that was mapped for writing counts as written when it is dropped: the mark is
/// part of the access, so it cannot be forgotten, nor come after an unmap was acknowledged or a completion was posted.
#[derive(Debug)]
pub struct DmaBuffer {
    mapped: Mapped,
    /// The log of the memory, and where in it the bytes begin.
    log: Option<(DirtyLog, u64)>,
    /// Held only for its count, which whoever waits for all accesses to end watches.
    _in_use: Option<Arc<()>>,
}

impl DmaBuffer {
    /// Guest memory that the device may write: it is marked in `log`, whose memory has these bytes at `offset`, and then `in_use` is let go.
    pub fn written(mapped: Mapped, log: DirtyLog, offset: u64, in_use: Option<Arc<()>>) -> Self {
        Self { mapped, log: Some((log, offset)), _in_use: in_use }
    }

    /// Guest memory that hardware writes whenever it likes, without anybody being told: all of it counts as written until it is dropped.
    pub fn held(mapped: Mapped, log: DirtyLog, offset: u64) -> Self {
        let buffer = Self::written(mapped, log, offset, None);
        buffer.hold();
        buffer
    }

    /// Says once more that hardware writes it, after a buffer that shared pages with it was dropped.
    pub fn hold(&self) {
        if let Some((log, offset)) = &self.log {
            log.hold(*offset, self.mapped.len());
        }
    }

    /// Guest memory that the device reads.
    pub fn read(mapped: Mapped, in_use: Option<Arc<()>>) -> Self {
        Self { mapped, log: None, _in_use: in_use }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.mapped.len()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.mapped.is_empty()
    }

    /// First byte. Valid for `len()` bytes as long as this value lives; others may write the bytes at any time.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapped.as_ptr()
    }

    /// The memory and the offset of the first byte in it.
    pub fn parts(&self) -> (&Arc<Memory>, u64) {
        self.mapped.parts()
    }
}

/// A buffer of the device's own.
impl From<Mapped> for DmaBuffer {
    fn from(mapped: Mapped) -> Self {
        Self::read(mapped, None)
    }
}

impl Drop for DmaBuffer {
    fn drop(&mut self) {
        // Before the fields are dropped, and with them what an unmap waits for.
        if let Some((log, offset)) = &self.log {
            log.mark(*offset, self.mapped.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_mapped_for_writing_is_marked_before_its_token_is_let_go() {
        let memory = Memory::memfd("guest", 64 << 10).unwrap();
        let log = DirtyLog::new(memory.len()).unwrap();
        let token = Arc::new(());
        let mapped = || Mapped::new(Arc::clone(&memory), 0x3ff8, 16).unwrap();
        drop(DmaBuffer::read(mapped(), Some(Arc::clone(&token))));
        drop(DmaBuffer::from(mapped()));
        assert!(log.is_clean());
        let buffer = DmaBuffer::written(mapped(), log.clone(), 0x3ff8, Some(Arc::clone(&token)));
        std::thread::scope(|scope| {
            scope.spawn(move || drop(buffer));
            while Arc::strong_count(&token) > 1 {
                std::hint::spin_loop();
            }
            std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
            let mut pages = Vec::new();
            log.take(|page| pages.push(page));
            assert_eq!(pages, [3, 4]);
        });
    }
}
