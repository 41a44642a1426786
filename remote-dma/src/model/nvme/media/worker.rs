//! Four threads that read and write the image: jobs go in and come back through bounded queues without locks.
//!
//! A worker with nothing to do sleeps on an eventfd; the controller writes to it only while somebody sleeps. A worker that finished a job writes
//! to the controller's eventfd only while the controller sleeps (`arm`). Both sides announce first and look second, with a full fence
//! between, so that a job is never left lying with everybody asleep.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::thread::JoinHandle;

use crossbeam_queue::ArrayQueue;
use rustix::event::EventfdFlags;

use super::wholeness::Wholeness;
use super::{Job, JobError, JobKind, MAX_JOBS};
use crate::dma_buffer::DmaBuffer;

const WORKERS: usize = 4;
/// Bytes that a compare or a fallback zeroing handles at once.
const PIECE_BYTES: usize = 64 << 10;
/// Vectors of one system call (IOV_MAX).
const MAX_VECTORS: usize = 1024;

#[derive(Debug)]
struct Shared {
    file: Arc<File>,
    wholeness: Arc<Wholeness>,
    jobs: ArrayQueue<Box<Job>>,
    done: ArrayQueue<Box<Job>>,
    /// Workers that sleep or are about to.
    sleepers: AtomicUsize,
    /// The controller sleeps or is about to.
    armed: AtomicBool,
    ended: AtomicBool,
    work: OwnedFd,
    wake: OwnedFd,
}

/// The pool; dropping it ends the threads after the jobs they are at.
#[derive(Debug)]
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// The eventfd may have been written to since it was drained.
    drain: bool,
}

impl Workers {
    pub(super) fn start(file: Arc<File>, wholeness: Arc<Wholeness>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            file,
            wholeness,
            jobs: ArrayQueue::new(MAX_JOBS),
            done: ArrayQueue::new(MAX_JOBS),
            sleepers: AtomicUsize::new(0),
            armed: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            work: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE)?,
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let mut pool = Self { shared, threads: Vec::with_capacity(WORKERS), drain: false };
        for index in 0..WORKERS {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("farbus-media-{index}"));
            pool.threads.push(thread.spawn(move || run(&shared))?);
        }
        Ok(pool)
    }

    pub(super) fn submit(&mut self, job: Box<Job>) {
        // There are only MAX_JOBS jobs, so both queues always have room; a full one would mean a forged job.
        if let Err(mut job) = self.shared.jobs.push(job) {
            debug_assert!(false, "more jobs than exist");
            job.outcome = Some(JobError::Failed);
            finish(&self.shared, job);
            return;
        }
        fence(Ordering::SeqCst);
        if self.shared.sleepers.load(Ordering::Relaxed) > 0 {
            signal(&self.shared.work, 1);
        }
    }

    pub(super) fn reap(&mut self) -> Option<Box<Job>> {
        if self.drain {
            self.drain = false;
            self.shared.armed.store(false, Ordering::Relaxed);
            // An error means that nothing was written: nothing to drain.
            let _nothing = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        }
        self.shared.done.pop()
    }

    pub(super) fn cancel(&mut self) -> Option<Box<Job>> {
        self.shared.jobs.pop()
    }

    pub(super) fn arm(&mut self) -> bool {
        self.drain = true;
        self.shared.armed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.shared.done.is_empty()
    }

    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        signal(&self.shared.work, WORKERS as u64);
        for thread in self.threads.drain(..) {
            // A worker that panicked has said so already.
            let _panicked = thread.join();
        }
    }
}

fn signal(eventfd: &OwnedFd, count: u64) {
    let written = rustix::io::write(eventfd, &count.to_ne_bytes());
    // EAGAIN: the counter is at its limit, so the sleeper is awake anyway.
    debug_assert!(matches!(written, Ok(8) | Err(rustix::io::Errno::AGAIN)));
}

fn finish(shared: &Shared, job: Box<Job>) {
    let refused = shared.done.push(job);
    debug_assert!(refused.is_ok(), "more jobs than exist");
    fence(Ordering::SeqCst);
    if shared.armed.swap(false, Ordering::Relaxed) {
        signal(&shared.wake, 1);
    }
}

fn run(shared: &Shared) {
    let mut carrier = Carrier::new(Arc::clone(&shared.file), Arc::clone(&shared.wholeness));
    while !shared.ended.load(Ordering::Relaxed) {
        match shared.jobs.pop() {
            Some(mut job) => {
                carrier.carry_out(&mut job);
                finish(shared, job);
            }
            None => sleep(shared),
        }
    }
}

/// Whoever reads and writes a file, with what it uses again and again.
#[derive(Debug)]
pub(super) struct Carrier {
    file: Arc<File>,
    wholeness: Arc<Wholeness>,
    room: Room,
}

impl Carrier {
    pub(super) fn new(file: Arc<File>, wholeness: Arc<Wholeness>) -> Self {
        Self { file, wholeness, room: Room { vectors: Vec::with_capacity(MAX_VECTORS), piece: vec![0; PIECE_BYTES] } }
    }

    pub(super) fn carry_out(&mut self, job: &mut Job) {
        job.outcome = self.outcome(job).err();
        // The guest's memory is let go, and with that in the dirty log, before the controller hears that the job is done.
        job.buffers.clear();
    }

