//! A cache in front of any store: blocks of packs, indices and manifests in one file of a local directory, for this process, others, and those to come.
//!
//! A withdrawal of `vm7@1` from a bucket reads 51 MB and leaves them in the cache; that of `vm7@2` then reads the 5 MB that are new. What is there already are 32 KiB
//! blocks of objects that never change, so nobody has to ask whether they have.
//!
//! The bank's name, the object's and the block's number are hashed to a key, the key says which 16 places of the file a block may have, and the
//! one of them that was not used for longest makes room: so the file has its size, and nothing needs to be counted or locked. Each place says what is there and BLAKE3
//! of it, keyed with the key. Whoever reads holds one against the other: a block that was torn, flipped, or half overwritten by another process is not there.
//!
//! A manifest may be written anew under its name ([`crate::keep::remove`]), so its key has its length and time as the last listing said them. What turns out not to be
//! what it should be is fetched anew ([`Store::doubt`]). A cache that cannot be written says so once, and is read only.
//!
//! A bank over a link has no objects that could be read: in front of it pages are kept, by their names ([`PagedStore`]).
//!
//! ```text
//! "FBCACHE1", sets, ways (16), bytes of a block (32768), BLAKE3 of these 20 bytes     4096, zeros at the end
//! for each place: key[8..32], bytes, when last used (seconds), BLAKE3                  64 each
//! for each place: the block                                                            32768 each
//! ```

mod arena;
mod paged;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::{Draft, Durability, Guard, Hold, Kind, Object, Pin, Store, StoreError};
use crate::page::Root;
use arena::Arena;
pub use paged::{PageCache, PagedStore};

/// Bytes of a block.
const BLOCK: u64 = 32 << 10;

/// Bytes that are asked of the store at once.
const FETCH: u64 = 16 << 20;

/// What a cache did since it was opened.
#[derive(Debug, Default)]
pub struct CacheCounters {
    hits: AtomicU64,
    misses: AtomicU64,
    wire_bytes: AtomicU64,
    evictions: AtomicU64,
}

/// The counters at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CacheFigures {
    /// Blocks that were there: of 32 KiB, or pages of 4 KiB where the bank is at the other end of a link.
    pub hits: u64,
    /// Blocks that were not.
    pub misses: u64,
    /// Bytes of objects that came from the store; those of the pages, before compression, where it is at the other end of a link.
    pub wire_bytes: u64,
    /// Blocks that made room for others.
    pub evictions: u64,
}

impl CacheCounters {
    /// What they are now.
    pub fn figures(&self) -> CacheFigures {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CacheFigures {
            hits: of(&self.hits),
            misses: of(&self.misses),
            wire_bytes: of(&self.wire_bytes),
            evictions: of(&self.evictions),
        }
    }
}

fn lock(facts: &Mutex<Facts>) -> MutexGuard<'_, Facts> {
    facts.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

/// A store with a cache.
#[derive(Debug)]
pub struct CachedStore {
    inner: Box<dyn Store>,
    arena: Option<Arena>,
    /// Whether it could not be written.
    full: AtomicBool,
    counters: Arc<CacheCounters>,
    address: String,
    facts: Arc<Mutex<Facts>>,
}

#[derive(Debug, Default)]
struct Facts {
    known: HashMap<(Kind, String), Known>,
    doubted: HashSet<(Kind, String)>,
}

impl Facts {
    fn doubt(&mut self, kind: Kind, name: &str) {
        let key = (kind, name.to_owned());
        self.known.remove(&key);
        self.doubted.insert(key);
    }
}

/// Which object it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    len: u64,
    /// Nanoseconds since 1970, for what may be another object under the same name.
    modified: u128,
}

impl Known {
    fn of(kind: Kind, object: &Object) -> Self {
        let since = object.modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { len: object.len, modified: if kind == Kind::Manifest { since.as_nanos() } else { 0 } }
    }
}

