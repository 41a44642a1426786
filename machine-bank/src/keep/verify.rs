//! Reads everything and says what is wrong: every page of every pack, every leaf of every manifest, every name against the index.
//!
//! One flipped bit in a pack of 8 MiB: "pack 9f…: 16 pages are damaged", and for each machine that names one of them
//! "vm7@3: 3 pages of memory are damaged or missing".

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::Serialize;

use super::unreadable::{Again, Unreadable, look_again};
use crate::bank::Bank;
use crate::deposit::Progress;
use crate::index::{Index, IndexError};
use crate::manifest::{Listing, Manifest, ManifestError};
use crate::pack::{GROUP, GroupDecoder, PackId, Place, parse_pack};
use crate::page::{PAGE, PageId};
use crate::reader::ReadError;
use crate::store::{Kind, Store, StoreError};

/// Bytes of the largest pack that is read.
const MOST_PACK: u64 = 32 << 20;
/// Bytes of a damaged pack that are read at once: what a seal closes together.
const PIECE: usize = 16 << 10;

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
    /// Those of them that are damaged.
    pub damaged_packs: u64,
    /// Pages in them.
    pub pages: u64,
    /// Machines.
    pub machines: u64,
    /// What is wrong.
    pub faults: Vec<Fault>,
    /// Deposits whose manifests cannot be read, each of which is a fault too: these no repair of packs brings back.
    pub unreadable: Vec<Unreadable>,
}

/// Verifies all of a bank. Deposits and withdrawals may go on.
///
/// # Errors
/// The store's fault, other than that something is missing or damaged: that is a fault in the report.
pub fn verify(bank: &Bank, progress: &dyn Fn(Progress)) -> Result<VerifyReport, ReadError> {
    let mut report = VerifyReport::default();
    let listing = bank.listing()?;
    let Packs { good, .. } = packs(bank, &mut report, progress)?;
    let index = Index::open(bank.store())?;
    for entry in &listing.0 {
        report.machines += 1;
        machine(bank, &listing, entry, &index, &good, &mut report, &mut |_| {})?;
    }
    Ok(report)
}

/// What was found in the packs.
pub(super) struct Packs {
    /// Pages that some pack has whole.
    pub good: HashSet<PageId>,
    /// Packs with something that is damaged.
    pub damaged: Vec<PackId>,
}

/// Reads all packs.
pub(super) fn packs(bank: &Bank, report: &mut VerifyReport, progress: &dyn Fn(Progress)) -> Result<Packs, ReadError> {
    let packs = bank.store().list(Kind::Pack)?;
    let total = packs.iter().map(|object| object.len).sum();
    let (mut done, mut good, mut reading) = (0, HashSet::new(), Reading::new()?);
    let mut damaged = Vec::new();
    for object in &packs {
        done += object.len;
        let Some(id) = PackId::from_name(&object.name) else { continue };
        report.packs += 1;
        match reading.pack(bank, id, &mut |id, _| _ = good.insert(id)) {
            Ok(None) => {}
            Ok(Some((pages, 0))) => report.pages += pages,
            Ok(Some((pages, wrong))) => {
                report.pages += pages;
                damaged.push(id);
                report.faults.push(Fault { what: format!("pack {}", object.name), fault: format!("{wrong} pages are damaged") });
            }
            Err(PackFault::Pack(fault)) => {
                damaged.push(id);
                report.faults.push(Fault { what: format!("pack {}", object.name), fault });
            }
            Err(PackFault::Store(error)) => return Err(error.into()),
        }
        progress(Progress { done, total });
    }
    report.damaged_packs = damaged.len() as u64;
    Ok(Packs { good, damaged })
}

/// Why nothing of a pack can be read.
pub(super) enum PackFault {
    /// It is damaged.
    Pack(String),
    /// The store's fault.
    Store(StoreError),
}

