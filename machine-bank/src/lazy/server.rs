//! The fault handler: one thread that reads the faults of all machines, and a pager thread for each machine, which alone waits for the store.
//!
//! Three machines of one image: the handler answers what the cache has within some 30 us each; the group that only the store has is fetched by
//! its machine's pager, and a store or a client that hangs holds up that machine and nobody else.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use farbus_transport::{Memory, MemoryError};
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll, eventfd};
use thiserror::Error;

use super::area::Area;
use super::away::{OnStore, Patience, StoreEvent};
use super::cache::Cache;
use super::pager::page;
use super::regions::{Region, RegionError, Regions};
use super::report::{Failure, LazyReport, OnFailure};
use super::served::Served;
use super::uffd::{Features, Uffd, UffdError, Watch};
use super::working_set::WorkingSet;
use crate::bank::Bank;
use crate::manifest::{Entry, ManifestError};

/// Bit of an epoll datum that says that it is of the machine's process and not of its faults.
const PROCESS: u64 = 1 << 63;
/// How long a pager may take to leave when its machine ends: if it is asking the store for something, that goes on without anybody.
const LEAVE: Duration = Duration::from_millis(100);
/// The epoll datum that ends the handler.
const END: u64 = u64::MAX;

/// What a machine's memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Private memory, filled by copies.
    #[default]
    Anonymous,
    /// A memfd that other processes can map, filled by copies.
    Shared,
    /// A private view of the cache: machines of one image have their unwritten pages in common.
    View,
}

/// How a machine is served.
#[derive(Clone)]
pub struct LazyOptions {
    /// Which section; `memory` unless this says otherwise.
    pub section: String,
    /// How a store that is away is waited for.
    pub patience: Patience,
    /// Whether the working set that is kept with the machine is fetched before it is asked for.
    pub prefetch: bool,
    /// Whether everything else is fetched after that.
    pub rest: bool,
    /// Is told what cannot be had.
    pub on_failure: OnFailure,
    /// Is told that the store is away, and that it is back.
    pub on_store: OnStore,
}

impl Default for LazyOptions {
    fn default() -> Self {
        let on_failure: OnFailure = Arc::new(|_: &Failure| {});
        let on_store: OnStore = Arc::new(|_: &StoreEvent| {});
        Self { section: "memory".to_owned(), patience: Patience::default(), prefetch: true, rest: false, on_failure, on_store }
    }
}

impl fmt::Debug for LazyOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { section, patience, prefetch, rest, .. } = self;
        write!(f, "LazyOptions({section}, {patience:?}, prefetch {prefetch}, rest {rest})")
    }
}

/// Why a machine is not served.
#[derive(Debug, Error)]
pub enum LazyError {
    /// The machine has no such section.
    #[error("the machine has no section {0}")]
    Section(String),
    /// The manifest cannot be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The store's fault.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// The regions make no sense.
    #[error(transparent)]
    Regions(#[from] RegionError),
    /// The kernel has no userfaultfd for us.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The host has no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The host's fault.
    #[error("{what}: {source}")]
    Host {
        /// What was done.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl LazyError {
    fn host(what: &'static str) -> impl Fn(rustix::io::Errno) -> Self {
        move |errno| Self::Host { what, source: errno.into() }
    }
}

struct Shared {
    cache: Arc<Cache>,
    epoll: OwnedFd,
    end: OwnedFd,
    machines: Mutex<HashMap<u64, Arc<Served>>>,
    next: AtomicU64,
}

impl Shared {
    /// Is told no more of a machine. One that was told of its end twice is forgotten already.
    fn forget(&self, served: &Served) {
        for fd in [Some(served.uffd.as_fd()), served.process.as_ref().map(AsFd::as_fd)].into_iter().flatten() {
            epoll::delete(&self.epoll, fd).unwrap_or_else(|errno| tracing::debug!(%errno, "a machine was not watched"));
        }
    }

    fn served(&self, id: u64) -> Option<Arc<Served>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }
}

/// Serves the faults of machines. Dropped, it ends when its last machine is.
pub struct FaultServer {
    shared: Arc<Shared>,
    _handler: Arc<Handler>,
}

/// The handler thread; ends with the last who needs it.
struct Handler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Handler {
    fn drop(&mut self) {
        if let Err(errno) = rustix::io::write(&self.shared.end, &1_u64.to_ne_bytes()) {
            tracing::warn!(%errno, "the fault handler stays");
        } else if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the fault handler had panicked");
        }
    }
}

