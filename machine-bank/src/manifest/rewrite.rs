//! A manifest written anew, in another store or against another base, under the root that it has.
//!
//! `vm7@2` rests on `vm7@1`, which is to be removed: its leaves are resolved, verified and written in full, and take the place of what it was.

use std::sync::Arc;

use super::{Entry, LeafNames, Manifest, ManifestError, Writer};
use crate::codec::Malformed;
use crate::page::Identity;
use crate::store::{Store, StoreError};

/// Writes `manifest`, which `from` has, to `to`, as deposit `number` and against `base`, which `to` has.
///
/// # Errors
/// A leaf is damaged, or a store's fault; what there was is there.
pub fn rewrite(
    (from, to): (&dyn Store, &dyn Store),
    identity: &Identity,
    manifest: &Manifest,
    base: Option<Arc<Manifest>>,
    number: impl FnOnce() -> Result<u64, StoreError>,
) -> Result<Entry, ManifestError> {
    let mut writer = Writer::new(to, base)?;
    let base = writer.base().cloned();
    for (at, section) in manifest.head.sections.iter().enumerate() {
        let to_section = writer.section(section.kind, &section.name, section.len);
        writer.count(to_section, section.counts);
        let of_base = base.as_ref().and_then(|base| Some((base, base.section(&section.name)?)));
        for leaf in 0..section.leaves.len() {
            let ids = manifest.leaf(from, identity, at, leaf)?;
            let below = match of_base {
                Some((base, at)) if base.head.sections[at].pages_of(leaf) == ids.len() => Some(base.leaf(to, identity, at, leaf)?),
                _ => None,
            };
            writer.leaf(to_section, leaf, &LeafNames::new(identity, &ids, below.as_deref()))?;
        }
    }
    let head = &manifest.head;
    let mut same = true;
    let entry = writer.finish(identity, &head.machine, head.created_ms, head.parent, |root| {
        same = root == manifest.root;
        if same { number() } else { Err(StoreError::Name(root.to_string())) }
    });
    match entry {
        Err(StoreError::Name(_)) if !same => Err(ManifestError::Malformed {
            object: manifest.object.clone(),
            error: Malformed::Hash("a head that was written anew"),
        }),
        other => Ok(other?),
    }
}
