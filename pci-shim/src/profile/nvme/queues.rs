//! The queues of a controller as its driver made them and as far as each side is in them: from doorbells, and from admin commands seen in guest memory.
//!
//! A doorbell of 3 for queue 0 shows entry 2, a Create I/O Completion Queue 1 of 64 entries at 0x1_0450_0000 with vector 1; when the driver has taken its
//! completion with success, queue 1 is known, and a later doorbell of 17 for it says that the driver is at 17, in its first round.

use std::collections::{BTreeMap, VecDeque};

use farbus_remote_dma::Iova;

use super::AdminQueues;
use super::ledger::Ledger;
use super::saved::{SavedCompletions, SavedQueues, SavedSubmission, posted};
use crate::profile::Peek;

/// Bytes of a submission queue entry and of a completion queue entry (NVM Express 1.4, sections 4.2 and 4.6).
pub(super) const SUBMISSION_BYTES: u64 = 64;
pub(super) const COMPLETION_BYTES: u64 = 16;

/// Admin opcodes (NVM Express 1.4, figure 139).
pub(super) mod opcode {
    pub(in super::super) const DELETE_SUBMISSION: u8 = 0x00;
    pub(in super::super) const CREATE_SUBMISSION: u8 = 0x01;
    pub(in super::super) const DELETE_COMPLETION: u8 = 0x04;
    pub(in super::super) const CREATE_COMPLETION: u8 = 0x05;
    pub(in super::super) const IDENTIFY: u8 = 0x06;
    pub(in super::super) const SET_FEATURES: u8 = 0x09;
    pub(in super::super) const GET_FEATURES: u8 = 0x0a;
    pub(in super::super) const EVENT_REQUEST: u8 = 0x0c;
}

/// Admin commands that a driver may have outstanding before what is known of its queues is given up: the longest queue there is.
const MOST_PENDING: usize = 4096;

/// A submission queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Submission {
    pub(super) base: u64,
    pub(super) entries: u32,
    /// The completion queue that its completions go to.
    pub(super) completions: u16,
    /// Where the driver is.
    pub(super) tail: u32,
}

/// A completion queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completions {
    pub(super) base: u64,
    pub(super) entries: u32,
    /// `None`: nobody is told of its completions.
    pub(super) vector: Option<u16>,
    /// Where the driver is.
    pub(super) head: u32,
    /// The phase of the next entry that the driver waits for.
    pub(super) phase: bool,
    /// Whether the driver has been round once: then every entry was written.
    pub(super) round: bool,
    /// Commands that were rung for and whose completions the driver has not taken; `None` after a submission queue of it was deleted.
    pub(super) outstanding: Option<u32>,
}

/// A feature's number, the namespace, and which of several values it is.
pub(super) type FeatureKey = (u8, u32, u32);

/// What a Set Features is about (NVM Express 1.4, section 5.21.1): thresholds are told apart by sensor and direction, interrupts by their vector.
pub(super) fn feature_key(command: &[u8; SUBMISSION_BYTES as usize]) -> FeatureKey {
    const TEMPERATURE: u8 = 0x04;
    const VECTOR: u8 = 0x09;
    let dword = |at: usize| {
        let bytes = command.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    };
    let which = match command[40] {
        TEMPERATURE => dword(44) & 0x003f_0000,
        VECTOR => dword(44) & 0xffff,
        _ => 0,
    };
    (command[40], dword(4), which)
}

/// An admin command that has no completion yet that we know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    pub(super) slot: u32,
    pub(super) entry: [u8; SUBMISSION_BYTES as usize],
}

impl Pending {
    pub(super) fn opcode(&self) -> u8 {
        self.entry[0]
    }

    fn identifier(&self) -> u16 {
        u16::from_le_bytes([self.entry[2], self.entry[3]])
    }
}

/// A completion queue entry, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) queue_head: u16,
    pub(super) queue: u16,
    pub(super) identifier: u16,
    pub(super) phase: bool,
    pub(super) success: bool,
}

