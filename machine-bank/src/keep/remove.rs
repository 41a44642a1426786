//! Taking machines out of a bank, by name or by age. Their pages go with the next sweep, if no other machine has them.
//!
//! `vm7` was deposited nine times; keeping the last three and what is younger than a day removes `vm7@1` to `vm7@6`, unless somebody withdraws one.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use thiserror::Error;

use super::numbers::Numbers;
use crate::bank::Bank;
use crate::manifest::{Entry, Manifest, ManifestError, rewrite};
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
    /// Manifests that rested on one that is gone and were written anew.
    pub rewritten: u64,
}

/// Why machines were not taken out.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// A manifest cannot be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The store's fault, or a deposit is running.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The deposits that `keep` does not keep; with nothing to keep, none is expired. `machine` alone, or all.
///
/// # Errors
/// A manifest cannot be read.
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
                    let manifest = Manifest::open(bank.store(), bank.identity(), &listing, &entry.root)?;
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
/// that they rest on.
///
/// # Errors
/// A manifest that has to be written anew is damaged, a deposit is running, or the store's fault; what was not yet removed is there.
pub fn remove(bank: &Bank, entries: &[Entry]) -> Result<RemoveReport, RemoveError> {
    let (store, identity) = (bank.store(), bank.identity());
    let _alone = store.hold(Hold::Sweep, bank.wait())?;
    let pins = store.pins()?;
    let mut report = RemoveReport::default();
    let listing = bank.listing()?;
    // Whoever withdraws a machine reads the manifests that it rests on too, and none of them may be written anew meanwhile.
    let mut used: HashMap<Root, u32> = HashMap::new();
    for pin in &pins {
        used.insert(pin.root, pin.pid);
        if listing.by_root(&pin.root).is_some() {
            let manifest = Manifest::open(store, identity, &listing, &pin.root)?;
            used.extend(manifest.bases().map(|base| (base.root, pin.pid)));
        }
    }
    let mut gone: HashSet<Root> = HashSet::new();
    for entry in entries {
        match used.get(&entry.root) {
            Some(pid) => report.in_use.push((entry.to_string(), *pid)),
            None => _ = gone.insert(entry.root),
        }
    }
    for entry in listing.0.iter().filter(|entry| !gone.contains(&entry.root)) {
        let manifest = Manifest::open(store, identity, &listing, &entry.root)?;
        if manifest.table.base.is_some_and(|base| gone.contains(&base)) {
            let base = manifest.below(&|root| !gone.contains(root));
            rewrite((store, store), identity, &manifest, base, || Ok(entry.number))?;
            report.rewritten += 1;
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
