//! A machine goes on in a Cloud Hypervisor that waits for one: whole, or at once, with each page as the guest uses it.
//!
//! `restore(&bank, &vm7, path, &RestoreOptions { on_demand: true, resume: true, … }, …)` passes empty memfds; the guest runs, and its first use of an address is a
//! request that is answered when 64 KiB around it are in the memfd, verified.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use serde::Serialize;
use thiserror::Error;

use super::wire::{self, Link, Refused, Slot, slots};
use super::{CONFIG, STATE, slot_section};
use crate::bank::Bank;
use crate::deposit::Progress;
use crate::lazy::{Away, Bits, Image, OnStore, Patience, StoreEvent, Unread, Waiting, pages_of};
use crate::manifest::Entry;
use crate::pack::{GROUP, GROUP_PAGES};
use crate::page::PAGE;
use crate::withdraw::{Target, WithdrawError, Withdrawal};

/// How long the other end may take to answer: with the state it makes the machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// Bytes of the longest stretch that is asked for at once.
const MOST_FAULT: u64 = 64 << 20;
static ZEROS: [u8; GROUP] = [0; GROUP];

/// How to restore.
#[derive(Clone)]
pub struct RestoreOptions {
    /// Pages come as they are used. The other end has to wait with `memory_mode=postcopy`.
    pub on_demand: bool,
    /// The guest runs then, and is not paused as it was.
    pub resume: bool,
    /// How a store is waited for that is away while the guest needs a page.
    pub patience: Patience,
    /// Is told that it is, and that it is back.
    pub on_store: OnStore,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self { on_demand: false, resume: false, patience: Patience::default(), on_store: Arc::new(|_: &StoreEvent| {}) }
    }
}

impl fmt::Debug for RestoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { on_demand, resume, patience, .. } = self;
        write!(f, "RestoreOptions(on demand {on_demand}, resume {resume}, {patience:?})")
    }
}

/// What was restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RestoreReport {
    /// Slots of memory.
    pub slots: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Requests for pages that were answered.
    pub faults: u64,
    /// Pages that were written because of them, with those beside them.
    pub placed: u64,
    /// How often the store was asked again.
    pub retries: u64,
    /// How long it was away altogether while the guest needed a page, in milliseconds.
    pub away_ms: u64,
}

/// Why a machine was not restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// It was deposited otherwise.
    #[error("the machine has no section {0}, so it was not saved by Cloud Hypervisor")]
    Other(String),
    /// The other end.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A page cannot be had.
    #[error(transparent)]
    Withdraw(#[from] WithdrawError),
    /// The store is away, before anything was handed over.
    #[error("the store does not answer: {0}")]
    Away(String),
    /// A page that the guest waits for cannot be had; it was told so.
    #[error("the page at {0:#x} of the guest cannot be had")]
    Page(u64),
    /// The other end asked for what is no memory.
    #[error("{1} bytes at {0:#x} of the guest are in no slot")]
    Stray(u64, u64),
    /// The host has no memory for it.
    #[error("no memory for the machine: {0}")]
    Memory(io::Error),
}

