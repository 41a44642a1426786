//! Taking machines out of a bank, by name or by age. Their pages go with the next sweep, if no other machine has them.
//!
//! `vm7` was deposited nine times; keeping the last three and what is younger than a day removes `vm7@1` to `vm7@6`, unless somebody withdraws one.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use thiserror::Error;

use super::numbers::Numbers;
use super::unreadable::{Look, unreadable};
use crate::bank::Bank;
use crate::codec::Malformed;
use crate::manifest::{Entry, Listing, Manifest, ManifestError, named_base, rewrite};
use crate::page::Root;
use crate::store::{Hold, Kind, StoreError};

/// What is kept; what none of it names is expired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// So many deposits of each machine, the last.
    pub last: Option<usize>,
    /// Deposits younger than this.
    pub within: Option<Duration>,
}

/// What was taken out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RemoveReport {
    /// Machines that are gone.
    pub removed: Vec<String>,
    /// Machines that stay, because a process withdraws them or what rests on them, with its number.
    pub in_use: Vec<(String, u32)>,
    /// Machines that stay, because one that stays and cannot be read rests on them, or may, with that one.
    pub needed: Vec<(String, String)>,
    /// Manifests that rested on one that is gone and were written anew.
    pub rewritten: u64,
}

/// Why machines were not taken out.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// The store's fault, or a deposit is running.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The deposits that `keep` does not keep; with nothing to keep, none is expired. `machine` alone, or all.
///
/// # Errors
/// The store's fault.
pub fn expired(bank: &Bank, machine: Option<&str>, keep: &Keep) -> Result<Vec<Entry>, RemoveError> {
    if *keep == Keep::default() {
        return Ok(Vec::new());
    }
    let listing = bank.listing()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    let mut expired = Vec::new();
    for deposits in listing.0.chunk_by(|a, b| a.machine == b.machine) {
        if machine.is_some_and(|machine| deposits.iter().any(|entry| entry.machine != machine)) {
            continue;
        }
        let others = deposits.len().saturating_sub(keep.last.unwrap_or(0));
        for entry in &deposits[..others] {
            let young = match keep.within {
                None => false,
                Some(within) => {
                    let opened = opened(bank, &listing, &entry.root)?;
                    let Opened::Whole(manifest) = opened else { continue };
                    now.saturating_sub(manifest.head.created_ms.into()) < within.as_millis()
                }
            };
            if !young {
                expired.push(entry.clone());
            }
        }
    }
    Ok(expired)
}

/// Takes machines out; their numbers are not given again. Those that rest on them are written anew first; those that are being withdrawn stay, with those
/// that they rest on, and so does what one rests on that cannot be read and written anew.
///
/// # Errors
/// A deposit is running, or the store's fault; what was not yet removed is there.
pub fn remove(bank: &Bank, entries: &[Entry]) -> Result<RemoveReport, RemoveError> {
    let _alone = bank.store().hold(Hold::Sweep, bank.wait())?;
    take_out(bank, entries)
}

/// Takes out what is damaged, and what rests on it: what cannot be read where nobody else writes, which is looked for anew and twice.
///
/// # Errors
/// As for [`remove`].
pub fn remove_damaged(bank: &Bank) -> Result<RemoveReport, RemoveError> {
    let _alone = bank.store().hold(Hold::Sweep, bank.wait())?;
    // What a later version wrote is none of it.
    let damaged: Vec<_> = unreadable(bank, Look::Leaves)?.into_iter().filter(|one| one.damaged).map(|one| one.entry).collect();
    take_out(bank, &damaged)
}