impl fmt::Debug for FaultServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FaultServer")
    }
}

/// A machine whose memory comes when it is used. Dropped, its memory goes with it.
pub struct LazyMachine {
    served: Arc<Served>,
    id: u64,
    pager: Option<JoinHandle<()>>,
    area: Option<Area>,
    handler: Arc<Handler>,
}

impl fmt::Debug for LazyMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LazyMachine({})", self.id)
    }
}

impl FaultServer {
    /// Starts the handler.
    ///
    /// # Errors
    /// The host's fault.
    pub fn start(cache: Arc<Cache>) -> Result<Self, LazyError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(LazyError::host("make an epoll"))?;
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(LazyError::host("make an eventfd"))?;
        epoll::add(&epoll, &end, epoll::EventData::new_u64(END), epoll::EventFlags::IN)
            .map_err(LazyError::host("watch an eventfd"))?;
        let shared = Arc::new(Shared { cache, epoll, end, machines: Mutex::default(), next: AtomicU64::new(0) });
        let handled = shared.clone();
        let thread = std::thread::Builder::new().name("farbus-faults".to_owned()).spawn(move || handle(&handled));
        let thread = thread.map_err(|source| LazyError::Host { what: "start the fault handler", source })?;
        Ok(Self { shared: shared.clone(), _handler: Arc::new(Handler { shared, thread: Some(thread) }) })
    }

    /// The cache that it answers from.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.shared.cache
    }

    /// Reads what a section of a machine is, for clients who come while the store is away: they are served what the cache has, and wait for the rest.
    ///
    /// # Errors
    /// The machine cannot be read.
    pub fn prepare(&self, bank: &Bank, entry: &Entry, section: &str) -> Result<(), LazyError> {
        let len = self.section_len(bank, entry, section)?;
        self.shared.cache.image(entry, section, len)?;
        Ok(())
    }

    /// Bytes of a section, from the store if the cache does not know it.
    fn section_len(&self, bank: &Bank, entry: &Entry, section: &str) -> Result<u64, LazyError> {
        if let Some(len) = self.shared.cache.len_of(entry, section) {
            return Ok(len);
        }
        let manifest = bank.manifest(entry)?;
        let at = manifest.section(section).ok_or_else(|| LazyError::Section(section.to_owned()))?;
        Ok(manifest.head.sections[at].len)
    }

    /// Makes memory in this process whose contents are a section of the machine, and come when they are used.
    ///
    /// # Errors
    /// The machine cannot be read, or userfaultfd cannot be had.
    pub fn withdraw(
        &self,
        bank: &Arc<Bank>,
        entry: &Entry,
        backing: Backing,
        options: LazyOptions,
    ) -> Result<LazyMachine, LazyError> {
        let len = self.section_len(bank, entry, &options.section)?;
        let wish = if backing == Backing::View { Features::MINOR_SHMEM.and(Features::MISSING_SHMEM) } else { Features(0) };
        let poison = Features(Uffd::supported()?.0 & Features::POISON.0);
        let uffd = Uffd::new(wish.and(poison))?;
        let cached = self.shared.cache.image(entry, &options.section, len)?;
        let (area, watch) = match backing {
            Backing::Anonymous => (Area::anonymous(len)?, Watch::MISSING),
            Backing::Shared => (Area::shared(len)?, Watch::MISSING),
            Backing::View => (Area::view(cached.memory())?, Watch::MISSING_AND_MINOR),
        };
        let regions = Regions::new(vec![Region { address: area.address(), len: area.len(), offset: 0 }], len)?;
        area.watch(&uffd, watch)?;
        let mut machine = self.add(bank, entry, uffd, regions, backing == Backing::View, options, None)?;
        machine.area = Some(area);
        Ok(machine)
    }

    /// Serves memory of another process, which made `uffd`, registered `regions` for missing faults, and is gone
    /// when `process`, a pidfd say, is readable. Without one that is noticed when a page cannot be placed any more.
    ///
    /// # Errors
    /// The regions overlap or exceed the machine, or the machine cannot be read.
    pub fn adopt(
        &self,
        bank: &Arc<Bank>,
        entry: &Entry,
        uffd: Uffd,
        regions: Vec<Region>,
        process: Option<OwnedFd>,
        options: LazyOptions,
    ) -> Result<LazyMachine, LazyError> {
        let regions = Regions::new(regions, self.section_len(bank, entry, &options.section)?)?;
        self.add(bank, entry, uffd, regions, false, options, process)
    }

    #[expect(clippy::too_many_arguments, reason = "what is common to memory of ours and of others")]
    fn add(
        &self,
        bank: &Arc<Bank>,
        entry: &Entry,
        uffd: Uffd,
        regions: Regions,
        share: bool,
        options: LazyOptions,
        process: Option<OwnedFd>,
    ) -> Result<LazyMachine, LazyError> {
        let len = self.section_len(bank, entry, &options.section)?;
        let cached = self.shared.cache.image(entry, &options.section, len)?;
        let pages = len.div_ceil(crate::PAGE as u64);
        let served = Arc::new(Served::new(uffd, regions, cached, share, pages, process, options.on_failure.clone()));
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (bank, entry, pages) = (bank.clone(), entry.clone(), (served.clone(), self.shared.cache.clone()));
        let pager = std::thread::Builder::new().name("farbus-pager".to_owned());
        let pager = pager.spawn(move || {
            page(&bank, &entry, &pages.0, &pages.1, &options);
            pages.0.left();
        });
        let pager = pager.map_err(|source| LazyError::Host { what: "start a pager", source })?;
        let machine = LazyMachine { served: served.clone(), id, pager: Some(pager), area: None, handler: self._handler.clone() };
        self.shared.machines.lock().unwrap_or_else(PoisonError::into_inner).insert(id, served.clone());
        let watch = |fd: BorrowedFd<'_>, data, flags| epoll::add(&self.shared.epoll, fd, epoll::EventData::new_u64(data), flags);
        watch(served.uffd.as_fd(), id, epoll::EventFlags::IN).map_err(LazyError::host("watch a machine"))?;
        if let Some(process) = &served.process {
            watch(process.as_fd(), id | PROCESS, epoll::EventFlags::IN).map_err(LazyError::host("watch a process"))?;
        }
        Ok(machine)
    }
}

