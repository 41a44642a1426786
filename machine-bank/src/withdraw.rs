//! Whole withdrawal: a section of a machine becomes a file again, sparse where it is zero, every page verified before it is written.
//!
//! 512 MiB of memory of which 77 % is zero: two threads take leaves of 16 MiB, fetch the pages of each in the order in which the packs have them, and
//! write them where they belong. A withdrawal that was interrupted looks at what is there, and fetches what is missing.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use thiserror::Error;

use crate::bank::Bank;
use crate::deposit::{FileSource, Progress, Source};
use crate::manifest::{Entry, LEAF, Manifest, ManifestError};
use crate::page::{PAGE, PageId};
use crate::reader::{At, ReadError, Reader, Scratch, Wanted};
use crate::store::{Guard, StoreError};

/// Threads that fetch and write.
pub const THREADS: usize = 2;

/// Why a section was not withdrawn.
#[derive(Debug, Error)]
pub enum WithdrawError {
    /// The machine has no such section.
    #[error("the machine has no section {0}")]
    Section(String),
    /// The manifest cannot be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A page cannot be had.
    #[error("at byte {offset} of {section}: {error}")]
    Page {
        /// Of which section.
        section: String,
        /// Where the leaf with the page begins.
        offset: u64,
        /// Why.
        error: ReadError,
    },
    /// Pages cannot be found at all.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The store's fault.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file cannot be written.
    #[error("cannot write what is withdrawn: {0}")]
    Target(io::Error),
}

/// What was withdrawn of a section.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WithdrawReport {
    /// Pages in all.
    pub pages: u64,
    /// Pages of zeros, which were not written.
    pub zero: u64,
    /// Pages that were there already, from an interrupted withdrawal.
    pub there: u64,
    /// Pages that were fetched and verified.
    pub fetched: u64,
}

/// A machine being withdrawn: it cannot be removed meanwhile.
#[derive(Debug)]
pub struct Withdrawal<'b> {
    bank: &'b Bank,
    manifest: Arc<Manifest>,
    reader: Reader<'b>,
    _pin: Option<Box<dyn Guard>>,
}

impl Bank {
    /// Begins to withdraw a machine.
    ///
    /// # Errors
    /// It is damaged, or the store's fault.
    pub fn withdraw(&self, entry: &Entry) -> Result<Withdrawal<'_>, WithdrawError> {
        // First the pin: what is there after it stays.
        let pin = self.pin(entry)?;
        Ok(Withdrawal { bank: self, manifest: self.manifest(entry)?, reader: Reader::of(self, entry.root)?, _pin: pin })
    }
}