    fn outcome(&mut self, job: &Job) -> Result<(), JobError> {
        let stores = matches!(job.kind, JobKind::Write { .. } | JobKind::Zero { .. });
        self.wholeness.check(&self.file)?;
        let done = carry_out(&self.file, job, &mut self.room);
        let no_room = matches!(&done, Err(Failure::Host(error)) if error.raw_os_error() == Some(libc::ENOSPC));
        if stores {
            self.wholeness.note_room(!no_room);
        }
        match done {
            // What was stored or read may be less than there was.
            Ok(()) => self.wholeness.check(&self.file),
            Err(Failure::Different) => Err(JobError::Different),
            Err(Failure::Host(_)) if no_room => Err(JobError::NoSpace),
            Err(Failure::Host(error)) => {
                // A shorter file is the reason that matters, where it is one.
                self.wholeness.check(&self.file)?;
                tracing::warn!(kind = ?job.kind, offset = job.offset, len = job.len, %error, "the image failed");
                Err(JobError::Failed)
            }
        }
    }
}

fn sleep(shared: &Shared) {
    shared.sleepers.fetch_add(1, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    if shared.jobs.is_empty() && !shared.ended.load(Ordering::Relaxed) {
        // Interrupted or not: the loop looks again.
        let _token = rustix::io::read(&shared.work, &mut [0; 8]);
    }
    shared.sleepers.fetch_sub(1, Ordering::Relaxed);
}

/// What a worker uses again and again.
#[derive(Debug)]
struct Room {
    vectors: Vec<Vector>,
    piece: Vec<u8>,
}

/// An `iovec` whose address is a number, so that it can be kept by whatever thread comes next.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Vector {
    base: usize,
    len: usize,
}

const _: () = assert!(size_of::<Vector>() == size_of::<libc::iovec>() && align_of::<Vector>() == align_of::<libc::iovec>());
const _: () = assert!(std::mem::offset_of!(Vector, len) == std::mem::offset_of!(libc::iovec, iov_len));

enum Failure {
    Different,
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

impl From<rustix::io::Errno> for Failure {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Host(errno.into())
    }
}

fn carry_out(file: &File, job: &Job, room: &mut Room) -> Result<(), Failure> {
    match job.kind {
        JobKind::Read => Ok(vectored(file, job, room, Direction::Read)?),
        JobKind::Write { durable } => Ok(vectored(file, job, room, Direction::Write { durable })?),
        JobKind::Flush => Ok(rustix::fs::fdatasync(file)?),
        JobKind::Zero { deallocate, durable } => {
            zero(file, job, room, deallocate)?;
            if durable {
                rustix::fs::fdatasync(file)?;
            }
            Ok(())
        }
        JobKind::Compare => compare(file, job, room),
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write { durable: bool },
}

/// `preadv2` or `pwritev2` until all bytes of the buffers are moved: the kernel may stop early.
fn vectored(file: &File, job: &Job, room: &mut Room, direction: Direction) -> io::Result<()> {
    room.vectors.clear();
    let vector = |buffer: &DmaBuffer| Vector { base: buffer.as_ptr().expose_provenance(), len: buffer.len() as usize };
    room.vectors.extend(job.buffers.iter().map(vector));
    let mut offset = libc::off_t::try_from(job.offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut done = 0;
    loop {
        let rest = room.vectors.get_mut(done..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        let (vectors, count) = (rest.as_ptr().cast::<libc::iovec>(), rest.len().min(MAX_VECTORS) as libc::c_int);
        let moved = match direction {
            // SAFETY: a `Vector` is an `iovec`, as asserted above; each is a `DmaBuffer` of `job.buffers`, valid for its length until the job is
            // finished; guest memory may be written by others meanwhile, which the kernel's copies tolerate.
            Direction::Read => unsafe { libc::preadv2(file.as_raw_fd(), vectors, count, offset, 0) },
            Direction::Write { durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as for reading.
                unsafe { libc::pwritev2(file.as_raw_fd(), vectors, count, offset, flags) }
            }
        };
        let mut moved = match usize::try_from(moved) {
            // The image was shortened behind our back.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => moved,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
        };
        offset += moved as libc::off_t;
        for vector in rest {
            if moved < vector.len {
                vector.base += moved;
                vector.len -= moved;
                break;
            }
            moved -= vector.len;
            done += 1;
        }
    }
}

fn zero(file: &File, job: &Job, room: &mut Room, deallocate: bool) -> io::Result<()> {
    use rustix::fs::FallocateFlags;
    if job.len == 0 {
        return Ok(());
    }
    let how = if deallocate { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    match rustix::fs::fallocate(file, how | FallocateFlags::KEEP_SIZE, job.offset, job.len) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {
            use std::os::unix::fs::FileExt;
            room.piece.fill(0);
            for at in (0..job.len).step_by(PIECE_BYTES) {
                let len = (job.len - at).min(PIECE_BYTES as u64) as usize;
                file.write_all_at(room.piece.get(..len).unwrap_or_default(), job.offset + at)?;
            }
            Ok(())
        }
        outcome => Ok(outcome?),
    }
}

fn compare(file: &File, job: &Job, room: &mut Room) -> Result<(), Failure> {
    use std::os::unix::fs::FileExt;
    let mut at = job.offset;
    let mut theirs = [0; 4096];
    for buffer in &job.buffers {
        let (memory, start) = buffer.parts();
        for from in (0..buffer.len()).step_by(theirs.len()) {
            let len = (buffer.len() - from).min(theirs.len() as u64) as usize;
            let (ours, theirs) = (room.piece.get_mut(..len).unwrap_or_default(), theirs.get_mut(..len).unwrap_or_default());
            file.read_exact_at(ours, at)?;
            memory.read(start + from, theirs).map_err(io::Error::other)?;
            if ours != theirs {
                return Err(Failure::Different);
            }
            at += len as u64;
        }
    }
    Ok(())
}
