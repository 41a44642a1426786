//! The commands that were fetched and are not done: a slab made at the start, so that no command ever allocates.
//!
//! Command 7 of queue 3 gets slot 0, waits there for the DMA of its PRP list, moves 12 KiB, and gives the slot back once its completion is
//! posted and no DMA names the slot any more.

use farbus_transport::Nanos;

use super::command::{Command, Status};
use super::media::Job;
use super::prp::Cursor;
use super::scratch::Buffer;

/// Slots: more would need more than 2 queues of the greatest depth to be under way at once.
pub(super) const SLOTS: u32 = 4096;
/// Slots that only admin commands may take, so that queues can always be deleted.
pub(super) const ADMIN_RESERVE: u32 = 64;

/// Where a command is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not in use.
    #[default]
    Free,
    /// To be judged and begun; comes back here when a buffer was missing.
    Start,
    /// Data goes between the guest and local memory, then `then`.
    Move,
    /// Waits for the DMA of a PRP list; then goes on as told.
    List { mapping: bool },
    /// The guest's pages are being mapped for a job.
    Map,
    /// All DMA is started; waits for what must be awaited, then `then`.
    Settle,
    /// A job on the controller's buffer (or on no memory) is to be started.
    Submit,
    /// The media works.
    Media,
    /// Waits for the modelled latency.
    Timer,
    /// Waits for room in its completion queue.
    Full,
    /// An asynchronous event request.
    Event,
    /// Waits for the queue that it deletes.
    Delete { queue: u16 },
    /// Completed; a DMA still reads its buffer.
    Drain,
}

/// What follows when data was moved or the media is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Then {
    /// The completion.
    #[default]
    Complete,
    /// The job.
    Submit,
    /// From the buffer to the guest.
    Deliver,
    /// The next of the ranges in the buffer.
    Ranges,
}

/// What a slot's data transfer has at the controller's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Local {
    /// The image, from the command's first byte.
    #[default]
    Image,
    /// The slot's buffer.
    Buffer,
}

/// One command.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) phase: Phase,
    pub(super) then: Then,
    pub(super) local: Local,
    pub(super) to_guest: bool,
    pub(super) direct: bool,
    pub(super) queue: u16,
    pub(super) status: Status,
    pub(super) result: u32,
    pub(super) outstanding: u32,
    pub(super) command: Command,
    pub(super) cursor: Cursor,
    /// First byte of the media.
    pub(super) offset: u64,
    /// Bytes to move.
    pub(super) len: u32,
    /// Bytes whose DMA is started.
    pub(super) moved: u32,
    /// Dataset ranges done.
    pub(super) ranges_done: u32,
    pub(super) list: Option<Buffer>,
    pub(super) buffer: Option<Buffer>,
    pub(super) job: Option<Box<Job>>,
    pub(super) due: Nanos,
    /// Its number in the journal, where it is a write.
    pub(super) journaled: Option<u64>,
    pub(super) next: Option<u32>,
}

impl Slot {
    const fn empty() -> Self {
        Self {
            phase: Phase::Free,
            then: Then::Complete,
            local: Local::Image,
            to_guest: false,
            direct: false,
            queue: 0,
            status: Status::SUCCESS,
            result: 0,
            outstanding: 0,
            command: Command {
                opcode: 0,
                flags: 0,
                identifier: 0,
                namespace: 0,
                prp1: 0,
                prp2: 0,
                dword10: 0,
                dword11: 0,
                dword12: 0,
                dword13: 0,
                dword14: 0,
                dword15: 0,
            },
            cursor: Cursor::new(0, 0, 0, 4096),
            offset: 0,
            len: 0,
            moved: 0,
            ranges_done: 0,
            list: None,
            buffer: None,
            job: None,
            due: Nanos(0),
            journaled: None,
            next: None,
        }
    }
}

/// The slab.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Slots {
    pub(super) fn new() -> Self {
        Self { slots: (0..SLOTS).map(|_| Slot::empty()).collect(), free: (0..SLOTS).rev().collect() }
    }

    pub(super) const fn available(&self) -> u32 {
        self.free.len() as u32
    }

    /// A slot for `command`, in [`Phase::Start`].
    #[inline]
    pub(super) fn take(&mut self, queue: u16, command: Command) -> Option<u32> {
        let index = self.free.pop()?;
        let slot = self.slots.get_mut(index as usize)?;
        slot.phase = Phase::Start;
        slot.then = Then::Complete;
        slot.local = Local::Image;
        slot.to_guest = false;
        slot.direct = false;
        slot.queue = queue;
        slot.status = Status::SUCCESS;
        slot.result = 0;
        slot.command = command;
        slot.len = 0;
        slot.moved = 0;
        slot.ranges_done = 0;
        slot.due = Nanos(0);
        slot.journaled = None;
        slot.next = None;
        Some(index)
    }

    #[inline]
    pub(super) fn get(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: u32) -> Option<&mut Slot> {
        self.slots.get_mut(index as usize)
    }

    #[inline]
    pub(super) fn put_back(&mut self, index: u32) {
        if let Some(slot) = self.slots.get_mut(index as usize) {
            debug_assert!(slot.phase != Phase::Free && slot.outstanding == 0 && slot.job.is_none());
            slot.phase = Phase::Free;
            self.free.push(index);
        }
    }

    /// The slots in use.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Slot)> {
        (0..).zip(&self.slots).filter(|(_, slot)| slot.phase != Phase::Free)
    }
}
