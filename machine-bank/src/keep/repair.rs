//! Repair: damaged packs are put aside, what is whole in them is moved, and what is lost is noted, so that whoever has it can store it again.
//!
//! Of a pack with 9,600 pages one group is damaged: 9,584 pages go to a new pack, `9f…` becomes `damaged-9f…`, and 16 names are noted; a deposit of the machine, or an
//! import of its archive, stores those, and every machine that names them is whole again.
//!
//! It runs alone, as a sweep does, and at every instant each page that was whole is in a pack: first new packs, then the note, then the index, then the
//! damaged packs go. What was put aside is looked at by nobody here, and goes with the next sweep.

use std::collections::HashSet;

use serde::Serialize;
use thiserror::Error;

use super::lost::Lost;
use super::unreadable::Unreadable;
use super::verify::{Fault, PackFault, Packs, Reading, VerifyReport, machine, packs, read_what_opens};
use crate::bank::Bank;
use crate::deposit::Progress;
use crate::index::{Index, IndexError};
use crate::pack::{PackId, Packer, Sealed};
use crate::page::PageId;
use crate::reader::ReadError;
use crate::store::{Durability, Hold, Kind, StoreError};

/// What an object is called that was a pack and is damaged, before the pack's name.
const ASIDE: &str = "damaged-";

/// Whether a pack object was put aside.
pub(super) fn is_aside(name: &str) -> bool {
    name.starts_with(ASIDE)
}

/// What was repaired.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RepairReport {
    /// Packs that were read.
    pub packs: u64,
    /// What was wrong with packs.
    pub damaged: Vec<Fault>,
    /// What damaged packs are called now.
    pub put_aside: Vec<String>,
    /// Pages of them that were whole and are in new packs.
    pub moved: u64,
    /// Pages that machines name and no pack has.
    pub lost: u64,
    /// What machines miss, until somebody stores it again.
    pub machines: Vec<Fault>,
    /// Those of them whose manifests cannot be read, which nobody brings back by storing pages.
    pub unreadable: Vec<Unreadable>,
}

/// Why a bank was not repaired.
#[derive(Debug, Error)]
pub enum RepairError {
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The index cannot be read.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// There is no memory for a compressor.
    #[error("no memory: {0}")]
    Memory(std::io::Error),
    /// The store's fault, or a deposit is running.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Verifies a bank, and puts damaged packs aside.
///
/// # Errors
/// A deposit is running, or the store's fault; what was whole is there.
pub fn repair(bank: &Bank, progress: &dyn Fn(Progress)) -> Result<RepairReport, RepairError> {
    let store = bank.store();
    let _alone = store.hold(Hold::Sweep, bank.wait())?;
    let listing = bank.listing()?;
    let mut verified = VerifyReport::default();
    let Packs { good, damaged } = packs(bank, &mut verified, progress)?;
    let mut report =
        RepairReport { packs: verified.packs, damaged: std::mem::take(&mut verified.faults), ..RepairReport::default() };
    let mut damaged: HashSet<PackId> = damaged.into_iter().collect();
    // From the packs themselves: an index that is wrong is made again too.
    let mut index = Index::rebuild(store)?;
    index.forget(&|pack| damaged.contains(pack));
    // A new pack with the name of a damaged one, which has the same pages, took its place.
    let replaced = move_whole(bank, &mut index, &damaged, &mut report)?;
    damaged.retain(|pack| !replaced.contains(pack));
    store.sync(Kind::Pack)?;
    let mut lost = HashSet::new();
    for entry in &listing.0 {
        machine(bank, &listing, entry, &index, &good, &mut verified, &mut |id| _ = lost.insert(id))?;
    }
    report.lost = lost.len() as u64;
    report.machines = verified.faults;
    report.unreadable = verified.unreadable;
    Lost::new(lost).write(store)?;
    // One of which nothing can be read stays where it is, and nothing is looked for in it.
    let mut copied = Vec::new();
    for pack in &damaged {
        if let Some(name) = put_aside(bank, *pack)? {
            report.put_aside.push(name);
            copied.push(*pack);
        }
    }
    store.sync(Kind::Pack)?;
    index.merge_all(store)?;
    for pack in &copied {
        store.remove(Kind::Pack, &pack.name())?;
    }
    store.sync(Kind::Pack)?;
    report.put_aside.sort();
    Ok(report)
}

/// Writes what is whole in damaged packs, and in no other, to new packs, and says which.
fn move_whole(
    bank: &Bank,
    index: &mut Index,
    damaged: &HashSet<PackId>,
    report: &mut RepairReport,
) -> Result<HashSet<PackId>, RepairError> {
    let mut written = HashSet::new();
    let (mut reading, mut packer) = (Reading::new()?, Packer::new().map_err(RepairError::Memory)?);
    let mut pending: HashSet<PageId> = HashSet::new();
    for pack in damaged {
        let (mut full, mut failed): (Vec<Sealed>, _) = (Vec::new(), None);
        let read = reading.pack(bank, *pack, &mut |id, page| match index.find(bank.store(), &id) {
            Ok(None) if pending.insert(id) => full.extend(packer.push(id, page)),
            Ok(_) => {}
            Err(error) => failed = Some(error),
        });
        match (read, failed) {
            (Err(PackFault::Store(error)), _) | (_, Some(error)) => return Err(error.into()),
            // Nobody can tell where its groups begin.
            (Err(PackFault::Pack(_)) | Ok(_), None) => {}
        }
        for sealed in full {
            put(bank, index, &sealed, report)?;
            written.insert(sealed.id);
        }
    }
    let last = packer.take();
    if !last.is_empty() {
        let sealed = last.seal();
        put(bank, index, &sealed, report)?;
        written.insert(sealed.id);
    }
    Ok(written)
}

fn put(bank: &Bank, index: &mut Index, sealed: &Sealed, report: &mut RepairReport) -> Result<(), StoreError> {
    bank.store().put(Kind::Pack, &sealed.id.name(), &sealed.bytes, Durability::Durable)?;
    index.add(sealed.id, &sealed.entries);
    report.moved += sealed.entries.len() as u64;
    Ok(())
}

/// Copies a damaged pack to where nobody takes it for one; says what it is called there.
fn put_aside(bank: &Bank, pack: PackId) -> Result<Option<String>, StoreError> {
    let (store, from) = (bank.store(), pack.name());
    let to = format!("{ASIDE}{from}");
    let Some(bytes) = read_what_opens(store, &from)? else { return Ok(None) };
    store.put(Kind::Pack, &to, &bytes, Durability::Durable)?;
    Ok(Some(to))
}
