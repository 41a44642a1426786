//! A store with one manifest more, which is yet to be checked: it lies over the bank's own and is seen by nobody else.
//!
//! A client sent `vm7@…@9f…`, which rests on `vm7@1`: opened through this, its leaves resolve through both, and are held against their hashes.

use std::time::{Duration, SystemTime};

use crate::page::Root;
use crate::store::{Draft, Guard, Hold, Kind, Object, Pin, Store, StoreError};

/// The bank's store and one manifest.
#[derive(Debug)]
pub(super) struct Staged<'a> {
    pub store: &'a dyn Store,
    pub name: String,
    pub bytes: Vec<u8>,
}

impl Staged<'_> {
    fn has(&self, kind: Kind, name: &str) -> bool {
        kind == Kind::Manifest && name == self.name
    }
}

fn read_only<T>() -> Result<T, StoreError> {
    Err(StoreError::ReadOnly(std::io::ErrorKind::Unsupported.into()))
}

impl Store for Staged<'_> {
    fn address(&self) -> String {
        self.store.address()
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        let mut objects = self.store.list(kind)?;
        if kind == Kind::Manifest {
            objects.push(Object { name: self.name.clone(), len: self.bytes.len() as u64, modified: SystemTime::UNIX_EPOCH });
        }
        Ok(objects)
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        if !self.has(kind, name) {
            return self.store.read(kind, name, offset, buf);
        }
        let from = usize::try_from(offset).ok().and_then(|from| self.bytes.get(from..)?.get(..buf.len()));
        let wanted = offset.saturating_add(buf.len() as u64);
        buf.copy_from_slice(from.ok_or_else(|| StoreError::Ends { kind, name: name.to_owned(), wanted })?);
        Ok(())
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        if self.has(kind, name) { Ok(self.bytes.len() as u64) } else { self.store.len(kind, name) }
    }

    fn create(&self, _: Kind) -> Result<Box<dyn Draft>, StoreError> {
        read_only()
    }

    fn sync(&self, _: Kind) -> Result<(), StoreError> {
        read_only()
    }

    fn remove(&self, _: Kind, _: &str) -> Result<(), StoreError> {
        read_only()
    }

    fn hold(&self, _: Hold, _: Duration) -> Result<Box<dyn Guard>, StoreError> {
        read_only()
    }

    fn pin(&self, _: Root) -> Result<Box<dyn Guard>, StoreError> {
        read_only()
    }

    fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        read_only()
    }

    fn tidy(&self) -> Result<u64, StoreError> {
        read_only()
    }
}
