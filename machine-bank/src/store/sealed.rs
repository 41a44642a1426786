//! Encryption at rest: a store over any other, which keeps objects that nobody reads, changes, cuts or swaps without the tenant's key.
//!
//! A pack of 40,000 bytes is sealed as three blocks, of 16,384, 16,384 and 7,232 bytes with 16 more each, and a trailer of 64. Reading 15 KB of it reads the trailer once
//! and one or two blocks.
//!
//! ```text
//! blocks      16384 bytes each, the last one the rest; XChaCha20-Poly1305: a tag of 16 bytes behind each
//! salt        32    drawn for each object when its draft is made
//! length       8    bytes before sealing
//! tag         16    of nothing, with kind, name and length beside it
//! "FBSEAL1\n"  8
//! ```
//!
//! *Keys.* `master = derive_key("farbus machine bank 1 seal", tenant key)`, and an object's key is keyed BLAKE3 of its salt under `master`. So no two objects have a
//! key in common, and a block of one says nothing in another, of whatever kind, name or age that is.
//!
//! *Nonces.* A block's is its number, and the trailer's is all ones, which no number is. An object's key comes from 256 bits drawn for its draft alone, and a draft
//! seals each number once, in order: so no nonce comes twice under one key, whoever else writes, and nothing has to be remembered.
//!
//! *What is bound.* The key binds a block to its object, the nonce to its place, and the length, under the trailer's tag, says which is the last. An object's name is
//! known only when it is committed, and the trailer is written then: its tag binds kind, name and length to the key. It is checked before any block is used.
//!
//! *What is not hidden, and not noticed:* names, lengths and times; that an object is missing, or is an older one of the same name. Pages and machines
//! have names that follow from what they are, so the older one of a name says the same. The bank's configuration is not sealed: it says that the rest is.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::{KeyInit, Tag, XChaCha20Poly1305, XNonce};

use super::{Draft, Durability, Guard, Hold, Kind, Object, Pin, Store, StoreError};
use crate::page::{KEY, Root};

const CONTEXT: &str = "farbus machine bank 1 seal";
const MAGIC: &[u8; 8] = b"FBSEAL1\n";
/// Bytes that are sealed together: as many as a group of pages often has.
const BLOCK: u64 = 16 << 10;
const TAG: u64 = 16;
const SALT: usize = 32;
const TRAILER: usize = SALT + 8 + TAG as usize + MAGIC.len();
/// Bytes that a draft hands on at once.
const BATCH: usize = 512 << 10;
/// Objects whose keys are remembered.
const OPENED: usize = 4096;

/// Objects under a tenant's key, in another store.
pub struct SealedStore {
    inner: Box<dyn Store>,
    master: [u8; 32],
    opened: Mutex<HashMap<(Kind, String), Opened>>,
}

/// An object whose trailer was checked.
#[derive(Clone)]
struct Opened {
    cipher: XChaCha20Poly1305,
    len: u64,
}

