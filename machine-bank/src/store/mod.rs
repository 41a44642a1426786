//! The Store seam: where a bank's objects are, whole and unchangeable once they are there.
//!
//! `store.create(Kind::Pack)?`, `append(&bytes)`, `commit("9f…")`: at every instant, also after a power cut, there is either all of pack 9f… or
//! nothing of it. Three calls write, three read, two lock; what a directory, memory, an object store or another bank keeps is the same.

pub mod address;
pub mod cached;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod directory;
pub mod memory;
#[cfg(feature = "object")]
pub mod object;
pub mod sealed;

use std::fmt;
use std::io;
use std::time::{Duration, SystemTime};

use thiserror::Error;

use crate::manifest::Entry;
use crate::page::Root;
use crate::remote::Service;

pub use address::{BankAddress, LinkSpec, ShmPath};
pub use cached::{CacheCounters, CacheFigures, CachedStore, PageCache, PagedStore};
pub use directory::Directory;
pub use memory::MemoryStore;
#[cfg(feature = "object")]
pub use object::ObjectStore;
pub use sealed::SealedStore;

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// What the bank says of itself; one, named `bank`.
    Config,
    /// Pages.
    Pack,
    /// Where pages are. It can be made again from the packs.
    Index,
    /// A deposited machine.
    Manifest,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Config, Self::Pack, Self::Index, Self::Manifest];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Config => "config",
            Self::Pack => "pack",
            Self::Index => "index",
            Self::Manifest => "manifest",
        })
    }
}

/// An object that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its name: 1 to 200 of `a`-`z`, `A`-`Z`, `0`-`9`, `.`, `_`, `-`, `@`, not beginning with a dot.
    pub name: String,
    /// Bytes.
    pub len: u64,
    /// When it was committed.
    pub modified: SystemTime,
}

/// Whether an object must survive a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// After [`Store::sync`] it does.
    Durable,
    /// It may be lost or damaged then: it can be made again, and whoever reads it checks it.
    Rebuildable,
}

/// How a process uses the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// It adds objects that refer to others; any number may.
    Deposit,
    /// It names a machine that it deposited; one at a time, whatever else goes on.
    Commit,
    /// It removes objects; one only, and no deposit meanwhile.
    Sweep,
}

/// A machine that somebody withdraws: it may not be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The machine.
    pub root: Root,
    /// The process.
    pub pid: u32,
}

