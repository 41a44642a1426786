//! Where every stored page is: a few sorted runs in the store, and the pages of packs that no run names yet, in memory.
//!
//! A deposit that put 6 packs adds one run of 35,000 pages; ten such deposits leave about four runs, because a run is merged with those that are not
//! twice as long. Everything here can be made again from the packs' directories, and is, where a run is damaged or missing.
//!
//! Why not an embedded database: it would be a second thing to commit, whose loss would be the loss of the bank; this one follows from the
//! packs. And a run is written once, in order, where a tree of random keys is written all over: with 16 MiB of cache each, on a busy machine of two cores,
//! redb 3 took 360 to 460 ms for 40,000 pages and 2.9 s for 400,000, where a run took 9 to 52 ms and 0.28 s; 50,000 lookups took it 26 to 35 ms, and runs 8 ms.
//!
//! Its limit: 4 bytes of memory for each page of the bank, a gigabyte for a terabyte of pages that are all different.

mod merge;
mod run;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use thiserror::Error;

use crate::codec::Malformed;
use crate::pack::{PackId, Place, TRAILER, parse_directory, parse_trailer};
use crate::page::PageId;
use crate::store::{Kind, Store, StoreError};

pub use merge::Merge;
use merge::{open_run, write_run};
use run::Run;
pub use run::{Location, RunError};

/// Pages in memory from which they become a run: 6 MiB.
pub const LOOSE: usize = 100_000;

/// What of a run is believed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// All, once what is read of it at first is right.
    Tails,
    /// All, once all of it is right.
    Records,
    /// Nothing.
    Nothing,
}

/// A run, and for each of its packs the number in the index's table; `None`: the pack is gone.
type Mapped = (Arc<Run>, Vec<Option<u32>>);

/// Finds pages.
#[derive(Debug)]
pub struct Index {
    packs: Vec<PackId>,
    numbers: HashMap<PackId, u32>,
    runs: Vec<Mapped>,
    loose: HashMap<PageId, Location>,
    /// What is being written outside of this index ([`Index::begin_merge`]).
    merging: Arc<HashMap<PageId, Location>>,
    /// Runs that are damaged, or name no pack that is there: superseded by the next flush.
    useless: Vec<String>,
}

/// Why pages cannot be found.
#[derive(Debug, Error)]
pub enum IndexError {
    /// The store's fault.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A pack does not say what it holds.
    #[error("pack {}: {error}", .pack.name())]
    Pack {
        /// Which.
        pack: PackId,
        /// What is wrong.
        error: Malformed,
    },
}

impl Index {
    /// Reads the runs, and the directories of packs that no run names. A pack whose directory is damaged holds nothing; that is in the log, and
    /// `verify` says it.
    ///
    /// # Errors
    /// The store's fault.
    pub fn open(store: &dyn Store) -> Result<Self, IndexError> {
        Self::from_runs(store, Trust::Tails)
    }

    /// The same from the packs' directories alone.
    ///
    /// # Errors
    /// The store's fault.
    pub fn rebuild(store: &dyn Store) -> Result<Self, IndexError> {
        Self::from_runs(store, Trust::Nothing)
    }

    /// As [`Index::open`], but a run is believed only if every record is what it was when it was written: for whoever removes what no record leads to.
    ///
    /// # Errors
    /// The store's fault.
    pub fn open_checked(store: &dyn Store) -> Result<Self, IndexError> {
        Self::from_runs(store, Trust::Records)
    }

