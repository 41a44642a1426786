//! The I/O commands that a driver rang for and whose completions it has not taken: copies, so that the controller in a lost one's place can be told them again.
//!
//! A doorbell of 17 for queue 3 shows the read in slot 16: its 64 bytes are copied before the device hears of it, because the driver may fill the slot anew as
//! soon as the device has consumed it. When the driver's completion head passes the read's completion, the copy goes.

use std::collections::VecDeque;

use farbus_remote_dma::Iova;

use super::queues::{Entry, NOT_SEEN, SUBMISSION_BYTES};
use crate::profile::Peek;

/// A submission queue entry.
pub(super) type Command = [u8; SUBMISSION_BYTES as usize];

/// Commands for which room is made when a queue is created: more than drivers submit to one. Beyond that it grows.
const ROOM: usize = 1024;

/// Commands that are kept at most, of all queues: 1 MiB, and a bound for the time that a guest can make us look for one.
const MOST: usize = 16 << 10;

/// What is outstanding in each I/O submission queue, in the order of submission.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    /// By the number of the queue; the admin queue's commands are kept elsewhere.
    queues: Vec<VecDeque<Command>>,
    /// How many in all.
    count: usize,
    /// Why this is not all; `None` where it is.
    pub(super) unseen: Option<&'static str>,
}

impl Ledger {
    /// Of a controller with queues of numbers below `places`.
    pub(super) fn new(places: usize) -> Self {
        Self { queues: vec![VecDeque::new(); places], count: 0, unseen: None }
    }

    /// A queue was created. One of a number that is not expected is not kept, and known not to be by whoever asks for what is known of it.
    pub(super) fn created(&mut self, queue: u16, entries: u32) {
        if let Some(place) = self.queues.get_mut(usize::from(queue)) {
            self.count -= place.len();
            *place = VecDeque::with_capacity((entries as usize).min(ROOM));
        }
    }

    /// A queue was deleted, and its commands with it.
    pub(super) fn deleted(&mut self, queue: u16) {
        if let Some(place) = self.queues.get_mut(usize::from(queue)) {
            self.count -= place.len();
            *place = VecDeque::new();
        }
    }

    /// The driver rang for the slots from `before` to `tail` of a queue of `entries`.
    #[inline]
    pub(super) fn submitted(&mut self, queue: u16, base: u64, entries: u32, (before, tail): (u32, u32), guest: &dyn Peek) {
        let Some(commands) = self.queues.get_mut(usize::from(queue)) else { return };
        let mut slot = before;
        while slot != tail && self.unseen.is_none() {
            let mut entry = [0; SUBMISSION_BYTES as usize];
            let at = base.checked_add(u64::from(slot) * SUBMISSION_BYTES);
            if !at.is_some_and(|at| guest.peek(Iova(at), &mut entry)) {
                self.unseen = Some(NOT_SEEN);
            } else if self.count >= MOST {
                self.unseen = Some("more commands are outstanding than are kept");
            } else if commands.len() + 1 >= entries as usize {
                // A driver that goes by tags never does that, and what one does that does not could not be put into the queue again.
                self.unseen = Some("more commands are outstanding than their queue holds");
            } else {
                commands.push_back(entry);
                self.count += 1;
            }
            slot = (slot + 1) % entries;
        }
    }

    /// The completion of a command: taken by the driver, or posted and not taken.
    #[inline]
    pub(super) fn completed(&mut self, entry: &Entry) {
        let Some(commands) = self.queues.get_mut(usize::from(entry.queue)) else { return };
        let name = entry.identifier.to_le_bytes();
        match commands.iter().position(|command| command[2..4] == name) {
            Some(at) => {
                commands.remove(at);
                self.count -= 1;
            }
            None => self.unseen = Some("a command was completed that was not seen"),
        }
    }

    /// The completion of a command that was never kept lies in its queue, and will be taken.
    pub(super) fn expect(&mut self, entry: &Entry) {
        if let Some(commands) = self.queues.get_mut(usize::from(entry.queue)) {
            let mut command = [0; SUBMISSION_BYTES as usize];
            command[2..4].copy_from_slice(&entry.identifier.to_le_bytes());
            commands.push_back(command);
            self.count += 1;
        }
    }

    /// What is outstanding in a queue, the oldest first.
    pub(super) fn of(&self, queue: u16) -> Vec<Command> {
        self.queues.get(usize::from(queue)).map(|commands| commands.iter().copied().collect()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entry n of any queue is named n.
    struct Slots;

    impl Peek for Slots {
        fn peek(&self, iova: Iova, into: &mut [u8]) -> bool {
            let Some(names) = into.get_mut(2..4) else { return false };
            names.copy_from_slice(&((iova.0 / SUBMISSION_BYTES) as u16).to_le_bytes());
            true
        }
    }

    struct Nothing;

    impl Peek for Nothing {
        fn peek(&self, _iova: Iova, _into: &mut [u8]) -> bool {
            false
        }
    }

    fn names(ledger: &Ledger) -> Vec<u16> {
        ledger.of(1).iter().map(|command| u16::from_le_bytes([command[2], command[3]])).collect()
    }

    fn done(identifier: u16) -> Entry {
        Entry { queue_head: 0, queue: 1, identifier, phase: true, success: true }
    }

    #[test]
    fn what_was_rung_for_is_outstanding_until_it_is_completed_in_whatever_order() {
        let mut ledger = Ledger::new(2);
        ledger.created(1, 8);
        ledger.submitted(1, 0, 8, (6, 1), &Slots);
        assert_eq!(names(&ledger), [6, 7, 0]);
        ledger.completed(&done(7));
        ledger.submitted(1, 0, 8, (1, 2), &Slots);
        assert_eq!((names(&ledger), ledger.unseen), (vec![6, 0, 1], None));
        ledger.deleted(1);
        assert!(names(&ledger).is_empty());
    }

    #[test]
    fn what_cannot_be_told_again_is_known_not_to_be() {
        let made = || {
            let mut ledger = Ledger::new(2);
            ledger.created(1, 4);
            ledger
        };
        let (mut unseen, mut strange, mut flooded) = (made(), made(), made());
        unseen.submitted(1, 0, 4, (0, 1), &Nothing);
        assert_eq!(unseen.unseen, Some(NOT_SEEN));
        strange.completed(&done(3));
        assert!(strange.unseen.is_some());
        flooded.submitted(1, 0, 4, (0, 3), &Slots);
        assert_eq!(flooded.unseen, None);
        flooded.submitted(1, 0, 4, (3, 0), &Slots);
        assert!(flooded.unseen.is_some() && flooded.of(1).len() == 3, "a driver could make us keep any number of commands");
    }
}
