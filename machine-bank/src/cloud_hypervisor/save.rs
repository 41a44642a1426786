//! A Cloud Hypervisor saves its machine: it passes the memfds of its memory, and we deposit them while it waits.
//!
//! It says Start, MemoryFd, Config, State and CompletePaused; the last is answered when the machine is in the bank. Is it refused, its guest goes on where it was.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use thiserror::Error;

use super::wire::{self, Link, Refused, Slot, slots};
use super::{CONFIG, STATE, slot_section};
use crate::bank::Bank;
use crate::deposit::{Changes, DepositError, DepositOptions, DepositReport, FileSource, Progress, Source};
use crate::manifest::SectionKind;

/// How long the other end may say nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a machine was not saved.
#[derive(Debug, Error)]
pub enum SaveError {
    /// The other end.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Ours.
    #[error(transparent)]
    Deposit(#[from] DepositError),
}

/// What came so far.
#[derive(Default)]
struct Came {
    started: bool,
    memory: BTreeMap<u32, File>,
    config: Option<Vec<u8>>,
    state: Option<Vec<u8>>,
}

/// A section that is deposited beside what comes: a disk, say, that nobody writes while the machine is handed over.
pub type Other<'a> = (SectionKind, &'a str, &'a dyn Source);

/// Deposits the machine that comes over a connection. `progress` is called from several threads, with the section.
///
/// # Errors
/// The other end says something wrong, or the deposit fails; the other end is told, and the machine is not in the bank.
pub fn save(
    bank: &Bank,
    machine: &str,
    options: &DepositOptions,
    others: &[Other<'_>],
    stream: UnixStream,
    progress: &(dyn Fn(&str, Progress) + Sync),
) -> Result<DepositReport, SaveError> {
    stream.set_read_timeout(Some(PATIENCE)).map_err(Refused::from)?;
    let mut link = Link(stream);
    let ended = receive(&mut link).and_then(|came| came.deposit(bank, machine, options, others, progress));
    match &ended {
        Ok(_) => link.answer(true)?,
        // It closes the connection where it cannot be told.
        Err(_) => link.answer(false).unwrap_or_else(|error| tracing::debug!(%error, "the other end is not told")),
    }
    ended
}

/// Takes what comes up to its end, which is not answered yet.
fn receive(link: &mut Link) -> Result<Came, SaveError> {
    let mut came = Came::default();
    loop {
        let request = link.request()?.ok_or(Refused::Closed)?;
        if !came.started && request.command != wire::START {
            return Err(Refused::Command(request.command, "Start").into());
        }
        match request.command {
            wire::START if !came.started => came.started = true,
            wire::MEMORY_FD if came.config.is_none() => {
                let (slot, fd) = link.memory(request.length)?;
                if came.memory.len() >= wire::MOST_SLOTS || came.memory.insert(slot, fd.into()).is_some() {
                    return Err(Refused::Slots(came.memory.len() + 1).into());
                }
            }
            wire::CONFIG if came.config.is_none() => came.config = Some(link.json("a configuration", request.length)?),
            wire::STATE if came.config.is_some() && came.state.is_none() => {
                came.state = Some(link.json("a state", request.length)?)
            }
            wire::COMPLETE | wire::COMPLETE_PAUSED if came.state.is_some() => return Ok(came),
            wire::ABANDON => return Err(Refused::Abandoned.into()),
            other => return Err(Refused::Command(other, "the next part of a machine").into()),
        }
        link.answer(true)?;
    }
}

impl Came {
    fn deposit(
        self,
        bank: &Bank,
        machine: &str,
        options: &DepositOptions,
        others: &[Other<'_>],
        progress: &(dyn Fn(&str, Progress) + Sync),
    ) -> Result<DepositReport, SaveError> {
        let (config, state) = (self.config.unwrap_or_default(), self.state.unwrap_or_default());
        let mut memory = self.memory;
        let mut sources = Vec::new();
        for slot in slots(&config)? {
            let file = memory.remove(&slot.slot).ok_or(Refused::Slots(0))?;
            sources.push((slot_section(slot.slot), SlotSource::new(file, &slot)?));
        }
        if let Some(other) = memory.keys().next() {
            return Err(Refused::Slot { slot: *other, gpa: 0, size: 0, why: "the configuration does not have it" }.into());
        }
        let mut deposit = bank.deposit(machine, options)?;
        for (name, source) in &sources {
            deposit.section(SectionKind::Memory, name, source, Changes::HashAll, &|done| progress(name, done))?;
        }
        for (kind, name, source) in others {
            deposit.section(*kind, name, *source, Changes::HashAll, &|done| progress(name, done))?;
        }
        for (name, json) in [(CONFIG, &config), (STATE, &state)] {
            deposit.section(SectionKind::DeviceState, name, &json.as_slice(), Changes::HashAll, &|done| progress(name, done))?;
        }
        Ok(deposit.commit()?)
    }
}

/// The part of a memfd that a slot is.
struct SlotSource {
    file: FileSource,
    from: u64,
    len: u64,
}

impl SlotSource {
    fn new(file: File, slot: &Slot) -> Result<Self, Refused> {
        let file = FileSource::new(file)?;
        let refuse = |why| Refused::Slot { slot: slot.slot, gpa: slot.gpa, size: slot.size, why };
        // Both are bounded.
        if file.len() < slot.file_offset + slot.size {
            return Err(refuse("its memfd is shorter"));
        }
        Ok(Self { file, from: slot.file_offset, len: slot.size })
    }
}

impl Source for SlotSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(self.from + offset, buf)
    }

    fn data_from(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.from + self.len;
        let data = self.file.data_from(self.from + offset)?.filter(|data| data.start < end);
        Ok(data.map(|data| data.start - self.from..data.end.min(end) - self.from))
    }
}
