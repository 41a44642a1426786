//! Deposit: a machine's sections go into the bank, and what the bank has already does not go again.
//!
//! `bank.deposit("vm7", &DepositOptions::default())?`, `section(Memory, "memory", &file, Changes::HashAll, …)`, `commit()`: of 131,072 pages 75,000
//! are zero, 30,000 as at the last deposit, 9,000 elsewhere in the bank, and 17,000 are stored.
//!
//! Two threads read, hash and compress leaves; a third writes their packs. Nothing is seen before `commit`. A deposit that dies leaves the packs it
//! had put, and the next one finds their pages: that is how it resumes.

mod source;
mod worker;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use thiserror::Error;

pub use source::{Changes, FileSource, Source};
use worker::{Full, Leaf, Pages, Worker};

use crate::bank::{Bank, FindError};
use crate::index::IndexError;
use crate::keep::lost::Lost;
use crate::known::Known;
use crate::manifest::head::{MOST_BYTES, MOST_SECTIONS, leaves, pages_of};
use crate::manifest::{Counts, Entry, LEAF, LeafNames, Manifest, ManifestError, SectionKind, Writer, valid_machine};
use crate::pack::{FULL, PackBuilder, PackId, Place, Sealed};
use crate::page::{PAGE, PageId};
use crate::store::{Draft, Durability, Guard, Hold, Kind, StoreError};

/// Threads that read, hash and compress.
pub const THREADS: usize = 2;
/// Full packs that wait for being written.
const QUEUE: usize = 1;
/// Bytes of the buffers of a deposit: each thread's, and what is known of packs that are sealed, wait, or are being written.
pub const BUFFERS: usize = THREADS * worker::BUFFERS + (2 * THREADS + QUEUE + 1) * worker::SEALED;

/// What a machine is compared with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Parent {
    /// The last deposit of the machine, if there is one.
    #[default]
    Last,
    /// Nothing.
    None,
    /// This one, as people write it.
    Named(String),
}

/// How to deposit.
#[derive(Clone, Debug, Default)]
pub struct DepositOptions {
    /// What to compare with.
    pub parent: Parent,
}

/// What was done of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// What became of a deposit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DepositReport {
    /// `vm7@3`.
    pub machine: String,
    /// The root, in hexadecimal.
    pub root: String,
    /// What it was compared with.
    pub parent: Option<String>,
    /// What became of its pages.
    pub counts: Counts,
    /// Bytes of the packs that were added.
    pub pack_bytes: u64,
    /// Bytes of the manifest.
    pub manifest_bytes: u64,
}

