//! An image in a file or on a block device, read and written by the workers, or, where the file is memory anyway, by the controller's thread.
//!
//! `FileMedia::open("disk.img", false)` takes an exclusive lock (shared for read-only), so that a second lender of the same image is refused
//! before it can spoil anything. On tmpfs a read of 4 KiB is one `preadv` into the guest's page in the next poll.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use farbus_transport::Memory;
use rustix::fs::XattrFlags;

use super::image::Image;
use super::wholeness::Wholeness;
use super::worker::{Carrier, Workers};
use super::{Job, JobKind, MAX_JOBS, Media, MediaError};
use crate::holder::HolderNote;

/// The extended attribute (xattr(7)) of an image that says who had it last.
const HOLDER: &str = "user.farbus.holder";

/// Blocks in a file.
#[derive(Debug)]
pub struct FileMedia {
    len: u64,
    identity: u64,
    read_only: bool,
    file: Arc<File>,
    workers: Workers,
    prompt: Option<Prompt>,
}

/// A file whose reads and writes wait for nobody: handing them to another thread would cost more than they do.
#[derive(Debug)]
struct Prompt {
    carrier: Carrier,
    jobs: VecDeque<Box<Job>>,
}

impl Prompt {
    fn new(file: &Arc<File>, wholeness: &Arc<Wholeness>) -> Self {
        Self { carrier: Carrier::new(Arc::clone(file), Arc::clone(wholeness)), jobs: VecDeque::with_capacity(MAX_JOBS) }
    }

    /// Zeroing and flushing may take long, of memory too.
    fn takes(job: &Job) -> bool {
        matches!(job.kind, JobKind::Read | JobKind::Write { .. })
    }
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
        let in_memory = image.is_in_memory();
        let Image { file, len, identity, read_only } = image;
        let wholeness = Arc::new(Wholeness::new(&file, len));
        let file = Arc::new(file);
        let workers = Workers::start(Arc::clone(&file), Arc::clone(&wholeness));
        let workers = workers.map_err(|source| MediaError::Host { what: "start workers for", path: path.to_owned(), source })?;
        let prompt = in_memory.then(|| Prompt::new(&file, &wholeness));
        Ok(Self { len, identity, read_only, file, workers, prompt })
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

    fn holder(&self) -> Option<HolderNote> {
        let mut bytes = [0; HolderNote::BYTES];
        let read = rustix::fs::fgetxattr(&self.file, HOLDER, &mut bytes).ok()?;
        HolderNote::parse(bytes.get(..read)?)
    }

    fn note_holder(&mut self, note: HolderNote) {
        if self.read_only {
            // Who writes nothing undoes nothing.
            return;
        }
        if let Err(errno) = rustix::fs::fsetxattr(&self.file, HOLDER, &note.encode(), XattrFlags::empty()) {
            tracing::warn!(%errno, "an image cannot remember its borrower (its file system has no attributes for that): who loses this lender does not get it back");
        }
    }

    fn submit(&mut self, job: Box<Job>) {
        match &mut self.prompt {
            Some(prompt) if Prompt::takes(&job) => prompt.jobs.push_back(job),
            _ => self.workers.submit(job),
        }
    }

    fn reap(&mut self) -> Option<Box<Job>> {
        let prompt = self.prompt.as_mut();
        if let Some(prompt) = prompt
            && let Some(mut job) = prompt.jobs.pop_front()
        {
            prompt.carrier.carry_out(&mut job);
            return Some(job);
        }
        self.workers.reap()
    }

    fn cancel(&mut self) -> Option<Box<Job>> {
        self.prompt.as_mut().and_then(|prompt| prompt.jobs.pop_front()).or_else(|| self.workers.cancel())
    }

    fn busy(&self) -> bool {
        self.prompt.as_ref().is_some_and(|prompt| !prompt.jobs.is_empty())
    }

    fn arm(&mut self) -> bool {
        !self.busy() && self.workers.arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.workers.wake_fd())
    }
}
