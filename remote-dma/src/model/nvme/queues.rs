//! Submission and completion queues as the controller sees them: where they lie, how far each side is (NVMe 1.4, section 4.1).
//!
//! Submission queue 3 with 1,024 entries, head 9 and tail 17 has 8 new commands; a doorbell of 1,024 for it is refused, because slots
//! end at 1,023.

use crate::address::Iova;

/// Why a doorbell value is refused (figure 147: invalid doorbell write value).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InvalidDoorbell;

/// A submission queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct SubmissionQueue {
    pub(super) base: Iova,
    /// Entries; 0 where the queue does not exist.
    pub(super) entries: u32,
    /// First slot not consumed.
    pub(super) head: u32,
    /// First slot not written, as of the last doorbell.
    pub(super) tail: u32,
    /// Slots whose DMA is under way, from `head`.
    pub(super) fetching: u32,
    /// Commands consumed and neither completed nor dropped.
    pub(super) active: u32,
    /// Where its completions go.
    pub(super) completions: u16,
    /// The slot of the command that deletes this queue; new commands are not consumed any more.
    pub(super) deleter: Option<u32>,
}

impl SubmissionQueue {
    /// No queue.
    pub(super) const ABSENT: Self = Self::new(Iova(0), 0, 0);

    pub(super) const fn new(base: Iova, entries: u32, completions: u16) -> Self {
        Self {
            base,
            entries,
            head: 0,
            tail: 0,
            fetching: 0,
            active: 0,
            completions,
            deleter: None,
        }
    }

    pub(super) const fn exists(&self) -> bool {
        self.entries != 0
    }

    /// Commands written and not consumed.
    pub(super) const fn pending(&self) -> u32 {
        if self.tail >= self.head {
            self.tail - self.head
        } else {
            self.tail + self.entries - self.head
        }
    }

    /// Commands that can be fetched with one DMA.
    pub(super) const fn contiguous(&self) -> u32 {
        if self.tail >= self.head {
            self.tail - self.head
        } else {
            self.entries - self.head
        }
    }

    pub(super) const fn ring(&mut self, tail: u32) -> Result<(), InvalidDoorbell> {
        if tail >= self.entries {
            return Err(InvalidDoorbell);
        }
        let added = if tail >= self.tail {
            tail - self.tail
        } else {
            tail + self.entries - self.tail
        };
        // One slot always stays empty (section 4.1.2).
        if added > self.entries - 1 - self.pending() {
            return Err(InvalidDoorbell);
        }
        self.tail = tail;
        Ok(())
    }

    pub(super) const fn consume(&mut self, count: u32) {
        self.head = (self.head + count) % self.entries;
    }

    /// Address of the slot at the head. Creation checked that the queue does not wrap around the address space.
    pub(super) const fn head_address(&self) -> Iova {
        Iova(self.base.0.wrapping_add(self.head as u64 * super::command::SQE_BYTES as u64))
    }
}

/// A completion queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct CompletionQueue {
    pub(super) base: Iova,
    /// Entries; 0 where the queue does not exist.
    pub(super) entries: u32,
    /// First slot that the driver has not taken.
    pub(super) head: u32,
    /// Next slot to write.
    pub(super) tail: u32,
    /// The phase of the next entry.
    pub(super) phase: bool,
    /// The vector, where interrupts are enabled.
    pub(super) vector: Option<u16>,
    /// Submission queues that complete here.
    pub(super) users: u32,
    /// Commands that wait for room, first and last slot of a chain through `Slot::next`.
    pub(super) waiting: Option<(u32, u32)>,
}

impl CompletionQueue {
    /// No queue.
    pub(super) const ABSENT: Self = Self::new(Iova(0), 0, None);

    pub(super) const fn new(base: Iova, entries: u32, vector: Option<u16>) -> Self {
        Self {
            base,
            entries,
            head: 0,
            tail: 0,
            phase: true,
            vector,
            users: 0,
            waiting: None,
        }
    }

    pub(super) const fn exists(&self) -> bool {
        self.entries != 0
    }

    /// Entries posted and not taken.
    pub(super) const fn unread(&self) -> u32 {
        if self.tail >= self.head {
            self.tail - self.head
        } else {
            self.tail + self.entries - self.head
        }
    }

    pub(super) const fn full(&self) -> bool {
        self.unread() == self.entries - 1
    }

    pub(super) const fn ring(&mut self, head: u32) -> Result<(), InvalidDoorbell> {
        if head >= self.entries {
            return Err(InvalidDoorbell);
        }
        let taken = if head >= self.head {
            head - self.head
        } else {
            head + self.entries - self.head
        };
        if taken > self.unread() {
            return Err(InvalidDoorbell);
        }
        self.head = head;
        Ok(())
    }

    /// The address and phase of the next entry, and steps over it.
    pub(super) const fn push(&mut self) -> (Iova, bool) {
        let place = Iova(self.base.0.wrapping_add(self.tail as u64 * super::command::CQE_BYTES as u64));
        let phase = self.phase;
        self.tail += 1;
        if self.tail == self.entries {
            self.tail = 0;
            self.phase = !self.phase;
        }
        (place, phase)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_doorbell_leaves_a_queue_that_can_be_counted(entries in 2_u32..64, rings in proptest::collection::vec((any::<u8>(), any::<bool>()), 1..200)) {
            let mut queue = SubmissionQueue::new(Iova(0), entries, 0);
            let mut completions = CompletionQueue::new(Iova(0), entries, None);
            let (mut written, mut taken) = (0_u64, 0_u64);
            for (value, consume) in rings {
                let before = queue.pending();
                if queue.ring(u32::from(value)).is_err() { prop_assert_eq!(queue.pending(), before); }
                prop_assert!(queue.pending() < entries && queue.tail < entries && queue.contiguous() <= queue.pending());
                if consume && queue.pending() > 0 { queue.consume(1); prop_assert!(queue.head < entries); }
                if !completions.full() {
                    let (at, phase) = completions.push();
                    prop_assert_eq!(at.0, written % u64::from(entries) * 16);
                    prop_assert_eq!(phase, (written / u64::from(entries)).is_multiple_of(2));
                    written += 1;
                }
                let old = completions.head;
                if completions.ring(u32::from(value)).is_ok() { taken += u64::from((completions.head + entries - old) % entries); }
                prop_assert_eq!(u64::from(completions.unread()), written - taken);
            }
        }
    }
}
