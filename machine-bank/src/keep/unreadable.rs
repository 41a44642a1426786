//! Deposits that cannot be read: those whose own manifest is damaged, and those that rest on such a one.
//!
//! One bit of `vm7@2` flipped: `vm7@2` cannot be read, because of itself, and `vm7@3`, because of `vm7@2`; `vm7@1` and every other machine are as they were.

use std::fmt;

use serde::Serialize;

use crate::bank::Bank;
use crate::codec::Malformed;
use crate::manifest::{Entry, Listing, Manifest, ManifestError, deposit_of};
use crate::store::{Kind, StoreError};

/// How often at most a deposit is read anew while others write.
const MOST_LOOKS: u32 = 16;

/// A deposit that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// The deposit: `vm7@3`.
    pub machine: String,
    /// Its root.
    pub root: String,
    /// What is wrong.
    pub fault: String,
    /// The deposit that is damaged: itself, or one that it rests on.
    pub because_of: String,
    /// Whether that is damage. If not, a later version of this program wrote it, or it is at the other end of a link, which says no more.
    pub damaged: bool,
    /// The same, for what is done about it.
    #[serde(skip)]
    pub entry: Entry,
}

impl Unreadable {
    /// Whether its own manifest is damaged.
    pub fn is_cause(&self) -> bool {
        self.because_of == self.machine
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { damaged: false, machine, fault, .. } => write!(f, "{machine} cannot be read: {fault}"),
            Self { machine, because_of, .. } if !self.is_cause() => {
                write!(f, "{machine} rests on {because_of}, which is damaged")
            }
            Self { machine, fault, .. } => write!(f, "{machine} is damaged: {fault}"),
        }
    }
}

/// How closely it is looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// At heads and tables, which are all that is needed to list a machine.
    Heads,
    /// At every leaf too, which are all names of pages.
    Leaves,
}

/// All deposits of a bank that cannot be read.
///
/// # Errors
/// The store's fault, so that nothing is known of any.
pub fn unreadable(bank: &Bank, look: Look) -> Result<Vec<Unreadable>, StoreError> {
    let listing = bank.listing()?;
    let mut found = Vec::new();
    for entry in &listing.0 {
        let Err(error) = read(bank, &listing, entry, look) else { continue };
        if let Again::Unreadable(why) = look_again(bank, entry, error, |listing| read(bank, listing, entry, look))? {
            found.push(why);
        }
    }
    Ok(found)
}

/// What became of a deposit that could not be read at first.
#[derive(Debug)]
pub enum Again<T> {
    /// It can be read: others were writing anew what it rests on.
    Read(T),
    /// It was removed meanwhile.
    Gone,
    /// It cannot be read.
    Unreadable(Unreadable),
}

/// Reads anew what gave `error`, before damage is said of it: whoever removes a deposit writes those anew that rest on it, and who reads both at the time
/// has the one from before and the other from after. It counts as damage if nothing was written during a reading that fails.
///
/// # Errors
/// The store's fault, so that nothing is known of it.
pub fn look_again<T>(
    bank: &Bank,
    entry: &Entry,
    error: ManifestError,
    read: impl Fn(&Listing) -> Result<T, ManifestError>,
) -> Result<Again<T>, StoreError> {
    let mut error = error;
    for _ in 0..MOST_LOOKS {
        match why_unreadable(bank, entry, error)? {
            None => return Ok(Again::Gone),
            Some(why) if !why.damaged => return Ok(Again::Unreadable(why)),
            Some(_) => {}
        }
        let listing = bank.listing()?;
        // What is open, or in a cache, may be what it was.
        listing.0.iter().for_each(|entry| bank.store().doubt(Kind::Manifest, &entry.object()));
        error = match read(&listing) {
            Ok(what) => return Ok(Again::Read(what)),
            Err(error) => error,
        };
        if bank.listing()?.0 == listing.0 {
            break;
        }
    }
    Ok(why_unreadable(bank, entry, error)?.map_or(Again::Gone, Again::Unreadable))
}

fn read(bank: &Bank, listing: &Listing, entry: &Entry, look: Look) -> Result<(), ManifestError> {
    let manifest = Manifest::open(bank.store(), bank.identity(), listing, &entry.root)?;
    if look == Look::Heads {
        return Ok(());
    }
    for (section, about) in manifest.head.sections.iter().enumerate() {
        for leaf in 0..about.leaves.len() {
            manifest.leaf(bank.store(), bank.identity(), section, leaf)?;
        }
    }
    Ok(())
}

/// Why `entry` cannot be read, where `error` says that of it and of no store; nothing where it was removed meanwhile.
///
/// # Errors
/// `error`, where it is the store's fault.
fn why_unreadable(bank: &Bank, entry: &Entry, error: ManifestError) -> Result<Option<Unreadable>, StoreError> {
    let fault = error.to_string();
    let (object, damaged) = match error {
        ManifestError::Malformed { object, error } => (object, !matches!(error, Malformed::Version(..))),
        ManifestError::NoBase { object, .. } => (object, true),
        ManifestError::Store(
            StoreError::Ends { name, .. } | StoreError::TooLong { name, .. } | StoreError::Unsealed { name, .. },
        ) => (name, true),
        ManifestError::Store(StoreError::Missing { kind: Kind::Manifest, name }) => {
            if bank.listing()?.by_root(&entry.root).is_none() {
                return Ok(None);
            }
            (name, true)
        }
        // The other end of a link failed with this machine, and answers.
        ManifestError::Store(StoreError::Refused(_) | StoreError::Io { .. }) if bank.store().service().is_some() => {
            (entry.object(), false)
        }
        ManifestError::Store(error) => return Err(error),
    };
    let because_of = deposit_of(&object).unwrap_or_else(|| entry.to_string());
    let root = entry.root.to_string();
    Ok(Some(Unreadable { machine: entry.to_string(), root, fault, because_of, damaged, entry: entry.clone() }))
}
