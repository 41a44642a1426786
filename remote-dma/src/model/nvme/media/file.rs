//! An image in a file or on a block device, read and written by the workers.
//!
//! `FileMedia::open("disk.img", false)` takes an exclusive lock (shared for read-only), so that a second lender of the same image is refused
//! before it can spoil anything.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use farbus_transport::Memory;

use super::image::Image;
use super::worker::Workers;
use super::{Job, Media, MediaError};

/// Blocks in a file.
#[derive(Debug)]
pub struct FileMedia {
    len: u64,
    identity: u64,
    read_only: bool,
    workers: Workers,
}

impl FileMedia {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// [`MediaError`] says what is wrong with it and what to do.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, MediaError> {
        Self::over(Image::open(path, read_only)?, path)
    }

    /// Starts the workers of an image.
    pub(super) fn over(image: Image, path: &Path) -> Result<Self, MediaError> {
        let Image { file, len, identity, read_only } = image;
        let workers = Workers::start(Arc::new(file));
        let workers = workers.map_err(|source| MediaError::Host { what: "start workers for", path: path.to_owned(), source })?;
        Ok(Self { len, identity, read_only, workers })
    }
}

impl Media for FileMedia {
    fn len(&self) -> u64 {
        self.len
    }

    fn volatile_cache(&self) -> bool {
        !self.read_only
    }

    fn memory(&self) -> Option<&Arc<Memory>> {
        None
    }

    fn identity(&self) -> u64 {
        self.identity
    }

    fn submit(&mut self, job: Box<Job>) {
        self.workers.submit(job);
    }

    fn reap(&mut self) -> Option<Box<Job>> {
        self.workers.reap()
    }

    fn cancel(&mut self) -> Option<Box<Job>> {
        self.workers.cancel()
    }

    fn busy(&self) -> bool {
        false
    }

    fn arm(&mut self) -> bool {
        self.workers.arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.workers.wake_fd())
    }
}
