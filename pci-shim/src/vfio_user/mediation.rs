//! Accesses to guest memory that the client makes for us: `DMA_READ` and `DMA_WRITE` on the client's own socket, several outstanding.
//!
//! The device fetches 64 bytes at a queue's slot 16: message 0x8001, `DMA_READ`, goes out; the client's reply 0x8001 brings them, or an errno,
//! which the device sees as a fault. Nothing waits for the reply but the device: a guest's register read is answered meanwhile.
//!
//! A client may handle such messages in any order, so order is kept here: a polled store goes out once all earlier stores are answered,
//! its last word after the rest; an access that overlaps an earlier store waits for it; interrupts, and replies to register reads, resets and
//! unmaps (`held.rs`), wait for the stores before them. A store that was sent can land until its answer is here, whatever became of who asked.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use farbus_remote_dma::{Iova, MediationAnswer, Ticket};
use farbus_transport::Nanos;
use zerocopy::IntoBytes;

use super::held::Until;
use super::maps::{FileKey, Maps};
use super::message::{dma_read_reply, dma_write_reply_fits};
use super::served::Served;
use super::share::{Evidence, MAX_TRIES, STRIKES, Sample, Trust};
use super::socket::Output;
use super::wire::{Command, DmaAccess, FLAG_ERROR, Header};
use crate::{MediationKind, MediationRequest};

/// Messages that wait for a reply at the same time.
const MAX_OUTSTANDING: usize = 32;
/// Messages whose reply nobody waits for any more; a client that leaves so many unanswered is broken.
const MAX_ABANDONED: usize = 1024;
/// Bytes of output that wait for the client, above which no more messages are added.
const MAX_BACKLOG: usize = 256 << 10;

enum Kind {
    Fetch {
        bytes: Vec<u8>,
    },
    Store {
        bytes: Vec<u8>,
        polled: bool,
        number: u64,
    },
    /// Our own question whether a mapping shows what the client has.
    Check {
        len: usize,
        file: FileKey,
        strikes: u8,
        tries: u8,
    },
}

struct Operation {
    /// `None` where the device does not wait (any more).
    ticket: Option<Ticket>,
    iova: Iova,
    kind: Kind,
    /// Bytes that are done.
    done: usize,
}

impl Operation {
    fn len(&self) -> usize {
        match &self.kind {
            Kind::Fetch { bytes } | Kind::Store { bytes, .. } => bytes.len(),
            Kind::Check { len, .. } => *len,
        }
    }

    fn overlaps(&self, iova: u64, len: u64) -> bool {
        let end = self.iova.0.saturating_add(self.len() as u64);
        self.iova.0 < iova.saturating_add(len) && iova < end
    }

    /// Bytes of the next message. A polled store's last word is a message of its own.
    fn part(&self, max_data: usize) -> usize {
        let rest = self.len() - self.done;
        let rest = match self.kind {
            Kind::Store { polled: true, .. } if rest > 4 => rest - 4,
            _ => rest,
        };
        rest.min(max_data)
    }
}

struct Outstanding {
    operation: Operation,
    part: usize,
    sample: Option<Sample>,
    deadline: Nanos,
    abandoned: bool,
    /// Where a store goes, whatever became of its operation.
    stores_at: Option<Iova>,
}

impl Outstanding {
    fn may_land_in(&self, iova: u64, len: u64) -> bool {
        let end = |at: Iova| at.0.saturating_add(self.part as u64);
        self.stores_at.is_some_and(|at| at.0 < iova.saturating_add(len) && iova < end(at))
    }
}

/// What an answer led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// Nothing beyond the answer.
    Nothing,
    /// A file was found not to be the guest's memory.
    NotShared,
}

/// All accesses that one client makes for a device.
pub(super) struct Mediator {
    waiting: VecDeque<Operation>,
    outstanding: HashMap<u16, Outstanding>,
    abandoned: usize,
    next_id: u16,
    newest_store: u64,
    unanswered_stores: BTreeSet<u64>,
    max_data: usize,
    deadline: Duration,
}

