//! A served bank: what all clients of it share, and how one of them is served from its hello to its end.
//!
//! Two clients have one index, which is read again when a deposit begins, because a sweep may have been; and what each brought is remembered by its name.
//! Reading it again, and making runs of what is new, takes as long as it takes beside the index that everybody uses meanwhile: that is locked for moments only.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard, TryLockError};
use std::time::{Duration, Instant};

use farbus_transport::{Fabric, Nanos, Tally, Teller};
use rustix::event::EventfdFlags;

use super::super::port::Port;
use super::super::service::WireCounts;
use super::super::wire::{BODY, PART};
use super::quota::Quotas;
use super::{Half, Rights, Session};
use crate::bank::Bank;
use crate::index::{Found, Index, IndexError, LOOSE};
use crate::pack::{PackId, Place};
use crate::page::PageId;
use crate::store::{Kind, Store, StoreError};

/// What a server allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// Bytes of packs and manifests that one client may have sent before they are checked, over all its links: 256 MiB.
    pub staged: u64,
    /// Deposits that one client may have under way, over all its links: 64.
    pub holds: u64,
    /// Machines that one client may be withdrawing, likewise: 256.
    pub pins: u64,
    /// A hold or a pin that its client neither uses nor renews for so long ends: 5 minutes. A living client renews it every 10 s.
    pub hold: Duration,
    /// Pages whose names are remembered of the machines that a client may read who may not read all: 1,048,576, of some 24 bytes each. What is beyond them is sent again.
    pub known: usize,
    /// How often a client whose request takes long is told that it is worked on: 5 s. It gives up after 30 s without a word.
    pub word: Duration,
    /// A client that says nothing for so long is gone. A living one says something every 20 s.
    pub silence: Duration,
    /// How long a deposit waits for a sweep at most, whatever the client asks for.
    pub wait: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            staged: 256 << 20,
            holds: 64,
            pins: 256,
            hold: Duration::from_secs(300),
            known: 1 << 20,
            word: Duration::from_secs(5),
            silence: Duration::from_secs(90),
            wait: Duration::from_secs(10),
        }
    }
}

/// Who a client is, and what it may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its name. Clients of one name are taken for one.
    pub name: String,
    /// What it may do.
    pub rights: Rights,
}

/// Ends sessions.
#[derive(Clone, Debug)]
pub struct Stop(Arc<(AtomicBool, OwnedFd)>);

impl Stop {
    /// One that is not set.
    ///
    /// # Errors
    /// What eventfd(2) answers.
    pub fn new() -> std::io::Result<Self> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new((AtomicBool::new(false), fd))))
    }

    /// Ends every session that has it.
    pub fn set(&self) {
        self.0.0.store(true, Ordering::Release);
        if let Err(errno) = rustix::io::write(&self.0.1, &1_u64.to_ne_bytes()) {
            tracing::debug!(%errno, "a stop was set many times");
        }
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.0.0.load(Ordering::Acquire)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.1.as_fd()
    }
}

/// A bank that is served.
#[derive(Debug)]
pub struct BankServer {
    pub(super) bank: Bank,
    index: RwLock<Shared>,
    /// Held by whoever reads or writes runs.
    upkeep: Mutex<Upkeep>,
    /// Readings of the index that have begun.
    begun: AtomicU64,
    pub(super) options: ServeOptions,
    pub(super) quotas: Quotas,
    /// What each client brought, by its name: what a deposit that was interrupted need not send again.
    pub(super) brought: Mutex<HashMap<String, Brought>>,
}

/// A pack and what is in it.
type Added = (PackId, Vec<(PageId, Place)>);

/// The index that all clients have.
#[derive(Debug)]
struct Shared {
    index: Index,
    /// What was added since the next index began to be read, while one is.
    since: Option<Vec<Added>>,
}

/// The last reading of the index.
#[derive(Debug)]
struct Upkeep {
    at: Instant,
    /// Which it was, of those that went well.
    number: u64,
    /// The packs that there were before it.
    packs: [u8; 32],
}