impl std::fmt::Debug for SealedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedStore").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl SealedStore {
    /// What `inner` keeps under this key.
    pub fn new(inner: Box<dyn Store>, key: &[u8; KEY]) -> Self {
        Self { inner, master: blake3::derive_key(CONTEXT, key), opened: Mutex::default() }
    }

    fn opened(&self) -> MutexGuard<'_, HashMap<(Kind, String), Opened>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, kind: Kind, name: &str) {
        self.opened().remove(&(kind, name.to_owned()));
    }

    /// Once more past a cache, where an object that was written anew under its name may be mixed with what it was: each has a key of its own.
    fn twice<T>(&self, kind: Kind, name: &str, mut open: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
        match open() {
            Err(StoreError::Unsealed { .. }) => {
                self.forget(kind, name);
                self.inner.doubt(kind, name);
                open()
            }
            done => done,
        }
    }

    /// The object's key and length, as its trailer says.
    fn open(&self, kind: Kind, name: &str) -> Result<Opened, StoreError> {
        let unsealed = || StoreError::Unsealed { kind, name: name.to_owned() };
        let total = self.inner.len(kind, name)?;
        let at = total.checked_sub(TRAILER as u64).ok_or_else(unsealed)?;
        let mut trailer = [0; TRAILER];
        self.inner.read(kind, name, at, &mut trailer).map_err(|error| changed(error, kind, name))?;
        let (salt, rest) = trailer.split_at(SALT);
        let (len, rest) = rest.split_at(8);
        let (tag, magic) = rest.split_at(TAG as usize);
        let len = len.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)).filter(|len| sealed_len(*len) == Some(total));
        let (Some(len), Ok(tag), true) = (len, Tag::try_from(tag), magic == MAGIC) else { return Err(unsealed()) };
        let cipher = cipher(&self.master, salt);
        cipher
            .decrypt_inout_detached(&last_nonce(), &bound(kind, name, len), (&mut [][..]).into(), &tag)
            .map_err(|_| unsealed())?;
        let opened = Opened { cipher, len };
        let mut all = self.opened();
        if all.len() >= OPENED {
            all.clear();
        }
        all.insert((kind, name.to_owned()), opened.clone());
        Ok(opened)
    }

    /// Reads from an object that was opened.
    fn read_opened(&self, opened: &Opened, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let wanted = offset.saturating_add(buf.len() as u64);
        if wanted > opened.len {
            return Err(StoreError::Ends { kind, name: name.to_owned(), wanted });
        }
        if buf.is_empty() {
            return Ok(());
        }
        let (first, end) = (offset / BLOCK, wanted.div_ceil(BLOCK));
        let (from, to) = (first * (BLOCK + TAG), (end * BLOCK).min(opened.len) + end * TAG);
        let mut sealed = vec![0; (to - from) as usize];
        self.inner.read(kind, name, from, &mut sealed).map_err(|error| changed(error, kind, name))?;
        for (number, block) in (first..end).zip(sealed.chunks_mut((BLOCK + TAG) as usize)) {
            let (bytes, tag) = block.split_at_mut(block.len() - TAG as usize);
            let opens = Tag::try_from(&*tag)
                .is_ok_and(|tag| opened.cipher.decrypt_inout_detached(&nonce(number), &beside(kind), bytes.into(), &tag).is_ok());
            if !opens {
                return Err(StoreError::Unsealed { kind, name: name.to_owned() });
            }
            let starts = number * BLOCK;
            let (skip, at) = (offset.saturating_sub(starts) as usize, starts.saturating_sub(offset) as usize);
            let bytes = &bytes[skip..];
            let count = bytes.len().min(buf.len() - at);
            buf[at..at + count].copy_from_slice(&bytes[..count]);
        }
        Ok(())
    }
}

/// What the bank says of itself is not sealed: by it whoever opens the bank knows that the rest is.
fn is_description(kind: Kind, name: &str) -> bool {
    kind == Kind::Config && name == crate::bank::CONFIG
}

/// Bytes that `len` bytes become; `None` where that is no number.
fn sealed_len(len: u64) -> Option<u64> {
    len.div_ceil(BLOCK).checked_mul(TAG)?.checked_add(len)?.checked_add(TRAILER as u64)
}

/// Bytes before sealing; none where an object cannot have so many.
fn plain_len(total: u64) -> Option<u64> {
    let blocks = total.checked_sub(TRAILER as u64)?;
    let len = blocks.checked_sub(blocks.div_ceil(BLOCK + TAG) * TAG)?;
    (sealed_len(len) == Some(total)).then_some(len)
}

fn cipher(master: &[u8; 32], salt: &[u8]) -> XChaCha20Poly1305 {
    XChaCha20Poly1305::new(&(*blake3::keyed_hash(master, salt).as_bytes()).into())
}

fn nonce(number: u64) -> XNonce {
    let mut nonce = [0; 24];
    nonce[..8].copy_from_slice(&number.to_le_bytes());
    nonce.into()
}

fn last_nonce() -> XNonce {
    [0xff; 24].into()
}

/// What a block's tag has beside it.
fn beside(kind: Kind) -> Vec<u8> {
    kind.to_string().into_bytes()
}

/// What the trailer's tag has beside it. No kind's name ends in a number, and no object's begins with a slash.
fn bound(kind: Kind, name: &str, len: u64) -> Vec<u8> {
    [kind.to_string().as_bytes(), b"/", name.as_bytes(), b"/", &len.to_le_bytes()].concat()
}