impl Mediator {
    /// For a client that takes `max_data` bytes a message and has `deadline` for each.
    pub(super) fn new(max_data: u32, deadline: Duration) -> Self {
        Self {
            waiting: VecDeque::new(),
            outstanding: HashMap::new(),
            abandoned: 0,
            next_id: 0x8000,
            newest_store: 0,
            unanswered_stores: BTreeSet::new(),
            max_data: max_data as usize,
            deadline,
        }
    }

    pub(super) fn set_max_data(&mut self, max_data: u32) {
        self.max_data = max_data as usize;
    }

    /// The last store that the device asked for, and the first that is not answered.
    pub(super) fn stores(&self) -> (u64, Option<u64>) {
        (self.newest_store, self.unanswered_stores.first().copied())
    }

    /// Whether what a reply waits for has come.
    pub(super) fn has_ended(&self, until: &Until) -> bool {
        let mut sent = self.outstanding.values();
        match until {
            Until::Stored(number) => self.unanswered_stores.first().is_none_or(|first| first > number),
            Until::Quiet => !sent.any(|message| message.stores_at.is_some()),
            Until::QuietIn(ranges) => !sent.any(|message| ranges.iter().any(|(iova, len)| message.may_land_in(*iova, *len))),
        }
    }

    /// Whether nothing waits and nothing is outstanding.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.outstanding.is_empty()
    }

    /// Whether the client leaves too many messages without a reply.
    pub(super) fn is_ignored(&self) -> bool {
        self.abandoned > MAX_ABANDONED
    }

    /// When the first reply is overdue.
    pub(super) fn next_deadline(&self) -> Option<Nanos> {
        self.outstanding.values().filter(|message| !message.abandoned).map(|message| message.deadline).min()
    }

    /// Takes what the device asks for. Call after every call of the device, before interrupts are delivered.
    pub(super) fn collect<D: Served>(&mut self, device: &mut D) {
        while let Some(MediationRequest { ticket, iova, kind }) = device.next_mediation() {
            let kind = match kind {
                MediationKind::Fetch { len } => Kind::Fetch { bytes: vec![0; len as usize] },
                MediationKind::Store { bytes, polled } => {
                    self.newest_store += 1;
                    self.unanswered_stores.insert(self.newest_store);
                    Kind::Store { bytes, polled, number: self.newest_store }
                }
            };
            self.waiting.push_back(Operation { ticket: Some(ticket), iova, kind, done: 0 });
        }
    }

    /// Sends what may be sent.
    ///
    /// # Errors
    /// The connection is broken.
    pub(super) fn send(&mut self, maps: &Maps, socket: BorrowedFd<'_>, output: &mut Output, now: Nanos) -> io::Result<()> {
        while self.outstanding.len() - self.abandoned < MAX_OUTSTANDING && output.backlog() < MAX_BACKLOG {
            let startable = |first: &Operation| may_start(first, &self.outstanding, &self.unanswered_stores);
            if !self.waiting.front().is_some_and(startable) {
                return Ok(());
            }
            let Some(operation) = self.waiting.pop_front() else {
                return Ok(());
            };
            self.send_part(operation, maps, socket, output, now)?;
        }
        Ok(())
    }

    /// Takes a client's reply. One that nobody asked for is ignored.
    ///
    /// # Errors
    /// The connection is broken.
    #[expect(clippy::too_many_arguments, reason = "one reply touches the device, its maps and the socket")]
    pub(super) fn reply<D: Served>(
        &mut self,
        header: &Header,
        body: &[u8],
        device: &mut D,
        maps: &mut Maps,
        socket: BorrowedFd<'_>,
        output: &mut Output,
        now: Nanos,
    ) -> io::Result<Finding> {
        let Some(message) = self.outstanding.remove(&header.message_id) else {
            tracing::debug!(id = header.message_id, "a reply came that nobody asked for");
            return Ok(Finding::Nothing);
        };
        if message.abandoned {
            self.abandoned -= 1;
            return Ok(Finding::Nothing);
        }
        let Outstanding { mut operation, part, sample, .. } = message;
        let at = Iova(operation.iova.0.saturating_add(operation.done as u64));
        let expected = command_of(&operation.kind);
        let done = operation.done;
        let refused = header.flags & FLAG_ERROR != 0 || header.command != expected.number();
        let evidence = match &mut operation.kind {
            _ if refused => None,
            Kind::Fetch { bytes } => dma_read_reply(body, at.0, part).and_then(|data| {
                bytes.get_mut(done..done + part)?.copy_from_slice(data);
                Some(sample.as_ref().map_or(Evidence::Nothing, |sample| sample.after_fetch(maps, at, data)))
            }),
            Kind::Store { bytes, .. } => bytes
                .get(done..done + part)
                .filter(|_| dma_write_reply_fits(body, at.0))
                .map(|stored| sample.as_ref().map_or(Evidence::Nothing, |sample| sample.after_store(maps, at, stored))),
            Kind::Check { .. } => dma_read_reply(body, at.0, part)
                .map(|data| sample.as_ref().map_or(Evidence::Nothing, |sample| sample.after_fetch(maps, at, data))),
        };
        let Some(evidence) = evidence else {
            if header.flags & FLAG_ERROR != 0 {
                tracing::debug!(iova = %at, errno = header.error, "the client refused a dma access");
            } else {
                tracing::warn!(iova = %at, "the client's reply does not fit a dma access");
            }
            self.finish(operation, device, false);
            return Ok(Finding::Nothing);
        };
        if let Kind::Check { file, strikes, tries, .. } = operation.kind {
            return Ok(self.judge(operation.iova, part, file, evidence, (strikes, tries), maps));
        }
        if let Some(file) = sample.map(|sample| sample.file) {
            self.weigh(file, evidence, at, part, maps);
        }
        operation.done += part;
        if operation.done < operation.len() {
            self.send_part(operation, maps, socket, output, now)?;
        } else {
            self.finish(operation, device, true);
        }
        Ok(Finding::Nothing)
    }

    /// Faults what is overdue.
    pub(super) fn expire<D: Served>(&mut self, device: &mut D, now: Nanos) {
        if self.next_deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        let overdue = |message: &Outstanding| !message.abandoned && message.deadline <= now;
        self.abandon(device, overdue);
        tracing::warn!("the client did not answer dma accesses in time: the device sees faults");
    }

    /// Faults every access that touches a range: it is being taken away.
    pub(super) fn fault_range<D: Served>(&mut self, device: &mut D, iova: u64, len: u64) {
        self.abandon(device, |message| !message.abandoned && message.operation.overlaps(iova, len));
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let (inside, outside): (VecDeque<_>, VecDeque<_>) = waiting.partition(|operation| operation.overlaps(iova, len));
        self.waiting = outside;
        for operation in inside {
            self.finish(operation, device, false);
        }
    }

    /// Faults everything: the device is being reset, or the client left.
    pub(super) fn fault_all<D: Served>(&mut self, device: &mut D) {
        // A device that answers each fault with another access is not humoured for ever.
        for _ in 0..1024 {
            self.collect(device);
            self.abandon(device, |message| !message.abandoned);
            let waiting = std::mem::take(&mut self.waiting);
            if waiting.is_empty() {
                return;
            }
            for operation in waiting {
                self.finish(operation, device, false);
            }
        }
    }

    fn abandon<D: Served>(&mut self, device: &mut D, chosen: impl Fn(&Outstanding) -> bool) {
        let mut operations = Vec::new();
        for message in self.outstanding.values_mut().filter(|message| chosen(message)) {
            message.abandoned = true;
            self.abandoned += 1;
            let nothing =
                Operation { ticket: None, iova: message.operation.iova, kind: Kind::Fetch { bytes: Vec::new() }, done: 0 };
            operations.push(std::mem::replace(&mut message.operation, nothing));
        }
        for operation in operations {
            self.finish(operation, device, false);
        }
    }

    fn finish<D: Served>(&mut self, operation: Operation, device: &mut D, succeeded: bool) {
        if let Kind::Store { number, .. } = &operation.kind {
            self.unanswered_stores.remove(number);
        }
        let Some(ticket) = operation.ticket else { return };
        let answer = match &operation.kind {
            _ if !succeeded => MediationAnswer::Fault,
            Kind::Fetch { bytes } => MediationAnswer::Fetched(bytes),
            Kind::Store { .. } => MediationAnswer::Stored,
            Kind::Check { .. } => return,
        };
        device.answer(ticket, answer);
    }

    fn send_part(
        &mut self,
        operation: Operation,
        maps: &Maps,
        socket: BorrowedFd<'_>,
        output: &mut Output,
        now: Nanos,
    ) -> io::Result<()> {
        let part = operation.part(self.max_data);
        let at = Iova(operation.iova.0.saturating_add(operation.done as u64));
        let sample = Sample::take(maps, at, part);
        let id = self.fresh_id();
        let access = DmaAccess { address: at.0, count: part as u64 };
        let data = match &operation.kind {
            Kind::Store { bytes, .. } => bytes.get(operation.done..operation.done + part).unwrap_or_default(),
            Kind::Fetch { .. } | Kind::Check { .. } => &[],
        };
        let header = Header::command(id, command_of(&operation.kind), size_of::<DmaAccess>() + data.len());
        output.send(socket, &header, [access.as_bytes(), data])?;
        let stores_at = matches!(operation.kind, Kind::Store { .. }).then_some(at);
        let message = Outstanding { operation, part, sample, deadline: now + self.deadline, abandoned: false, stores_at };
        self.outstanding.insert(id, message);
        Ok(())
    }

    fn fresh_id(&mut self) -> u16 {
        // At most MAX_OUTSTANDING and MAX_ABANDONED of the 65,536 are in use.
        loop {
            self.next_id = self.next_id.wrapping_add(1);
            if !self.outstanding.contains_key(&self.next_id) {
                return self.next_id;
            }
        }
    }

    /// What a device's own access says of a file.
    fn weigh(&mut self, file: FileKey, evidence: Evidence, at: Iova, len: usize, maps: &mut Maps) {
        match evidence {
            Evidence::Nothing => {}
            Evidence::Shared => {
                if let Some(file) = maps.file_mut(file) {
                    file.trust = Trust::Seen;
                }
            }
            Evidence::Differs => {
                let waits =
                    |operation: &Operation| matches!(&operation.kind, Kind::Check { file: checked, .. } if *checked == file);
                let checking = self.waiting.iter().chain(self.outstanding.values().map(|message| &message.operation)).any(waits);
                if !checking {
                    self.check(at, len, file, 0, 0);
                }
            }
        }
    }

    /// What a check of ours says.
    fn judge(
        &mut self,
        at: Iova,
        len: usize,
        file: FileKey,
        evidence: Evidence,
        (strikes, tries): (u8, u8),
        maps: &mut Maps,
    ) -> Finding {
        let tries = tries + 1;
        match evidence {
            Evidence::Differs if strikes + 1 >= STRIKES => {
                let Some(file) = maps.file_mut(file) else {
                    return Finding::Nothing;
                };
                file.trust = Trust::NotShared;
                return Finding::NotShared;
            }
            Evidence::Differs => self.check(at, len, file, strikes + 1, tries),
            Evidence::Nothing | Evidence::Shared if strikes > 0 && tries < MAX_TRIES => self.check(at, len, file, 0, tries),
            Evidence::Nothing | Evidence::Shared => {}
        }
        Finding::Nothing
    }

    fn check(&mut self, iova: Iova, len: usize, file: FileKey, strikes: u8, tries: u8) {
        self.waiting.push_front(Operation { ticket: None, iova, kind: Kind::Check { len, file, strikes, tries }, done: 0 });
    }
}

fn command_of(kind: &Kind) -> Command {
    match kind {
        Kind::Store { .. } => Command::DmaWrite,
        Kind::Fetch { .. } | Kind::Check { .. } => Command::DmaRead,
    }
}

/// Whether an operation keeps its order if it is sent now.
fn may_start(operation: &Operation, outstanding: &HashMap<u16, Outstanding>, unanswered_stores: &BTreeSet<u64>) -> bool {
    if let Kind::Store { polled: true, number, .. } = &operation.kind
        && unanswered_stores.first().is_some_and(|first| first < number)
    {
        return false;
    }
    let stores = |kind: &Kind| matches!(kind, Kind::Store { .. });
    !outstanding.values().filter(|message| !message.abandoned).any(|message| {
        (stores(&operation.kind) || stores(&message.operation.kind))
            && message.operation.overlaps(operation.iova.0, operation.len() as u64)
    })
}