/// Hands a machine to the Cloud Hypervisor that listens at `path`, and returns when it needs us no more.
///
/// # Errors
/// It is no machine of Cloud Hypervisor's, a page cannot be had, or the other end says something wrong; there is no guest then, or one that got an error for a page.
pub fn restore(
    bank: &Bank,
    entry: &Entry,
    path: &Path,
    options: &RestoreOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<RestoreReport, RestoreError> {
    let withdrawal = bank.withdraw(entry)?;
    let (mut config, state) = (json(&withdrawal, CONFIG)?, json(&withdrawal, STATE)?);
    let slots = slots(&config)?;
    if options.on_demand {
        config = told_of_mode(config)?;
    }
    let retries = AtomicU64::new(0);
    let mut memory = Vec::new();
    for slot in &slots {
        memory.push(SlotMemory::new(bank, entry, &withdrawal, *slot, options.patience, &retries)?);
    }
    let (mut report, total) =
        (RestoreReport { slots: slots.len() as u64, ..RestoreReport::default() }, slots.iter().map(|slot| slot.size).sum());
    report.bytes = total;
    if !options.on_demand {
        let mut done = 0;
        for one in &memory {
            let further = |more: Progress| progress(Progress { done: done + more.done, total });
            withdrawal.section_to(&slot_section(one.slot.slot), one, true, &further)?;
            done += one.slot.size;
        }
    }
    let connect = || {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok::<_, Refused>(Link(stream))
    };
    let mut link = connect()?;
    link.ask(wire::START, "Start", &[])?;
    for one in &memory {
        link.pass(one.slot.slot, &one.file)?;
    }
    link.ask(wire::CONFIG, "the configuration", &config)?;
    let end = if options.resume { wire::COMPLETE } else { wire::COMPLETE_PAUSED };
    if !options.on_demand {
        link.ask(wire::STATE, "the state", &state)?;
        link.ask(end, "the end", &[])?;
        return Ok(report);
    }
    let mut faults = connect()?;
    io::Write::write_all(&mut faults.0, &wire::FAULTS).map_err(Refused::from)?;
    // A guest that is paused, or has all it needs at the moment, asks for nothing.
    faults.0.set_read_timeout(None).map_err(Refused::from)?;
    let hang_up = faults.0.try_clone().map_err(Refused::from)?;
    std::thread::scope(|scope| {
        let (report, waiting) = (&mut report, Waiting::new(options.patience, options.on_store.clone()));
        let served = scope.spawn(move || serve(&mut faults, &mut memory, waiting, report, progress));
        let handed = link.ask(wire::STATE, "the state", &state).and_then(|()| link.ask(end, "the end", &[]));
        if handed.is_err() {
            // Nobody will ask any more.
            hang_up
                .shutdown(std::net::Shutdown::Both)
                .unwrap_or_else(|error| tracing::debug!(%error, "a connection is gone already"));
        }
        let served = served.join().unwrap_or(Err(RestoreError::Memory(io::ErrorKind::Other.into())));
        handed?;
        served
    })?;
    report.retries = retries.load(Ordering::Relaxed);
    Ok(report)
}

/// Answers requests for pages until the other end closes the connection.
fn serve(
    link: &mut Link,
    memory: &mut [SlotMemory<'_>],
    mut waiting: Waiting,
    report: &mut RestoreReport,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<(), RestoreError> {
    while let Some(request) = link.request()? {
        match request.command {
            wire::PAGE_FAULT if request.length == 16 => {}
            wire::ABANDON => {
                link.answer(true)?;
                return Err(Refused::Abandoned.into());
            }
            other => return Err(Refused::Command(other, "PageFault").into()),
        }
        let mut range = [0; 16];
        link.fill(&mut range)?;
        let (gpa, len) = (u64::from_le_bytes(first_half(range)), u64::from_le_bytes(second_half(range)));
        let slot = memory.iter_mut().find(|memory| memory.has(gpa, len));
        let placed = match slot {
            None => Err(RestoreError::Stray(gpa, len)),
            Some(slot) => match place(slot, gpa, len, link, &mut waiting, report) {
                Ok(true) => Ok(()),
                // Nobody waits for it any more.
                Ok(false) => return Ok(()),
                Err(error) => Err(error),
            },
        };
        // Whatever went wrong, the other end hears of it before we go.
        link.answer(placed.is_ok())?;
        report.faults += 1;
        placed?;
        progress(Progress { done: (report.placed * PAGE as u64).min(report.bytes), total: report.bytes });
    }
    Ok(())
}

/// Writes what is asked for, however long the store is away meanwhile; false: the other end has gone in the meantime.
fn place(
    slot: &mut SlotMemory<'_>,
    gpa: u64,
    len: u64,
    link: &Link,
    waiting: &mut Waiting,
    report: &mut RestoreReport,
) -> Result<bool, RestoreError> {
    loop {
        let away = match slot.place(gpa, len, &mut report.placed) {
            Ok(()) => {
                report.away_ms += waiting.answered().map_or(0, |away| away.as_millis() as u64);
                return Ok(true);
            }
            Err(Unplaced::Failed(error)) => return Err(error),
            Err(Unplaced::Away(away)) => away,
        };
        let Some(until) = waiting.failed(&away) else { return Err(RestoreError::Page(gpa)) };
        if link.closes_within(until.saturating_duration_since(Instant::now()))? {
            return Ok(false);
        }
    }
}

fn first_half([a, b, c, d, e, f, g, h, ..]: [u8; 16]) -> [u8; 8] {
    [a, b, c, d, e, f, g, h]
}

fn second_half([.., a, b, c, d, e, f, g, h]: [u8; 16]) -> [u8; 8] {
    [a, b, c, d, e, f, g, h]
}

/// A JSON section.
fn json(withdrawal: &Withdrawal<'_>, name: &str) -> Result<Vec<u8>, RestoreError> {
    let section = withdrawal.manifest().section(name).ok_or_else(|| RestoreError::Other(name.to_owned()))?;
    let len = withdrawal.manifest().head.sections[section].len;
    if len > wire::MOST_JSON {
        return Err(Refused::Length("a section of JSON", len).into());
    }
    let mut json = vec![0; len as usize];
    withdrawal.read(section, 0, &mut json)?;
    Ok(json)
}

/// Where a version has the mode in the configuration, it is told; others are told by who made them wait.
fn told_of_mode(config: Vec<u8>) -> Result<Vec<u8>, Refused> {
    let mut value: serde_json::Value = serde_json::from_slice(&config)?;
    match value.get_mut("memory_mode") {
        Some(mode) => *mode = "Postcopy".into(),
        None => return Ok(config),
    }
    Ok(serde_json::to_vec(&value)?)
}

/// Why pages are not there.
enum Unplaced {
    /// The store is away.
    Away(Away),
    /// They cannot be had, or not be written.
    Failed(RestoreError),
}

/// The memory of a slot, that the other end maps.
struct SlotMemory<'b> {
    slot: Slot,
    file: File,
    image: Image<'b>,
    /// Pages that are in it, which are never written again.
    placed: Bits,
}

impl<'b> SlotMemory<'b> {
    fn new(
        bank: &'b Bank,
        entry: &Entry,
        withdrawal: &Withdrawal<'_>,
        slot: Slot,
        patience: Patience,
        retries: &'b AtomicU64,
    ) -> Result<Self, RestoreError> {
        let name = slot_section(slot.slot);
        let there = withdrawal.manifest().section(&name).map(|at| withdrawal.manifest().head.sections[at].len);
        if there != Some(slot.size) {
            return Err(RestoreError::Other(name));
        }
        let memfd = |errno: rustix::io::Errno| RestoreError::Memory(errno.into());
        let file: OwnedFd = rustix::fs::memfd_create("farbus-bank-slot", MemfdFlags::CLOEXEC).map_err(memfd)?;
        rustix::fs::ftruncate(&file, slot.file_offset + slot.size).map_err(memfd)?;
        let image = Image::open(bank, entry, &name, patience, retries).map_err(|error| match error {
            Unread::Away(away) => RestoreError::Away(away.why),
            Unread::Lost(error) => error.into(),
        })?;
        Ok(Self { slot, file: file.into(), image, placed: Bits::new(slot.size / PAGE as u64) })
    }

    /// Whether a stretch of whole pages is in it.
    fn has(&self, gpa: u64, len: u64) -> bool {
        let whole = (gpa | len).is_multiple_of(PAGE as u64) && len > 0 && len <= MOST_FAULT;
        let from = gpa.checked_sub(self.slot.gpa);
        whole && from.and_then(|from| from.checked_add(len)).is_some_and(|end| end <= self.slot.size)
    }

    /// Writes what is asked for, with what is beside it, and counts the pages.
    fn place(&mut self, gpa: u64, len: u64, count: &mut u64) -> Result<(), Unplaced> {
        let first = (gpa - self.slot.gpa) / PAGE as u64;
        let asked = first..first + len / PAGE as u64;
        let groups: Vec<u64> = (asked.start / GROUP_PAGES as u64..asked.end.div_ceil(GROUP_PAGES as u64)).collect();
        let pages = self.slot.size / PAGE as u64;
        let mut failed = None;
        for group in groups {
            let range = pages_of(group, pages);
            let needed = range.start.max(asked.start)..range.end.min(asked.end);
            if needed.clone().all(|page| self.placed.get(page)) {
                continue;
            }
            let (placed, file, from) = (&mut self.placed, &self.file, self.slot.file_offset);
            let fetched = self.image.fetch(&[group], &mut |fetched| {
                let bytes = fetched.bytes.unwrap_or(&ZEROS);
                for page in range.clone() {
                    let at = (page - range.start) as usize;
                    if fetched.bad.contains(&at) || placed.get(page) {
                        continue;
                    }
                    // The page is there whole from one instant to the next: the kernel holds it locked meanwhile.
                    match file.write_all_at(&bytes[at * PAGE..][..PAGE], from + page * PAGE as u64) {
                        Ok(()) => {
                            placed.set(page);
                            *count += 1;
                        }
                        Err(error) => failed = Some(RestoreError::Memory(error)),
                    }
                }
            });
            fetched.map_err(Unplaced::Away)?;
            if let Some(error) = failed {
                return Err(Unplaced::Failed(error));
            }
            if let Some(page) = needed.clone().find(|page| !self.placed.get(*page)) {
                return Err(Unplaced::Failed(RestoreError::Page(self.slot.gpa + page * PAGE as u64)));
            }
        }
        Ok(())
    }
}

impl Target for SlotMemory<'_> {
    fn there(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.slot.file_offset + offset)
    }
}
