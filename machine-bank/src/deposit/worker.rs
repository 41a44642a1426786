//! One of the threads of a deposit: it reads leaves, names their pages, and packs those that the bank lacks.
//!
//! A leaf of 4,096 pages of which 1,700 are not as the parent had them: 300 of these are zero, 500 the bank has, 900 are new and become 57 groups.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError, RwLock};

use super::DepositError;
use super::source::{Changes, Source};
use crate::bank::Bank;
use crate::keep::lost::Lost;
use crate::known::Known;
use crate::manifest::{Counts, LEAF};
use crate::pack::{FULL_PAGES, GROUP, PackId, Packer, Place, Sealed};
use crate::page::{PAGE, PageId};
use crate::store::{Draft, Kind, StoreError};

/// Pages that are read at once: 256 KiB, so that they are still in the core's cache when they are hashed.
const EXTENT: usize = 64;
/// The same where another bank is asked which of them it has: fewer questions, as each takes a link's time both ways.
const EXTENT_ASKED: usize = 1024;
/// The first in bytes.
const EXTENT_BYTES: usize = EXTENT * PAGE;
/// Bytes of a pack from which they are written to its draft: few enough to be still in the core's cache then.
const SPILL: usize = 512 << 10;
/// Bytes of a thread's buffers: an extent, a group, and what is not spilled yet.
pub(super) const BUFFERS: usize = EXTENT_BYTES + GROUP + 2 * SPILL;
/// Bytes of what is kept of a pack until it is in the index: names, and places.
pub(super) const SEALED: usize = FULL_PAGES * (2 * size_of::<PageId>() + size_of::<Place>());

/// What all threads of a deposit share.
#[derive(Debug)]
pub(super) struct Pages {
    /// Which pages are stored.
    pub known: RwLock<Known>,
    /// New pages that a thread has taken and that are in no pack of the index yet.
    pub claimed: Mutex<HashSet<PageId>>,
    /// Pages that a parent has by name and the bank does not have.
    pub lost: Lost,
}

impl Pages {
    /// Whether this page is new and the caller's to store; it is nobody else's then.
    fn claim(&self, id: PageId) -> bool {
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner).insert(id)
    }

    /// A pack is in the store.
    pub fn stored(&self, bank: &Bank, pack: PackId, entries: &[(PageId, Place)]) -> Result<(), StoreError> {
        self.known.write().unwrap_or_else(PoisonError::into_inner).add(bank, pack, entries)?;
        let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, _) in entries {
            claimed.remove(id);
        }
        Ok(())
    }
}

/// A pack of which all groups are known. Without a draft nothing of it is written yet.
#[derive(Debug)]
pub(super) struct Full {
    pub draft: Option<Box<dyn Draft>>,
    pub sealed: Sealed,
}

/// A thread's buffers, kept from section to section.
#[derive(Debug)]
pub(super) struct Worker {
    buffer: Vec<u8>,
    names: Vec<PageId>,
    fresh: Vec<(usize, PageId)>,
    /// What is in no pack of the store yet.
    pub packer: Packer,
    /// Where the first part of its pack is.
    pub draft: Option<Box<dyn Draft>>,
    /// What became of the section's pages.
    pub counts: Counts,
}

/// A leaf to be deposited.
pub(super) struct Leaf<'a> {
    /// Its first page's number in the section.
    pub first: u64,
    /// The parent's names for it.
    pub parent: Option<&'a [PageId]>,
    /// Pages of it.
    pub pages: usize,
}

impl Worker {
    pub fn new() -> Result<Self, DepositError> {
        Ok(Self {
            buffer: Vec::new(),
            names: Vec::new(),
            fresh: Vec::new(),
            packer: Packer::new().map_err(DepositError::Memory)?,
            draft: None,
            counts: Counts::default(),
        })
    }

