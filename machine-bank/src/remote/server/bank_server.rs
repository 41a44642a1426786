//! A served bank: what all clients of it share, and how one of them is served from its hello to its end.
//!
//! Two clients have one index, which is read again when a deposit begins, because a sweep may have been; and what each brought is remembered by its name.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use farbus_transport::{Fabric, Nanos, Tally, Teller};
use rustix::event::EventfdFlags;

use super::super::port::Port;
use super::super::service::WireCounts;
use super::super::wire::{BODY, PART};
use super::{Half, Rights, Session};
use crate::bank::Bank;
use crate::index::{Index, IndexError};
use crate::store::Store;

/// What a server allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// Bytes of packs and manifests that one client may have sent before they are checked.
    pub staged: u64,
    /// A client that says nothing for so long is gone. A living one says something every 20 s.
    pub silence: Duration,
    /// How long a deposit waits for a sweep at most, whatever the client asks for.
    pub wait: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { staged: 256 << 20, silence: Duration::from_secs(90), wait: Duration::from_secs(10) }
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
    pub(super) index: RwLock<Index>,
    renewed: Mutex<Instant>,
    pub(super) options: ServeOptions,
    /// What each client brought, by its name: what a deposit that was interrupted need not send again.
    pub(super) brought: Mutex<HashMap<String, HashSet<Half>>>,
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
        let index = RwLock::new(Index::open(bank.store())?);
        Ok(Arc::new(Self { bank, index, renewed: Mutex::new(Instant::now()), options, brought: Mutex::default() }))
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

    /// Reads the index again: after a sweep, or where somebody else deposited.
    pub(super) fn renew(&self) -> Result<(), IndexError> {
        self.replace_index(Index::open)
    }

    /// Under the lock from the beginning: what another client brings meanwhile would be missing in what was read before.
    fn replace_index(&self, read: impl FnOnce(&dyn Store) -> Result<Index, IndexError>) -> Result<(), IndexError> {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        *index = read(self.bank.store())?;
        drop(index);
        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Ok(())
    }

    /// The same where a page was not found, at most once a second: in a bank that lacks pages that costs others nothing.
    pub(super) fn renew_after_miss(&self) -> Result<bool, IndexError> {
        let recent = self.renewed.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < Duration::from_secs(1);
        if !recent {
            // A run that is damaged says that nothing is where it was.
            self.replace_index(Index::open_checked)?;
        }
        Ok(!recent)
    }
}
