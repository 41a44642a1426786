//! What a bank holds, what that would be without it, and by what it became less.
//!
//! Four deposits of 512 MiB are 2 GiB: 1.3 GiB were zero, 300 MiB as in the parent, 100 MiB elsewhere in the bank, 300 MiB new, which compression made 110 MiB.

use serde::Serialize;

use super::unreadable::{Again, Unreadable, look_again};
use crate::bank::Bank;
use crate::manifest::{Counts, Listing, Manifest};
use crate::page::PAGE;
use crate::store::{Kind, StoreError};

/// Statistics of a bank, in bytes unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Machines by name.
    pub machines: u64,
    /// Deposits.
    pub deposits: u64,
    /// Bytes of all sections of all deposits.
    #[serde(rename = "logical_bytes")]
    pub logical: u64,
    /// Pages of zeros, named only.
    #[serde(rename = "saved_zero_bytes")]
    pub saved_zero: u64,
    /// As in the parent at the same place.
    #[serde(rename = "saved_position_bytes")]
    pub saved_position: u64,
    /// In the bank already.
    #[serde(rename = "saved_content_bytes")]
    pub saved_content: u64,
    /// What compression took from the rest.
    #[serde(rename = "saved_compression_bytes")]
    pub saved_compression: u64,
    /// Packs.
    pub packs: u64,
    /// Bytes of packs.
    pub pack_bytes: u64,
    /// Bytes of manifests.
    pub manifest_bytes: u64,
    /// Bytes of the index.
    pub index_bytes: u64,
    /// Bytes of all of it.
    #[serde(rename = "stored_bytes")]
    pub stored: u64,
    /// Deposits that cannot be read, which no other figure has but their number and the bytes of their manifests.
    pub unreadable: Vec<Unreadable>,
}

/// Adds up a bank. What machines that were removed had brought is in the packs until a sweep, and in no other figure.
///
/// # Errors
/// The store's fault.
pub fn stats(bank: &Bank) -> Result<Stats, StoreError> {
    let store = bank.store();
    let listing = bank.listing()?;
    let mut stats = Stats { deposits: listing.0.len() as u64, ..Stats::default() };
    stats.machines = listing.0.chunk_by(|a, b| a.machine == b.machine).count() as u64;
    let mut counts = Counts::default();
    for entry in &listing.0 {
        stats.manifest_bytes += entry.len;
        let open = |listing: &Listing| Manifest::open(store, bank.identity(), listing, &entry.root);
        let manifest = match open(&listing) {
            Ok(manifest) => manifest,
            Err(error) => match look_again(bank, entry, error, open)? {
                Again::Read(manifest) => manifest,
                Again::Gone => continue,
                Again::Unreadable(why) => {
                    stats.unreadable.push(why);
                    continue;
                }
            },
        };
        for section in &manifest.head.sections {
            stats.logical = stats.logical.saturating_add(section.len);
            counts.add(&section.counts);
        }
    }
    let bytes = |pages: u64| pages.saturating_mul(PAGE as u64);
    (stats.saved_zero, stats.saved_position, stats.saved_content) =
        (bytes(counts.zero), bytes(counts.position), bytes(counts.content));
    stats.saved_compression = bytes(counts.new).saturating_sub(counts.new_bytes);
    let packs = store.list(Kind::Pack)?;
    stats.packs = packs.len() as u64;
    stats.pack_bytes = packs.iter().map(|object| object.len).sum();
    stats.index_bytes = store.list(Kind::Index)?.iter().map(|object| object.len).sum();
    stats.stored = stats.pack_bytes + stats.manifest_bytes + stats.index_bytes;
    Ok(stats)
}
