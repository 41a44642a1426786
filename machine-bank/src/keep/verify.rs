//! Reads everything and says what is wrong: every page of every pack, every leaf of every manifest, every name against the index.
//!
//! One flipped bit in a pack of 8 MiB: "pack 9f…: 16 pages are damaged", and for each machine that names one of them
//! "vm7@3: 3 pages of memory are damaged or missing".

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::Serialize;

use crate::bank::Bank;
use crate::deposit::Progress;
use crate::index::{Index, IndexError};
use crate::manifest::{Listing, Manifest, ManifestError};
use crate::pack::{GROUP, GroupDecoder, PackId, Place, parse_pack};
use crate::page::{PAGE, PageId};
use crate::reader::ReadError;
use crate::store::{Kind, StoreError};

/// Bytes of the largest pack that is read.
const MOST_PACK: u64 = 32 << 20;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// A pack, a machine.
    pub what: String,
    /// What is wrong with it.
    pub fault: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.fault)
    }
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Packs.
    pub packs: u64,
    /// Pages in them.
    pub pages: u64,
    /// Machines.
    pub machines: u64,
    /// What is wrong.
    pub faults: Vec<Fault>,
}

/// Verifies all of a bank. Deposits and withdrawals may go on.
///
/// # Errors
/// The store's fault, other than that something is missing or damaged: that is a fault in the report.
pub fn verify(bank: &Bank, progress: &dyn Fn(Progress)) -> Result<VerifyReport, ReadError> {
    let mut report = VerifyReport::default();
    let listing = bank.listing()?;
    let packs = bank.store().list(Kind::Pack)?;
    let total = packs.iter().map(|object| object.len).sum();
    let (mut done, mut good, mut decoder) = (0, HashSet::new(), GroupDecoder::new().map_err(ReadError::Memory)?);
    let mut pages = Box::new([0; GROUP]);
    for object in &packs {
        let Some(id) = PackId::from_name(&object.name) else { continue };
        report.packs += 1;
        let what = format!("pack {}", object.name);
        match bank.store().read_all(Kind::Pack, &object.name, MOST_PACK) {
            Ok(bytes) => match parse_pack(id, &bytes) {
                Ok(entries) => {
                    report.pages += entries.len() as u64;
                    let damaged = damaged(bank, &bytes, &entries, &mut decoder, &mut pages, &mut good);
                    if damaged > 0 {
                        report.faults.push(Fault { what, fault: format!("{damaged} pages are damaged") });
                    }
                }
                Err(error) => report.faults.push(Fault { what, fault: error.to_string() }),
            },
            // A sweep has removed it meanwhile.
            Err(StoreError::Missing { .. }) => {}
            Err(error @ (StoreError::TooLong { .. } | StoreError::Ends { .. } | StoreError::Unsealed { .. })) => {
                report.faults.push(Fault { what, fault: error.to_string() });
            }
            Err(error) => return Err(error.into()),
        }
        done += object.len;
        progress(Progress { done, total });
    }
    let index = Index::open(bank.store())?;
    for entry in &listing.0 {
        report.machines += 1;
        machine(bank, &listing, entry, &index, &good, &mut report)?;
    }
    Ok(report)
}

/// Pages of a pack that are not what they are called; the others are `good`.
fn damaged(
    bank: &Bank,
    bytes: &[u8],
    entries: &[(PageId, Place)],
    decoder: &mut GroupDecoder,
    pages: &mut [u8; GROUP],
    good: &mut HashSet<PageId>,
) -> usize {
    let mut damaged = 0;
    for group in entries.chunk_by(|(_, a), (_, b)| a.offset == b.offset) {
        let place = group[0].1;
        let stored = bytes.get(place.offset as usize..(place.offset + place.len) as usize);
        let len = stored.and_then(|stored| decoder.decode(stored, pages).ok()).unwrap_or(0);
        for (at, (id, _)) in group.iter().enumerate() {
            let page = pages[..len].as_chunks::<PAGE>().0.get(at);
            if page.is_some_and(|page| bank.identity().page(page) == *id) {
                good.insert(*id);
            } else {
                damaged += 1;
            }
        }
    }
    damaged
}

fn machine(
    bank: &Bank,
    listing: &Listing,
    entry: &crate::manifest::Entry,
    index: &Index,
    good: &HashSet<PageId>,
    report: &mut VerifyReport,
) -> Result<(), ReadError> {
    let mut fault = |fault: String| report.faults.push(Fault { what: entry.to_string(), fault });
    let manifest = match Manifest::open(bank.store(), bank.identity(), listing, &entry.root) {
        Ok(manifest) => manifest,
        // Removed meanwhile.
        Err(ManifestError::Store(StoreError::Missing { .. })) if !listed(bank, entry)? => return Ok(()),
        Err(error) => {
            fault(error.to_string());
            return Ok(());
        }
    };
    let mut wrong: BTreeMap<&str, u64> = BTreeMap::new();
    for (at, section) in manifest.head.sections.iter().enumerate() {
        for leaf in 0..section.leaves.len() {
            match manifest.leaf(bank.store(), bank.identity(), at, leaf) {
                Ok(ids) => {
                    for id in ids.iter().filter(|id| !id.is_zero()) {
                        let found = good.contains(id) && index.find(bank.store(), id).map_err(IndexError::Store)?.is_some();
                        if !found {
                            *wrong.entry(&section.name).or_default() += 1;
                        }
                    }
                }
                Err(error) => fault(error.to_string()),
            }
        }
    }
    for (section, pages) in wrong {
        fault(format!("{pages} pages of {section} are damaged or missing"));
    }
    Ok(())
}

fn listed(bank: &Bank, entry: &crate::manifest::Entry) -> Result<bool, StoreError> {
    Ok(bank.listing()?.by_root(&entry.root).is_some())
}
