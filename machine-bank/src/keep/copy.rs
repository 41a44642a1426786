//! A machine from one bank into another, with those of its pages that the other lacks: export, import, and what a second bank is filled from.
//!
//! Copying `vm7@3` into a bank that has `vm7@2` moves 17,000 pages, verified on the way, and a manifest that rests on `vm7@2` there; its root is the same.

use std::collections::HashSet;

use serde::Serialize;
use thiserror::Error;

use crate::bank::Bank;
use crate::deposit::Progress;
use crate::index::IndexError;
use crate::known::Known;
use crate::manifest::{Entry, Manifest, ManifestError, rewrite};
use crate::pack::{Packer, Sealed};
use crate::page::PageId;
use crate::reader::{At, ReadError, Reader, Scratch, Wanted};
use crate::store::{Durability, Hold, Kind, StoreError};

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CopyReport {
    /// What the machine is called there.
    pub machine: String,
    /// Its root.
    pub root: String,
    /// Whether it was there already, so that nothing was copied but pages of it that had been lost.
    pub was_there: bool,
    /// Pages that were copied.
    pub pages: u64,
    /// Bytes of the packs that they became.
    pub pack_bytes: u64,
}

/// Why a machine was not copied.
#[derive(Debug, Error)]
pub enum CopyError {
    /// The banks name pages differently.
    #[error("the two banks have different tenant keys")]
    Keys,
    /// It cannot be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Its pages cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The other bank's index cannot be read.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// There is no memory for a compressor.
    #[error("no memory: {0}")]
    Memory(std::io::Error),
    /// A store's fault, or a sweep is running.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Copies a machine.
///
/// # Errors
/// It is damaged, or a store's fault; the other bank then has some of its pages, and not the machine.
pub fn copy(from: &Bank, to: &Bank, entry: &Entry, progress: &dyn Fn(Progress)) -> Result<CopyReport, CopyError> {
    if from.identity().check() != to.identity().check() {
        return Err(CopyError::Keys);
    }
    let _pin = from.pin(entry)?;
    let _hold = to.store().hold(Hold::Deposit, to.wait())?;
    let manifest = from.manifest(entry)?;
    let there = to.listing()?;
    let mut packs = Packs { to, known: Known::open(to)?, pending: HashSet::new(), report: CopyReport::default() };
    let (reader, mut scratch, mut packer) =
        (Reader::of(from, entry.root)?, Scratch::new()?, Packer::new().map_err(CopyError::Memory)?);
    let total: u64 = manifest.head.sections.iter().map(|section| section.len).sum();
    let mut done = 0;
    for (at, section) in manifest.head.sections.iter().enumerate() {
        for leaf in 0..section.leaves.len() {
            let ids = manifest.leaf(from.store(), from.identity(), at, leaf)?;
            let wanted = packs.lacking(&ids, at, leaf)?;
            let mut full = Vec::new();
            reader.fetch(&wanted, &mut scratch, &mut |at, page| full.extend(packer.push(ids[at as usize], page)))?;
            for sealed in full {
                packs.put(&sealed)?;
            }
            done += (ids.len() * crate::page::PAGE) as u64;
            progress(Progress { done: done.min(total), total });
        }
    }
    let last = packer.take();
    if !last.is_empty() {
        packs.put(&last.seal())?;
    }
    to.store().sync(Kind::Pack)?;
    if let Some(there) = there.by_root(&entry.root) {
        // Its pages may have been lost there, and are not any more.
        packs.known.finish(to)?;
        // Whoever hears that it is there relies on it.
        Manifest::open(to.store(), to.identity(), &to.listing()?, &there.root)?.verify(to.store(), to.identity())?;
        let (machine, root) = (there.to_string(), there.root.to_string());
        return Ok(CopyReport { machine, root, was_there: true, ..packs.report });
    }
    let base = match manifest.head.parent.filter(|parent| there.by_root(parent).is_some()) {
        Some(parent) => Some(Manifest::open(to.store(), to.identity(), &there, &parent)?),
        None => None,
    };
    let commit = to.store().hold(Hold::Commit, to.wait())?;
    let number = || to.next_number(&entry.machine);
    let copied = rewrite((from.store(), to.store()), to.identity(), &manifest, base, number)?;
    drop(commit);
    to.store().sync(Kind::Manifest)?;
    packs.known.finish(to)?;
    let report = packs.report;
    Ok(CopyReport { machine: copied.to_string(), root: copied.root.to_string(), ..report })
}

struct Packs<'b> {
    to: &'b Bank,
    known: Known,
    /// Pages that are in no pack yet.
    pending: HashSet<PageId>,
    report: CopyReport,
}

impl Packs<'_> {
    /// Those of a leaf's pages that the bank lacks, each once.
    fn lacking(&mut self, ids: &[PageId], section: usize, leaf: usize) -> Result<Vec<Wanted>, StoreError> {
        let stored = ids.iter().enumerate().filter(|(_, id)| !id.is_zero());
        let wanted = stored.map(|(at, id)| Wanted { id: *id, token: at as u64, at: At::new(section, leaf, at) });
        let mut wanted: Vec<_> = wanted.collect();
        self.known.lacking(self.to, &mut wanted, |wanted| wanted.id)?;
        wanted.retain(|wanted| self.pending.insert(wanted.id));
        Ok(wanted)
    }

    fn put(&mut self, sealed: &Sealed) -> Result<(), StoreError> {
        self.to.store().put(Kind::Pack, &sealed.id.name(), &sealed.bytes, Durability::Durable)?;
        for (id, _) in &sealed.entries {
            self.pending.remove(id);
        }
        self.report.pages += sealed.entries.len() as u64;
        self.report.pack_bytes += sealed.bytes.len() as u64;
        self.known.add(self.to, sealed.id, &sealed.entries)
    }
}
