//! A controller that was reset, brought back to where a saved state has it, by nothing but what any NVMe controller can be told.
//!
//! Queue 1 of 64 entries was at 12 in its second round: on memory of ours at the guest's addresses the queue is created again, 76 reads of one block are
//! carried out, and the controller is at 12 in its second round. Then the guest's memory takes that memory's place, and neither side can tell.
//!
//! Requests for events that waited are put to the controller again, under the driver's own names; features are set again as the driver set them last, but for
//! those whose values lay in memory. Commands that had not been begun are begun when the function goes on: their entries are the guest's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_remote_dma::{BarAddress, Iova, Width};
use farbus_transport::Memory;

use super::lost::Lost;
use super::queues::{COMPLETION_BYTES, SUBMISSION_BYTES, opcode};
use super::saved::{SavedCompletions, SavedQueues, SavedSubmission};
use super::{ACQ, AQA, ASQ, CC, CC_ENABLE, CSTS, DOORBELLS, INTMS, Nvme};
use crate::profile::{ReviveError, Reviving};

/// How long the controller may take for one step.
pub(super) const LIMIT: Duration = Duration::from_secs(10);
/// Commands that a queue is advanced by at most: two rounds of the longest queue, and as many again.
const MOST_COMMANDS: u64 = 4 << 16;
/// Commands under way at a time.
const BATCH: u64 = 64;
pub(super) const PAGE: u64 = 4096;
const SHUTDOWN: u32 = 0b11 << 14;
/// NVM command set: read (NVM Express 1.4, section 6.9).
const READ: u8 = 0x02;
const FLUSH: u8 = 0x00;
const ALL_NAMESPACES: u32 = u32::MAX;

type Command = [u8; SUBMISSION_BYTES as usize];

pub(super) struct Submission {
    memory: Arc<Memory>,
    pub(super) entries: u64,
    completions: u16,
    submitted: u64,
}

struct Completions {
    memory: Arc<Memory>,
    entries: u64,
    taken: u64,
    /// The driver has taken no more than this of the entries that there will be.
    most: u64,
    told: u64,
}

/// The controller and its queues on memory of ours.
pub(super) struct Rig<'d> {
    pub(super) device: &'d mut dyn Reviving,
    stride: u64,
    submissions: BTreeMap<u16, Submission>,
    completions: BTreeMap<u16, Completions>,
    page: Iova,
    data: Arc<Memory>,
}

impl Nvme {
    pub(super) fn bring_back(&self, to: Option<&Lost>, device: &mut dyn Reviving) -> Result<(), ReviveError> {
        let dword = |offset| u64::from(u32::from_le_bytes(self.written(offset)));
        let register = |offset| BarAddress { bar: 0, offset };
        for offset in [AQA, ASQ, ASQ + 4, ACQ, ACQ + 4] {
            device.write(register(offset), Width::B4, dword(offset));
        }
        let configuration = dword(CC);
        if let Some(Lost { saved, again }) = to {
            if !saved.unknown.is_empty() {
                return Err(ReviveError::Unknown(saved.unknown.clone()));
            }
            let stride = self.stride().ok_or_else(|| ReviveError::Unknown("its doorbells are not known".into()))?;
            let mut rig = Rig::new(device, saved, stride)?;
            rig.enable(configuration & !u64::from(SHUTDOWN) | u64::from(CC_ENABLE))?;
            rig.advance(saved)?;
            if self.masked != 0 {
                rig.device.write(register(INTMS), Width::B4, u64::from(self.masked));
            }
            rig.tell_again(saved, again)?;
        }
        // With what is only said, and done at once: a shutdown, or a configuration without enabling.
        if to.is_none() || configuration & u64::from(SHUTDOWN) != 0 {
            device.write(register(CC), Width::B4, configuration);
        }
        if to.is_none() && self.masked != 0 {
            device.write(register(INTMS), Width::B4, u64::from(self.masked));
        }
        Ok(())
    }
}

