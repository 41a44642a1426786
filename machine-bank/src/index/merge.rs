//! Runs that are made of what is in memory and of shorter runs: in an index, or beside one that others go on reading.
//!
//! A server's index has 120,000 pages that no run has. `begin_merge` sets them aside where `find` still sees them, `Merge::write` makes a run of them while nobody waits,
//! and `end_merge` puts it in their place: the index is locked for the first and the last only.

use std::collections::HashMap;
use std::sync::Arc;

use super::run::{Cursor, Run, RunError, RunWriter};
use super::{Index, Location, Mapped};
use crate::pack::PackId;
use crate::page::PageId;
use crate::store::{Store, StoreError};

/// What becomes one run.
#[derive(Debug)]
pub struct Merge {
    loose: Arc<HashMap<PageId, Location>>,
    packs: Vec<PackId>,
    runs: Vec<Mapped>,
    useless: Vec<String>,
}

impl Merge {
    /// Writes the run. The index may be used, and added to, meanwhile.
    ///
    /// # Errors
    /// The store's fault; what was there is there.
    pub fn write(&self, store: &dyn Store) -> Result<Option<Run>, StoreError> {
        let run = write_run(store, &self.loose, &self.packs, &self.runs)?;
        run.map(|(name, len)| open_run(store, &name, len)).transpose()
    }
}

impl Index {
    /// What is in memory, and the runs that are not twice as long; nothing where there is nothing in memory, or a merge has not ended.
    pub fn begin_merge(&mut self) -> Option<Merge> {
        if !self.merging.is_empty() || (self.loose.is_empty() && self.useless.is_empty()) {
            return None;
        }
        let runs = self.take_short();
        // They are found until the new one is there.
        self.runs.extend(runs.iter().cloned());
        self.merging = Arc::new(std::mem::take(&mut self.loose));
        Some(Merge { loose: self.merging.clone(), packs: self.packs.clone(), runs, useless: self.useless.clone() })
    }

    /// Puts what was written in the place of what it was made of, and says which objects nobody needs any more; where it was not written all is as it was.
    pub fn end_merge(&mut self, merge: Merge, written: Option<Option<Run>>) -> Vec<String> {
        self.merging = Arc::default();
        let Some(run) = written else {
            for (id, location) in merge.loose.iter() {
                self.loose.entry(*id).or_insert(*location);
            }
            return Vec::new();
        };
        let old = |name: &String| merge.runs.iter().any(|(run, _)| run.name == *name);
        self.runs.retain(|(run, _)| !old(&run.name));
        self.useless.retain(|name| !merge.useless.contains(name));
        let new = run.as_ref().map(|run| run.name.clone());
        let run = run.map(|run| self.mapped(run));
        self.runs.extend(run);
        let gone = merge.runs.into_iter().map(|(run, _)| run.name.clone()).chain(merge.useless);
        gone.filter(|name| Some(name) != new.as_ref()).collect()
    }

    /// Lets go of runs that are not there any more: another process has merged them into its own.
    pub fn keep_runs(&mut self, there: &[String]) {
        self.runs.retain(|(run, _)| there.contains(&run.name));
    }
}

/// Writes one run of what is in memory and of others.
pub(super) fn write_run(
    store: &dyn Store,
    loose: &HashMap<PageId, Location>,
    packs_of: &[PackId],
    merged: &[Mapped],
) -> Result<Option<(String, u64)>, StoreError> {
    let mut loose: Vec<_> = loose.iter().map(|(id, location)| (*id, *location)).collect();
    loose.sort_unstable_by_key(|(id, _)| *id);
    let mut sources: Vec<Source<'_>> = vec![Source::Loose(loose.iter())];
    sources.extend(merged.iter().map(|(run, numbers)| Source::Run(run.cursor(), numbers)));
    let mut heads = sources.iter_mut().map(|source| source.next(store)).collect::<Result<Vec<_>, _>>()?;
    let (mut writer, mut packs) = (RunWriter::new(store)?, Packs::default());
    while let Some((at, (id, location))) =
        heads.iter().enumerate().filter_map(|(at, head)| head.map(|head| (at, head))).min_by_key(|(_, (id, _))| *id)
    {
        let pack = packs.local(location.pack, packs_of[location.pack as usize]);
        writer.push(&id, &Location { pack, place: location.place })?;
        heads[at] = sources[at].next(store)?;
    }
    writer.finish(&packs.ids)
}

/// Opens a run that was just written.
pub(super) fn open_run(store: &dyn Store, name: &str, len: u64) -> Result<Run, StoreError> {
    Run::open(store, name, len).map_err(|error| match error {
        RunError::Store(error) => error,
        malformed @ RunError::Malformed(..) => StoreError::io("an index that was just written", std::io::Error::other(malformed)),
    })
}

/// The packs of a run that is being written, numbered as they come.
#[derive(Default)]
struct Packs {
    local: HashMap<u32, u32>,
    ids: Vec<PackId>,
}

impl Packs {
    fn local(&mut self, number: u32, id: PackId) -> u32 {
        *self.local.entry(number).or_insert_with(|| {
            self.ids.push(id);
            self.ids.len() as u32 - 1
        })
    }
}

enum Source<'a> {
    Loose(std::slice::Iter<'a, (PageId, Location)>),
    Run(Cursor<'a>, &'a [Option<u32>]),
}

impl Source<'_> {
    fn next(&mut self, store: &dyn Store) -> Result<Option<(PageId, Location)>, StoreError> {
        match self {
            Self::Loose(entries) => Ok(entries.next().copied()),
            Self::Run(cursor, numbers) => loop {
                let Some((id, Location { pack, place })) = cursor.next(store)? else { return Ok(None) };
                // Pages of packs that are gone are left out.
                if let Some(pack) = numbers[pack as usize] {
                    return Ok(Some((id, Location { pack, place })));
                }
            },
        }
    }
}
