//! Copy-on-write epochs: a machine is deposited as it was at one instant, while it runs on.
//!
//! 512 MiB, of which the guest wrote 1,300 pages since the last epoch: the machine stops, these pages are protected again, which takes about a
//! millisecond, and it runs. The deposit reads them in its own time. Where the guest writes one that was not read yet, its first write waits some 10 us in which
//! the page is set aside; the deposit then gets what was set aside.
//!
//! Who writes by another way than the mapping (a second mapping, `pwrite`, an RNIC, a device) says so before, by [`Epochs::before_write`], and is
//! at rest while an epoch begins. Writes cost more than under a [`WriteTracker`](super::WriteTracker), whose protection the kernel takes off by itself: that one
//! is for machines that stop for as long as a deposit reads.

mod shard;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{DirtyPages, TrackError};
use crate::deposit::{Changes, Source};
use crate::lazy::{Area, Event, Features, PlaceError, Uffd, Watch};
use crate::page::PAGE;
use shard::{SHARD_PAGES, Shard, Taken};

/// While writes wait for room, how long until it is looked for again.
const AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000 };

/// Epochs of one area. Dropped, it lets all writes go on.
#[derive(Debug)]
pub struct Epochs {
    inner: Arc<Inner>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    area: Arc<Area>,
    uffd: Uffd,
    end: OwnedFd,
    shards: Vec<Mutex<Shard>>,
    pages: u64,
    /// Pages set aside at most, and now.
    most: u64,
    aside: AtomicU64,
    running: AtomicBool,
    set_aside: AtomicU64,
}

/// The machine at one instant, for one deposit.
#[derive(Debug)]
pub struct Epoch {
    inner: Arc<Inner>,
    changed: DirtyPages,
    done: bool,
}

/// Why no epoch begins.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// Writes cannot be told.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Memory cannot be protected.
    #[error("cannot protect memory: {0}")]
    Protect(#[from] PlaceError),
    /// The last one is not deposited yet.
    #[error("an epoch of this memory is still being deposited")]
    Running,
    /// No thread, or no descriptor.
    #[error("cannot begin to watch memory: {0}")]
    Host(io::Error),
}

impl Epochs {
    /// Watches an area, of which every page counts as written. At most `most_bytes` of pages are set aside; beyond that writes wait for the deposit.
    ///
    /// # Errors
    /// There is no userfaultfd with write protection (Linux 5.19), the area has one already, or the host's fault.
    pub fn watch(area: Arc<Area>, most_bytes: u64) -> Result<Self, EpochError> {
        let uffd = Uffd::new(Features::WP_SHMEM.and(Features::WP_UNPOPULATED)).map_err(TrackError::Uffd)?;
        area.watch(&uffd, Watch::WRITES).map_err(TrackError::Uffd)?;
        let pages = area.len() / PAGE as u64;
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| EpochError::Host(errno.into()))?;
        let shards = (0..pages.div_ceil(SHARD_PAGES)).map(|_| Mutex::new(Shard::all_written())).collect();
        let inner = Arc::new(Inner {
            area,
            uffd,
            end,
            shards,
            pages,
            most: (most_bytes / PAGE as u64).max(1),
            aside: AtomicU64::new(0),
            running: AtomicBool::new(false),
            set_aside: AtomicU64::new(0),
        });
        let keeper = {
            let inner = inner.clone();
            std::thread::Builder::new().name("farbus-epochs".to_owned()).spawn(move || inner.keep()).map_err(EpochError::Host)?
        };
        Ok(Self { inner, keeper: Some(keeper) })
    }

    /// Begins an epoch: what is in memory now is what its deposit gets. The machine stands still meanwhile, and whatever else writes its memory.
    ///
    /// # Errors
    /// The last epoch lives, or the kernel refuses; pages then count as written still.
    pub fn begin(&self) -> Result<Epoch, EpochError> {
        let inner = &self.inner;
        if inner.running.swap(true, Ordering::AcqRel) {
            return Err(EpochError::Running);
        }
        // From here on its end, however it comes about, counts what it took as written.
        let mut epoch = Epoch { inner: inner.clone(), changed: DirtyPages::none(inner.area.len()), done: false };
        for (at, shard) in (0..).zip(&inner.shards) {
            let written = inner.lock(shard).begin();
            epoch.changed.mark_words(at * SHARD_PAGES, &written);
        }
        for run in runs(&epoch.changed, inner.pages) {
            inner.uffd.protect(inner.area.address() + run.start * PAGE as u64, (run.end - run.start) * PAGE as u64, true)?;
        }
        Ok(epoch)
    }

    /// To be called before these bytes are written by another way than the mapping: it sets aside what a deposit has still to read, and counts the
    /// pages as written.
    pub fn before_write(&self, offset: u64, len: u64) {
        let first = offset / PAGE as u64;
        let end = offset.saturating_add(len).div_ceil(PAGE as u64).min(self.inner.pages);
        for page in first..end {
            while !self.inner.written(page) {
                std::thread::sleep(std::time::Duration::from_micros(500));
            }
        }
    }

    /// How many pages were set aside so far because they were written before they were read.
    pub fn set_aside(&self) -> u64 {
        self.inner.set_aside.load(Ordering::Relaxed)
    }
}

impl Drop for Epochs {
    fn drop(&mut self) {
        if let Err(errno) = rustix::io::write(&self.inner.end, &1u64.to_ne_bytes()) {
            tracing::error!(%errno, "the thread that sets pages aside cannot be told to end");
            return;
        }
        if self.keeper.take().is_some_and(|keeper| keeper.join().is_err()) {
            tracing::error!("the thread that set pages aside panicked");
        }
        // First nothing of an epoch that outlives this can be read any more; then who waits for a page that nobody answers for goes on.
        self.inner.shards.iter().for_each(|shard| self.inner.lock(shard).lose());
        if let Err(error) = self.inner.uffd.protect(self.inner.area.address(), self.inner.area.len(), false) {
            tracing::error!(%error, "memory stays protected");
        }
    }
}