impl<'d> Rig<'d> {
    fn new(device: &'d mut dyn Reviving, saved: &SavedQueues, stride: u64) -> Result<Self, ReviveError> {
        let mut used = Vec::new();
        let mut lend = |device: &mut dyn Reviving, base: u64, bytes: u64| {
            let len = bytes.next_multiple_of(PAGE);
            used.push(base..base.saturating_add(len));
            device.lend_memory(Iova(base), len)
        };
        let (mut submissions, mut completions) = (BTreeMap::new(), BTreeMap::new());
        for queue in &saved.submissions {
            let entries = u64::from(queue.entries);
            let memory = lend(device, queue.base, entries * SUBMISSION_BYTES)?;
            submissions.insert(queue.id, Submission { memory, entries, completions: queue.completions, submitted: 0 });
        }
        for queue in &saved.completions {
            let entries = u64::from(queue.entries);
            let memory = lend(device, queue.base, entries * COMPLETION_BYTES)?;
            completions.insert(queue.id, Completions { memory, entries, taken: 0, most: u64::MAX, told: 0 });
        }
        // A page that is no queue's; low, for devices that reach no higher.
        let free = |page: &u64| !used.iter().any(|range| range.start < page + PAGE && *page < range.end);
        let page = (1..=used.len() as u64 * 4096 + 1).map(|page| page * PAGE).find(free);
        let page = page.ok_or_else(|| ReviveError::Unknown("its queues fill the memory".into()))?;
        let data = device.lend_memory(Iova(page), PAGE)?;
        Ok(Self { device, stride, submissions, completions, page: Iova(page), data })
    }

    fn enable(&mut self, configuration: u64) -> Result<(), ReviveError> {
        let register = |offset| BarAddress { bar: 0, offset };
        self.device.write(register(CC), Width::B4, configuration);
        let began = Instant::now();
        loop {
            let status = self.device.read(register(CSTS), Width::B4);
            match status {
                _ if status == Width::B4.all_ones() => return Err(ReviveError::Device("it is gone".into())),
                _ if status & 0b10 != 0 => return Err(ReviveError::Device("it fails when it is enabled".into())),
                _ if status & 1 != 0 => return Ok(()),
                _ if began.elapsed() > LIMIT => return Err(ReviveError::Device(format!("it is not ready, CSTS is {status:#x}"))),
                _ => self.device.work()?,
            }
        }
    }

    /// All of it: features, queues, and where both sides are in them.
    fn advance(&mut self, saved: &SavedQueues) -> Result<(), ReviveError> {
        let has_io = saved.submissions.iter().any(|queue| queue.id != 0);
        let mut setup: Vec<Command> = saved.features.clone();
        setup.extend(saved.completions.iter().filter(|queue| queue.id != 0).map(create_completions));
        setup.extend(saved.submissions.iter().filter(|queue| queue.id != 0).map(create_submission));
        if has_io {
            setup.push(command(opcode::IDENTIFY, 0, self.page, [2, 0, 0]));
        }
        let events = saved.events.len() as u64;
        // One more behind the requests for events: its completion says that they were fetched, which they do not say themselves.
        let silent = events + u64::from(events > 0);
        let admin = self.positions(saved, 0, setup.len() as u64 + silent, events)?;
        for entry in &setup {
            self.run(0, entry, 1)?;
        }
        if has_io {
            self.advance_io(saved)?;
        }
        let ([(_, total)] | [(_, total), ..]) = admin[..] else { return Ok(()) };
        let mut left = total - setup.len() as u64 - events;
        let nothing = command(opcode::GET_FEATURES, 0, Iova(0), [7, 0, 0]);
        if events > 0 {
            if self.room(0)? <= events {
                return Err(ReviveError::Unknown("more requests for events wait than the admin queue can take".into()));
            }
            for entry in &saved.events {
                self.put(0, entry)?;
            }
            self.run(0, &nothing, 1)?;
            left -= 1;
        }
        self.run(0, &nothing, left)
    }

    fn advance_io(&mut self, saved: &SavedQueues) -> Result<(), ReviveError> {
        let mut first = [0; 4];
        self.data.read(0, &mut first).map_err(|error| ReviveError::Device(error.to_string()))?;
        let nothing = match u32::from_le_bytes(first) {
            // Nothing to read from.
            0 => command(FLUSH, ALL_NAMESPACES, Iova(0), [0; 3]),
            namespace => command(READ, namespace, self.page, [0; 3]),
        };
        for queue in saved.completions.iter().filter(|queue| queue.id != 0) {
            for (id, count) in self.positions(saved, queue.id, 0, 0)? {
                self.run(id, &nothing, count)?;
            }
        }
        Ok(())
    }