/// A pack with zeros in the place of what the seal says was changed; nothing where not even its length can be told.
pub(super) fn read_what_opens(store: &dyn Store, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let len = match store.len(Kind::Pack, name) {
        Ok(len) if len <= MOST_PACK => len,
        Ok(_) | Err(StoreError::Unsealed { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = vec![0; len as usize];
    let mut at = 0;
    for piece in bytes.chunks_mut(PIECE) {
        match store.read(Kind::Pack, name, at, piece) {
            Ok(()) => {}
            Err(StoreError::Unsealed { .. }) => piece.fill(0),
            Err(error) => return Err(error),
        }
        at += piece.len() as u64;
    }
    Ok(Some(bytes))
}

/// Buffers for reading packs.
pub(super) struct Reading {
    decoder: GroupDecoder,
    pages: Box<[u8; GROUP]>,
}

impl Reading {
    pub fn new() -> Result<Self, ReadError> {
        Ok(Self { decoder: GroupDecoder::new().map_err(ReadError::Memory)?, pages: Box::new([0; GROUP]) })
    }

    /// Reads a pack, hands out its pages that are what they are called, and says how many it has and how many are not; `None`: a sweep has removed
    /// it meanwhile.
    pub fn pack(
        &mut self,
        bank: &Bank,
        pack: PackId,
        good: &mut dyn FnMut(PageId, &[u8; PAGE]),
    ) -> Result<Option<(u64, u64)>, PackFault> {
        let bytes = match bank.store().read_all(Kind::Pack, &pack.name(), MOST_PACK) {
            Ok(bytes) => bytes,
            Err(StoreError::Missing { .. }) => return Ok(None),
            // Where objects are sealed one changed bit is a block that does not open, and the others are what they were.
            Err(error @ StoreError::Unsealed { .. }) => match read_what_opens(bank.store(), &pack.name()) {
                Ok(Some(bytes)) => bytes,
                Ok(None) => return Err(PackFault::Pack(error.to_string())),
                Err(error) => return Err(PackFault::Store(error)),
            },
            Err(error @ (StoreError::TooLong { .. } | StoreError::Ends { .. })) => {
                return Err(PackFault::Pack(error.to_string()));
            }
            Err(error) => return Err(PackFault::Store(error)),
        };
        let entries = parse_pack(pack, &bytes).map_err(|error| PackFault::Pack(error.to_string()))?;
        Ok(Some((entries.len() as u64, self.pages(bank, &bytes, &entries, good))))
    }

    /// Pages of a pack that are not what they are called; the others are `good`.
    fn pages(&mut self, bank: &Bank, bytes: &[u8], entries: &[(PageId, Place)], good: &mut dyn FnMut(PageId, &[u8; PAGE])) -> u64 {
        let mut damaged = 0;
        for group in entries.chunk_by(|(_, a), (_, b)| a.offset == b.offset) {
            let place = group[0].1;
            let stored = bytes.get(place.offset as usize..(place.offset + place.len) as usize);
            let len = stored.and_then(|stored| self.decoder.decode(stored, &mut self.pages).ok()).unwrap_or(0);
            for (at, (id, _)) in group.iter().enumerate() {
                let page = self.pages[..len].as_chunks::<PAGE>().0.get(at);
                match page.filter(|page| bank.identity().page(*page) == *id) {
                    Some(page) => good(*id, page),
                    None => damaged += 1,
                }
            }
        }
        damaged
    }
}

/// Looks for every page of a machine, and hands out those that are `lost`.
pub(super) fn machine(
    bank: &Bank,
    listing: &Listing,
    entry: &crate::manifest::Entry,
    index: &Index,
    good: &HashSet<PageId>,
    report: &mut VerifyReport,
    lost: &mut dyn FnMut(PageId),
) -> Result<(), ReadError> {
    let mut fault = |fault: String| report.faults.push(Fault { what: entry.to_string(), fault });
    let open = |listing: &Listing| Manifest::open(bank.store(), bank.identity(), listing, &entry.root);
    let mut manifest = match open(listing) {
        Ok(manifest) => manifest,
        // Removed meanwhile.
        Err(ManifestError::Store(StoreError::Missing { .. })) if !listed(bank, entry)? => return Ok(()),
        Err(error) => match look_again(bank, entry, error, open)? {
            Again::Read(manifest) => manifest,
            Again::Gone => return Ok(()),
            Again::Unreadable(why) => {
                fault(why.fault.clone());
                report.unreadable.push(why);
                return Ok(());
            }
        },
    };
    let mut broken = None;
    let mut wrong: BTreeMap<&str, u64> = BTreeMap::new();
    // It has its root, whichever way it is written down at the time.
    let head = manifest.clone();
    for (at, section) in head.head.sections.iter().enumerate() {
        for leaf in 0..section.leaves.len() {
            let read = |manifest: &Manifest| manifest.leaf(bank.store(), bank.identity(), at, leaf);
            let found = match read(&manifest) {
                Ok(ids) => Again::Read((manifest.clone(), ids)),
                Err(error) => look_again(bank, entry, error, |listing| {
                    let manifest = open(listing)?;
                    let ids = read(&manifest)?;
                    Ok((manifest, ids))
                })?,
            };
            match found {
                Again::Read((read, ids)) => {
                    manifest = read;
                    for id in ids.iter().filter(|id| !id.is_zero()) {
                        let found = good.contains(id) && index.find(bank.store(), id).map_err(IndexError::Store)?.is_some();
                        if !found {
                            lost(*id);
                            *wrong.entry(&section.name).or_default() += 1;
                        }
                    }
                }
                Again::Gone => return Ok(()),
                Again::Unreadable(why) => {
                    fault(why.fault.clone());
                    broken.get_or_insert(why);
                }
            }
        }
    }
    for (section, pages) in wrong {
        fault(format!("{pages} pages of {section} are damaged or missing"));
    }
    report.unreadable.extend(broken);
    Ok(())
}

fn listed(bank: &Bank, entry: &crate::manifest::Entry) -> Result<bool, StoreError> {
    Ok(bank.listing()?.by_root(&entry.root).is_some())
}
