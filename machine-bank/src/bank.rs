//! A bank: a store, what its pages are named by, and the machines in it. Everything else is an operation on one.
//!
//! `Bank::init(Box::new(Directory::create("/var/lib/bank")?), None)` makes one; `bank.deposit("vm7", …)` adds a machine, `bank.find("vm7")` says
//! which deposit `vm7` is, `bank.withdraw(…)` writes it to files again.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::codec::{Input, Malformed};
use crate::keep::numbers::Numbers;
use crate::manifest::{Entry, Listing, Manifest, ManifestError};
use crate::page::{Identity, KEY};
use crate::store::{Durability, Guard, Hold, Kind, SealedStore, Store, StoreError};

pub(crate) const CONFIG: &str = "bank";
const MAGIC: &[u8; 8] = b"FBBANK1\n";
const VERSION: u16 = 1;
/// Of a bank whose objects are sealed: what knows version 1 only must not add to it.
const SEALED_VERSION: u16 = 2;
const CONFIG_BYTES: u64 = 8 + 2 + 1 + 32;

/// A bank.
#[derive(Debug)]
pub struct Bank {
    store: Box<dyn Store>,
    identity: Identity,
    wait: Duration,
}

/// Why a bank cannot be used.
#[derive(Debug, Error)]
pub enum BankError {
    /// The store's fault.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There are machines or packs, and what says whose they are is gone.
    #[error("there are machines or packs of a bank whose description (config/bank) is gone")]
    Nameless,
    /// What the bank says of itself is damaged.
    #[error("the bank's description: {0}")]
    Malformed(#[from] Malformed),
    /// There is a bank already.
    #[error("there is a bank already")]
    Exists,
    /// It was made with a key.
    #[error("the bank was made with a tenant key, and none was given")]
    KeyNeeded,
    /// It was made without one, or with another.
    #[error("the bank was not made with this tenant key")]
    WrongKey,
}

impl Bank {
    /// Makes an empty bank in an empty store. With a key its pages are named so that nobody without it can tell whether a page is there.
    ///
    /// # Errors
    /// There is a bank, or the store's fault.
    pub fn init(store: Box<dyn Store>, key: Option<&[u8; KEY]>) -> Result<Self, BankError> {
        let identity = key.map_or_else(Identity::plain, Identity::keyed);
        Self::describe(&*store, VERSION, key.is_some(), &identity.check())?;
        Ok(Self::with(store, identity))
    }

    /// The same, with every object sealed under the key ([`SealedStore`]).
    ///
    /// # Errors
    /// There is a bank, or the store's fault.
    pub fn init_sealed(store: Box<dyn Store>, key: &[u8; KEY]) -> Result<Self, BankError> {
        let identity = Identity::keyed(key);
        Self::describe(&*store, SEALED_VERSION, true, &sealed_check(&identity))?;
        Ok(Self::with(Box::new(SealedStore::new(store, key)), identity))
    }

