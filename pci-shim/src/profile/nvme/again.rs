//! Commands that a lost controller had not answered, told to the one in its place: from slots of ours, about the guest's data, with answers in the guest's queues.
//!
//! Three of queue 1's last twenty commands are outstanding: they are put into the last three slots before the driver's tail, in memory of ours at the guest's
//! addresses, because the guest may have filled its own slots anew; the doorbell rings; and when three completions lie in the guest's queue, its memory takes ours's place.

use std::time::Instant;

use farbus_remote_dma::Iova;

use super::ledger::Command;
use super::queues::{Entry, SUBMISSION_BYTES};
use super::revive::{LIMIT, PAGE, Rig, no_queue};
use super::saved::SavedQueues;
use crate::profile::ReviveError;

/// What lies behind a queue in its last page: the guest's, and not ours to hide.
struct Beside {
    queue: u16,
    at: u64,
    bytes: Vec<u8>,
}

impl Rig<'_> {
    /// Tells the controller again what is outstanding, and waits for all answers.
    pub(super) fn tell_again(&mut self, saved: &SavedQueues, again: &[(u16, Vec<Command>)]) -> Result<(), ReviveError> {
        if again.is_empty() {
            return Ok(());
        }
        let mut beside = Vec::new();
        let mut keep = Vec::new();
        for (id, commands) in again {
            let base = saved.submissions.iter().find(|queue| queue.id == *id).map(|queue| queue.base);
            let base = base.ok_or_else(no_queue)?;
            keep.push(Iova(base));
            beside.extend(self.show_what_lies_beside(*id, base)?);
            for command in commands {
                self.put_as_it_is(*id, command)?;
            }
        }
        self.device.give_guest_memory(&keep)?;
        // What is about queues comes last: one that is being deleted still takes what was put into it.
        for administers in [false, true] {
            for (id, _) in again.iter().filter(|(id, _)| (*id == 0) == administers) {
                self.ring(*id)?;
            }
            for queue in saved.completions.iter().filter(|queue| (queue.id == 0) == administers) {
                let own =
                    |id: u16| saved.submissions.iter().any(|submission| submission.id == id && submission.completions == queue.id);
                let told = again.iter().filter(|(id, _)| own(*id)).flat_map(|(id, commands)| commands.iter().map(|it| (*id, it)));
                let told = told.map(|(id, command)| (id, u16::from_le_bytes([command[2], command[3]]))).collect();
                self.await_answers((queue.base, queue.entries), (queue.tail, queue.tail_phase), told)?;
            }
        }
        for Beside { queue, at, bytes } in beside {
            let mut now = vec![0; bytes.len()];
            self.read_slots(queue, at, &mut now)?;
            if now != bytes {
                // It would have to be given to the guest behind its back, and the answer is already there.
                return Err(ReviveError::Unknown("a command's data lies in the page of a queue".into()));
            }
        }
        Ok(())
    }

    /// The device may be told of data there.
    fn show_what_lies_beside(&mut self, queue: u16, base: u64) -> Result<Option<Beside>, ReviveError> {
        let submission = self.submission(queue)?;
        let at = submission.entries * SUBMISSION_BYTES;
        let len = at.next_multiple_of(PAGE) - at;
        let mut bytes = vec![0; len as usize];
        if len == 0 || !self.device.guest().peek(Iova(base.saturating_add(at)), &mut bytes) {
            return Ok(None);
        }
        self.write_slots(queue, at, &bytes)?;
        Ok(Some(Beside { queue, at, bytes }))
    }

    /// Waits until the answers to all that was `told`, by queue and name, lie in the guest's completion queue; events that it asked for may lie between them.
    fn await_answers(
        &mut self,
        (base, entries): (u64, u32),
        from: (u32, bool),
        mut told: Vec<(u16, u16)>,
    ) -> Result<(), ReviveError> {
        let (mut slot, mut phase) = from;
        let mut began = Instant::now();
        while !told.is_empty() {
            let entry = Entry::read(base, slot, self.device.guest());
            let entry = entry.ok_or_else(|| ReviveError::Unknown("a completion queue cannot be looked at from here".into()))?;
            if entry.phase == phase {
                told.retain(|known| *known != (entry.queue, entry.identifier));
                began = Instant::now();
                slot += 1;
                if slot == entries {
                    (slot, phase) = (0, !phase);
                }
                continue;
            }
            if began.elapsed() > LIMIT {
                return Err(ReviveError::Device(format!("{} commands that it was told again do not end", told.len())));
            }
            self.device.work()?;
        }
        Ok(())
    }
}
