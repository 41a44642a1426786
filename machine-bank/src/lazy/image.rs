//! A machine's section by groups of 64 KiB: which pages they are, fetched from the store and verified, with patience where the store fails.
//!
//! `image.fetch(&[12, 13], …)` names 32 pages, reads the 30 that are not zero in one go, and hands out two groups. What is said to be damaged or missing is
//! asked for again after 10, 20 and 40 ms, and then page by page, so that one damaged page takes no others with it. A store that is away is the caller's to
//! wait for: nothing was concluded, and the groups can be asked for again.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::away::{Away, Patience, Unread};
use super::working_set::WorkingSet;
use crate::bank::Bank;
use crate::manifest::{Entry, LEAF};
use crate::pack::{GROUP, GROUP_PAGES};
use crate::page::{PAGE, PageId};
use crate::reader::{At, Scratch, Wanted};
use crate::withdraw::{WithdrawError, Withdrawal};

/// A group as it was fetched.
#[derive(Debug)]
pub(crate) struct Fetched<'a> {
    /// Which.
    pub group: u64,
    /// Its bytes, of those pages that the section has; `None`: all are zero.
    pub bytes: Option<&'a [u8]>,
    /// Pages of it that are damaged or lost, by their number in the group.
    pub bad: Vec<usize>,
    /// What was wrong with the first of these.
    pub why: String,
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
    /// Whether the store was asked since this was cleared.
    asked: bool,
    /// How often the store was asked again.
    retries: &'b AtomicU64,
}