/// Why a machine was not deposited.
#[derive(Debug, Error)]
pub enum DepositError {
    /// It cannot be called that.
    #[error("{0:?} is no name: use 1 to 64 letters, digits, '.', '_' and '-', not beginning with '.' or '-'")]
    Name(String),
    /// It has a section of that name.
    #[error("there are two sections {0}")]
    Twice(String),
    /// It has too many sections.
    #[error("more than {MOST_SECTIONS} sections")]
    Sections,
    /// A section is too long.
    #[error("section {name} has {len} bytes, and one can have {MOST_BYTES}")]
    TooLong {
        /// Which.
        name: String,
        /// Its bytes.
        len: u64,
    },
    /// It has none.
    #[error("a machine without sections")]
    Empty,
    /// Somebody deposited the machine meanwhile, and this was to follow its parent at once.
    #[error("{0} is not the last deposit of its machine any more")]
    Overtaken(String),
    /// What is deposited cannot be read.
    #[error("cannot read what is deposited: {0}")]
    Source(io::Error),
    /// There is no parent of that name.
    #[error("the parent: {0}")]
    Parent(#[from] FindError),
    /// The parent cannot be read.
    #[error("the parent: {0}")]
    Manifest(#[from] ManifestError),
    /// The index cannot be read.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The store's fault.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no memory for a compressor, or a thread.
    #[error("no memory: {0}")]
    Memory(io::Error),
}

/// A deposit under way.
#[derive(Debug)]
pub struct Deposit<'b> {
    bank: &'b Bank,
    machine: String,
    parent: Option<(Entry, Arc<Manifest>)>,
    writer: Writer,
    pages: Pages,
    workers: Vec<Worker>,
    pack_bytes: AtomicU64,
    hold: Box<dyn Guard>,
}

impl Bank {
    /// Begins a deposit of `machine`. Others may deposit at the same time; a sweep waits.
    ///
    /// # Errors
    /// The name is none, the parent cannot be read, a sweep is running, or the store's fault.
    pub fn deposit(&self, machine: &str, options: &DepositOptions) -> Result<Deposit<'_>, DepositError> {
        if !valid_machine(machine) {
            return Err(DepositError::Name(machine.to_owned()));
        }
        let hold = self.store().hold(Hold::Deposit, self.wait())?;
        let listing = self.listing()?;
        let parent = match &options.parent {
            Parent::None => None,
            Parent::Last => listing.last(machine).cloned(),
            Parent::Named(wish) => Some(self.find(wish)?),
        };
        let parent = match parent {
            None => None,
            Some(entry) => {
                let manifest = Manifest::open(self.store(), self.identity(), &listing, &entry.root)?;
                Some((entry, manifest))
            }
        };
        let writer = Writer::new(self.store(), parent.as_ref().map(|(_, manifest)| manifest.clone()))?;
        let lost = Lost::read(self.store())?;
        let pages = Pages { known: RwLock::new(Known::open(self)?), claimed: Mutex::default(), lost };
        let workers = (0..THREADS).map(|_| Worker::new()).collect::<Result<_, _>>()?;
        let machine = machine.to_owned();
        Ok(Deposit { bank: self, machine, parent, writer, pages, workers, pack_bytes: AtomicU64::new(0), hold })
    }
}