    fn from_runs(store: &dyn Store, trust: Trust) -> Result<Self, IndexError> {
        // Runs before packs: a pack that is committed in between is read by its directory.
        let mut objects = store.list(Kind::Index)?;
        objects.sort_by_key(|object| object.len);
        let packs = store.list(Kind::Pack)?;
        let mut index = Self {
            packs: Vec::new(),
            numbers: HashMap::new(),
            runs: Vec::new(),
            loose: HashMap::new(),
            merging: Arc::default(),
            useless: Vec::new(),
        };
        let lens: HashMap<PackId, u64> =
            packs.iter().filter_map(|object| PackId::from_name(&object.name).map(|id| (id, object.len))).collect();
        for id in lens.keys() {
            index.number(*id);
        }
        let mut covered = vec![false; index.packs.len()];
        for object in objects {
            let open = || {
                if trust == Trust::Records {
                    Run::check(store, &object.name, object.len)?;
                }
                Run::open(store, &object.name, object.len)
            };
            let mut opened = open();
            if let Err(RunError::Malformed(..)) = opened {
                store.doubt(Kind::Index, &object.name);
                opened = open();
            }
            let run = match opened {
                Ok(run) if trust != Trust::Nothing => run,
                // Superseded since it was listed.
                Err(RunError::Store(StoreError::Missing { .. })) => continue,
                Err(RunError::Store(error)) if error.is_of_store() => return Err(error.into()),
                Ok(_) => {
                    index.useless.push(object.name);
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "an index is left out and made again");
                    index.useless.push(object.name);
                    continue;
                }
            };
            let numbers: Vec<_> = run.packs.iter().map(|pack| index.numbers.get(pack).copied()).collect();
            numbers.iter().flatten().for_each(|number| covered[*number as usize] = true);
            if numbers.iter().all(Option::is_none) {
                index.useless.push(object.name);
            } else {
                index.runs.push((Arc::new(run), numbers));
            }
        }
        for (number, _) in covered.iter().enumerate().filter(|(_, covered)| !**covered) {
            let pack = index.packs[number];
            match read_directory(store, pack, lens[&pack]) {
                Ok(entries) => index.add_entries(number as u32, &entries),
                Err(IndexError::Store(StoreError::Missing { .. })) => {}
                Err(error @ IndexError::Pack { .. })
                | Err(error @ IndexError::Store(StoreError::Ends { .. } | StoreError::Unsealed { .. })) => {
                    tracing::warn!(%error, "a pack is left out");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(index)
    }

    fn number(&mut self, pack: PackId) -> u32 {
        let next = self.packs.len() as u32;
        let number = *self.numbers.entry(pack).or_insert(next);
        if number == next {
            self.packs.push(pack);
        }
        number
    }

    fn add_entries(&mut self, pack: u32, entries: &[(PageId, Place)]) {
        self.loose.extend(entries.iter().map(|(id, place)| (*id, Location { pack, place: *place })));
    }

    /// Adds a pack that was just put.
    pub fn add(&mut self, pack: PackId, entries: &[(PageId, Place)]) {
        let number = self.number(pack);
        self.add_entries(number, entries);
    }

    /// The pack of a location.
    pub fn pack(&self, location: &Location) -> PackId {
        self.packs[location.pack as usize]
    }

    /// Where a page is.
    ///
    /// # Errors
    /// The store's fault.
    pub fn find(&self, store: &dyn Store, id: &PageId) -> Result<Option<Location>, StoreError> {
        if let Some(location) = self.loose.get(id).or_else(|| self.merging.get(id)) {
            return Ok(Some(*location));
        }
        for (run, numbers) in &self.runs {
            if let Some(Location { pack, place }) = run.find(store, id)?
                && let Some(pack) = numbers[pack as usize]
            {
                return Ok(Some(Location { pack, place }));
            }
        }
        Ok(None)
    }

    /// Pages in memory that no run has.
    pub fn loose(&self) -> usize {
        self.loose.len()
    }

    /// Makes a run of what is in memory, merged with runs that are not twice as long.
    ///
    /// # Errors
    /// The store's fault; what was there is there.
    pub fn flush(&mut self, store: &dyn Store) -> Result<(), StoreError> {
        if self.loose.is_empty() && self.useless.is_empty() {
            return Ok(());
        }
        let merged = self.take_short();
        let written = self.write(store, &merged).and_then(|run| self.open_written(store, run));
        match self.replace(store, merged, written) {
            // Another process merged that run into one of its own and removed it. It is gone from here too: its packs tell what was in it.
            Err(StoreError::Missing { .. }) => self.forget_gone(store),
            done => done,
        }
    }

    /// Lets go of runs that are not there any more. What only they said is in the runs of those who removed them, and is not looked for by this one: at worst
    /// a page is stored twice.
    fn forget_gone(&mut self, store: &dyn Store) -> Result<(), StoreError> {
        let there: HashSet<String> = store.list(Kind::Index)?.into_iter().map(|object| object.name).collect();
        self.runs.retain(|(run, _)| there.contains(&run.name));
        Ok(())
    }

    /// The same for the last time.
    ///
    /// # Errors
    /// The store's fault; what was there is there.
    pub fn finish(mut self, store: &dyn Store) -> Result<(), StoreError> {
        if self.loose.is_empty() && self.useless.is_empty() {
            return Ok(());
        }
        let merged = self.take_short();
        let name = self.write(store, &merged)?.map(|(name, _)| name);
        self.remove_merged(store, &merged, name.as_deref())
    }

    /// The runs that are to be merged with what is in memory.
    fn take_short(&mut self) -> Vec<Mapped> {
        self.runs.sort_by_key(|(run, _)| run.len());
        let (mut total, mut merged) = (self.loose.len(), 0);
        for (run, _) in &self.runs {
            if total == 0 || run.len() > 2 * total {
                break;
            }
            total += run.len();
            merged += 1;
        }
        self.runs.drain(..merged).collect()
    }

    /// Makes one run of everything that is in packs that are there.
    ///
    /// # Errors
    /// The store's fault; what was there is there.
    pub fn merge_all(&mut self, store: &dyn Store) -> Result<(), StoreError> {
        let merged = std::mem::take(&mut self.runs);
        let written = self.write(store, &merged).and_then(|run| self.open_written(store, run));
        self.replace(store, merged, written)
    }

    /// Puts a run in the place of those that were merged into it; they stay where it could not be written.
    fn replace(
        &mut self,
        store: &dyn Store,
        merged: Vec<Mapped>,
        run: Result<Option<Mapped>, StoreError>,
    ) -> Result<(), StoreError> {
        match run {
            Ok(run) => {
                self.remove_merged(store, &merged, run.as_ref().map(|(run, _)| &*run.name))?;
                self.useless.clear();
                self.runs.extend(run);
                self.loose.clear();
                Ok(())
            }
            Err(error) => {
                self.runs.extend(merged);
                Err(error)
            }
        }
    }

    fn remove_merged(&self, store: &dyn Store, merged: &[Mapped], new: Option<&str>) -> Result<(), StoreError> {
        let old = merged.iter().map(|(run, _)| &run.name).chain(&self.useless);
        old.filter(|old| Some(old.as_str()) != new).try_for_each(|old| store.remove(Kind::Index, old))
    }

    fn write(&self, store: &dyn Store, merged: &[Mapped]) -> Result<Option<(String, u64)>, StoreError> {
        write_run(store, &self.loose, &self.packs, merged)
    }

    fn open_written(&self, store: &dyn Store, run: Option<(String, u64)>) -> Result<Option<Mapped>, StoreError> {
        let run = run.map(|(name, len)| open_run(store, &name, len)).transpose()?;
        Ok(run.map(|run| self.mapped(run)))
    }

    fn mapped(&self, run: Run) -> Mapped {
        let numbers = run.packs.iter().map(|pack| self.numbers.get(pack).copied()).collect();
        (Arc::new(run), numbers)
    }

    /// Takes packs out that are no more, with their pages.
    pub fn forget(&mut self, gone: &dyn Fn(&PackId) -> bool) {
        let packs = &self.packs;
        self.loose.retain(|_, location| !gone(&packs[location.pack as usize]));
        for (run, numbers) in &mut self.runs {
            for (pack, number) in run.packs.iter().zip(numbers.iter_mut()) {
                if gone(pack) {
                    *number = None;
                }
            }
        }
        self.numbers.retain(|pack, _| !gone(pack));
    }
}

/// What a pack of `len` bytes says it holds.
///
/// # Errors
/// It is damaged, or the store's fault.
pub fn read_directory(store: &dyn Store, pack: PackId, len: u64) -> Result<Vec<(PageId, Place)>, IndexError> {
    match read_directory_once(store, pack, len) {
        Err(IndexError::Pack { .. }) => {
            store.doubt(Kind::Pack, &pack.name());
            read_directory_once(store, pack, len)
        }
        read => read,
    }
}

fn read_directory_once(store: &dyn Store, pack: PackId, len: u64) -> Result<Vec<(PageId, Place)>, IndexError> {
    let damaged = |error| IndexError::Pack { pack, error };
    let name = pack.name();
    let mut trailer = [0; TRAILER];
    let at = len.checked_sub(TRAILER as u64).ok_or_else(|| damaged(Malformed::Ends))?;
    store.read(Kind::Pack, &name, at, &mut trailer)?;
    let (offset, bytes, hash) = parse_trailer(&trailer, len).map_err(damaged)?;
    let mut directory = vec![0; bytes];
    store.read(Kind::Pack, &name, offset, &mut directory)?;
    parse_directory(pack, &directory, offset, hash).map_err(damaged)
}