impl Entry {
    pub(super) fn read(base: u64, index: u32, guest: &dyn Peek) -> Option<Self> {
        let mut bytes = [0; COMPLETION_BYTES as usize];
        let at = base.checked_add(u64::from(index) * COMPLETION_BYTES)?;
        guest.peek(Iova(at), &mut bytes).then(|| {
            let [.., a, b, c, d, e, f, g, h] = bytes;
            let status = u16::from_le_bytes([g, h]);
            Self {
                queue_head: u16::from_le_bytes([a, b]),
                queue: u16::from_le_bytes([c, d]),
                identifier: u16::from_le_bytes([e, f]),
                phase: status & 1 != 0,
                success: status >> 1 == 0,
            }
        })
    }
}

/// What is known of the queues of an enabled controller.
#[derive(Clone, Debug, Default)]
pub(super) struct Queues {
    submission: Vec<Option<Submission>>,
    completions: Vec<Option<Completions>>,
    /// The last Set Features of each feature, and of each thing that it is about, that took no data, in the order of their numbers.
    pub(super) features: BTreeMap<FeatureKey, [u8; SUBMISSION_BYTES as usize]>,
    /// In the order of their submission.
    pub(super) pending: VecDeque<Pending>,
    /// The I/O commands that are outstanding; `None` where nobody will ask for them.
    pub(super) ledger: Option<Ledger>,
    /// Why what is known is not all; `None` where it is.
    pub(super) unknown: Option<&'static str>,
}

impl Queues {
    /// Of a controller that is enabled with these; `last` is the highest number that a queue can have.
    pub(super) fn new(admin: &AdminQueues, last: u16) -> Self {
        let places = usize::from(last) + 1;
        let mut queues = Self { submission: vec![None; places], completions: vec![None; places], ..Self::default() };
        let (submission, completions) = (admin.submission.0, admin.completion.0);
        queues.put_submission(
            0,
            Submission { base: submission, entries: u32::from(admin.submission_entries), completions: 0, tail: 0 },
        );
        queues.put_completions(0, completions, u32::from(admin.completion_entries), Some(0));
        queues
    }

    /// Keeps I/O commands from now on. Queues that there are already had some that were not kept.
    pub(super) fn remember(&mut self) {
        let mut ledger = Ledger::new(self.submission.len());
        if self.submissions().any(|(id, _)| id != 0) {
            ledger.unseen = Some("commands were submitted before they were kept");
        }
        self.ledger = Some(ledger);
    }

    /// As [`Queues::remember`], of queues that were restored and have not gone on: what waits in them will be found.
    pub(super) fn remember_restored(&mut self, saved: &SavedQueues) {
        let mut ledger = Ledger::new(self.submission.len());
        saved.submissions.iter().for_each(|queue| ledger.created(queue.id, queue.entries));
        self.ledger = Some(ledger);
    }

    /// All submission queues with their numbers.
    pub(super) fn submissions(&self) -> impl Iterator<Item = (u16, &Submission)> {
        (0..).zip(&self.submission).filter_map(|(id, queue)| Some((id, queue.as_ref()?)))
    }

    /// All completion queues with their numbers.
    pub(super) fn all_completions(&self) -> impl Iterator<Item = (u16, &Completions)> {
        (0..).zip(&self.completions).filter_map(|(id, queue)| Some((id, queue.as_ref()?)))
    }

    fn put_submission(&mut self, id: u16, queue: Submission) {
        match self.submission.get_mut(usize::from(id)) {
            Some(place) => *place = Some(queue),
            None => self.unknown = Some("a queue has a number that the device's interrupts do not suggest"),
        }
    }

    fn put_completions(&mut self, id: u16, base: u64, entries: u32, vector: Option<u16>) {
        match self.completions.get_mut(usize::from(id)) {
            Some(place) => {
                *place = Some(Completions { base, entries, vector, head: 0, phase: true, round: false, outstanding: Some(0) })
            }
            None => self.unknown = Some("a queue has a number that the device's interrupts do not suggest"),
        }
    }