struct Shared<'a> {
    next: AtomicUsize,
    done: AtomicU64,
    stop: AtomicBool,
    failed: Mutex<Option<WithdrawError>>,
    report: Mutex<WithdrawReport>,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl Withdrawal<'_> {
    /// The machine.
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Reads pages of it.
    pub fn reader(&self) -> &Reader<'_> {
        &self.reader
    }

    /// Writes a section to `target`, which becomes as long as it is. Where `target` holds pages of an interrupted withdrawal, or any others,
    /// those that are right stay.
    ///
    /// # Errors
    /// A page is missing or damaged, or the file cannot be written; what is in the file then is not the machine.
    pub fn section(
        &self,
        name: &str,
        target: &File,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<WithdrawReport, WithdrawError> {
        let section = self.manifest.section(name).ok_or_else(|| WithdrawError::Section(name.to_owned()))?;
        let about = &self.manifest.head.sections[section];
        let before = FileSource::new(target.try_clone().map_err(WithdrawError::Target)?).map_err(WithdrawError::Target)?;
        let before = Some(before.at_most(about.len)).filter(|before| !before.is_empty());
        target.set_len(about.len).map_err(WithdrawError::Target)?;
        let shared = Shared {
            next: AtomicUsize::new(0),
            done: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            failed: Mutex::new(None),
            report: Mutex::default(),
            progress,
        };
        std::thread::scope(|scope| {
            for _ in 0..THREADS.min(about.leaves.len()) {
                scope.spawn(|| {
                    if let Err(error) = self.work(section, target, before.as_ref(), &shared) {
                        shared.stop.store(true, Ordering::Relaxed);
                        shared.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                });
            }
        });
        let report = shared.report.into_inner().unwrap_or_else(PoisonError::into_inner);
        shared.failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(report), Err)
    }

    fn work(&self, section: usize, target: &File, before: Option<&FileSource>, shared: &Shared<'_>) -> Result<(), WithdrawError> {
        let about = &self.manifest.head.sections[section];
        let (mut scratch, mut buffer) = (Scratch::new()?, vec![0; LEAF * PAGE]);
        let mut report = WithdrawReport::default();
        loop {
            let leaf = shared.next.fetch_add(1, Ordering::Relaxed);
            if leaf >= about.leaves.len() || shared.stop.load(Ordering::Relaxed) {
                break;
            }
            let start = (leaf * LEAF * PAGE) as u64;
            let ids = self.manifest.leaf(self.bank.store(), self.bank.identity(), section, leaf)?;
            // Whether each page has to be written.
            let missing = match before {
                None => ids.iter().map(|id| !id.is_zero()).collect(),
                Some(before) => self.missing(&ids, before, start, &mut buffer).map_err(WithdrawError::Target)?,
            };
            let mut wanted = Vec::new();
            for (at, (id, _)) in ids.iter().zip(&missing).enumerate().filter(|(_, (_, missing))| **missing) {
                if id.is_zero() {
                    buffer[at * PAGE..(at + 1) * PAGE].fill(0);
                } else {
                    wanted.push(Wanted { id: *id, token: at as u64, at: At::new(section, leaf, at) });
                }
            }
            let mut sink = |at: u64, page: &[u8; PAGE]| buffer[at as usize * PAGE..][..PAGE].copy_from_slice(page);
            let fetched = self.reader.fetch(&wanted, &mut scratch, &mut sink);
            fetched.map_err(|error| WithdrawError::Page { section: about.name.clone(), offset: start, error })?;
            write_missing(target, &buffer, &missing, start, about.len).map_err(WithdrawError::Target)?;
            report.pages += ids.len() as u64;
            report.zero += ids.iter().filter(|id| id.is_zero()).count() as u64;
            report.fetched += wanted.len() as u64;
            report.there += ids.iter().zip(&missing).filter(|(id, missing)| !id.is_zero() && !**missing).count() as u64;
            let bytes = (ids.len() * PAGE) as u64;
            let done = shared.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            (shared.progress)(Progress { done: done.min(about.len), total: about.len });
        }
        let mut all = shared.report.lock().unwrap_or_else(PoisonError::into_inner);
        all.pages += report.pages;
        all.zero += report.zero;
        all.there += report.there;
        all.fetched += report.fetched;
        Ok(())
    }

    /// Which pages of a leaf are not yet in the file.
    fn missing(&self, ids: &[PageId], before: &FileSource, start: u64, buffer: &mut [u8]) -> io::Result<Vec<bool>> {
        let there = before.len().saturating_sub(start).min((ids.len() * PAGE) as u64) as usize;
        if there > 0 && before.data_from(start)?.is_some_and(|data| data.start < start + there as u64) {
            before.read_at(start, &mut buffer[..there])?;
        } else {
            buffer[..there].fill(0);
        }
        buffer[there..ids.len() * PAGE].fill(0);
        let pages = buffer.as_chunks::<PAGE>().0;
        Ok(ids.iter().zip(pages).map(|(id, page)| self.bank.identity().page(page) != *id).collect())
    }
}

/// Writes stretches of missing pages, up to the section's end.
fn write_missing(target: &File, buffer: &[u8], missing: &[bool], start: u64, len: u64) -> io::Result<()> {
    let mut at = 0;
    for stretch in missing.chunk_by(|a, b| a == b) {
        let (from, to) = (at * PAGE, (at + stretch.len()) * PAGE);
        at += stretch.len();
        if stretch[0] {
            let to = to.min(len.saturating_sub(start) as usize);
            target.write_all_at(&buffer[from..to], start + from as u64)?;
        }
    }
    Ok(())
}
