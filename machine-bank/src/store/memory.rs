//! A store in memory, for tests: objects that can be torn, flipped, hidden and refused, as disks and networks do.
//!
//! `store.flip(Kind::Pack, "9f…", 100, 3)` turns one bit of a pack, and whoever withdraws a machine with that page must hear of it;
//! `store.fail_writes_after(5)` lets five writes through and refuses the sixth as a full disk would.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::{Draft, Durability, Guard, Hold, Kind, Object, Pin, Store, StoreError, valid_name};
use crate::page::Root;

/// A store that is gone when the last clone is dropped.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Objects with when they were committed.
type Objects = BTreeMap<(Kind, String), (Arc<Vec<u8>>, SystemTime)>;

#[derive(Debug, Default)]
struct State {
    objects: Objects,
    deposits: usize,
    sweeping: bool,
    committing: bool,
    pins: Vec<Root>,
    /// Calls that may still write; `None`: any number.
    writes_left: Option<u64>,
    gone: bool,
    delay: Duration,
}

impl State {
    fn reachable(&self) -> Result<(), StoreError> {
        if self.gone { Err(StoreError::io("the store is gone", io::ErrorKind::ConnectionReset.into())) } else { Ok(()) }
    }

    fn write(&mut self) -> Result<(), StoreError> {
        self.reachable()?;
        match &mut self.writes_left {
            None => Ok(()),
            Some(0) => Err(StoreError::Full(io::ErrorKind::StorageFull.into())),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }
}

impl MemoryStore {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// A copy of all objects as they are now, and of no lock: what is there after a crash at this instant.
    pub fn crashed(&self) -> Self {
        let objects = self.state().objects.clone();
        let copy = Self::new();
        copy.state().objects = objects;
        copy
    }

    /// Lets `writes` more calls write and refuses the others.
    pub fn fail_writes_after(&self, writes: u64) {
        self.state().writes_left = Some(writes);
    }

    /// Ends all faults.
    pub fn heal(&self) {
        let mut state = self.state();
        (state.writes_left, state.gone, state.delay) = (None, false, Duration::ZERO);
    }

    /// Refuses every call.
    pub fn disappear(&self) {
        self.state().gone = true;
    }

    /// Takes this long to read anything.
    pub fn slow_down(&self, delay: Duration) {
        self.state().delay = delay;
    }

    /// Turns bit `bit` of byte `at` of an object; false where there is no such byte.
    pub fn flip(&self, kind: Kind, name: &str, at: usize, bit: u8) -> bool {
        self.change(kind, name, |bytes| {
            bytes.get_mut(at).is_some_and(|byte| {
                *byte ^= 1 << (bit & 7);
                true
            })
        })
    }

    /// Leaves the first `len` bytes of an object, as a torn write does.
    pub fn tear(&self, kind: Kind, name: &str, len: usize) -> bool {
        self.change(kind, name, |bytes| {
            bytes.truncate(len);
            true
        })
    }

    fn change(&self, kind: Kind, name: &str, change: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        self.state().objects.get_mut(&(kind, name.to_owned())).is_some_and(|(bytes, _)| change(Arc::make_mut(bytes)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn object(&self, kind: Kind, name: &str) -> Result<Arc<Vec<u8>>, StoreError> {
        let delay = {
            let state = self.state();
            state.reachable()?;
            state.delay
        };
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        let state = self.state();
        let object = state.objects.get(&(kind, name.to_owned()));
        object.map(|(bytes, _)| bytes.clone()).ok_or_else(|| StoreError::Missing { kind, name: name.to_owned() })
    }
}

impl Store for MemoryStore {
    fn address(&self) -> String {
        "memory".to_owned()
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        let state = self.state();
        state.reachable()?;
        let of_kind = state.objects.iter().filter(|((other, _), _)| *other == kind);
        Ok(of_kind
            .map(|((_, name), (bytes, modified))| Object { name: name.clone(), len: bytes.len() as u64, modified: *modified })
            .collect())
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let object = self.object(kind, name)?;
        let wanted = offset.saturating_add(buf.len() as u64);
        let range = usize::try_from(offset).ok().zip(usize::try_from(wanted).ok());
        let bytes = range.and_then(|(from, to)| object.get(from..to));
        buf.copy_from_slice(bytes.ok_or_else(|| StoreError::Ends { kind, name: name.to_owned(), wanted })?);
        Ok(())
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        Ok(self.object(kind, name)?.len() as u64)
    }

    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        self.state().write()?;
        Ok(Box::new(MemoryDraft { store: self.clone(), kind, bytes: Vec::new() }))
    }

    fn sync(&self, _: Kind) -> Result<(), StoreError> {
        self.state().write()
    }

    fn remove(&self, kind: Kind, name: &str) -> Result<(), StoreError> {
        let mut state = self.state();
        state.write()?;
        state.objects.remove(&(kind, name.to_owned()));
        Ok(())
    }

    fn hold(&self, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError> {
        let until = Instant::now() + wait;
        let mut state = self.state();
        loop {
            state.reachable()?;
            let free = match hold {
                Hold::Deposit => !state.sweeping,
                Hold::Commit => !state.committing,
                Hold::Sweep => !state.sweeping && state.deposits == 0,
            };
            if free {
                break;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let by = if state.sweeping { "a collection of garbage is running" } else { "a deposit is running" };
                return Err(StoreError::Busy { by: by.to_owned() });
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match hold {
            Hold::Deposit => state.deposits += 1,
            Hold::Commit => state.committing = true,
            Hold::Sweep => state.sweeping = true,
        }
        Ok(Box::new(MemoryGuard { store: self.clone(), what: Held::Hold(hold) }))
    }

    fn pin(&self, root: Root) -> Result<Box<dyn Guard>, StoreError> {
        let mut state = self.state();
        state.reachable()?;
        state.pins.push(root);
        Ok(Box::new(MemoryGuard { store: self.clone(), what: Held::Pin(root) }))
    }

    fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        let state = self.state();
        state.reachable()?;
        Ok(state.pins.iter().map(|root| Pin { root: *root, pid: std::process::id() }).collect())
    }

    fn tidy(&self) -> Result<u64, StoreError> {
        self.state().write().map(|()| 0)
    }
}

#[derive(Debug)]
struct MemoryDraft {
    store: MemoryStore,
    kind: Kind,
    bytes: Vec<u8>,
}

impl Draft for MemoryDraft {
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.store.state().write()?;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn commit(self: Box<Self>, name: &str, _: Durability) -> Result<(), StoreError> {
        if !valid_name(name) {
            return Err(StoreError::Name(name.to_owned()));
        }
        let mut state = self.store.state();
        state.write()?;
        state.objects.insert((self.kind, name.to_owned()), (Arc::new(self.bytes), SystemTime::now()));
        Ok(())
    }
}

#[derive(Debug)]
enum Held {
    Hold(Hold),
    Pin(Root),
}

#[derive(Debug)]
struct MemoryGuard {
    store: MemoryStore,
    what: Held,
}

impl Guard for MemoryGuard {}

impl Drop for MemoryGuard {
    fn drop(&mut self) {
        let mut state = self.store.state();
        match self.what {
            Held::Hold(Hold::Deposit) => state.deposits -= 1,
            Held::Hold(Hold::Commit) => state.committing = false,
            Held::Hold(Hold::Sweep) => state.sweeping = false,
            Held::Pin(root) => {
                if let Some(at) = state.pins.iter().position(|pin| *pin == root) {
                    state.pins.swap_remove(at);
                }
            }
        }
        self.store.0.changed.notify_all();
    }
}