impl<'b> Image<'b> {
    pub fn open(bank: &'b Bank, entry: &Entry, section: &str, patience: Patience, retries: &'b AtomicU64) -> Result<Self, Unread> {
        let withdrawal = ask(bank, patience, retries, || bank.withdraw(entry))?;
        let missing = || Unread::Lost(WithdrawError::Section(section.to_owned()));
        let at = withdrawal.manifest().section(section).ok_or_else(missing)?;
        let pages = withdrawal.manifest().head.sections[at].pages();
        let begun = Instant::now();
        let scratch = Scratch::new().map_err(|error| Unread::sorted(bank, begun, error.into()))?;
        let (leaves, buffer, asked) = (HashMap::new(), Vec::new(), false);
        Ok(Self { withdrawal, bank, section: at, pages, patience, leaves, scratch, buffer, asked, retries })
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

    /// Fetches groups and hands each to `sink`, in their order, and says whether the store had to be asked; where it fails none was handed out, or some.
    pub fn fetch(&mut self, groups: &[u64], sink: &mut dyn FnMut(Fetched<'_>)) -> Result<bool, Away> {
        self.asked = false;
        let mut names = Vec::with_capacity(groups.len());
        for group in groups {
            names.push(match self.names(*group) {
                Ok(names) => Ok(names),
                Err(Unread::Lost(error)) => Err(error.to_string()),
                Err(Unread::Away(away)) => return Err(away),
            });
        }
        let all = match self.read(groups, &names) {
            Ok(()) => true,
            Err(Unread::Lost(_)) => false,
            Err(Unread::Away(away)) => return Err(away),
        };
        for (at, (group, ids)) in groups.iter().zip(&names).enumerate() {
            let (mut bad, mut why) = (Vec::new(), String::new());
            let pages = pages_of(*group, self.pages);
            match ids {
                Ok(ids) if !all => (bad, why) = self.one_by_one(at, *group, ids)?,
                Ok(_) => {}
                Err(error) => (bad, why) = ((0..(pages.end - pages.start) as usize).collect(), error.clone()),
            }
            let zero = ids.as_ref().is_ok_and(|ids| ids.iter().all(PageId::is_zero));
            let bytes = &self.buffer[at * GROUP..][..(pages.end - pages.start) as usize * PAGE];
            sink(Fetched { group: *group, bytes: (!zero).then_some(bytes), bad, why });
        }
        Ok(self.asked)
    }

    /// Reads all of the groups into the buffer.
    fn read(&mut self, numbers: &[u64], groups: &[Result<Vec<PageId>, String>]) -> Result<(), Unread> {
        self.buffer.clear();
        self.buffer.resize(groups.len() * GROUP, 0);
        let section = self.section;
        let named = groups.iter().enumerate().filter_map(|(at, ids)| ids.as_ref().ok().map(|ids| (at, ids)));
        let places = named.flat_map(|(at, ids)| ids.iter().enumerate().map(move |(page, id)| (at, page, id)));
        let wanted: Vec<_> = places
            .filter(|(_, _, id)| !id.is_zero())
            .map(|(at, page, id)| Wanted {
                id: *id,
                token: (at * GROUP_PAGES + page) as u64,
                at: place(section, numbers[at], page),
            })
            .collect();
        self.asked |= !wanted.is_empty();
        let (reader, scratch, buffer) = (self.withdrawal.reader(), &mut self.scratch, &mut self.buffer);
        ask(self.bank, self.patience, self.retries, || {
            reader.fetch(&wanted, scratch, &mut |at, page| buffer[at as usize * PAGE..][..PAGE].copy_from_slice(page))
        })
    }

    /// Reads the pages of the group at `at` of the buffer each for itself, and says which cannot be had and why. The store was asked often enough before.
    fn one_by_one(&mut self, at: usize, group: u64, ids: &[PageId]) -> Result<(Vec<usize>, String), Away> {
        let (mut bad, mut why) = (Vec::new(), String::new());
        for (page, id) in ids.iter().enumerate().filter(|(_, id)| !id.is_zero()) {
            let to = &mut self.buffer[at * GROUP + page * PAGE..][..PAGE];
            let wanted = [Wanted { id: *id, token: 0, at: place(self.section, group, page) }];
            let asked = Instant::now();
            let read = self.withdrawal.reader().fetch(&wanted, &mut self.scratch, &mut |_, page| to.copy_from_slice(page));
            match read.map_err(|error| Unread::sorted(self.bank, asked, error.into())) {
                Ok(()) => {}
                Err(Unread::Away(away)) => return Err(away),
                Err(Unread::Lost(error)) => {
                    if bad.is_empty() {
                        why = error.to_string();
                    }
                    bad.push(page);
                }
            }
        }
        Ok((bad, why))
    }

    /// The names of a group's pages.
    fn names(&mut self, group: u64) -> Result<Vec<PageId>, Unread> {
        let Range { start, end } = pages_of(group, self.pages);
        let leaf = (start / LEAF as u64) as usize;
        let ids = match self.leaves.get(&leaf) {
            Some(ids) => ids.clone(),
            None => {
                let (bank, manifest) = (self.bank, self.withdrawal.manifest());
                self.asked = true;
                let read = || manifest.leaf(bank.store(), bank.identity(), self.section, leaf);
                let ids: Arc<[PageId]> = ask(bank, self.patience, self.retries, read)?.into();
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

/// Asks, and asks again for what is said to be damaged or missing, with longer and longer pauses.
fn ask<T, E: Into<WithdrawError>>(
    bank: &Bank,
    patience: Patience,
    retries: &AtomicU64,
    mut once: impl FnMut() -> Result<T, E>,
) -> Result<T, Unread> {
    let (mut left, mut pause) = (patience.tries, patience.pause);
    loop {
        let asked = Instant::now();
        let error = match once() {
            Ok(answer) => return Ok(answer),
            Err(error) => Unread::sorted(bank, asked, error.into()),
        };
        left = left.saturating_sub(1);
        if left == 0 || matches!(error, Unread::Away(_)) {
            return Err(error);
        }
        retries.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(pause);
        pause = patience.after(pause);
    }
}

/// A leaf has whole groups, so a group has one leaf.
const _: () = assert!(LEAF.is_multiple_of(GROUP_PAGES));
