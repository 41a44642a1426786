//! A cache in front of a bank at the other end of a link: pages and leaves by their names, in one file of a local directory, for this process, others, and those to come.
//!
//! `PagedStore::new(Box::new(remote), "/var/cache/bank", 4 << 30)`: a withdrawal of `vm7@1` fetches 46,000 pages and leaves them there; that of `vm7@2` asks for the
//! 5,000 that are new. Such a bank is asked by places in a machine; but which page is at a place is known here, so that it need not be asked for one that is kept.
//!
//! The file is that of [`super`], called `pages`, with places of 4 KiB: a page is one block, a leaf of 4096 names 33 of them. Its size is bounded, what was not used for
//! longest makes room, and any number of processes and banks have it in common: a page has one name wherever it comes from. Whoever reads a page from it holds it
//! against its name as if it came over the link, so one that was torn or flipped is fetched instead. What came over a link is kept when it was verified, and not before.
//!
//! *Tenants.* The key of a place is a hash of the name. Names of a bank with a tenant key are keyed, so nobody finds a page of it who cannot name it. Pages of a bank that
//! is not sealed are in the file as they are, as they are in the bank: it is its user's alone (mode 600). Of a *sealed* bank they are sealed here too: with
//! XChaCha20-Poly1305, under a key that is derived from the tenant's and used for nothing else, the place's key and kind bound by the nonce, and the tag beside the
//! place; and the places' keys are made with another such key. A nonce follows from a name, which has one content: it never comes with another. Before
//! [`Bank::open`](crate::Bank::open) has said which of both it is, nothing is found or kept.
//!
//! *What can be noticed.* Who serves the bank sees which pages are not asked for, and so what was withdrawn before.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::{KeyInit, Tag, XChaCha20Poly1305, XNonce};

use super::arena::Arena;
use super::{CacheCounters, add};
use crate::page::{KEY, PAGE, PageId, Root};
use crate::remote::Service;
use crate::store::{Draft, Guard, Hold, Kind, Object, Pin, Store, StoreError};

/// Bytes of the largest leaf as it is written in full.
const MOST_LEAF: usize = crate::manifest::LEAF * 32 + crate::manifest::LEAF / 8;

/// How what is kept is found and read.
enum Lid {
    Open([u8; 32]),
    Sealed(Box<XChaCha20Poly1305>, [u8; 32]),
}

/// Pages and leaves that were fetched before.
pub struct PageCache {
    arena: Option<Arena>,
    lid: OnceLock<Lid>,
    full: AtomicBool,
    counters: Arc<CacheCounters>,
}

impl std::fmt::Debug for PageCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageCache").field("arena", &self.arena).finish_non_exhaustive()
    }
}

/// What a block is of.
#[derive(Clone, Copy)]
enum Of {
    Page = 0,
    Leaf = 1,
}

impl PageCache {
    fn new(folder: &Path, size: u64) -> Self {
        let arena = Arena::open(folder, "pages", PAGE as u64, size).inspect_err(|error| {
            tracing::warn!(%error, folder = %folder.display(), "nothing is cached");
        });
        Self { arena: arena.ok(), lid: OnceLock::new(), full: AtomicBool::new(false), counters: Arc::default() }
    }

    /// Whether what is kept is sealed, and under which tenant's key.
    pub(crate) fn begin(&self, sealed: Option<&[u8; KEY]>) {
        self.lid.get_or_init(|| match sealed {
            None => Lid::Open(blake3::derive_key("farbus machine bank 1 cached names", &[])),
            Some(key) => {
                let cipher = XChaCha20Poly1305::new(&blake3::derive_key("farbus machine bank 1 cached seal", key).into());
                Lid::Sealed(Box::new(cipher), blake3::derive_key("farbus machine bank 1 cached sealed names", key))
            }
        });
    }

    /// Fills `page` with what is kept under this name. It is to be held against the name.
    pub(crate) fn page(&self, id: &PageId, page: &mut [u8; PAGE]) -> bool {
        self.find(Of::Page, &id.0, 0, page)
    }

    /// A page turned out to be what it is called, or not; and whether it has to be fetched.
    pub(crate) fn count(&self, hits: usize, misses: usize) {
        add(&self.counters.hits, hits as u64);
        add(&self.counters.misses, misses as u64);
        add(&self.counters.wire_bytes, (misses * PAGE) as u64);
    }

    /// Keeps a page that is what it is called.
    pub(crate) fn keep_page(&self, id: &PageId, page: &[u8; PAGE]) {
        self.keep(Of::Page, &id.0, 0, page);
    }

