//! A machine's section by groups of 64 KiB: which pages they are, fetched from the store and verified, with patience where the store fails.
//!
//! `image.fetch(&[12, 13], …)` names 32 pages, reads the 30 that are not zero in one go, and hands out two groups; a store that answers an error is
//! asked again after 10, 40 and 160 ms, and then group by group and page by page, so that one damaged page takes no others with it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::working_set::WorkingSet;
use crate::bank::Bank;
use crate::manifest::{Entry, LEAF};
use crate::pack::{GROUP, GROUP_PAGES};
use crate::page::{PAGE, PageId};
use crate::reader::{At, ReadError, Scratch, Wanted};
use crate::withdraw::{WithdrawError, Withdrawal};

/// How often a store is asked for what it does not give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Times in all, at least 1.
    pub tries: u32,
    /// Before the second; before each further one four times as long.
    pub pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { tries: 4, pause: Duration::from_millis(10) }
    }
}

/// A group as it was fetched.
#[derive(Debug)]
pub(crate) struct Fetched<'a> {
    /// Which.
    pub group: u64,
    /// Its bytes, of those pages that the section has; `None`: all are zero.
    pub bytes: Option<&'a [u8]>,
    /// Pages of it that cannot be had, by their number in the group.
    pub bad: Vec<usize>,
}

/// A section that is being fetched, by one thread.
pub(crate) struct Image<'b> {
    withdrawal: Withdrawal<'b>,
    bank: &'b Bank,
    section: usize,
    pages: u64,
    patience: Patience,
    leaves: HashMap<usize, Arc<[PageId]>>,
    scratch: Scratch,
    buffer: Vec<u8>,
    /// How often the store was asked again.
    retries: &'b AtomicU64,
}

impl<'b> Image<'b> {
    pub fn open(
        bank: &'b Bank,
        entry: &Entry,
        section: &str,
        patience: Patience,
        retries: &'b AtomicU64,
    ) -> Result<Self, WithdrawError> {
        let withdrawal = patient(patience, retries, || bank.withdraw(entry))?;
        let at = withdrawal.manifest().section(section).ok_or_else(|| WithdrawError::Section(section.to_owned()))?;
        let pages = withdrawal.manifest().head.sections[at].pages();
        let (leaves, scratch, buffer) = (HashMap::new(), Scratch::new()?, Vec::new());
        Ok(Self { withdrawal, bank, section: at, pages, patience, leaves, scratch, buffer, retries })
    }

    /// The working set that is kept with the machine; empty where there is none.
    pub fn working_set(&self, section: &str) -> WorkingSet {
        match WorkingSet::of(self.bank, &self.withdrawal, section) {
            Ok(set) => set.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(%error, "a machine is withdrawn without its working set");
                WorkingSet::default()
            }
        }
    }

    /// Fetches groups and hands each to `sink`, in their order. An error of the manifest's is that of all of them.
    pub fn fetch(&mut self, groups: &[u64], sink: &mut dyn FnMut(Fetched<'_>)) -> Result<(), WithdrawError> {
        let mut names = Vec::with_capacity(groups.len());
        for group in groups {
            names.push(self.names(*group)?);
        }
        let all = self.read(groups, &names);
        for (at, (group, ids)) in groups.iter().zip(&names).enumerate() {
            let mut bad = Vec::new();
            if all.is_err() {
                bad = self.one_by_one(at, *group, ids);
            }
            let zero = bad.is_empty() && ids.iter().all(PageId::is_zero);
            let bytes = &self.buffer[at * GROUP..][..ids.len() * PAGE];
            sink(Fetched { group: *group, bytes: (!zero).then_some(bytes), bad });
        }
        Ok(())
    }

    /// Reads all of the groups into the buffer.
    fn read(&mut self, numbers: &[u64], groups: &[Vec<PageId>]) -> Result<(), ReadError> {
        self.buffer.clear();
        self.buffer.resize(groups.len() * GROUP, 0);
        let section = self.section;
        let places = groups.iter().enumerate().flat_map(|(at, ids)| ids.iter().enumerate().map(move |(page, id)| (at, page, id)));
        let wanted: Vec<_> = places
            .filter(|(_, _, id)| !id.is_zero())
            .map(|(at, page, id)| Wanted {
                id: *id,
                token: (at * GROUP_PAGES + page) as u64,
                at: place(section, numbers[at], page),
            })
            .collect();
        let (reader, scratch, buffer) = (self.withdrawal.reader(), &mut self.scratch, &mut self.buffer);
        patient(self.patience, self.retries, || {
            reader.fetch(&wanted, scratch, &mut |at, page| buffer[at as usize * PAGE..][..PAGE].copy_from_slice(page))
        })
    }

    /// Reads the pages of the group at `at` of the buffer each for itself, and says which cannot be had. The store was asked patiently before.
    fn one_by_one(&mut self, at: usize, group: u64, ids: &[PageId]) -> Vec<usize> {
        let mut bad = Vec::new();
        for (page, id) in ids.iter().enumerate().filter(|(_, id)| !id.is_zero()) {
            let to = &mut self.buffer[at * GROUP + page * PAGE..][..PAGE];
            let wanted = [Wanted { id: *id, token: 0, at: place(self.section, group, page) }];
            if let Err(error) = self.withdrawal.reader().fetch(&wanted, &mut self.scratch, &mut |_, page| to.copy_from_slice(page))
            {
                tracing::error!(%error, "a page of a machine cannot be had");
                bad.push(page);
            }
        }
        bad
    }

    /// The names of a group's pages.
    fn names(&mut self, group: u64) -> Result<Vec<PageId>, WithdrawError> {
        let Range { start, end } = pages_of(group, self.pages);
        let leaf = (start / LEAF as u64) as usize;
        let ids = match self.leaves.get(&leaf) {
            Some(ids) => ids.clone(),
            None => {
                let (bank, manifest) = (self.bank, self.withdrawal.manifest());
                let read = || manifest.leaf(bank.store(), bank.identity(), self.section, leaf);
                let ids: Arc<[PageId]> = patient(self.patience, self.retries, read)?.into();
                self.leaves.insert(leaf, ids.clone());
                ids
            }
        };
        let first = (leaf * LEAF) as u64;
        Ok(ids.get((start - first) as usize..(end - first) as usize).unwrap_or_default().to_vec())
    }
}

/// Where a page of a group is.
fn place(section: usize, group: u64, page: usize) -> At {
    At { section: section as u16, page: group * GROUP_PAGES as u64 + page as u64 }
}

/// The pages of a group of a section of `pages`.
pub(crate) fn pages_of(group: u64, pages: u64) -> Range<u64> {
    let start = (group * GROUP_PAGES as u64).min(pages);
    start..(start + GROUP_PAGES as u64).min(pages)
}

/// Asks again, with longer and longer pauses.
fn patient<T, E>(patience: Patience, retries: &AtomicU64, mut ask: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let mut pause = patience.pause;
    for _ in 1..patience.tries {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(_) => {
                retries.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(pause);
                pause *= 4;
            }
        }
    }
    ask()
}

/// A leaf has whole groups, so a group has one leaf.
const _: () = assert!(LEAF.is_multiple_of(GROUP_PAGES));