    /// How many commands to put into each submission queue of completion queue `id`, so that all are where they should be; `silent` of the first one's
    /// are not completed. Also says how many of the entries the driver will have taken.
    fn positions(&mut self, saved: &SavedQueues, id: u16, least: u64, silent: u64) -> Result<Vec<(u16, u64)>, ReviveError> {
        let not_there = || ReviveError::Unknown("a queue completes to one that there is not".into());
        let target = saved.completions.iter().find(|queue| queue.id == id).ok_or_else(not_there)?;
        let queues: Vec<&SavedSubmission> = saved.submissions.iter().filter(|queue| queue.completions == id).collect();
        let (unread, twice) = (u64::from(target.unread()), 2 * u64::from(target.entries));
        let wanted = u64::from(target.tail) + if target.tail_phase { 0 } else { u64::from(target.entries) };
        let mut counts: Vec<(u16, u64)> = queues.iter().map(|queue| (queue.id, u64::from(queue.head))).collect();
        let others: u64 = counts.iter().skip(1).map(|(_, count)| count).sum();
        let cannot = || ReviveError::Unknown(format!("where its queues are cannot be reached again (completion queue {id})"));
        let completed = match (queues.first(), counts.first_mut()) {
            (Some(first), Some((_, count))) => {
                let step = u64::from(first.entries);
                let fits = |count: &u64| {
                    *count >= least && (*count - silent + others) % twice == wanted && *count - silent + others >= unread
                };
                let mut places =
                    (0..).map(|round| u64::from(first.head) + round * step).take_while(|count| *count <= MOST_COMMANDS);
                *count = places.find(fits).ok_or_else(cannot)?;
                *count - silent + others
            }
            // Its submission queues were deleted, and it is where they left it.
            _ if wanted == 0 => 0,
            _ => return Err(cannot()),
        };
        if let Some(completions) = self.completions.get_mut(&id) {
            completions.most = completed - unread;
        }
        Ok(counts)
    }

    /// Carries `entry` out `count` times.
    fn run(&mut self, queue: u16, entry: &Command, count: u64) -> Result<(), ReviveError> {
        let mut left = count;
        while left > 0 {
            let room = self.room(queue)?;
            let now = left.min(BATCH).min(room);
            let mut told = Vec::new();
            for _ in 0..now {
                told.push(self.put(queue, entry)?);
            }
            self.ring(queue)?;
            while !told.is_empty() {
                let name = self.take(queue)?;
                match told.iter().position(|known| *known == name) {
                    Some(at) => told.swap_remove(at),
                    // An event that the driver asked for, say: its entry would be missing in the driver's queue.
                    None => return Err(ReviveError::Unknown("it completes what it was not told while it is brought back".into())),
                };
            }
            left -= now;
        }
        Ok(())
    }

    fn room(&self, queue: u16) -> Result<u64, ReviveError> {
        let room = self.submissions.get(&queue).and_then(|submission| {
            let completions = self.completions.get(&submission.completions)?;
            let unread = completions.taken - completions.told;
            Some((submission.entries - 1).min((completions.entries - 1).saturating_sub(unread)))
        });
        room.filter(|room| *room > 0).ok_or_else(|| ReviveError::Unknown("a queue has no room".into()))
    }

    /// The command's name comes back.
    fn put(&mut self, queue: u16, entry: &Command) -> Result<u16, ReviveError> {
        let submitted = self.submission(queue)?.submitted;
        let mut entry = *entry;
        // Requests for events keep the name that their driver knows; all others are ours, and over before the next one of their name.
        if entry[0] != opcode::EVENT_REQUEST || queue != 0 {
            let [low, high] = (submitted as u16).to_le_bytes();
            (entry[2], entry[3]) = (low, high);
        }
        self.put_as_it_is(queue, &entry)?;
        Ok(u16::from_le_bytes([entry[2], entry[3]]))
    }

    /// Puts a command under the name that it has.
    pub(super) fn put_as_it_is(&mut self, queue: u16, entry: &Command) -> Result<(), ReviveError> {
        let submission = self.submissions.get_mut(&queue).ok_or_else(no_queue)?;
        let slot = submission.submitted % submission.entries;
        submission.submitted += 1;
        submission.memory.write(slot * SUBMISSION_BYTES, entry).map_err(|error| ReviveError::Device(error.to_string()))
    }

