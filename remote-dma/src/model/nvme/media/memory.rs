//! An image in memory: reads and writes never come here, because DMA moves them straight; what is left is done in small steps.
//!
//! Zeroing 32 MiB takes 128 polls of 256 KiB each, so that no register access waits for it; comparing 4 KiB takes one.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use farbus_transport::Memory;

use super::{Job, JobError, JobKind, MAX_JOBS, Media, MediaError, checked_len};

/// Bytes that one step zeroes or compares.
const STEP_BYTES: u64 = 256 << 10;
const PIECE_BYTES: usize = 4096;
static ZEROES: [u8; PIECE_BYTES] = [0; PIECE_BYTES];

/// Blocks in memory.
#[derive(Debug)]
pub struct MemoryMedia {
    image: Arc<Memory>,
    identity: u64,
    jobs: VecDeque<Box<Job>>,
    /// Bytes of the first job that are done.
    progress: u64,
}

impl MemoryMedia {
    /// Blocks in `image`, all of it. A mapping of a file that somebody may shorten meanwhile is no good image: use
    /// [`super::open`] for files.
    ///
    /// # Errors
    /// [`MediaError::Empty`], [`MediaError::Unaligned`].
    pub fn new(image: Arc<Memory>) -> Result<Self, MediaError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        checked_len(Path::new("(memory)"), image.len())?;
        let identity = u64::from(std::process::id()) << 32 | NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Self::of_file(image, identity))
    }

    /// Blocks in a mapping of a file whose length was checked and whose pages are all there.
    pub(super) fn of_file(image: Arc<Memory>, identity: u64) -> Self {
        Self { image, identity, jobs: VecDeque::with_capacity(MAX_JOBS), progress: 0 }
    }

    /// Takes the first job up to `STEP_BYTES` further; true once it is done.
    fn step(&mut self) -> bool {
        let Some(job) = self.jobs.front_mut() else {
            return false;
        };
        let end = job.len.min(self.progress + STEP_BYTES);
        let outcome = match job.kind {
            JobKind::Flush => Ok(()),
            JobKind::Zero { .. } => pieces(self.progress, end)
                .try_for_each(|(at, len)| self.image.write(job.offset + at, ZEROES.get(..len).unwrap_or_default()))
                .map_err(|_| JobError::Failed),
            JobKind::Compare => pieces(self.progress, end).try_for_each(|(at, len)| compare_piece(&self.image, job, at, len)),
            // Data moves by DMA; a job of this kind is the controller's mistake and must not look like success.
            JobKind::Read | JobKind::Write { .. } => Err(JobError::Failed),
        };
        self.progress = end;
        job.outcome = outcome.err();
        job.outcome.is_some() || job.kind == JobKind::Flush || end == job.len
    }
}

/// `from..to` in pieces of at most `PIECE_BYTES`.
fn pieces(from: u64, to: u64) -> impl Iterator<Item = (u64, usize)> {
    (from..to).step_by(PIECE_BYTES).map(move |at| (at, (to - at).min(PIECE_BYTES as u64) as usize))
}

fn compare_piece(image: &Memory, job: &Job, at: u64, len: usize) -> Result<(), JobError> {
    let (mut ours, mut theirs) = ([0; PIECE_BYTES], [0; PIECE_BYTES]);
    let (ours, theirs) = (ours.get_mut(..len).unwrap_or_default(), theirs.get_mut(..len).unwrap_or_default());
    image.read(job.offset + at, ours).map_err(|_| JobError::Failed)?;
    // The controller compares from one buffer of its own, so the first one has all bytes.
    let (memory, start) = job.buffers.first().map(|buffer| buffer.parts()).ok_or(JobError::Failed)?;
    memory.read(start + at, theirs).map_err(|_| JobError::Failed)?;
    if ours == theirs { Ok(()) } else { Err(JobError::Different) }
}

impl Media for MemoryMedia {
    fn len(&self) -> u64 {
        self.image.len()
    }

    fn volatile_cache(&self) -> bool {
        false
    }

    fn memory(&self) -> Option<&Arc<Memory>> {
        Some(&self.image)
    }

    fn identity(&self) -> u64 {
        self.identity
    }

    fn submit(&mut self, job: Box<Job>) {
        self.jobs.push_back(job);
    }

    fn reap(&mut self) -> Option<Box<Job>> {
        if !self.step() {
            return None;
        }
        self.progress = 0;
        self.jobs.pop_front()
    }

    fn cancel(&mut self) -> Option<Box<Job>> {
        self.progress = 0;
        self.jobs.pop_front()
    }

    fn busy(&self) -> bool {
        !self.jobs.is_empty()
    }

    fn arm(&mut self) -> bool {
        self.jobs.is_empty()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
