//! What a controller was like when it was lost in the middle of its work, and which commands the one in its place must be told again.
//!
//! The driver rang for 20 commands of queue 1, took 15 completions, and 2 more lie behind in the queue: the controller is put where it has completed 17 of 20, and
//! the copies of the other three are its next. Whether the lost one had carried one of them out cannot be known, so only commands are told again that leave the same
//! behind when they are carried out twice before anybody hears of the first time.

use farbus_remote_dma::Iova;

use super::Nvme;
use super::ledger::Command;
use super::queues::{Entry, Queues, SUBMISSION_BYTES, Submission, opcode};
use super::saved::{SavedCompletions, SavedQueues, SavedSubmission, posted};
use crate::profile::{Peek, RecoveryRule};

/// A controller that is not there any more.
#[derive(Clone, Debug, Default)]
pub(super) struct Lost {
    /// Where it was, had it never consumed what is outstanding.
    pub(super) saved: SavedQueues,
    /// What is outstanding in each queue, the oldest first.
    pub(super) again: Vec<(u16, Vec<Command>)>,
}

impl Lost {
    /// From what is known, and from the entries in guest memory, which nobody writes any more.
    ///
    /// # Errors
    /// Why it cannot be told.
    pub(super) fn of(known: &Queues, guest: &dyn Peek, broken: Option<RecoveryRule>) -> Result<Self, &'static str> {
        let mut known = known.clone();
        let mut saved = SavedQueues::default();
        for (id, queue) in known.learn(guest)? {
            let end = posted(&queue, guest, |entry| {
                if id != 0
                    && broken != Some(RecoveryRule::TellOnce)
                    && let Some(ledger) = &mut known.ledger
                {
                    ledger.completed(&entry);
                }
            })?;
            saved.completions.push(SavedCompletions::of(id, &queue, end));
        }
        let ledger = known.ledger.as_ref().ok_or("its commands were not kept")?;
        if let Some(why) = known.unknown.or(ledger.unseen) {
            return Err(why);
        }
        let (events, admin): (Vec<Command>, Vec<Command>) =
            known.pending.iter().map(|pending| pending.entry).partition(|entry| entry[0] == opcode::EVENT_REQUEST);
        let mut again = Vec::new();
        for (id, queue) in known.submissions() {
            let mut commands = if id == 0 { admin.clone() } else { ledger.of(id) };
            if id != 0 {
                match broken {
                    Some(RecoveryRule::TellAgain) => commands.clear(),
                    Some(RecoveryRule::TellTheCopy) => in_the_slots(&mut commands, queue, guest),
                    _ => {}
                }
            }
            if !commands.iter().all(|command| may_be_told_again(id, command)) {
                return Err("a command is outstanding that must not be carried out twice");
            }
            let count = commands.len() as u32;
            if count >= queue.entries {
                return Err("more commands are outstanding than their queue holds");
            }
            let head = (queue.tail + queue.entries - count) % queue.entries;
            let (base, entries, completions, tail) = (queue.base, queue.entries, queue.completions, queue.tail);
            saved.submissions.push(SavedSubmission { id, base, entries, completions, head, tail });
            if count > 0 {
                again.push((id, commands));
            }
        }
        for queue in &saved.completions {
            let own = saved.submissions.iter().filter(|submission| submission.completions == queue.id);
            let told = |id: u16| again.iter().find(|(queue, _)| *queue == id).map_or(0, |(_, commands)| commands.len() as u32);
            if own.map(|submission| told(submission.id)).sum::<u32>() + queue.unread() >= queue.entries {
                return Err("a completion queue has no room for what is outstanding");
            }
        }
        saved.features = known.features.values().copied().collect();
        saved.events = events;
        Ok(Self { saved, again })
    }
}

impl Nvme {
    /// Vectors of the completion queues in which something lies that the driver has not taken.
    pub(super) fn unheard(&self, guest: &dyn Peek) -> Vec<u16> {
        let lies = |base, head, phase| Entry::read(base, head, guest).is_some_and(|entry| entry.phase == phase);
        let queues = self.queues.all_completions().filter(|(_, queue)| lies(queue.base, queue.head, queue.phase));
        queues.filter_map(|(_, queue)| queue.vector).collect()
    }
}

/// What lies in the guest's slots, where it may have put other commands by now: for a test that must fail.
fn in_the_slots(commands: &mut [Command], queue: &Submission, guest: &dyn Peek) {
    let count = commands.len() as u32;
    for (back, command) in (1..=count).rev().zip(commands) {
        let slot = (queue.tail + queue.entries - back) % queue.entries;
        guest.peek(Iova(queue.base + u64::from(slot) * SUBMISSION_BYTES), command);
    }
}

/// Whether carrying a command out a second time, before its driver has heard of the first, leaves what once would (NVM Express 1.4, figures 139 and 346). It is
/// asked to be carried out between its submission and its completion, and for this one that lasts until now.
fn may_be_told_again(queue: u16, command: &Command) -> bool {
    /// Get Log Page, Abort, Keep Alive; the others have names.
    const ADMIN: [u8; 10] = [
        opcode::DELETE_SUBMISSION,
        opcode::CREATE_SUBMISSION,
        0x02,
        opcode::DELETE_COMPLETION,
        opcode::CREATE_COMPLETION,
        opcode::IDENTIFY,
        0x08,
        opcode::SET_FEATURES,
        opcode::GET_FEATURES,
        0x18,
    ];
    /// Flush, Write, Read, Write Uncorrectable, Compare, Write Zeroes, Dataset Management, Verify.
    const IO: [u8; 8] = [0x00, 0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0c];
    /// Half of a fused operation is none.
    const FUSED: u8 = 0b11;
    match queue {
        0 => ADMIN.contains(&command[0]),
        _ => IO.contains(&command[0]) && command[1] & FUSED == 0,
    }
}