/// What a client brought.
#[derive(Debug, Default)]
pub(super) struct Brought {
    /// Its pages, as long as they are not too many.
    pub pages: HashSet<Half>,
    /// Its packs, the last ones.
    pub packs: VecDeque<PackId>,
}

/// How a session went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Why it ended.
    pub reason: String,
    /// What went over the link.
    pub wire: WireCounts,
}

impl BankServer {
    /// Serves a bank.
    ///
    /// # Errors
    /// Its index cannot be read.
    pub fn new(bank: Bank, options: ServeOptions) -> Result<Arc<Self>, IndexError> {
        let upkeep = Upkeep { at: Instant::now(), number: 0, packs: packs(bank.store())? };
        let index = RwLock::new(Shared { index: Index::open(bank.store())?, since: None });
        Ok(Arc::new(Self {
            bank,
            index,
            upkeep: Mutex::new(upkeep),
            begun: AtomicU64::new(0),
            options,
            quotas: Quotas::default(),
            brought: Mutex::default(),
        }))
    }

    /// The bank.
    pub fn bank(&self) -> &Bank {
        &self.bank
    }

    /// Serves a client until it leaves, is ended for what it does, or `stop` is set. `clock` is the time for the fabric.
    pub fn serve<F: Fabric>(&self, fabric: F, client: &Client, stop: &Stop, clock: impl FnMut() -> Nanos) -> Served {
        self.serve_telling(fabric, client, stop, clock, None)
    }

    /// As [`BankServer::serve`], and tells `tally`, which has [`WireCounts::NAMES`], what goes over the link: after each request, and before it sleeps.
    pub fn serve_telling<F: Fabric>(
        &self,
        fabric: F,
        client: &Client,
        stop: &Stop,
        mut clock: impl FnMut() -> Nanos,
        tally: Option<Arc<Tally>>,
    ) -> Served {
        let port = Port::new(fabric, BODY).and_then(|mut port| {
            let (grant, slab) = port.grant("farbus-bank-slab", PART)?;
            Ok((port, grant, slab))
        });
        let (port, grant, slab) = match port {
            Ok(port) => port,
            Err(reason) => return Served { reason, wire: WireCounts::default() },
        };
        let mut session = Session {
            server: self,
            client,
            port,
            slab,
            queue: VecDeque::new(),
            manifests: VecDeque::new(),
            leaves: VecDeque::new(),
            handles: HashMap::new(),
            next_handle: 0,
            streams: HashMap::new(),
            known: None,
            renewed: Instant::now(),
            lapsed: false,
            cutter: None,
            clock: &mut clock,
            teller: tally.map(Teller::new),
        };
        let reason = session.run(grant, stop);
        session.tell();
        session.queue.clear();
        // Before goodbyes, so that others need not wait for them.
        session.handles.clear();
        let Session { mut port, clock, .. } = session;
        port.close(clock);
        Served { reason, wire: port.counts }
    }

    /// Where pages are, one after the other. The index is locked for what is in memory only: a store that answers slowly keeps nobody else from it.
    pub(super) fn find(&self, ids: &[PageId]) -> impl Iterator<Item = Result<Option<Found>, StoreError>> {
        let (held, mut runs) = self.indexed(|index| (ids.iter().map(|id| index.held(id)).collect::<Vec<_>>(), index.runs()));
        ids.iter().zip(held).map(move |(id, held)| {
            if held.is_some() {
                return Ok(held);
            }
            loop {
                let error = match runs.find(self.bank.store(), id) {
                    Err(error @ (StoreError::Missing { .. } | StoreError::Ends { .. })) => error,
                    found => return found,
                };
                // It may have been merged into another one meanwhile, with what was in memory.
                let (held, now) = self.indexed(|index| (index.held(id), index.runs()));
                if held.is_some() {
                    return Ok(held);
                }
                if now.are(&runs) {
                    return Err(error);
                }
                runs = now;
            }
        })
    }

    /// Uses the index, and no store.
    pub(super) fn indexed<T>(&self, use_it: impl FnOnce(&Index) -> T) -> T {
        use_it(&self.index.read().unwrap_or_else(PoisonError::into_inner).index)
    }

