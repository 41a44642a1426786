//! Which pages need not be stored: those of the index of a bank that is here, or those that another bank says it has.
//!
//! Of 256 pages that are not as the parent had them 40 are in the index: 216 are claimed and packed. Over a link the same is one question.

use crate::bank::Bank;
use crate::index::{Index, IndexError, LOOSE};
use crate::pack::{PackId, Place};
use crate::page::PageId;
use crate::store::StoreError;

/// Who knows it.
#[derive(Debug)]
pub(crate) enum Known {
    /// An index of this process.
    Index(Index),
    /// The bank at the other end of a link.
    Service,
}

impl Known {
    /// # Errors
    /// The store's fault.
    pub fn open(bank: &Bank) -> Result<Self, IndexError> {
        match bank.store().service() {
            Some(_) => Ok(Self::Service),
            None => Index::open(bank.store()).map(Self::Index),
        }
    }

    /// Leaves those of `pages` that the bank lacks; `id` says what one is called.
    ///
    /// # Errors
    /// The store's fault.
    pub fn lacking<T>(&self, bank: &Bank, pages: &mut Vec<T>, id: impl Fn(&T) -> PageId) -> Result<(), StoreError> {
        match (self, bank.store().service()) {
            (Self::Service, Some(service)) => {
                if pages.is_empty() {
                    return Ok(());
                }
                let ids: Vec<_> = pages.iter().map(&id).collect();
                let mut have = service.have(&ids)?.into_iter();
                pages.retain(|_| have.next() != Some(true));
                Ok(())
            }
            (Self::Service, None) => Ok(()),
            (Self::Index(index), _) => {
                let mut failed = None;
                pages.retain(|page| match index.find(bank.store(), &id(page)) {
                    Ok(Some(_)) => false,
                    Ok(None) | Err(StoreError::Missing { .. }) => true,
                    Err(error) => {
                        failed = Some(error);
                        true
                    }
                });
                failed.map_or(Ok(()), Err)
            }
        }
    }

    /// A pack is in the store.
    ///
    /// # Errors
    /// The store's fault.
    pub fn add(&mut self, bank: &Bank, pack: PackId, entries: &[(PageId, Place)]) -> Result<(), StoreError> {
        let Self::Index(index) = self else { return Ok(()) };
        index.add(pack, entries);
        if index.loose() >= LOOSE { index.flush(bank.store()) } else { Ok(()) }
    }

    /// A pack is about to be in the store.
    pub fn note(&mut self, pack: PackId, entries: &[(PageId, Place)]) {
        if let Self::Index(index) = self {
            index.add(pack, entries);
        }
    }

    /// Writes down what was added, for the last time.
    ///
    /// # Errors
    /// The store's fault.
    pub fn finish(self, bank: &Bank) -> Result<(), StoreError> {
        match self {
            Self::Index(index) => index.finish(bank.store()),
            Self::Service => Ok(()),
        }
    }
}
