//! What the blocks lie on: memory that DMA reaches straight, or a file whose jobs a small pool of threads carries out.
//!
//! A 4 KiB read of LBA 8 from a file becomes a [`Job`] of kind `Read` at byte 4,096 whose buffer is the guest's page itself; a worker's `preadv`
//! fills it and the controller hears of it in [`Media::reap`]. From memory the same read is one DMA and no job.

mod file;
mod image;
mod memory;
mod wholeness;
mod worker;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farbus_transport::{Memory, MemoryError};
use thiserror::Error;

use crate::dma_buffer::DmaBuffer;
use crate::holder::HolderNote;

pub use file::FileMedia;
pub use image::open;
pub use memory::MemoryMedia;

/// Bytes of a logical block.
pub const BLOCK_BYTES: u64 = 512;

/// Why an image cannot be lent.
#[derive(Debug, Error)]
pub enum MediaError {
    /// There is no such file.
    #[error("there is no image at {path}: check the path")]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// It is a directory.
    #[error("{path} is a directory: name an image file or a block device")]
    Directory {
        /// The path.
        path: PathBuf,
    },
    /// It is neither a file nor a block device.
    #[error("{path} is neither a file nor a block device")]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// It has no bytes.
    #[error("{path} is empty: give it a size first, for example with truncate -s 1G")]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// It does not end on a block boundary.
    #[error("{path} has {len} bytes, which is not a multiple of {BLOCK_BYTES}: extend it or give another image")]
    Unaligned {
        /// The path.
        path: PathBuf,
        /// Bytes it has.
        len: u64,
    },
    /// Somebody else lends it.
    #[error("{path} is in use by another lender: end that one, or lend it read-only from both")]
    Locked {
        /// The path.
        path: PathBuf,
    },
    /// The host refused.
    #[error("cannot {what} {path}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The controller's own memory could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The image's size, checked.
pub(super) fn checked_len(path: &Path, len: u64) -> Result<u64, MediaError> {
    if len == 0 {
        return Err(MediaError::Empty { path: path.to_owned() });
    }
    if !len.is_multiple_of(BLOCK_BYTES) {
        return Err(MediaError::Unaligned { path: path.to_owned(), len });
    }
    Ok(len)
}

/// What a job does to the media.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JobKind {
    /// Media into the buffers.
    Read,
    /// The buffers into the media.
    Write {
        /// Not done before it is on stable storage.
        durable: bool,
    },
    /// All that was done before is on stable storage.
    #[default]
    Flush,
    /// The range reads as zeroes from now on.
    Zero {
        /// The storage behind it may be given back.
        deallocate: bool,
        /// Not done before it is on stable storage.
        durable: bool,
    },
    /// The buffers against the media.
    Compare,
}

/// How a job ended badly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobError {
    /// The media differs from the buffers.
    Different,
    /// There is no room for the write.
    NoSpace,
    /// The media could not be read or written.
    Failed,
}

/// Work for the media, made once and used again for ever.
#[derive(Debug, Default)]
pub struct Job {
    /// Who asked: the controller's slot.
    pub slot: u32,
    /// Which life of the controller asked.
    pub epoch: u32,
    /// What to do.
    pub kind: JobKind,
    /// First byte of the media.
    pub offset: u64,
    /// Bytes of the media; for reads, writes and compares as many as the buffers have.
    pub len: u64,
    /// Memory to fill or to take from, in order. Let go by whoever carries the job out, before anybody hears that it is done.
    pub buffers: Vec<DmaBuffer>,
    /// How many bytes of the buffers are the guest's own.
    pub guest_bytes: u64,
    /// The outcome.
    pub outcome: Option<JobError>,
}

impl Job {
    /// A job with room for the pages of the longest transfer, so that using it never allocates.
    pub(super) fn with_room() -> Self {
        let pages = super::MAX_TRANSFER_BYTES as usize / 4096 + 1;
        Self { buffers: Vec::with_capacity(pages), ..Self::default() }
    }

    /// Lets go of all memory.
    pub(super) fn clear(&mut self) {
        self.buffers.clear();
        self.guest_bytes = 0;
        self.outcome = None;
    }
}

/// Where the blocks are. All calls come from the controller's thread.
pub trait Media: Send {
    /// Bytes; a multiple of [`BLOCK_BYTES`], at least one block.
    fn len(&self) -> u64;

    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes may be lost with the host's power until flushed.
    fn volatile_cache(&self) -> bool;

    /// The image itself, where data can be moved between it and the guest without a job.
    fn memory(&self) -> Option<&Arc<Memory>>;

    /// A name that no other image has, stable for as long as the image exists.
    fn identity(&self) -> u64;

    /// See [`crate::Backend::holder`].
    fn holder(&self) -> Option<HolderNote> {
        None
    }

    /// See [`crate::Backend::note_holder`].
    fn note_holder(&mut self, _note: HolderNote) {}

    /// Starts a job; it comes back from [`Media::reap`] or [`Media::cancel`]. At most [`MAX_JOBS`] at once.
    fn submit(&mut self, job: Box<Job>);

    /// A job that is done.
    fn reap(&mut self) -> Option<Box<Job>>;

    /// A job that was not begun and now never will be.
    fn cancel(&mut self) -> Option<Box<Job>>;

    /// Whether polling makes progress by itself, without anybody else's work.
    fn busy(&self) -> bool;

    /// Prepares to sleep: false where a job is done already.
    fn arm(&mut self) -> bool;

    /// Readable when an armed media has done a job.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// Jobs that one controller has at once.
pub const MAX_JOBS: usize = 256;