    fn describe(store: &dyn Store, version: u16, keyed: bool, check: &[u8; 32]) -> Result<(), BankError> {
        match store.len(Kind::Config, CONFIG) {
            Ok(_) => return Err(BankError::Exists),
            Err(StoreError::Missing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        // Described as another bank, with another key or none, they would all look damaged.
        if !store.list(Kind::Manifest)?.is_empty() || !store.list(Kind::Pack)?.is_empty() {
            return Err(BankError::Nameless);
        }
        let config = [&MAGIC[..], &version.to_le_bytes(), &[u8::from(keyed)], check].concat();
        store.put(Kind::Config, CONFIG, &config, Durability::Durable)?;
        store.sync(Kind::Config)?;
        Ok(())
    }

    /// Opens the bank in a store; whether its objects are sealed it says itself.
    ///
    /// # Errors
    /// There is none, its key is another, or the store's fault.
    pub fn open(store: Box<dyn Store>, key: Option<&[u8; KEY]>) -> Result<Self, BankError> {
        let config = store.read_all(Kind::Config, CONFIG, CONFIG_BYTES)?;
        let mut input = Input::new(&config);
        if input.array::<8>()? != *MAGIC {
            return Err(Malformed::Magic("bank").into());
        }
        let (version, keyed, check) = (input.u16()?, input.u8()?, input.array::<32>()?);
        input.end()?;
        if !(VERSION..=SEALED_VERSION).contains(&version) {
            return Err(Malformed::Version(version, SEALED_VERSION).into());
        }
        if keyed == 1 && key.is_none() {
            return Err(BankError::KeyNeeded);
        }
        let identity = key.map_or_else(Identity::plain, Identity::keyed);
        // Whoever can write the description cannot make an open bank of a sealed one: the one's check does not lead to the other's.
        let expected = if version == SEALED_VERSION { sealed_check(&identity) } else { identity.check() };
        if expected != check || (keyed == 1) != key.is_some() {
            return Err(BankError::WrongKey);
        }
        if let Some(pages) = store.pages() {
            pages.begin(key.filter(|_| version == SEALED_VERSION));
        }
        let store = match key {
            // Over a link the other side opens what is sealed: what comes here is pages, not objects.
            Some(key) if version == SEALED_VERSION && store.service().is_none() => Box::new(SealedStore::new(store, key)),
            _ => store,
        };
        Ok(Self::with(store, identity))
    }

    fn with(store: Box<dyn Store>, identity: Identity) -> Self {
        Self { store, identity, wait: Duration::from_secs(10) }
    }

    /// How long to wait for others who use the bank in a way that does not go with ours; 10 s unless this says otherwise.
    #[must_use]
    pub fn patience(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// How long to wait for others.
    pub fn wait(&self) -> Duration {
        self.wait
    }

    /// Where its objects are.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// How it hashes.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The machines in it.
    ///
    /// # Errors
    /// The store's fault.
    pub fn listing(&self) -> Result<Listing, StoreError> {
        Listing::read(self.store())
    }

    /// The number of a machine's next deposit, which nobody else is given, and which no deposit had that was removed since. Asked for under [`Hold::Commit`](crate::store::Hold).
    /// It is 0 where the bank at the other end of a link is to choose it.
    ///
    /// # Errors
    /// The store's fault.
    pub fn next_number(&self, machine: &str) -> Result<u64, StoreError> {
        if self.store.service().is_some() {
            return Ok(0);
        }
        let last = self.listing()?.last(machine).map_or(0, |entry| entry.number);
        let given = last.max(Numbers::read(self.store())?.given(machine));
        let none_left = || StoreError::io(format!("{machine} has had every number"), std::io::ErrorKind::InvalidData.into());
        let mut number = given.checked_add(1).ok_or_else(none_left)?;
        // One that is taken and not there was a deposit's that died at its last step.
        while !self.store.reserve(&format!("{machine}@{number:08}"))? {
            number += 1;
        }
        Ok(number)
    }

    /// A machine by what people write: `vm7`, `vm7@3`, `9f02ab`.
    ///
    /// # Errors
    /// There is none, or more than one, or the store's fault.
    pub fn find(&self, wish: &str) -> Result<Entry, FindError> {
        self.listing()?.find(wish).cloned().ok_or_else(|| FindError::None(wish.to_owned()))
    }

    /// Keeps a machine from being removed until the guard is dropped; nothing where the bank can only be read. Then a page that is removed
    /// meanwhile is missed, and never wrong.
    ///
    /// # Errors
    /// The store's fault.
    pub fn pin(&self, entry: &Entry) -> Result<Option<Box<dyn Guard>>, StoreError> {
        // Who removes machines looks for pins under the same lock.
        match self.store().hold(Hold::Commit, self.wait).and_then(|_commit| self.store().pin(entry.root)) {
            Ok(pin) => Ok(Some(pin)),
            Err(StoreError::ReadOnly(error)) => {
                tracing::debug!(%error, "the bank cannot be written, so nothing keeps the machine from being removed");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The manifest of a machine.
    ///
    /// # Errors
    /// It is damaged, or the store's fault.
    pub fn manifest(&self, entry: &Entry) -> Result<Arc<Manifest>, ManifestError> {
        Manifest::open(self.store(), &self.identity, &self.listing()?, &entry.root)
    }
}

/// What the description of a sealed bank has of its key.
fn sealed_check(identity: &Identity) -> [u8; 32] {
    blake3::derive_key("farbus machine bank 1 sealed", &identity.check())
}

/// Why a machine is not found.
#[derive(Debug, Error)]
pub enum FindError {
    /// The store's fault.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No deposit is called that, or more than one.
    #[error("no machine, or more than one, is {0}")]
    None(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    #[test]
    fn a_bank_opens_with_its_own_key_only() {
        let (plain, keyed) = (MemoryStore::new(), MemoryStore::new());
        let open = |store: &MemoryStore, key| Bank::open(Box::new(store.clone()), key);
        assert!(matches!(open(&plain, None), Err(BankError::Store(StoreError::Missing { .. }))));
        Bank::init(Box::new(plain.clone()), None).unwrap();
        Bank::init(Box::new(keyed.clone()), Some(&[1; KEY])).unwrap();
        assert!(open(&plain, None).is_ok() && open(&keyed, Some(&[1; KEY])).is_ok());
        assert!(matches!(open(&plain, Some(&[1; KEY])), Err(BankError::WrongKey)));
        assert!(matches!(open(&keyed, Some(&[2; KEY])), Err(BankError::WrongKey)));
        assert!(matches!(open(&keyed, None), Err(BankError::KeyNeeded)));
        assert!(matches!(Bank::init(Box::new(plain.clone()), None), Err(BankError::Exists)));
        for (at, bit) in [(0, 0), (8, 0), (10, 0), (12, 5)] {
            plain.flip(Kind::Config, CONFIG, at, bit);
            assert!(open(&plain, None).is_err(), "byte {at}");
            plain.flip(Kind::Config, CONFIG, at, bit);
        }
    }
}