    /// Names the pages of a leaf, and hands full packs to `send`.
    pub fn leaf(
        &mut self,
        bank: &Bank,
        pages: &Pages,
        source: &dyn Source,
        changes: &Changes<'_>,
        leaf: &Leaf<'_>,
        send: &mut dyn FnMut(Full) -> Result<(), DepositError>,
    ) -> Result<Vec<PageId>, DepositError> {
        debug_assert!(leaf.pages <= LEAF, "a leaf has at most {LEAF} pages");
        let mut ids = leaf.parent.map_or_else(|| vec![PageId::ZERO; leaf.pages], <[PageId]>::to_vec);
        self.counts.pages += leaf.pages as u64;
        // What is lost is read though nothing changed, because it can be stored again.
        let readable = !matches!(changes, Changes::None);
        let lost: Vec<bool> = ids.iter().map(|id| readable && pages.lost.has(id)).collect();
        let may = |at: usize| leaf.parent.is_none() || lost[at] || changes.may(leaf.first + at as u64);
        let extent = if bank.store().service().is_some() { EXTENT_ASKED } else { EXTENT };
        let mut at = 0;
        while at < leaf.pages {
            if !may(at) {
                self.count_unread(&ids[at]);
                at += 1;
                continue;
            }
            let end = leaf.pages.min(at + extent);
            let end = (at..end).find(|at| !may(*at)).unwrap_or(end);
            self.extent(bank, pages, source, leaf, at, &mut ids[at..end], send)?;
            at = end;
        }
        Ok(ids)
    }

    fn count_unread(&mut self, id: &PageId) {
        *if id.is_zero() { &mut self.counts.zero } else { &mut self.counts.position } += 1;
    }

    /// Reads and names pages that follow each other; `ids` are the parent's and become theirs.
    #[expect(clippy::too_many_arguments, reason = "the leaf's and the extent's are different things")]
    fn extent(
        &mut self,
        bank: &Bank,
        pages: &Pages,
        source: &dyn Source,
        leaf: &Leaf<'_>,
        at: usize,
        ids: &mut [PageId],
        send: &mut dyn FnMut(Full) -> Result<(), DepositError>,
    ) -> Result<(), DepositError> {
        let offset = (leaf.first + at as u64) * PAGE as u64;
        let bytes = (ids.len() * PAGE) as u64;
        let data = source.data_from(offset).map_err(DepositError::Source)?;
        if data.is_none_or(|data| data.start >= offset + bytes) {
            ids.fill(PageId::ZERO);
            self.counts.zero += ids.len() as u64;
            return Ok(());
        }
        let there = source.len().saturating_sub(offset).min(bytes) as usize;
        self.buffer.resize((bytes as usize).max(EXTENT_BYTES), 0);
        source.read_at(offset, &mut self.buffer[..there]).map_err(DepositError::Source)?;
        // The last page is filled up with zeros.
        self.buffer[there..bytes as usize].fill(0);
        self.fresh.clear();
        bank.identity().pages(&self.buffer.as_chunks::<PAGE>().0[..ids.len()], &mut self.names);
        for (at, (id, name)) in ids.iter_mut().zip(&self.names).enumerate() {
            if name.is_zero() {
                self.counts.zero += 1;
            } else if leaf.parent.is_some() && id == name && !pages.lost.has(name) {
                self.counts.position += 1;
            } else {
                self.fresh.push((at, *name));
            }
            *id = *name;
        }
        self.store_fresh(bank, pages, send)
    }

    /// Packs those of the buffer's pages that the bank lacks.
    fn store_fresh(
        &mut self,
        bank: &Bank,
        pages: &Pages,
        send: &mut dyn FnMut(Full) -> Result<(), DepositError>,
    ) -> Result<(), DepositError> {
        pages.known.read().unwrap_or_else(PoisonError::into_inner).lacking(bank, &mut self.fresh, |(_, id)| *id)?;
        let buffer = self.buffer.as_chunks::<PAGE>().0;
        for (at, id) in self.fresh.iter().filter(|(_, id)| pages.claim(*id)) {
            self.counts.new += 1;
            if let Some(sealed) = self.packer.push(*id, &buffer[*at]) {
                send(Full { draft: self.draft.take(), sealed })?;
            } else if self.packer.pending() >= SPILL {
                let draft = match &mut self.draft {
                    Some(draft) => draft,
                    none => none.insert(bank.store().create(Kind::Pack)?),
                };
                self.packer.spill(|bytes| draft.append(bytes))?;
            }
        }
        Ok(())
    }

    /// The section is read.
    pub fn end(&mut self) {
        self.packer.end_group();
        self.counts.new_bytes += self.packer.take_bytes();
    }
}
