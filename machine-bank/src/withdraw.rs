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
use crate::manifest::{Entry, LEAF, Manifest, ManifestError, Section};
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

/// Where a section is written: a file, or a part of one. Several threads write, each other places.
pub trait Target: Sync {
    /// Fills `buf` with what is there from `offset` of the section; zeros where there is nothing.
    ///
    /// # Errors
    /// The host's fault.
    fn there(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes from `offset` of the section.
    ///
    /// # Errors
    /// The host's fault.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// A file of its own.
struct Whole<'a> {
    file: &'a File,
    before: FileSource,
}

impl Target for Whole<'_> {
    fn there(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let there = self.before.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (front, behind) = buf.split_at_mut(there);
        behind.fill(0);
        if there > 0 && self.before.data_from(offset)?.is_some_and(|data| data.start < offset + there as u64) {
            self.before.read_at(offset, front)
        } else {
            front.fill(0);
            Ok(())
        }
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }
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
        let about = self.about(name)?;
        let before = FileSource::new(target.try_clone().map_err(WithdrawError::Target)?).map_err(WithdrawError::Target)?;
        let before = before.at_most(about.len);
        target.set_len(about.len).map_err(WithdrawError::Target)?;
        let fresh = before.is_empty();
        self.section_to(name, &Whole { file: target, before }, fresh, progress)
    }

    /// Writes a section to `target`, of which nothing but zeros is there where it is `fresh`.
    ///
    /// # Errors
    /// As [`Withdrawal::section`].
    pub fn section_to(
        &self,
        name: &str,
        target: &dyn Target,
        fresh: bool,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<WithdrawReport, WithdrawError> {
        let about = self.about(name)?;
        let section = self.manifest.section(name).ok_or_else(|| WithdrawError::Section(name.to_owned()))?;
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
                    if let Err(error) = self.work(section, target, fresh, &shared) {
                        shared.stop.store(true, Ordering::Relaxed);
                        shared.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                });
            }
        });
        let report = shared.report.into_inner().unwrap_or_else(PoisonError::into_inner);
        shared.failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(report), Err)
    }

    fn about(&self, name: &str) -> Result<&Section, WithdrawError> {
        let section = self.manifest.section(name).ok_or_else(|| WithdrawError::Section(name.to_owned()))?;
        Ok(&self.manifest.head.sections[section])
    }

    /// Reads a piece of a section, which exists, verified; what is behind its end is zero.
    ///
    /// # Errors
    /// A page is missing or damaged, or the store's fault.
    pub fn read(&self, section: usize, offset: u64, buf: &mut [u8]) -> Result<(), WithdrawError> {
        let about = &self.manifest.head.sections[section];
        let (mut scratch, leaf_bytes) = (Scratch::new()?, (LEAF * PAGE) as u64);
        buf.fill(0);
        let end = about.len.min(offset + buf.len() as u64);
        let mut at = offset;
        while at < end {
            let leaf = (at / leaf_bytes) as usize;
            let start = leaf as u64 * leaf_bytes;
            let stop = end.min(start + leaf_bytes);
            let ids = self.manifest.leaf(self.bank.store(), self.bank.identity(), section, leaf)?;
            let pages = ((at - start) / PAGE as u64)..(stop - start).div_ceil(PAGE as u64);
            let wanted = pages.map(|page| Wanted {
                id: ids[page as usize],
                token: start + page * PAGE as u64,
                at: At::new(section, leaf, page as usize),
            });
            let wanted: Vec<_> = wanted.filter(|wanted| !wanted.id.is_zero()).collect();
            let mut sink = |place: u64, page: &[u8; PAGE]| {
                let (from, to) = (place.max(offset), end.min(place + PAGE as u64));
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&page[(from - place) as usize..(to - place) as usize]);
            };
            let fetched = self.reader.fetch(&wanted, &mut scratch, &mut sink);
            fetched.map_err(|error| WithdrawError::Page { section: about.name.clone(), offset: start, error })?;
            at = stop;
        }
        Ok(())
    }

    fn work(&self, section: usize, target: &dyn Target, fresh: bool, shared: &Shared<'_>) -> Result<(), WithdrawError> {
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
            let missing = if fresh {
                ids.iter().map(|id| !id.is_zero()).collect()
            } else {
                self.missing(&ids, target, start, about.len, &mut buffer).map_err(WithdrawError::Target)?
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
    fn missing(&self, ids: &[PageId], target: &dyn Target, start: u64, len: u64, buffer: &mut [u8]) -> io::Result<Vec<bool>> {
        let bytes = ids.len() * PAGE;
        let there = len.saturating_sub(start).min(bytes as u64) as usize;
        target.there(start, &mut buffer[..there])?;
        buffer[there..bytes].fill(0);
        let pages = buffer.as_chunks::<PAGE>().0;
        Ok(ids.iter().zip(pages).map(|(id, page)| self.bank.identity().page(page) != *id).collect())
    }
}

/// Writes stretches of missing pages, up to the section's end.
fn write_missing(target: &dyn Target, buffer: &[u8], missing: &[bool], start: u64, len: u64) -> io::Result<()> {
    let mut at = 0;
    for stretch in missing.chunk_by(|a, b| a == b) {
        let (from, to) = (at * PAGE, (at + stretch.len()) * PAGE);
        at += stretch.len();
        if stretch[0] {
            let to = to.min(len.saturating_sub(start) as usize);
            target.write_at(start + from as u64, &buffer[from..to])?;
        }
    }
    Ok(())
}
