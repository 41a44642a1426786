//! Which pages a repair could not find: a deposit that comes across one of them stores it again, though its parent has it by name.
//!
//! After a pack of 600 groups was put aside of which one was damaged, 16 names are here; the next deposit of the machine reads those pages and stores them, and
//! with that every machine has them again.

use std::collections::HashSet;

use crate::bank::Bank;
use crate::codec::{Input, Malformed};
use crate::manifest::head::leaves;
use crate::manifest::{Entry, LEAF, ManifestError};
use crate::page::PageId;
use crate::store::{Durability, Kind, Store, StoreError};

/// What they are kept in.
pub(crate) const OBJECT: &str = "lost";
const MAGIC: &[u8; 8] = b"FBLOST1\n";
/// Names at most; where more are lost, any page may be.
const MOST: usize = 1 << 22;

/// Pages that are lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    all: bool,
    pages: HashSet<PageId>,
}

impl Lost {
    /// These; where they are too many, all.
    pub fn new(pages: HashSet<PageId>) -> Self {
        if pages.len() > MOST { Self { all: true, pages: HashSet::new() } } else { Self { all: false, pages } }
    }

    /// A note that any page may be.
    pub fn note_of_all() -> Vec<u8> {
        [&MAGIC[..], &[1]].concat()
    }

    /// Whether a page may be.
    pub fn has(&self, id: &PageId) -> bool {
        self.all || (!self.pages.is_empty() && self.pages.contains(id))
    }

    /// Those that a bank notes. Where the note is damaged, any page may be.
    ///
    /// # Errors
    /// The store's fault.
    pub fn read(store: &dyn Store) -> Result<Self, StoreError> {
        let most = (MAGIC.len() + 1 + MOST * 32) as u64;
        match store.read_all(Kind::Config, OBJECT, most) {
            Ok(bytes) => Ok(parse(&bytes).unwrap_or_else(|error| {
                tracing::warn!(%error, "which pages are lost is not known");
                Self { all: true, pages: HashSet::new() }
            })),
            Err(StoreError::Missing { .. }) => Ok(Self::default()),
            Err(StoreError::TooLong { .. } | StoreError::Ends { .. } | StoreError::Unsealed { .. }) => {
                Ok(Self { all: true, pages: HashSet::new() })
            }
            Err(error) => Err(error),
        }
    }

    /// Notes them in the place of what was noted.
    ///
    /// # Errors
    /// The store's fault.
    pub fn write(&self, store: &dyn Store) -> Result<(), StoreError> {
        if *self == Self::default() {
            store.remove(Kind::Config, OBJECT)?;
        } else {
            let mut bytes = MAGIC.to_vec();
            bytes.push(u8::from(self.all));
            self.pages.iter().for_each(|id| bytes.extend_from_slice(&id.0));
            store.put(Kind::Config, OBJECT, &bytes, Durability::Durable)?;
        }
        store.sync(Kind::Config)
    }
}

/// The pages of a section of a machine, by their numbers, whose names are noted as lost: a deposit that follows the machine reads them whether they changed or not,
/// so a source that has only what changed needs these too. None in a bank where nothing was lost, of which nothing is read for it.
///
/// # Errors
/// The machine's manifest cannot be read, or the store's fault.
pub fn lost_pages(bank: &Bank, entry: &Entry, section: &str) -> Result<Vec<u64>, ManifestError> {
    let lost = Lost::read(bank.store())?;
    let mut pages = Vec::new();
    if lost == Lost::default() {
        return Ok(pages);
    }
    let manifest = bank.manifest(entry)?;
    let Some(at) = manifest.section(section) else { return Ok(pages) };
    for leaf in 0..leaves(manifest.head.sections[at].len) {
        let ids = manifest.leaf(bank.store(), bank.identity(), at, leaf)?;
        let of_leaf = ids.iter().enumerate().filter(|(_, id)| lost.has(id));
        pages.extend(of_leaf.map(|(page, _)| (leaf * LEAF + page) as u64));
    }
    Ok(pages)
}

fn parse(bytes: &[u8]) -> Result<Lost, Malformed> {
    let mut input = Input::new(bytes);
    if input.array::<8>()? != *MAGIC {
        return Err(Malformed::Magic("note of lost pages"));
    }
    let all = match input.u8()? {
        0 => false,
        1 => true,
        other => return Err(Malformed::Value("whether all are lost", other.into())),
    };
    let (ids, rest) = input.take(input.left())?.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(Malformed::Ends);
    }
    Ok(Lost { all, pages: ids.iter().copied().map(PageId).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    #[test]
    fn what_is_noted_is_read_and_a_damaged_note_means_any_page() {
        let store = MemoryStore::new();
        assert_eq!(Lost::read(&store).unwrap(), Lost::default());
        let lost = Lost::new([PageId([1; 32]), PageId([2; 32])].into());
        lost.write(&store).unwrap();
        assert_eq!(Lost::read(&store).unwrap(), lost);
        assert!(lost.has(&PageId([1; 32])) && !lost.has(&PageId([3; 32])));
        for at in [0, 8] {
            store.flip(Kind::Config, OBJECT, at, 1);
            assert!(Lost::read(&store).unwrap().has(&PageId([3; 32])), "byte {at}");
            store.flip(Kind::Config, OBJECT, at, 1);
        }
        store.tear(Kind::Config, OBJECT, 50);
        assert!(Lost::read(&store).unwrap().has(&PageId([3; 32])));
        Lost::default().write(&store).unwrap();
        assert_eq!(Lost::read(&store).unwrap(), Lost::default());
    }
}
