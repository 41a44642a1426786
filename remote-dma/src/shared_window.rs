//! A window whose memory a device of another process may map itself: the descriptor, and the log that it does not mark.
//!
//! 512 MiB at iova 0 lie at offset 0 of a memfd: a vfio-user server gets the descriptor with its `DMA_MAP` and writes guest memory without a word, so
//! [`SharedWindow::mark_all`] counts every page as written when it may have been.

use std::os::fd::BorrowedFd;

use farbus_transport::Mapped;

use crate::dirty_log::DirtyLog;

/// Guest memory that somebody else maps as long as this lives: its owner waits for that when it takes the memory back.
#[derive(Debug)]
pub struct SharedWindow {
    /// Of no bytes: it keeps the mapping, and the memory's owner waiting.
    held: Mapped,
    /// Where the window begins in the memory, and its bytes.
    offset: u64,
    len: u64,
    /// Where the device may write. Its pages are counted from the granted memory's first byte, `log_offset` bytes before the window.
    log: Option<(DirtyLog, u64)>,
}

impl SharedWindow {
    /// `len` bytes from `offset` of what `held` keeps mapped. What is written there is marked in the log, if any, from its offset on.
    pub fn new(held: Mapped, offset: u64, len: u64, log: Option<(DirtyLog, u64)>) -> Self {
        Self { held, offset, len, log }
    }

    /// The file of the memory, and where in it the window begins; `None` where it has none.
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        let (memory, start) = self.held.parts();
        let (fd, base) = memory.file()?;
        Some((fd, base.checked_add(start)?.checked_add(self.offset)?))
    }

    /// Counts every page as written.
    pub fn mark_all(&self) {
        if let Some((log, offset)) = &self.log {
            log.mark(*offset, self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use farbus_transport::Memory;

    use super::*;

    #[test]
    fn its_file_and_its_pages_are_those_of_the_window() {
        let memory = Memory::memfd("guest", 64 << 10).unwrap();
        let log = DirtyLog::new(memory.len()).unwrap();
        let held = Mapped::new(Arc::clone(&memory), 0, 0).unwrap();
        let window = SharedWindow::new(held, 0x3000, 0x2000, Some((log.clone(), 0x3000)));
        assert_eq!(window.file().map(|(_, offset)| offset), Some(0x3000));
        window.mark_all();
        let mut pages = Vec::new();
        log.take(|page| pages.push(page));
        assert_eq!(pages, [3, 4]);
    }
}