    fn shared(&self) -> RwLockWriteGuard<'_, Shared> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pack is in the bank. Says how many pages no run has.
    pub(super) fn add(&self, pack: PackId, entries: &[(PageId, Place)]) -> usize {
        let mut shared = self.shared();
        shared.index.add(pack, entries);
        if let Some(since) = &mut shared.since {
            since.push((pack, entries.to_vec()));
        }
        shared.index.loose()
    }

    /// Makes a run of what no run has. Where somebody else is at it or reads the index, nothing is done, unless so many pages wait that this has to be waited for.
    pub(super) fn merge(&self) -> Result<(), StoreError> {
        let _upkeep = match self.upkeep.try_lock() {
            Ok(upkeep) => upkeep,
            Err(TryLockError::Poisoned(upkeep)) => upkeep.into_inner(),
            Err(TryLockError::WouldBlock) if self.indexed(Index::loose) < 4 * LOOSE => return Ok(()),
            Err(TryLockError::WouldBlock) => self.upkeep.lock().unwrap_or_else(PoisonError::into_inner),
        };
        let store = self.bank.store();
        let Some(merge) = self.shared().index.begin_merge() else { return Ok(()) };
        match merge.write(store) {
            Ok(run) => {
                let gone = self.shared().index.end_merge(merge, Some(run));
                gone.iter().try_for_each(|name| store.remove(Kind::Index, name))
            }
            Err(error) => {
                self.shared().index.end_merge(merge, None);
                // Another process has merged a run into one of its own and removed it: its packs tell what was in it.
                let StoreError::Missing { .. } = error else { return Err(error) };
                let there: Vec<_> = store.list(Kind::Index)?.into_iter().map(|object| object.name).collect();
                self.shared().index.keep_runs(&there);
                Ok(())
            }
        }
    }

    /// Reads the index again: after a sweep, or where somebody else deposited. Who comes while that is waited for has it from the next one who reads.
    pub(super) fn renew(&self) -> Result<(), IndexError> {
        let asked = self.begun.load(Ordering::Acquire);
        let mut upkeep = self.upkeep.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has begun since then, and has ended.
        if upkeep.number > asked { Ok(()) } else { self.replace_index(&mut upkeep, Index::open) }
    }

    /// The index is read beside the one that is used; what is brought meanwhile is in both.
    fn replace_index(
        &self,
        upkeep: &mut Upkeep,
        read: impl FnOnce(&dyn Store) -> Result<Index, IndexError>,
    ) -> Result<(), IndexError> {
        let number = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        self.shared().since = Some(Vec::new());
        let read = packs(self.bank.store()).map_err(IndexError::from).and_then(|packs| Ok((packs, read(self.bank.store())?)));
        let mut shared = self.shared();
        let since = shared.since.take().unwrap_or_default();
        let (packs, mut index) = read?;
        since.iter().for_each(|(pack, entries)| index.add(*pack, entries));
        shared.index = index;
        *upkeep = Upkeep { at: Instant::now(), number, packs };
        Ok(())
    }

    /// The same where a page was not found: where others have changed the packs, and otherwise, for a run that is damaged, at most once a second. In a bank that lacks
    /// pages that costs others nothing.
    pub(super) fn renew_after_miss(&self) -> Result<bool, IndexError> {
        let asked = self.begun.load(Ordering::Acquire);
        let mut upkeep = self.upkeep.lock().unwrap_or_else(PoisonError::into_inner);
        if upkeep.number > asked {
            return Ok(true);
        }
        if upkeep.at.elapsed() < Duration::from_secs(1) && packs(self.bank.store())? == upkeep.packs {
            return Ok(false);
        }
        // A run that is damaged says that nothing is where it was.
        self.replace_index(&mut upkeep, Index::open_checked)?;
        Ok(true)
    }
}

/// What tells whether there are other packs.
fn packs(store: &dyn Store) -> Result<[u8; 32], StoreError> {
    let mut names: Vec<_> = store.list(Kind::Pack)?.into_iter().map(|object| object.name).collect();
    names.sort_unstable();
    Ok(*blake3::hash(names.join("\n").as_bytes()).as_bytes())
}
