//! Garbage collection: packs with pages that no machine names go, and packs with few that one does are written anew.
//!
//! After `vm7@1` was removed, 4 of 11 packs hold nothing any more and 2 hold less than half: the sweep makes one pack of the two and removes six.
//!
//! It runs alone: a deposit that found a page in a pack would otherwise name a page that is about to go. Withdrawals go on: their machines are pinned, and a
//! page that moves is found again. At every instant each page that a machine names is in a pack: first new packs, then the index, then removal.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use thiserror::Error;

use super::repair::is_aside;
use crate::bank::Bank;
use crate::index::{Index, IndexError, read_directory};
use crate::manifest::{Manifest, ManifestError};
use crate::pack::{PackId, Packer, Place, Sealed};
use crate::page::PageId;
use crate::reader::{At, ReadError, Reader, Scratch, Wanted};
use crate::store::{Durability, Hold, Kind, StoreError};

/// Pages that are moved at once: 16 MiB.
const BATCH: usize = 4096;

/// What to sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SweepOptions {
    /// Packs that no machine needs are kept while they are younger: an interrupted deposit may want them again.
    pub grace: Duration,
    /// Packs of which less than this part is needed are written anew, in percent.
    pub repack_below: u8,
    /// Only say what would be done.
    pub dry_run: bool,
}

impl Default for SweepOptions {
    fn default() -> Self {
        Self { grace: Duration::ZERO, repack_below: 50, dry_run: false }
    }
}

/// What was swept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SweepReport {
    /// Packs before.
    pub packs: u64,
    /// Packs that were removed, those that were written anew included.
    pub removed: u64,
    /// Bytes of these.
    pub removed_bytes: u64,
    /// Pages that were moved.
    pub moved: u64,
    /// Bytes of the packs that they were moved to.
    pub written_bytes: u64,
    /// Bytes of half-written files of dead processes.
    pub tidied_bytes: u64,
    /// Packs that are damaged, which are never removed.
    pub damaged: Vec<String>,
    /// Bytes of damaged packs that a repair had put aside and that were removed.
    pub put_aside_bytes: u64,
    /// Pages that machines name and that are in no pack: `verify` says whose.
    pub missing: u64,
}