/// What the threads of one section share.
struct Shared<'a> {
    next: AtomicUsize,
    done: AtomicU64,
    stop: AtomicBool,
    failed: Mutex<Option<DepositError>>,
    writer: Mutex<&'a mut Writer>,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl Shared<'_> {
    fn fail(&self, error: DepositError) {
        self.stop.store(true, Ordering::Relaxed);
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}

/// A section being deposited.
struct Job<'a> {
    section: usize,
    source: &'a dyn Source,
    changes: Changes<'a>,
    /// The parent, the section's number there, and whether leaves are written against it.
    parent: Option<(&'a Manifest, usize)>,
    is_base: bool,
}

impl Deposit<'_> {
    /// What it is compared with.
    pub fn parent(&self) -> Option<&Entry> {
        self.parent.as_ref().map(|(entry, _)| entry)
    }

    /// Deposits a section. `progress` is called from several threads.
    ///
    /// # Errors
    /// The section cannot be, cannot be read, or the store's fault. Nothing is seen of the machine, and the deposit is of no more use.
    pub fn section(
        &mut self,
        kind: SectionKind,
        name: &str,
        source: &dyn Source,
        changes: Changes<'_>,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<(), DepositError> {
        if !valid_machine(name) {
            return Err(DepositError::Name(name.to_owned()));
        }
        if self.writer.has(name) {
            return Err(DepositError::Twice(name.to_owned()));
        }
        let len = source.len();
        if len > MOST_BYTES {
            return Err(DepositError::TooLong { name: name.to_owned(), len });
        }
        let is_base = self.writer.base().is_some();
        let section = self.writer.section(kind, name, len);
        if section >= MOST_SECTIONS {
            return Err(DepositError::Sections);
        }
        let parent = self.parent.as_ref().and_then(|(_, manifest)| Some((&**manifest, manifest.section(name)?)));
        let job = Job { section, source, changes, parent, is_base };
        let shared = Shared {
            next: AtomicUsize::new(0),
            done: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            failed: Mutex::new(None),
            writer: Mutex::new(&mut self.writer),
            progress,
        };
        let (bank, pages, pack_bytes) = (self.bank, &self.pages, &self.pack_bytes);
        std::thread::scope(|scope| {
            let (send, receive) = sync_channel(QUEUE);
            let (shared, job) = (&shared, &job);
            scope.spawn(move || write_packs(bank, pages, pack_bytes, shared, &receive));
            for worker in &mut self.workers {
                let send = send.clone();
                scope.spawn(move || work(worker, bank, pages, shared, job, &send));
            }
        });
        if let Some(error) = shared.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let mut counts = Counts::default();
        self.workers.iter_mut().for_each(|worker| counts.add(&std::mem::take(&mut worker.counts)));
        counts.content = counts.pages - counts.zero - counts.position - counts.new;
        self.writer.count(section, counts);
        Ok(())
    }

    /// Makes everything durable, and the machine seen.
    ///
    /// # Errors
    /// The store's fault; the machine is not there.
    pub fn commit(self) -> Result<DepositReport, DepositError> {
        self.finish(false)
    }

    /// The same, only if the parent is still the machine's last deposit: for what must not put an older state in the place of a newer one.
    ///
    /// # Errors
    /// It is not, or the store's fault; the machine is not there.
    pub fn commit_onto_parent(self) -> Result<DepositReport, DepositError> {
        self.finish(true)
    }

    fn finish(mut self, only_onto_parent: bool) -> Result<DepositReport, DepositError> {
        if self.writer.is_empty() {
            return Err(DepositError::Empty);
        }
        // What is named here was kept by it.
        self.hold.check()?;
        let (counts, last) = (self.writer.counts(), self.last_packs());
        let Self { bank, machine, parent, writer, pages, mut pack_bytes, .. } = self;
        let mut known = pages.known.into_inner().unwrap_or_else(PoisonError::into_inner);
        last.iter().for_each(|full| known.note(full.sealed.id, &full.sealed.entries));
        let parent = parent.map(|(entry, _)| entry);
        let entry = std::thread::scope(|scope| {
            // The index takes the processor's time, packs and manifest the disk's. A run may so name a pack before it is there, or one that never
            // will be: who opens the index leaves that out.
            let flushed = scope.spawn(|| known.finish(bank));
            let entry = publish(bank, &machine, parent.as_ref(), writer, last, &pack_bytes, only_onto_parent);
            // An index that is not there is made again by whoever opens the bank.
            match flushed.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the index of a deposit was not written, and is made again from its packs")
                }
                Err(_) => tracing::error!("the thread that wrote an index panicked; it is made again from the packs"),
            }
            entry
        })?;
        Ok(DepositReport {
            machine: entry.to_string(),
            root: entry.root.to_string(),
            parent: parent.map(|entry| entry.to_string()),
            counts,
            pack_bytes: *pack_bytes.get_mut(),
            manifest_bytes: entry.len,
        })
    }

    /// The packs that are not full, as few as what is written of them allows.
    fn last_packs(&mut self) -> Vec<Full> {
        let mut packs: Vec<_> = self
            .workers
            .iter_mut()
            .map(|worker| (worker.draft.take(), worker.packer.take()))
            .filter(|(_, pack)| !pack.is_empty())
            .collect();
        // What has no draft yet goes into one that has, so that small deposits make one pack.
        packs.sort_by_key(|(draft, pack)| (draft.is_none(), pack.len()));
        let mut merged: Vec<(Option<Box<dyn Draft>>, PackBuilder)> = Vec::new();
        for (draft, pack) in packs {
            match merged.last_mut() {
                Some((_, last)) if draft.is_none() && last.len() + pack.len() <= FULL => last.append(pack),
                _ => merged.push((draft, pack)),
            }
        }
        merged.into_iter().map(|(draft, pack)| Full { draft, sealed: pack.seal() }).collect()
    }
}

