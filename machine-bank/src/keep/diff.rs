//! What differs between two machines, section by section and page by page, from their manifests alone.
//!
//! `diff(&bank, vm7@1, vm7@2)` says that of 131,072 pages of memory 53,740 differ, 812 of which became zero, and between which bytes the first of them lie.

use serde::{Serialize, Serializer};

use crate::bank::Bank;
use crate::manifest::{Entry, LEAF, ManifestError};
use crate::page::{PAGE, PageId};

/// What differs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Diff {
    /// Each section that either has.
    pub sections: Vec<SectionDiff>,
}

/// What differs in a section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SectionDiff {
    /// Its name.
    pub name: String,
    /// Bytes in the first; nothing where it has none.
    #[serde(rename = "before_bytes")]
    pub len_before: Option<u64>,
    /// Bytes in the second.
    #[serde(rename = "after_bytes")]
    pub len_after: Option<u64>,
    /// Pages that either has.
    pub pages: u64,
    /// Pages that differ; what one of them does not have counts as zero.
    pub changed: u64,
    /// Of these, those that are zero in the second.
    pub became_zero: u64,
    /// The first stretches that differ: offset and bytes.
    #[serde(serialize_with = "with_units")]
    pub ranges: Vec<(u64, u64)>,
    /// Whether there are more.
    pub more_ranges: bool,
}

fn with_units<S: Serializer>(ranges: &[(u64, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Range {
        offset_bytes: u64,
        bytes: u64,
    }
    serializer.collect_seq(ranges.iter().map(|(offset_bytes, bytes)| Range { offset_bytes: *offset_bytes, bytes: *bytes }))
}

/// Compares two machines, and lists at most `ranges` stretches of each section.
///
/// # Errors
/// One of them is damaged, or the store's fault.
pub fn diff(bank: &Bank, before: &Entry, after: &Entry, ranges: usize) -> Result<Diff, ManifestError> {
    let (old, new) = (bank.manifest(before)?, bank.manifest(after)?);
    let mut names: Vec<&str> = old.head.sections.iter().map(|section| section.name.as_str()).collect();
    for section in &new.head.sections {
        if !names.contains(&section.name.as_str()) {
            names.push(&section.name);
        }
    }
    let mut sections = Vec::new();
    for name in names {
        let (before, after) = (old.section(name), new.section(name));
        let len = |manifest: &crate::manifest::Manifest, at: Option<usize>| at.map(|at| manifest.head.sections[at].len);
        let mut found = SectionDiff {
            name: name.to_owned(),
            len_before: len(&old, before),
            len_after: len(&new, after),
            ..SectionDiff::default()
        };
        let longest = found.len_before.max(found.len_after).unwrap_or(0);
        found.pages = crate::manifest::head::pages(longest);
        for leaf in 0..crate::manifest::head::leaves(longest) {
            let ids = |manifest: &crate::manifest::Manifest, at: Option<usize>| match at {
                Some(at) if leaf < manifest.head.sections[at].leaves.len() => {
                    manifest.leaf(bank.store(), bank.identity(), at, leaf)
                }
                _ => Ok(Vec::new()),
            };
            if let (Some(before), Some(after)) = (before, after)
                && old.head.sections[before].leaves.get(leaf) == new.head.sections[after].leaves.get(leaf)
            {
                continue;
            }
            compare(&ids(&old, before)?, &ids(&new, after)?, leaf as u64 * LEAF as u64, ranges, &mut found);
        }
        sections.push(found);
    }
    Ok(Diff { sections })
}

fn compare(old: &[PageId], new: &[PageId], first: u64, ranges: usize, found: &mut SectionDiff) {
    let page = |ids: &[PageId], at: usize| ids.get(at).copied().unwrap_or(PageId::ZERO);
    for at in 0..old.len().max(new.len()) {
        let (before, after) = (page(old, at), page(new, at));
        if before == after {
            continue;
        }
        found.changed += 1;
        found.became_zero += u64::from(after.is_zero());
        let (offset, bytes) = ((first + at as u64) * PAGE as u64, PAGE as u64);
        let room = found.ranges.len() < ranges;
        match found.ranges.last_mut() {
            Some((start, len)) if *start + *len == offset => *len += bytes,
            _ if room => found.ranges.push((offset, bytes)),
            _ => found.more_ranges = true,
        }
    }
}