/// Ends what it stands for when it is dropped, or when its process dies.
pub trait Guard: Send + Sync + fmt::Debug {
    /// Whether it still does.
    ///
    /// # Errors
    /// It ended before it was dropped, with the link that it was taken over.
    fn check(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Where objects are. Names are checked by the caller of the bank ([`valid_name`]); a store refuses others all the same.
pub trait Store: Send + Sync + fmt::Debug {
    /// Where it is, for people: `/var/lib/bank`, say.
    fn address(&self) -> String;

    /// What is there, in no order.
    ///
    /// # Errors
    /// The store is gone.
    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError>;

    /// Fills `buf` from `offset` of an object.
    ///
    /// # Errors
    /// There is no such object, or it ends before.
    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError>;

    /// Bytes of an object.
    ///
    /// # Errors
    /// There is no such object.
    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError>;

    /// An object to be written. Nobody sees it before it is committed, and dropped it leaves nothing.
    ///
    /// # Errors
    /// The store cannot be written.
    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError>;

    /// Makes everything that was committed durable, with its names.
    ///
    /// # Errors
    /// The store could not; nothing may be built on what was committed since the last time.
    fn sync(&self, kind: Kind) -> Result<(), StoreError>;

    /// Removes an object; one that is not there is removed already.
    ///
    /// # Errors
    /// The store cannot be written.
    fn remove(&self, kind: Kind, name: &str) -> Result<(), StoreError>;

    /// Waits at most `wait` until it may be used so.
    ///
    /// # Errors
    /// [`StoreError::Busy`]: somebody else still uses it otherwise.
    fn hold(&self, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError>;

    /// Says that a machine is being withdrawn.
    ///
    /// # Errors
    /// The store cannot be written.
    fn pin(&self, root: Root) -> Result<Box<dyn Guard>, StoreError>;

    /// Machines that living processes withdraw.
    ///
    /// # Errors
    /// The store is gone.
    fn pins(&self) -> Result<Vec<Pin>, StoreError>;

    /// Takes away what dead processes left half-written, and says how many bytes that were. Called under [`Hold::Sweep`].
    ///
    /// # Errors
    /// The store cannot be written.
    fn tidy(&self) -> Result<u64, StoreError>;

    /// Who is asked for machines and pages, where this is another bank and no store of bytes: there packs and indexes cannot be read.
    fn service(&self) -> Option<&dyn Service> {
        None
    }

    /// Pages that were fetched before, where they are kept by name: what a bank at the other end of a link has for a cache.
    fn pages(&self) -> Option<&PageCache> {
        None
    }

    /// Takes a name for whoever asks first: `vm7@00000003` is the third deposit of `vm7` and of nobody else. A store whose holds cannot lapse needs no more than them.
    /// A name is taken until a later deposit of the machine is there and the store is tidied; which numbers deposits had that were removed since, the bank notes itself.
    ///
    /// # Errors
    /// The store cannot be written.
    fn reserve(&self, _name: &str) -> Result<bool, StoreError> {
        Ok(true)
    }

    /// What was read of an object is not what it should be: a cache forgets it, so that the next read asks further.
    fn doubt(&self, _kind: Kind, _name: &str) {}

    /// All of an object of at most `most` bytes.
    ///
    /// # Errors
    /// There is no such object, or it is larger.
    fn read_all(&self, kind: Kind, name: &str, most: u64) -> Result<Vec<u8>, StoreError> {
        let len = self.len(kind, name)?;
        let bytes = usize::try_from(len).ok().filter(|_| len <= most).ok_or_else(|| StoreError::TooLong {
            kind,
            name: name.to_owned(),
            len,
            most,
        })?;
        let mut all = vec![0; bytes];
        self.read(kind, name, 0, &mut all)?;
        Ok(all)
    }

    /// An object in one piece.
    ///
    /// # Errors
    /// The store cannot be written.
    fn put(&self, kind: Kind, name: &str, bytes: &[u8], durability: Durability) -> Result<(), StoreError> {
        let mut draft = self.create(kind)?;
        draft.append(bytes)?;
        draft.commit(name, durability)
    }
}

/// An object that is being written.
pub trait Draft: Send + fmt::Debug {
    /// More of it.
    ///
    /// # Errors
    /// The store cannot be written.
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError>;

    /// All of it is there from now on, in the place of what had the name.
    ///
    /// # Errors
    /// The store cannot be written; there is what there was.
    fn commit(self: Box<Self>, name: &str, durability: Durability) -> Result<(), StoreError>;

    /// As [`Draft::commit`], for a manifest, which must survive a power cut. Where `entry.number` is 0 ([`Bank::next_number`](crate::Bank)) the bank
    /// that is written to chooses it; the deposit as it is there is returned.
    ///
    /// # Errors
    /// As [`Draft::commit`].
    fn commit_deposit(self: Box<Self>, entry: Entry) -> Result<Entry, StoreError> {
        self.commit(&entry.object(), Durability::Durable)?;
        Ok(entry)
    }
}

/// Why a store did not do it.
#[derive(Debug, Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("there is no {kind} {name}")]
    Missing {
        /// What it is.
        kind: Kind,
        /// Which.
        name: String,
    },
    /// It has fewer bytes than were asked for.
    #[error("{kind} {name} ends before byte {wanted}")]
    Ends {
        /// What it is.
        kind: Kind,
        /// Which.
        name: String,
        /// The byte behind the last that was wanted.
        wanted: u64,
    },
    /// It has more bytes than such an object can have.
    #[error("{kind} {name} has {len} bytes, more than the {most} that it can have")]
    TooLong {
        /// What it is.
        kind: Kind,
        /// Which.
        name: String,
        /// Its bytes.
        len: u64,
        /// The limit.
        most: u64,
    },
    /// No object can be called that.
    #[error("{0:?} is no name of an object")]
    Name(String),
    /// Others use it in a way that does not go with what was asked.
    #[error("{by}")]
    Busy {
        /// Who, and what they do.
        by: String,
    },
    /// Who has the store does not do that for us.
    #[error("{0}")]
    Refused(String),
    /// There is no link to the store any more, or no sense comes over it.
    #[error("{0}")]
    Gone(String),
    /// Nothing more fits.
    #[error("the store is full: {0}")]
    Full(io::Error),
    /// It cannot be written.
    #[error("the store cannot be written: {0}")]
    ReadOnly(io::Error),
    /// It does not answer, or not in time.
    #[error("the store does not answer: {what}: {source}")]
    Unreachable {
        /// What was done.
        what: String,
        /// What was seen of it.
        source: io::Error,
    },
    /// This process did not say for so long that it is there that others may go on without it.
    #[error("this process was silent for too long ({silent:?}), so others may have taken it for dead")]
    Lapsed {
        /// How long.
        silent: Duration,
    },
    /// It was changed, or is sealed under another key.
    #[error("{kind} {name} was changed, or belongs to another key")]
    Unsealed {
        /// What it is.
        kind: Kind,
        /// Its name.
        name: String,
    },
    /// The host's fault.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl StoreError {
    /// Whether the store failed, and not the object: nothing can be concluded about what is in it.
    pub fn is_of_store(&self) -> bool {
        matches!(
            self,
            Self::Io { .. }
                | Self::ReadOnly(_)
                | Self::Full(_)
                | Self::Unreachable { .. }
                | Self::Gone(_)
                | Self::Refused(_)
                | Self::Lapsed { .. }
                | Self::Busy { .. }
        )
    }

    /// Sorted by what can be done about it.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Self::Full(source),
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Self::ReadOnly(source),
            _ => Self::Io { what: what.into(), source },
        }
    }
}

/// Whether an object can be called that.
pub fn valid_name(name: &str) -> bool {
    (1..=200).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte))
}