/// An object that ends early was changed since its length was asked for.
fn changed(error: StoreError, kind: Kind, name: &str) -> StoreError {
    match error {
        StoreError::Ends { .. } => StoreError::Unsealed { kind, name: name.to_owned() },
        error => error,
    }
}

impl Store for SealedStore {
    fn address(&self) -> String {
        self.inner.address()
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        let listed = self.inner.list(kind)?;
        // One that cannot be what it is called is there all the same, and whoever reads it is told.
        Ok(listed.into_iter().map(|object| Object { len: plain_len(object.len).unwrap_or(0), ..object }).collect())
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        if is_description(kind, name) {
            return self.inner.read(kind, name, offset, buf);
        }
        let known = self.opened().get(&(kind, name.to_owned())).cloned();
        if let Some(opened) = known {
            match self.read_opened(&opened, kind, name, offset, buf) {
                // Another process may have put another object in its place.
                Err(StoreError::Unsealed { .. } | StoreError::Ends { .. }) => self.forget(kind, name),
                done => return done,
            }
        }
        self.twice(kind, name, || self.open(kind, name).and_then(|opened| self.read_opened(&opened, kind, name, offset, buf)))
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        if is_description(kind, name) {
            return self.inner.len(kind, name);
        }
        self.twice(kind, name, || self.open(kind, name)).map(|opened| opened.len)
    }

    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        let mut salt = [0; SALT];
        getrandom::fill(&mut salt).map_err(|error| StoreError::io("cannot draw a key", io::Error::from(error)))?;
        let draft = SealedDraft {
            inner: self.inner.create(kind)?,
            kind,
            cipher: cipher(&self.master, &salt),
            salt,
            block: Vec::with_capacity(BLOCK as usize),
            number: 0,
            sealed: Vec::new(),
        };
        Ok(Box::new(draft))
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
        self.forget(kind, name);
        self.inner.doubt(kind, name);
    }
}

struct SealedDraft {
    inner: Box<dyn Draft>,
    kind: Kind,
    cipher: XChaCha20Poly1305,
    salt: [u8; SALT],
    /// What the next block begins with.
    block: Vec<u8>,
    number: u64,
    /// Blocks that are not yet handed on.
    sealed: Vec<u8>,
}

impl std::fmt::Debug for SealedDraft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedDraft").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl SealedDraft {
    /// Seals what is in `block` under the next number.
    fn seal(&mut self) -> Result<(), StoreError> {
        let tag = self
            .cipher
            .encrypt_inout_detached(&nonce(self.number), &beside(self.kind), (&mut self.block[..]).into())
            .map_err(|_| too_long())?;
        self.number += 1;
        self.sealed.extend_from_slice(&self.block);
        self.sealed.extend_from_slice(&tag);
        self.block.clear();
        if self.sealed.len() >= BATCH {
            self.inner.append(&self.sealed)?;
            self.sealed.clear();
        }
        Ok(())
    }
}

/// The cipher's only objection; no object of a bank comes near.
fn too_long() -> StoreError {
    StoreError::Io { what: "cannot seal".to_owned(), source: io::ErrorKind::FileTooLarge.into() }
}

impl Draft for SealedDraft {
    fn append(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK as usize - self.block.len()));
            self.block.extend_from_slice(now);
            bytes = later;
            if self.block.len() == BLOCK as usize {
                self.seal()?;
            }
        }
        Ok(())
    }

    fn commit(mut self: Box<Self>, name: &str, durability: Durability) -> Result<(), StoreError> {
        let len = self.number * BLOCK + self.block.len() as u64;
        if !self.block.is_empty() {
            self.seal()?;
        }
        let tag = self.cipher.encrypt_inout_detached(&last_nonce(), &bound(self.kind, name, len), (&mut [][..]).into());
        let tag = tag.map_err(|_| too_long())?;
        self.sealed.extend_from_slice(&self.salt);
        self.sealed.extend_from_slice(&len.to_le_bytes());
        self.sealed.extend_from_slice(&tag);
        self.sealed.extend_from_slice(MAGIC);
        let Self { mut inner, sealed, .. } = *self;
        inner.append(&sealed)?;
        inner.commit(name, durability)
    }
}
