//! A bank at the other end of a link that is made anew when it was lost: a server that is started again finds the machines that run out of its bank waiting.
//!
//! The link ends, and what was asked is an error, as of any store that is away; whoever asks again has a new link, with the machines pinned that were pinned. Only while
//! something is being deposited nothing is dialled: the hold that kept a sweep away ended with the link, so the deposit has to end too.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::client::RemoteStore;
use super::service::{Fetched, Service, WireCounts};
use crate::page::{PageId, Root};
use crate::store::{Draft, Guard, Hold, Kind, Object, Pin, Store, StoreError};

/// Makes a link.
type Dial = Box<dyn Fn() -> Result<RemoteStore, StoreError> + Send + Sync>;

/// A bank at the other end of a link, whichever that is at the moment.
pub struct Redialing {
    address: String,
    dial: Dial,
    link: Mutex<Current>,
    /// Holds that a sweep waits for; they end with their link.
    holds: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Current {
    store: Arc<RemoteStore>,
    pins: Vec<Weak<Kept>>,
    /// What went over links that are no more.
    before: WireCounts,
}

/// A machine that is kept from being removed, at the link of the moment.
#[derive(Debug)]
struct Kept {
    root: Root,
    guard: Mutex<Option<Box<dyn Guard>>>,
}

#[derive(Debug)]
struct KeptGuard(#[expect(dead_code, reason = "held so that it is dropped with this")] Arc<Kept>);

impl Guard for KeptGuard {}

/// A hold, counted.
#[derive(Debug)]
struct Counted {
    guard: Option<Box<dyn Guard>>,
    holds: Arc<AtomicUsize>,
}

impl Guard for Counted {}

impl Drop for Counted {
    fn drop(&mut self) {
        // It is let go of over its own link.
        drop(self.guard.take());
        self.holds.fetch_sub(1, Ordering::SeqCst);
    }
}

impl fmt::Debug for Redialing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redialing").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Redialing {
    /// The bank that `dial` reaches, now and later.
    ///
    /// # Errors
    /// `dial`'s.
    pub fn new(dial: impl Fn() -> Result<RemoteStore, StoreError> + Send + Sync + 'static) -> Result<Self, StoreError> {
        Ok(Self::with(dial()?, dial))
    }

    /// The same with a link that is there already.
    pub fn with(store: RemoteStore, dial: impl Fn() -> Result<RemoteStore, StoreError> + Send + Sync + 'static) -> Self {
        let link = Current { store: Arc::new(store), pins: Vec::new(), before: WireCounts::default() };
        Self { address: link.store.address(), dial: Box::new(dial), link: Mutex::new(link), holds: Arc::default() }
    }

    /// The link of the moment, made anew where it is over.
    fn link(&self) -> Result<Arc<RemoteStore>, StoreError> {
        // Who else asks meanwhile would have to dial too.
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        if !link.store.is_over() || self.holds.load(Ordering::SeqCst) > 0 {
            return Ok(link.store.clone());
        }
        let store = (self.dial)()?;
        link.pins.retain(|pin| pin.strong_count() > 0);
        for kept in link.pins.iter().filter_map(Weak::upgrade) {
            let pinned = match store.pin(kept.root) {
                Ok(pinned) => Some(pinned),
                Err(StoreError::Missing { .. } | StoreError::ReadOnly(_)) => None,
                Err(error) => return Err(error),
            };
            if pinned.is_none() {
                tracing::warn!(root = %kept.root, "a machine that is withdrawn is not kept from being removed any more");
            }
            *kept.guard.lock().unwrap_or_else(PoisonError::into_inner) = pinned;
        }
        tracing::info!(address = self.address, "the link to a bank was made anew");
        link.before = link.before.and(link.store.wire());
        link.store = Arc::new(store);
        Ok(link.store.clone())
    }
}

impl WireCounts {
    /// Both.
    fn and(self, other: Self) -> Self {
        Self {
            messages_sent: self.messages_sent + other.messages_sent,
            messages_received: self.messages_received + other.messages_received,
            message_bytes: self.message_bytes + other.message_bytes,
            reads: self.reads + other.reads,
            read_bytes: self.read_bytes + other.read_bytes,
            offered_bytes: self.offered_bytes + other.offered_bytes,
        }
    }
}

impl Store for Redialing {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn service(&self) -> Option<&dyn Service> {
        Some(self)
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        self.link()?.list(kind)
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.link()?.read(kind, name, offset, buf)
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        self.link()?.len(kind, name)
    }

    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        self.link()?.create(kind)
    }

    fn sync(&self, kind: Kind) -> Result<(), StoreError> {
        self.link()?.sync(kind)
    }

    fn remove(&self, kind: Kind, name: &str) -> Result<(), StoreError> {
        self.link()?.remove(kind, name)
    }

    fn hold(&self, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError> {
        let link = self.link()?;
        if hold == Hold::Commit {
            return link.hold(hold, wait);
        }
        // Counted first: from here on nobody makes another link, which would not have the hold.
        self.holds.fetch_add(1, Ordering::SeqCst);
        let mut counted = Counted { guard: None, holds: self.holds.clone() };
        counted.guard = Some(link.hold(hold, wait)?);
        Ok(Box::new(counted))
    }

    fn pin(&self, root: Root) -> Result<Box<dyn Guard>, StoreError> {
        let kept = Arc::new(Kept { root, guard: Mutex::new(Some(self.link()?.pin(root)?)) });
        self.link.lock().unwrap_or_else(PoisonError::into_inner).pins.push(Arc::downgrade(&kept));
        Ok(Box::new(KeptGuard(kept)))
    }

    fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        self.link()?.pins()
    }

    fn tidy(&self) -> Result<u64, StoreError> {
        self.link()?.tidy()
    }
}

impl Service for Redialing {
    fn head(&self, root: &Root) -> Result<(u8, Vec<u8>), StoreError> {
        self.link()?.head(root)
    }

    fn leaf(&self, root: &Root, section: usize, leaf: usize) -> Result<Vec<u8>, StoreError> {
        self.link()?.leaf(root, section, leaf)
    }

    fn fetch(
        &self,
        root: &Root,
        section: usize,
        leaf: usize,
        pages: &[u16],
        buffer: &mut Vec<u8>,
        sink: &mut dyn FnMut(Fetched<'_>),
    ) -> Result<(), StoreError> {
        self.link()?.fetch(root, section, leaf, pages, buffer, sink)
    }

    fn have(&self, ids: &[PageId]) -> Result<Vec<bool>, StoreError> {
        self.link()?.have(ids)
    }

    fn wire(&self) -> WireCounts {
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        link.before.and(link.store.wire())
    }
}