/// Puts the last packs and the manifest, and makes all of it durable.
fn publish(
    bank: &Bank,
    machine: &str,
    parent: Option<&Entry>,
    writer: Writer,
    last: Vec<Full>,
    pack_bytes: &AtomicU64,
    only_onto_parent: bool,
) -> Result<Entry, DepositError> {
    for full in last {
        put_pack(bank, pack_bytes, full)?;
    }
    // Also where this one put no pack: it may name pages of another that died, or is about to, before its pack's name was durable.
    bank.store().sync(Kind::Pack)?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let root = parent.map(|entry| entry.root);
    // Two deposits of one machine that end together have two numbers.
    let commit = bank.store().hold(Hold::Commit, bank.wait())?;
    let last = if only_onto_parent { bank.listing()?.last(machine).cloned() } else { None };
    if only_onto_parent && last.as_ref().map(|entry| entry.root) != root {
        return Err(DepositError::Overtaken(parent.map(ToString::to_string).unwrap_or_default()));
    }
    // Where another bank gives the numbers, it gives the one behind the parent or none.
    let number = |_| match last {
        Some(last) if bank.store().service().is_some() => Ok(last.number + 1),
        _ => bank.next_number(machine),
    };
    let entry = writer.finish(bank.identity(), machine, created, root, number)?;
    drop(commit);
    bank.store().sync(Kind::Manifest)?;
    Ok(entry)
}

/// Writes what is not written of a pack, and says what it is and what is where in it.
fn put_pack(bank: &Bank, pack_bytes: &AtomicU64, full: Full) -> Result<(PackId, Vec<(PageId, Place)>), DepositError> {
    let Full { draft, sealed: Sealed { id, bytes, len, entries } } = full;
    let mut draft = draft.map_or_else(|| bank.store().create(Kind::Pack), Ok)?;
    draft.append(&bytes)?;
    draft.commit(&id.name(), Durability::Durable)?;
    pack_bytes.fetch_add(len, Ordering::Relaxed);
    Ok((id, entries))
}

fn write_packs(bank: &Bank, pages: &Pages, pack_bytes: &AtomicU64, shared: &Shared<'_>, receive: &Receiver<Full>) {
    // After a failure packs are taken all the same, so that nobody waits for room.
    for full in receive {
        if shared.stop.load(Ordering::Relaxed) {
            continue;
        }
        let put = put_pack(bank, pack_bytes, full).and_then(|(id, entries)| Ok(pages.stored(bank, id, &entries)?));
        if let Err(error) = put {
            shared.fail(error);
        }
    }
}

fn work(worker: &mut Worker, bank: &Bank, pages: &Pages, shared: &Shared<'_>, job: &Job<'_>, send: &SyncSender<Full>) {
    let len = job.source.len();
    loop {
        let leaf = shared.next.fetch_add(1, Ordering::Relaxed);
        if leaf >= leaves(len) || shared.stop.load(Ordering::Relaxed) {
            break;
        }
        if let Err(error) = one_leaf(worker, bank, pages, shared, job, leaf, send) {
            shared.fail(error);
            break;
        }
        let bytes = (pages_of(len, leaf) * PAGE) as u64;
        let done = shared.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (shared.progress)(Progress { done: done.min(len), total: len });
    }
    worker.end();
}

fn one_leaf(
    worker: &mut Worker,
    bank: &Bank,
    pages: &Pages,
    shared: &Shared<'_>,
    job: &Job<'_>,
    leaf: usize,
    send: &SyncSender<Full>,
) -> Result<(), DepositError> {
    let count = pages_of(job.source.len(), leaf);
    let parent = match job.parent {
        // A leaf of another length is another leaf.
        Some((manifest, section)) if manifest.head.sections[section].pages_of(leaf) == count => {
            Some(manifest.leaf(bank.store(), bank.identity(), section, leaf)?)
        }
        _ => None,
    };
    let part = Leaf { first: (leaf * LEAF) as u64, parent: parent.as_deref(), pages: count };
    let mut send = |full| {
        // The receiver ends only after all senders; that it is gone would be a failure of its own, already told.
        send.send(full).map_err(|_| DepositError::Memory(io::ErrorKind::BrokenPipe.into()))
    };
    let ids = worker.leaf(bank, pages, job.source, &job.changes, &part, &mut send)?;
    let base = parent.as_deref().filter(|_| job.is_base);
    let names = LeafNames::new(bank.identity(), &ids, base);
    shared.writer.lock().unwrap_or_else(PoisonError::into_inner).leaf(job.section, leaf, &names)?;
    Ok(())
}