    /// A leaf as it is written in full, by its hash, which it is to be held against.
    pub(crate) fn leaf(&self, hash: &[u8; 32]) -> Option<Vec<u8>> {
        let mut block = [0; PAGE];
        let mut find = |number| self.find(Of::Leaf, hash, number, &mut block).then_some(block);
        let first = find(0)?;
        let (len, rest) = first.split_first_chunk::<4>()?;
        let len = usize::try_from(u32::from_le_bytes(*len)).ok().filter(|len| *len <= MOST_LEAF)?;
        let mut bytes = rest.to_vec();
        while bytes.len() < len {
            let number = 1 + (bytes.len() - rest.len()) / PAGE;
            bytes.extend_from_slice(&find(number as u32)?);
        }
        bytes.truncate(len);
        Some(bytes)
    }

    /// Keeps a leaf that has this hash.
    pub(crate) fn keep_leaf(&self, hash: &[u8; 32], leaf: &[u8]) {
        let bytes = [&(leaf.len() as u32).to_le_bytes(), leaf].concat();
        for (number, piece) in (0..).zip(bytes.chunks(PAGE)) {
            let mut block = [0; PAGE];
            block[..piece.len()].copy_from_slice(piece);
            self.keep(Of::Leaf, hash, number, &block);
        }
    }

    fn find(&self, of: Of, name: &[u8; 32], number: u32, block: &mut [u8; PAGE]) -> bool {
        let (Some(arena), Some(lid)) = (&self.arena, self.lid.get()) else { return false };
        let key = lid.key(of, name, number);
        arena.find_if(&key, block, |block, noted| match lid {
            Lid::Open(_) => true,
            Lid::Sealed(cipher, _) => Tag::try_from(&noted[..16])
                .is_ok_and(|tag| cipher.decrypt_inout_detached(&nonce(&key), &[], block.into(), &tag).is_ok()),
        })
    }

    fn keep(&self, of: Of, name: &[u8; 32], number: u32, block: &[u8; PAGE]) {
        let (Some(arena), Some(lid)) = (&self.arena, self.lid.get()) else { return };
        if self.full.load(Ordering::Relaxed) {
            return;
        }
        let (key, mut block, mut noted) = (lid.key(of, name, number), *block, [0; 32]);
        if let Lid::Sealed(cipher, _) = lid {
            let Ok(tag) = cipher.encrypt_inout_detached(&nonce(&key), &[], (&mut block[..]).into()) else { return };
            noted[..16].copy_from_slice(&tag);
        }
        match arena.keep_noted(&key, &block, &noted) {
            Ok(evicted) => add(&self.counters.evictions, u64::from(evicted)),
            Err(error) => {
                if !self.full.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "a cache of pages cannot be written, and is only read from now on");
                }
            }
        }
    }
}

impl Lid {
    fn key(&self, of: Of, name: &[u8; 32], number: u32) -> [u8; 32] {
        let (Self::Open(key) | Self::Sealed(_, key)) = self;
        let mut input = [0; 37];
        input[0] = of as u8;
        input[1..5].copy_from_slice(&number.to_le_bytes());
        input[5..].copy_from_slice(name);
        *blake3::keyed_hash(key, &input).as_bytes()
    }
}

fn nonce(key: &[u8; 32]) -> XNonce {
    let mut nonce = XNonce::default();
    nonce.copy_from_slice(&key[..24]);
    nonce
}

/// A bank at the other end of a link, with pages of it kept here.
#[derive(Debug)]
pub struct PagedStore {
    inner: Box<dyn Store>,
    pages: PageCache,
}

impl PagedStore {
    /// `inner`, with a cache of at most `size` bytes in the directory `folder`, as [`CachedStore::new`](super::CachedStore::new) has one.
    pub fn new(inner: Box<dyn Store>, folder: &Path, size: u64) -> Self {
        Self { inner, pages: PageCache::new(folder, size) }
    }

    /// What it does, also later.
    pub fn counters(&self) -> Arc<CacheCounters> {
        self.pages.counters.clone()
    }
}

impl Store for PagedStore {
    fn address(&self) -> String {
        self.inner.address()
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        self.inner.list(kind)
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.inner.read(kind, name, offset, buf)
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        self.inner.len(kind, name)
    }

    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        self.inner.create(kind)
    }

    fn sync(&self, kind: Kind) -> Result<(), StoreError> {
        self.inner.sync(kind)
    }

    fn remove(&self, kind: Kind, name: &str) -> Result<(), StoreError> {
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

    fn service(&self) -> Option<&dyn Service> {
        self.inner.service()
    }

    fn pages(&self) -> Option<&PageCache> {
        Some(&self.pages)
    }

    fn reserve(&self, name: &str) -> Result<bool, StoreError> {
        self.inner.reserve(name)
    }

    fn doubt(&self, kind: Kind, name: &str) {
        self.inner.doubt(kind, name);
    }
}