impl Epoch {
    /// The pages that may differ from the last epoch's: with the last epoch's deposit as the parent, no others are read.
    pub fn changes(&self) -> Changes<'_> {
        self.changed.changes()
    }

    /// How many these are.
    pub fn count(&self) -> u64 {
        self.changed.count()
    }

    /// It is deposited: the next epoch is what changed since. Dropped instead, the next one has its pages too.
    pub fn deposited(mut self) {
        self.done = true;
    }
}

impl Source for Epoch {
    fn len(&self) -> u64 {
        self.inner.area.len()
    }

    /// A page that changed meanwhile can be read once.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (mut at, mut buf) = (offset, buf);
        while !buf.is_empty() {
            let here = (PAGE - (at % PAGE as u64) as usize).min(buf.len());
            let (part, rest) = buf.split_at_mut(here);
            self.inner.read(at, part)?;
            (at, buf) = (at + here as u64, rest);
        }
        Ok(())
    }
}

impl Drop for Epoch {
    fn drop(&mut self) {
        for (at, shard) in (0..).zip(&self.inner.shards) {
            let again = if self.done { None } else { Some(self.changed.words(at * SHARD_PAGES, SHARD_PAGES)) };
            let freed = self.inner.lock(shard).end(again);
            self.inner.aside.fetch_sub(freed, Ordering::AcqRel);
        }
        self.inner.running.store(false, Ordering::Release);
    }
}

impl Inner {
    fn lock<'a>(&self, shard: &'a Mutex<Shard>) -> MutexGuard<'a, Shard> {
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread that is told of first writes.
    fn keep(&self) {
        let mut waiting = Vec::new();
        loop {
            let mut ready = [PollFd::from_borrowed_fd(self.uffd.as_fd(), PollFlags::IN), PollFd::new(&self.end, PollFlags::IN)];
            let timeout = if waiting.is_empty() { None } else { Some(&AGAIN) };
            match poll(&mut ready, timeout) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return tracing::error!(%errno, "writes to memory cannot be waited for"),
            }
            if !ready[1].revents().is_empty() {
                return;
            }
            waiting.retain(|page| !self.answer(*page));
            loop {
                match self.uffd.event() {
                    Ok(None) => break,
                    Ok(Some(Event::Fault { address })) => {
                        let page = address.wrapping_sub(self.area.address()) / PAGE as u64;
                        if !self.answer(page) {
                            waiting.push(page);
                        }
                    }
                    Ok(Some(event)) => tracing::warn!(?event, "an event of a machine's memory that was not asked for"),
                    Err(errno) => return tracing::error!(%errno, "writes to memory are not told any more"),
                }
            }
        }
    }

    /// Lets the write to a page go on, if there is room for what it was.
    fn answer(&self, page: u64) -> bool {
        if page >= self.pages {
            tracing::error!(page, "a write outside of the machine's memory");
            return true;
        }
        if !self.written(page) {
            return false;
        }
        // Gone is the memory's end; anything else leaves the writer waiting, which is never a wrong page.
        if let Err(error) = self.uffd.protect(self.area.address() + page * PAGE as u64, PAGE as u64, false) {
            tracing::error!(%error, page, "a write cannot go on");
        }
        true
    }

    /// Counts a page as written, and sets it aside where a deposit has still to read it. False: there is no room for it yet.
    fn written(&self, page: u64) -> bool {
        let (shard, at) = self.place(page);
        let mut shard = self.lock(shard);
        if shard.is_due(at) {
            if self.aside.fetch_add(1, Ordering::AcqRel) >= self.most {
                self.aside.fetch_sub(1, Ordering::AcqRel);
                return false;
            }
            let mut bytes = Box::new([0; PAGE]);
            if let Err(error) = self.area.memory().read(page * PAGE as u64, &mut *bytes) {
                // It lies within the area, so this is the host's; the deposit is told when it comes to the page.
                tracing::error!(%error, page, "a page cannot be set aside");
                self.aside.fetch_sub(1, Ordering::AcqRel);
                shard.lose_one(at);
                return true;
            }
            shard.set_aside(at, bytes);
            self.set_aside.fetch_add(1, Ordering::Relaxed);
        }
        shard.write(at);
        true
    }

    /// Reads within a page, as it was when the epoch began.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let page = offset / PAGE as u64;
        if page >= self.pages {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (shard, at) = self.place(page);
        let mut shard = self.lock(shard);
        match shard.take(at) {
            Taken::Aside(bytes) => {
                self.aside.fetch_sub(1, Ordering::AcqRel);
                let from = (offset % PAGE as u64) as usize;
                into.copy_from_slice(&bytes[from..from + into.len()]);
                Ok(())
            }
            Taken::Memory => self.area.memory().read(offset, into).map_err(io::Error::other),
            Taken::Lost => Err(io::Error::other(format!("page {page} changed after it had been read, or outside of the epoch"))),
        }
    }

    fn place(&self, page: u64) -> (&Mutex<Shard>, usize) {
        (&self.shards[(page / SHARD_PAGES) as usize], (page % SHARD_PAGES) as usize)
    }
}

/// The stretches of marked pages.
fn runs(pages: &DirtyPages, count: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = (at..count).find(|page| pages.is_marked(*page))?;
        let end = (start..count).find(|page| !pages.is_marked(*page)).unwrap_or(count);
        at = end;
        Some(start..end)
    })
}