impl CachedStore {
    /// `inner`, with a cache of at most `size` bytes in the directory `folder`, which is made where it is missing. A cache that is in use there keeps its size. Where
    /// there can be none, that is in the log, and the store is as it is without.
    pub fn new(inner: Box<dyn Store>, folder: &Path, size: u64) -> Self {
        let arena = Arena::open(folder, "blocks", BLOCK, size).inspect_err(|error| {
            tracing::warn!(%error, folder = %folder.display(), "nothing is cached");
        });
        let address = inner.address();
        let full = AtomicBool::new(false);
        Self { inner, arena: arena.ok(), full, counters: Arc::default(), address, facts: Arc::default() }
    }

    /// What it does, also later.
    pub fn counters(&self) -> Arc<CacheCounters> {
        self.counters.clone()
    }

    /// Whether anything can be kept.
    pub fn keeps(&self) -> bool {
        self.arena.is_some() && !self.full.load(Ordering::Relaxed)
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        lock(&self.facts)
    }

    fn forget(&self, kind: Kind, name: &str) {
        self.facts().known.remove(&(kind, name.to_owned()));
    }

    /// Which object is called that, and whether that was known without asking.
    fn known(&self, kind: Kind, name: &str) -> Result<(Known, bool), StoreError> {
        let key = (kind, name.to_owned());
        if let Some(known) = self.facts().known.get(&key) {
            return Ok((*known, true));
        }
        let known = match kind {
            Kind::Manifest => {
                self.list(kind)?;
                let known = self.facts().known.get(&key).copied();
                match known {
                    Some(known) => known,
                    // Says why: that it is missing, or that nothing is called so.
                    None => Known { len: self.inner.len(kind, name)?, modified: u128::MAX },
                }
            }
            _ => Known { len: self.inner.len(kind, name)?, modified: 0 },
        };
        self.facts().known.insert(key, known);
        Ok((known, false))
    }

    fn read_known(&self, arena: &Arena, known: Known, at: (Kind, &str, u64), buf: &mut [u8]) -> Result<(), StoreError> {
        let (kind, name, offset) = at;
        let wanted = offset.saturating_add(buf.len() as u64);
        if wanted > known.len {
            return Err(StoreError::Ends { kind, name: name.to_owned(), wanted });
        }
        let object = self.object(kind, name, known);
        let trusted = !self.facts().doubted.contains(&(kind, name.to_owned()));
        let (first, end) = (offset / BLOCK, wanted.div_ceil(BLOCK));
        let len_of = |number: u64| BLOCK.min(known.len - number * BLOCK) as usize;
        let (mut block, mut lacking) = (vec![0; BLOCK as usize], first..first);
        for number in first..end {
            let block = &mut block[..len_of(number)];
            if trusted && arena.find(&key(&object, number), block) {
                add(&self.counters.hits, 1);
                self.fetch(arena, &object, known, at, lacking, buf)?;
                lacking = number + 1..number + 1;
                give(number, block, offset, buf);
            } else {
                lacking.end = number + 1;
                if (lacking.end - lacking.start) * BLOCK >= FETCH {
                    self.fetch(arena, &object, known, at, lacking, buf)?;
                    lacking = number + 1..number + 1;
                }
            }
        }
        self.fetch(arena, &object, known, at, lacking, buf)
    }

    /// Reads blocks from the store, keeps them, and puts what is wanted of them into `buf`.
    fn fetch(
        &self,
        arena: &Arena,
        object: &[u8; 32],
        known: Known,
        (kind, name, offset): (Kind, &str, u64),
        lacking: std::ops::Range<u64>,
        buf: &mut [u8],
    ) -> Result<(), StoreError> {
        if lacking.is_empty() {
            return Ok(());
        }
        let from = lacking.start * BLOCK;
        let mut bytes = vec![0; ((lacking.end * BLOCK).min(known.len) - from) as usize];
        self.inner.read(kind, name, from, &mut bytes)?;
        add(&self.counters.misses, lacking.end - lacking.start);
        add(&self.counters.wire_bytes, bytes.len() as u64);
        for (number, block) in lacking.zip(bytes.chunks(BLOCK as usize)) {
            give(number, block, offset, buf);
            if self.full.load(Ordering::Relaxed) {
                continue;
            }
            match arena.keep(&key(object, number), block) {
                Ok(evicted) => add(&self.counters.evictions, u64::from(evicted)),
                Err(error) => {
                    if !self.full.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%error, "the cache of {} cannot be written, and is only read from now on", self.address);
                    }
                }
            }
        }
        Ok(())
    }

    fn object(&self, kind: Kind, name: &str, known: Known) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        for part in [self.address.as_str(), &kind.to_string(), name] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hash.update(&known.len.to_le_bytes()).update(&known.modified.to_le_bytes());
        *hash.finalize().as_bytes()
    }
}