    pub(super) fn submission(&self, queue: u16) -> Result<&Submission, ReviveError> {
        self.submissions.get(&queue).ok_or_else(no_queue)
    }

    /// Writes to our memory of a queue.
    pub(super) fn write_slots(&self, queue: u16, at: u64, bytes: &[u8]) -> Result<(), ReviveError> {
        self.submission(queue)?.memory.write(at, bytes).map_err(|error| ReviveError::Device(error.to_string()))
    }

    /// Reads our memory of a queue.
    pub(super) fn read_slots(&self, queue: u16, at: u64, into: &mut [u8]) -> Result<(), ReviveError> {
        self.submission(queue)?.memory.read(at, into).map_err(|error| ReviveError::Device(error.to_string()))
    }

    pub(super) fn ring(&mut self, queue: u16) -> Result<(), ReviveError> {
        let submission = self.submission(queue)?;
        let at = BarAddress { bar: 0, offset: DOORBELLS + 2 * u64::from(queue) * self.stride };
        self.device.write(at, Width::B4, submission.submitted % submission.entries);
        Ok(())
    }

    /// Waits for the next completion of `queue`'s commands, and says that it was taken where the driver had taken it. Whose it is comes back.
    fn take(&mut self, queue: u16) -> Result<u16, ReviveError> {
        let id = self.submissions.get(&queue).map_or(queue, |submission| submission.completions);
        let began = Instant::now();
        let mut bytes = [0; COMPLETION_BYTES as usize];
        loop {
            let completions = self.completions.get(&id).ok_or_else(no_queue)?;
            let (slot, round) = (completions.taken % completions.entries, completions.taken / completions.entries);
            let read = completions.memory.read(slot * COMPLETION_BYTES, &mut bytes);
            read.map_err(|error| ReviveError::Device(error.to_string()))?;
            if bytes[14] & 1 == u8::from(round.is_multiple_of(2)) {
                break;
            }
            if began.elapsed() > LIMIT {
                return Err(ReviveError::Device(format!("a command of queue {queue} does not end")));
            }
            self.device.work()?;
        }
        let status = u16::from_le_bytes([bytes[14], bytes[15]]) >> 1;
        if status != 0 {
            return Err(ReviveError::Device(format!("a command of queue {queue} ends with status {status:#x}")));
        }
        let (at, stride) = (2 * u64::from(id) + 1, self.stride);
        if let Some(completions) = self.completions.get_mut(&id) {
            completions.taken += 1;
            let told = completions.taken.min(completions.most);
            if told > completions.told {
                completions.told = told;
                let head = told % completions.entries;
                self.device.write(BarAddress { bar: 0, offset: DOORBELLS + at * stride }, Width::B4, head);
            }
        }
        Ok(u16::from_le_bytes([bytes[12], bytes[13]]))
    }
}

pub(super) fn no_queue() -> ReviveError {
    ReviveError::Unknown("a queue is missing".into())
}

fn command(opcode: u8, namespace: u32, data: Iova, dwords: [u32; 3]) -> Command {
    let mut entry = [0; SUBMISSION_BYTES as usize];
    entry[0] = opcode;
    entry[4..8].copy_from_slice(&namespace.to_le_bytes());
    entry[24..32].copy_from_slice(&data.0.to_le_bytes());
    for (at, dword) in dwords.iter().enumerate() {
        if let Some(place) = entry.get_mut(40 + at * 4..44 + at * 4) {
            place.copy_from_slice(&dword.to_le_bytes());
        }
    }
    entry
}

fn create_completions(queue: &SavedCompletions) -> Command {
    let identity = u32::from(queue.id) | (queue.entries - 1) << 16;
    // Contiguous; bit 1 enables the interrupt.
    let how = 1 | u32::from(queue.vector.is_some()) << 1 | u32::from(queue.vector.unwrap_or(0)) << 16;
    command(opcode::CREATE_COMPLETION, 0, Iova(queue.base), [identity, how, 0])
}

fn create_submission(queue: &SavedSubmission) -> Command {
    let identity = u32::from(queue.id) | (queue.entries - 1) << 16;
    command(opcode::CREATE_SUBMISSION, 0, Iova(queue.base), [identity, 1 | u32::from(queue.completions) << 16, 0])
}