impl LazyMachine {
    /// Its memory, where it is of this process.
    pub fn memory(&self) -> Option<&Memory> {
        self.area.as_ref().map(Area::memory)
    }

    /// Where that is.
    pub fn area(&self) -> Option<&Area> {
        self.area.as_ref()
    }

    /// What became of it so far.
    pub fn report(&self) -> LazyReport {
        self.served.report()
    }

    /// The groups that it used, in the order in which it did first.
    pub fn working_set(&self) -> WorkingSet {
        WorkingSet { groups: self.served.order() }
    }

    /// Waits until all of it is there; false if it is not in that time.
    pub fn wait_whole(&self, most: Duration) -> bool {
        self.served.wait_whole(most)
    }

    /// Waits until its working set is there, and everything else that was to be fetched ahead.
    pub fn wait_ahead(&self, most: Duration) -> bool {
        self.served.wait_ahead(most)
    }

    /// Waits until its process, or its memory, is gone; false if it is not in that time.
    pub fn wait_over(&self, most: Duration) -> bool {
        self.served.wait_over(most)
    }
}

impl Drop for LazyMachine {
    fn drop(&mut self) {
        self.served.end();
        let shared = &self.handler.shared;
        if let Some(served) = shared.machines.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id) {
            shared.forget(&served);
        }
        let Some(pager) = self.pager.take() else { return };
        if !self.served.wait_left(LEAVE) && !pager.is_finished() {
            // It waits for a store that does not answer, and finds out afterwards that nobody needs that any more.
            tracing::debug!("the pager of a machine that has ended is still asking its store");
        } else if pager.join().is_err() {
            tracing::error!("a pager had panicked");
        }
    }
}

/// Reads the faults of all machines until the server ends.
fn handle(shared: &Shared) {
    let mut events = Vec::with_capacity(64);
    loop {
        events.clear();
        match epoll::wait(&shared.epoll, spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "the fault handler cannot wait for faults");
                return;
            }
        }
        for event in events.drain(..) {
            let data = event.data.u64();
            if data == END {
                return;
            }
            let Some(served) = shared.served(data & !PROCESS) else { continue };
            if data & PROCESS != 0 {
                served.end();
            } else {
                served.events();
                // Whoever passed the descriptor made it blocking: it would be ready for ever, and tell nothing.
                let flags = event.flags;
                if flags.contains(epoll::EventFlags::ERR) {
                    served.end();
                }
            }
            if served.is_over() {
                shared.forget(&served);
            }
        }
    }
}