fn key(object: &[u8; 32], number: u64) -> [u8; 32] {
    *blake3::keyed_hash(object, &number.to_le_bytes()).as_bytes()
}

/// Copies what lies both in block `number` and in `buf`, which begins at `offset`.
fn give(number: u64, block: &[u8], offset: u64, buf: &mut [u8]) {
    let starts = number * BLOCK;
    let (skip, at) = (offset.saturating_sub(starts) as usize, starts.saturating_sub(offset) as usize);
    let count = block.len().saturating_sub(skip).min(buf.len() - at);
    buf[at..at + count].copy_from_slice(&block[skip..skip + count]);
}

impl Store for CachedStore {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        let objects = self.inner.list(kind)?;
        let mut facts = self.facts();
        facts.known.retain(|(other, _), _| *other != kind);
        facts.known.extend(objects.iter().map(|object| ((kind, object.name.clone()), Known::of(kind, object))));
        Ok(objects)
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let Some(arena) = self.arena.as_ref().filter(|_| kind != Kind::Config && !buf.is_empty()) else {
            self.inner.read(kind, name, offset, buf)?;
            add(&self.counters.wire_bytes, buf.len() as u64);
            return Ok(());
        };
        let (known, remembered) = self.known(kind, name)?;
        match self.read_known(arena, known, (kind, name, offset), buf) {
            // It may be another object by now.
            Err(StoreError::Missing { .. } | StoreError::Ends { .. }) if remembered => {
                self.forget(kind, name);
                self.inner.doubt(kind, name);
                let (known, _) = self.known(kind, name)?;
                self.read_known(arena, known, (kind, name, offset), buf)
            }
            done => done,
        }
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        if kind == Kind::Config { self.inner.len(kind, name) } else { self.known(kind, name).map(|(known, _)| known.len) }
    }

    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        Ok(Box::new(CachedDraft { inner: self.inner.create(kind)?, kind, facts: self.facts.clone() }))
    }

    fn sync(&self, kind: Kind) -> Result<(), StoreError> {
        self.inner.sync(kind)
    }

    fn remove(&self, kind: Kind, name: &str) -> Result<(), StoreError> {
        self.forget(kind, name);
        self.inner.remove(kind, name)
    }

    fn hold(&self, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError> {
        self.inner.hold(hold, wait)
    }

    fn pin(&self, root: Root) -> Result<Box<dyn Guard>, StoreError> {
        self.inner.pin(root)
    }

    fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        self.inner.pins()
    }

    fn tidy(&self) -> Result<u64, StoreError> {
        self.inner.tidy()
    }

    fn reserve(&self, name: &str) -> Result<bool, StoreError> {
        self.inner.reserve(name)
    }

    fn doubt(&self, kind: Kind, name: &str) {
        self.facts().doubt(kind, name);
        self.inner.doubt(kind, name);
    }
}

/// What is written goes to the store alone: whoever deposits a machine rarely withdraws it at the same place.
#[derive(Debug)]
struct CachedDraft {
    inner: Box<dyn Draft>,
    kind: Kind,
    facts: Arc<Mutex<Facts>>,
}

impl Draft for CachedDraft {
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.inner.append(bytes)
    }

    fn commit(self: Box<Self>, name: &str, durability: Durability) -> Result<(), StoreError> {
        let Self { inner, kind, facts } = *self;
        inner.commit(name, durability)?;
        lock(&facts).doubt(kind, name);
        Ok(())
    }
}