/// Why a bank was not swept.
#[derive(Debug, Error)]
pub enum SweepError {
    /// A manifest cannot be read, so that nobody knows what it needs.
    #[error("nothing was removed, because what a machine needs is not known: {0}")]
    Manifest(#[from] ManifestError),
    /// The index cannot be read.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// Pages that have to move cannot be read.
    #[error("pages cannot be moved: {0}")]
    Read(#[from] ReadError),
    /// There is no memory for a compressor.
    #[error("no memory: {0}")]
    Memory(std::io::Error),
    /// The store's fault, or a deposit is running.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Sweeps.
///
/// # Errors
/// What machines need cannot be told, a deposit is running, or the store's fault; what machines need is there.
pub fn sweep(bank: &Bank, options: &SweepOptions) -> Result<SweepReport, SweepError> {
    let store = bank.store();
    let _alone = store.hold(Hold::Sweep, bank.wait())?;
    let mut report = SweepReport::default();
    if !options.dry_run {
        report.tidied_bytes = store.tidy()?;
    }
    let mut index = Index::open_checked(store)?;
    let needed = needed(bank, &index, &mut report)?;
    let mut unneeded: HashMap<PackId, u64> = HashMap::new();
    let mut moving: Vec<PageId> = Vec::new();
    let mut aside = Vec::new();
    for object in store.list(Kind::Pack)? {
        let Some(pack) = PackId::from_name(&object.name) else {
            aside.extend(is_aside(&object.name).then_some((object.name, object.len)));
            continue;
        };
        report.packs += 1;
        let entries = match read_directory(store, pack, object.len) {
            Ok(entries) => entries,
            Err(IndexError::Store(error)) if error.is_of_store() => return Err(error.into()),
            Err(_) => {
                report.damaged.push(object.name);
                continue;
            }
        };
        let live: Vec<_> = entries.iter().filter(|(_, place)| needed.contains(&(pack, *place))).map(|(id, _)| *id).collect();
        let young = object.modified.elapsed().unwrap_or_default() < options.grace || object.modified > SystemTime::now();
        if live.is_empty() && (young && !options.grace.is_zero()) {
            continue;
        }
        if live.len() * 100 < entries.len() * usize::from(options.repack_below) || live.is_empty() {
            unneeded.insert(pack, object.len);
            moving.extend(live);
        }
    }
    report.removed = unneeded.len() as u64;
    report.removed_bytes = unneeded.values().sum();
    report.moved = moving.len() as u64;
    report.put_aside_bytes = aside.iter().map(|(_, len)| len).sum();
    if options.dry_run {
        return Ok(report);
    }
    let kept = move_pages(bank, &mut index, &moving, &mut report)?;
    unneeded.retain(|pack, _| !kept.contains(pack));
    store.sync(Kind::Pack)?;
    index.forget(&|pack| unneeded.contains_key(pack));
    index.merge_all(store)?;
    for pack in unneeded.keys() {
        store.remove(Kind::Pack, &pack.name())?;
    }
    for (name, _) in &aside {
        store.remove(Kind::Pack, name)?;
    }
    store.sync(Kind::Pack)?;
    Ok(report)
}

/// Which places hold a page that a machine names. Names that are written down by any manifest are all that there are.
fn needed(bank: &Bank, index: &Index, report: &mut SweepReport) -> Result<HashSet<(PackId, Place)>, SweepError> {
    let listing = bank.listing()?;
    let mut needed = HashSet::new();
    for entry in &listing.0 {
        let manifest = Manifest::open(bank.store(), bank.identity(), &listing, &entry.root)?;
        for (at, section) in manifest.head.sections.iter().enumerate() {
            for leaf in 0..section.leaves.len() {
                for id in manifest.named(bank.store(), at, leaf)? {
                    match index.find(bank.store(), &id)? {
                        Some(location) => _ = needed.insert((index.pack(&location), location.place)),
                        None => report.missing += 1,
                    }
                }
            }
        }
    }
    Ok(needed)
}

/// Writes pages to new packs, and says which packs that makes: one can have the name of an old one.
fn move_pages(bank: &Bank, index: &mut Index, moving: &[PageId], report: &mut SweepReport) -> Result<HashSet<PackId>, SweepError> {
    let mut written = HashSet::new();
    if moving.is_empty() {
        return Ok(written);
    }
    let (reader, mut scratch, mut packer) = (Reader::new(bank)?, Scratch::new()?, Packer::new().map_err(SweepError::Memory)?);
    for batch in moving.chunks(BATCH) {
        let wanted: Vec<_> =
            batch.iter().enumerate().map(|(at, id)| Wanted { id: *id, token: at as u64, at: At::default() }).collect();
        let mut full: Vec<Sealed> = Vec::new();
        reader.fetch(&wanted, &mut scratch, &mut |at, page| full.extend(packer.push(batch[at as usize], page)))?;
        for sealed in full {
            put(bank, index, &sealed, report, &mut written)?;
        }
    }
    let last = packer.take();
    if !last.is_empty() {
        put(bank, index, &last.seal(), report, &mut written)?;
    }
    Ok(written)
}

fn put(
    bank: &Bank,
    index: &mut Index,
    sealed: &Sealed,
    report: &mut SweepReport,
    written: &mut HashSet<PackId>,
) -> Result<(), StoreError> {
    bank.store().put(Kind::Pack, &sealed.id.name(), &sealed.bytes, Durability::Durable)?;
    index.add(sealed.id, &sealed.entries);
    report.written_bytes += sealed.bytes.len() as u64;
    written.insert(sealed.id);
    Ok(())
}