    /// As it was saved.
    pub(super) fn restore_submission(&mut self, saved: &SavedSubmission) {
        let SavedSubmission { base, entries, completions, tail, .. } = *saved;
        self.put_submission(saved.id, Submission { base, entries, completions, tail });
    }

    /// As it was saved: where the driver was. What the device had posted beyond is found again.
    pub(super) fn restore_completions(&mut self, saved: &SavedCompletions) {
        self.put_completions(saved.id, saved.base, saved.entries, saved.vector);
        if let Some(Some(queue)) = self.completions.get_mut(usize::from(saved.id)) {
            (queue.head, queue.phase, queue.round, queue.outstanding) =
                (saved.head, saved.head_phase, saved.round, saved.outstanding);
        }
    }

    /// The admin commands from `head` to the driver's tail wait in guest memory.
    pub(super) fn restore_pending(&mut self, head: u32, guest: &dyn Peek) {
        if let Some(Some(Submission { base, entries, tail, .. })) = self.submission.first().copied() {
            self.admin_submitted(base, entries, head, tail, guest);
        }
    }

    /// Takes in what the admin queue says that the driver has not taken, and says which completion queues there are then: they are created and deleted by it.
    pub(super) fn learn(&mut self, guest: &dyn Peek) -> Result<Vec<(u16, Completions)>, &'static str> {
        if let Some(Some(admin)) = self.completions.first().copied() {
            posted(&admin, guest, |entry| self.completed(entry))?;
        }
        Ok(self.all_completions().map(|(id, queue)| (id, *queue)).collect())
    }

    /// Completions of commands of before lie in queues that were restored.
    pub(super) fn restore_unread(&mut self, guest: &dyn Peek) {
        let Some(ledger) = &mut self.ledger else { return };
        for (id, queue) in (0_u16..).zip(&self.completions) {
            if let Some(queue) = queue.as_ref().filter(|_| id != 0)
                && let Err(why) = posted(queue, guest, |entry| ledger.expect(&entry))
            {
                ledger.unseen = Some(why);
            }
        }
    }

    /// The I/O commands from `head` to the driver's tail of a queue that was restored wait in guest memory.
    pub(super) fn restore_outstanding(&mut self, queue: u16, head: u32, guest: &dyn Peek) {
        if let Some(Some(Submission { base, entries, tail, .. })) = self.submission.get(usize::from(queue)).copied()
            && let Some(ledger) = &mut self.ledger
        {
            ledger.submitted(queue, base, entries, (head, tail), guest);
        }
    }

    /// The driver's tail of a submission queue is `tail`.
    #[inline]
    pub(super) fn submitted(&mut self, queue: u16, tail: u32, guest: &dyn Peek) {
        let Some(Some(submission)) = self.submission.get_mut(usize::from(queue)) else { return };
        if tail >= submission.entries {
            // The device ignores it, too.
            return;
        }
        let before = std::mem::replace(&mut submission.tail, tail);
        let (base, entries) = (submission.base, submission.entries);
        let rung = (tail + entries - before) % entries;
        if let Some(Some(completions)) = self.completions.get_mut(usize::from(submission.completions)) {
            completions.outstanding = completions.outstanding.and_then(|outstanding| outstanding.checked_add(rung));
        }
        if queue == 0 {
            self.admin_submitted(base, entries, before, tail, guest);
        } else if let Some(ledger) = &mut self.ledger {
            ledger.submitted(queue, base, entries, (before, tail), guest);
        }
    }

    /// The driver's head of a completion queue is `head`.
    #[inline]
    pub(super) fn taken(&mut self, queue: u16, head: u32, guest: &dyn Peek) {
        let Some(Some(completions)) = self.completions.get_mut(usize::from(queue)) else { return };
        if head >= completions.entries {
            return;
        }
        let before = *completions;
        if head < before.head {
            (completions.phase, completions.round) = (!before.phase, true);
        }
        completions.head = head;
        let taken = (head + before.entries - before.head) % before.entries;
        completions.outstanding = before.outstanding.and_then(|outstanding| outstanding.checked_sub(taken));
        if queue != 0 && self.ledger.is_none() {
            return;
        }
        let mut at = before.head;
        while at != head {
            match (Entry::read(before.base, at, guest), &mut self.ledger) {
                (Some(entry), _) if queue == 0 => self.completed(entry),
                (Some(entry), Some(ledger)) => ledger.completed(&entry),
                (None, Some(ledger)) if queue != 0 => ledger.unseen = Some(NOT_SEEN),
                (None, _) => self.unknown = Some(NOT_SEEN),
                (Some(_), None) => {}
            }
            at = (at + 1) % before.entries;
        }
    }

    fn admin_submitted(&mut self, base: u64, entries: u32, before: u32, tail: u32, guest: &dyn Peek) {
        let mut slot = before;
        while slot != tail {
            let mut entry = [0; SUBMISSION_BYTES as usize];
            let at = base.checked_add(u64::from(slot) * SUBMISSION_BYTES);
            if !at.is_some_and(|at| guest.peek(Iova(at), &mut entry)) {
                self.unknown = Some(NOT_SEEN);
            } else if self.pending.len() < MOST_PENDING {
                self.pending.push_back(Pending { slot, entry });
            } else {
                self.unknown = Some("more admin commands are outstanding than a queue holds");
            }
            slot = (slot + 1) % entries;
        }
    }

    /// The completion of an admin command was posted.
    pub(super) fn completed(&mut self, entry: Entry) {
        let Some(at) = self.pending.iter().position(|pending| pending.identifier() == entry.identifier) else {
            self.unknown = Some("an admin command was completed that was not seen");
            return;
        };
        if let Some(Pending { entry: command, .. }) = self.pending.remove(at)
            && entry.success
        {
            self.done(&command);
        }
    }

    /// An admin command succeeded.
    fn done(&mut self, command: &[u8; SUBMISSION_BYTES as usize]) {
        let dword = |index: usize| {
            let bytes = command.get(index * 4..index * 4 + 4).and_then(|bytes| bytes.try_into().ok());
            u32::from_le_bytes(bytes.unwrap_or_default())
        };
        let prp1 = u64::from(dword(6)) | u64::from(dword(7)) << 32;
        let (queue, entries) = (dword(10) as u16, (dword(10) >> 16) + 1);
        match command[0] {
            opcode::CREATE_COMPLETION => {
                let vector = (dword(11) >> 16) as u16;
                self.put_completions(queue, prp1, entries, (dword(11) & 2 != 0).then_some(vector));
                self.must_be_contiguous(dword(11));
            }
            opcode::CREATE_SUBMISSION => {
                let completions = (dword(11) >> 16) as u16;
                self.put_submission(queue, Submission { base: prp1, entries, completions, tail: 0 });
                if let Some(ledger) = &mut self.ledger {
                    ledger.created(queue, entries);
                }
                self.must_be_contiguous(dword(11));
            }
            opcode::DELETE_COMPLETION => {
                if let Some(place) = self.completions.get_mut(usize::from(queue)) {
                    *place = None;
                }
            }
            opcode::DELETE_SUBMISSION => {
                let deleted = self.submission.get_mut(usize::from(queue)).and_then(Option::take);
                if let Some(ledger) = &mut self.ledger {
                    ledger.deleted(queue);
                }
                let completions = deleted.and_then(|deleted| self.completions.get_mut(usize::from(deleted.completions))?.as_mut());
                if let Some(completions) = completions {
                    // Its commands may have ended without a completion.
                    completions.outstanding = None;
                }
            }
            // What took its value from memory cannot be said again; the driver's own notion of it is all that there is.
            opcode::SET_FEATURES if prp1 == 0 => {
                self.features.insert(feature_key(command), *command);
            }
            _ => {}
        }
    }

    fn must_be_contiguous(&mut self, dword11: u32) {
        if dword11 & 1 == 0 {
            self.unknown = Some("a queue is not contiguous");
        }
    }
}

/// Guest memory lies where only the guest's side can look.
pub(super) const NOT_SEEN: &str = "the driver's admin commands lie in memory that cannot be looked at from here";
