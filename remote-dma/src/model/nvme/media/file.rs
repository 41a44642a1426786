//! An image in a file or on a block device: opened and locked here, read and written by the workers.
//!
//! `FileMedia::open("disk.img", false)` takes an exclusive lock (shared for read-only), so that a second lender of the same image is refused
//! before it can spoil anything.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use farbus_transport::Memory;
use rustix::fs::FlockOperation;

use super::worker::Workers;
use super::{Job, Media, MediaError, checked_len};

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
        let host = |what| {
            move |source| MediaError::Host {
                what,
                path: path.to_owned(),
                source,
            }
        };
        // Looked at before it is opened, because opening a pipe for writing waits for its reader.
        let metadata = std::fs::metadata(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => MediaError::Missing { path: path.to_owned() },
            _ => host("look at")(source),
        })?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            return Err(MediaError::Directory { path: path.to_owned() });
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(MediaError::Kind { path: path.to_owned() });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(host("open"))?;
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        rustix::fs::flock(&file, lock).map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => MediaError::Locked { path: path.to_owned() },
            _ => host("lock")(errno.into()),
        })?;
        let len = checked_len(path, size(&file).map_err(host("measure"))?)?;
        let identity = metadata.dev() << 48 ^ metadata.rdev() << 32 ^ metadata.ino();
        Ok(Self {
            len,
            identity,
            read_only,
            workers: Workers::start(Arc::new(file)).map_err(host("start workers for"))?,
        })
    }
}

/// Bytes of a file or block device: the end is where seeking finds it.
fn size(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?)
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
