//! Whether an image still has the length with which it was lent: where somebody shortens it, nothing of it is believed any more.
//!
//! An image of 64 MiB is cut to nothing. The guest's next write would let it grow again, with zeros for all that was lost, and a read of those would
//! succeed. So from the first access that finds it shorter, every one fails, and the log says why, once.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, StatxFlags};

use super::JobError;

/// What is known of a file's length.
#[derive(Debug)]
pub(super) struct Wholeness {
    /// Bytes that there must be; `None` for a block device, which keeps its length.
    len: Option<u64>,
    lost: AtomicBool,
    /// The file system had no room at the last write.
    full: AtomicBool,
}

impl Wholeness {
    /// Of `file`, which has `len` bytes now.
    pub(super) fn new(file: &File, len: u64) -> Self {
        let device = file.metadata().is_ok_and(|found| found.file_type().is_block_device());
        Self { len: (!device).then_some(len), lost: AtomicBool::new(false), full: AtomicBool::new(false) }
    }

    /// Looks, before what makes a file longer, and after what must have found all of it. Somebody who shortens it between the first look and a write of its
    /// very last bytes is not noticed.
    ///
    /// # Errors
    /// [`JobError::Failed`] from the first time on that it was too short.
    pub(super) fn check(&self, file: &File) -> Result<(), JobError> {
        let Some(wanted) = self.len else { return Ok(()) };
        self.recall()?;
        // The length alone: for a file's times a network file system would write everything back first.
        match rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::SIZE) {
            Ok(found) if found.stx_size >= wanted => Ok(()),
            Ok(found) => Err(self.lose(&format!("it has {} bytes", found.stx_size))),
            Err(error) => Err(self.lose(&error)),
        }
    }

    /// Before what stores nothing, it is enough to know what was found earlier.
    ///
    /// # Errors
    /// As [`Wholeness::check`].
    pub(super) fn recall(&self) -> Result<(), JobError> {
        if self.lost.load(Ordering::Relaxed) { Err(JobError::Failed) } else { Ok(()) }
    }

    fn lose(&self, what: &dyn std::fmt::Display) -> JobError {
        if !self.lost.swap(true, Ordering::Relaxed) {
            let wanted = self.len.unwrap_or_default();
            tracing::error!(
                "the image was shortened while it was lent: {what} of {wanted}; the guest's every access fails from now on"
            );
        }
        JobError::Failed
    }

    /// A write found room or none; said once, until there is room again.
    pub(super) fn note_room(&self, room: bool) {
        if room {
            if self.full.load(Ordering::Relaxed) {
                self.full.store(false, Ordering::Relaxed);
            }
        } else if !self.full.swap(true, Ordering::Relaxed) {
            tracing::warn!("there is no room for what the guest writes: its writes fail until there is");
        }
    }
}