/// Takes machines out while no deposit and no other removal runs.
fn take_out(bank: &Bank, entries: &[Entry]) -> Result<RemoveReport, RemoveError> {
    let (store, identity) = (bank.store(), bank.identity());
    let pins = store.pins()?;
    let mut report = RemoveReport::default();
    let listing = bank.listing()?;
    // Whoever withdraws a machine reads the manifests that it rests on too, and none of them may be written anew meanwhile.
    let mut used: HashMap<Root, User> = HashMap::new();
    for pin in &pins {
        used.insert(pin.root, User::Process(pin.pid));
        if listing.by_root(&pin.root).is_some() {
            let bases = match opened(bank, &listing, &pin.root)? {
                Opened::Whole(manifest) => manifest.bases().map(|base| base.root).collect(),
                // It was read before it was damaged, and goes on.
                Opened::Unreadable { .. } => may_rest_on(bank, &listing, &pin.root, true)?,
            };
            used.extend(bases.into_iter().map(|base| (base, User::Process(pin.pid))));
        }
    }
    let wanted: HashSet<Root> = entries.iter().map(|entry| entry.root).collect();
    let mut gone: HashSet<Root> = wanted.iter().filter(|root| !used.contains_key(*root)).copied().collect();
    let mut based: HashSet<Root> = HashSet::new();
    // What cannot be read cannot be written anew, so that what it rests on stays; and with that one more that stays may be one that cannot be read.
    let mut looked: HashSet<Root> = HashSet::new();
    while let Some(entry) = listing.0.iter().find(|entry| !gone.contains(&entry.root) && !looked.contains(&entry.root)) {
        looked.insert(entry.root);
        let bases = match opened(bank, &listing, &entry.root)? {
            Opened::Whole(manifest) => {
                if manifest.table.base.is_some_and(|base| gone.contains(&base)) {
                    based.insert(entry.root);
                }
                continue;
            }
            Opened::Unreadable { damaged } => may_rest_on(bank, &listing, &entry.root, !damaged)?,
        };
        stay(&mut gone, &mut used, bases, entry);
    }
    for entry in listing.0.iter().filter(|entry| based.contains(&entry.root)) {
        // Only now: what it rests on may just have been written anew.
        let Opened::Whole(manifest) = opened(bank, &listing, &entry.root)? else {
            stay(&mut gone, &mut used, may_rest_on(bank, &listing, &entry.root, true)?, entry);
            continue;
        };
        if !manifest.table.base.is_some_and(|base| gone.contains(&base)) {
            continue;
        }
        let base = manifest.below(&|root| !gone.contains(root));
        match rewrite((store, store), identity, &manifest, base, || Ok(entry.number)) {
            Ok(_) => report.rewritten += 1,
            Err(ManifestError::Store(error)) if error.is_of_store() => return Err(error.into()),
            // A leaf is damaged. Those that it rests on stay as they are, and whatever rests on them may.
            Err(error) => {
                tracing::warn!(%error, machine = %entry, "a deposit cannot be written anew, and what it rests on stays");
                stay(&mut gone, &mut used, manifest.bases().map(|base| base.root).collect(), entry);
            }
        }
    }
    for entry in entries.iter().filter(|entry| !gone.contains(&entry.root)) {
        match used.get(&entry.root) {
            Some(User::Process(pid)) => report.in_use.push((entry.to_string(), *pid)),
            Some(User::Deposit(by)) => report.needed.push((entry.to_string(), by.clone())),
            None => {}
        }
    }
    if report.rewritten > 0 {
        store.sync(Kind::Manifest)?;
    }
    // Those that rest on others first, so that a removal that is interrupted leaves none without its base.
    let mut going: Vec<_> = listing.0.iter().filter(|entry| gone.contains(&entry.root)).collect();
    going.sort_by_cached_key(|entry| {
        let depth = Manifest::open(store, identity, &listing, &entry.root).map_or(u8::MAX, |manifest| manifest.table.depth);
        std::cmp::Reverse(depth)
    });
    // Before any is gone: a number never names another deposit.
    Numbers::note(store, going.iter().copied())?;
    for entry in going {
        // Whoever pins a machine does so under this lock: either the pin is seen here, or the machine is gone before it.
        let _commit = store.hold(Hold::Commit, bank.wait())?;
        if let Some(pin) = store.pins()?.into_iter().find(|pin| !pins.contains(pin)) {
            // It may have read how its machine rested on this one before that was written anew.
            report.in_use.push((entry.to_string(), pin.pid));
            continue;
        }
        store.remove(Kind::Manifest, &entry.object())?;
        // A file system promises no order of removals.
        store.sync(Kind::Manifest)?;
        report.removed.push(entry.to_string());
    }
    report.removed.sort();
    Ok(report)
}

/// What keeps a deposit in the bank.
enum User {
    /// A process withdraws it, or what rests on it.
    Process(u32),
    /// A deposit that cannot be read rests on it, or may.
    Deposit(String),
}

/// `bases` stay, because `entry` needs them.
fn stay(gone: &mut HashSet<Root>, used: &mut HashMap<Root, User>, bases: Vec<Root>, entry: &Entry) {
    for base in bases {
        gone.remove(&base);
        used.entry(base).or_insert_with(|| User::Deposit(entry.to_string()));
    }
}

enum Opened {
    Whole(Arc<Manifest>),
    /// `damaged`, or written by a later version.
    Unreadable {
        damaged: bool,
    },
}

fn opened(bank: &Bank, listing: &Listing, root: &Root) -> Result<Opened, StoreError> {
    match Manifest::open(bank.store(), bank.identity(), listing, root) {
        Ok(manifest) => Ok(Opened::Whole(manifest)),
        Err(ManifestError::Store(error)) if error.is_of_store() => Err(error),
        Err(error) => {
            tracing::warn!(%error, "a deposit cannot be read, and stays with what it rests on");
            let later = matches!(error, ManifestError::Malformed { error: Malformed::Version(..), .. });
            Ok(Opened::Unreadable { damaged: !later })
        }
    }
}

/// What a deposit that cannot be read rests on, as far as that can be read. Where it cannot, and somebody can read the deposit (`whole`), it may be any.
fn may_rest_on(bank: &Bank, listing: &Listing, root: &Root, whole: bool) -> Result<Vec<Root>, StoreError> {
    let mut bases: Vec<Root> = Vec::new();
    let mut next = Some(*root);
    while let Some(entry) = next.and_then(|root| listing.by_root(&root)) {
        match named_base(bank.store(), &entry.object()) {
            Ok(None) => return Ok(bases),
            Ok(Some(base)) if listing.by_root(&base).is_some() && base != *root && !bases.contains(&base) => {
                bases.push(base);
                next = Some(base);
            }
            Err(ManifestError::Store(error)) if error.is_of_store() => return Err(error),
            Ok(Some(_)) | Err(_) => break,
        }
    }
    Ok(if whole { listing.0.iter().map(|entry| entry.root).filter(|other| other != root).collect() } else { bases })
}
