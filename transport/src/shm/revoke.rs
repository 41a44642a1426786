//! Revocation: how an owner makes sure that a peer which mapped its memory does not touch it any more.
//!
//! Grant 0x3_6b00_0007 is slot 7 in its third life. The peer checks, for every operation, that slot 7 is still in that life; the owner ends
//! the life, then waits until the peer is outside of any operation. Which of the two is first is decided as for the rings' sleep: the owner
//! lets every running thread fence (membarrier(2)), so that an operation costs its maker two plain stores and a load.
//!
//! An operation, a read, a write or a polled store, is made by the one thread that owns the peer's end, so one word says whether it is in
//! one. Mapped memory may be used by any thread and for as long as a disk takes, so each grant has a count of its mappings in use
//! (`hold.rs`), and the owner waits for that grant's alone. An end that closes while mappings are in use says no goodbye: its socket is shut
//! when the last of them is dropped. What is not waited for are marks in a dirty log that was granted: they touch no guest memory.
//!
//! The wait is bounded: 5 s for both together, then `deregister` says that the memory may still be in use, and the link is closed.
//!
//! It binds a peer that keeps to the protocol. A hostile process that was given a descriptor can touch the memory for ever: shared memory
//! trusts the user it is shared with, which is why a link is refused to any other user.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::lines::SharedLines;
use crate::barrier;
use crate::fabric::RevokeError;
use crate::hold::{Hold, Lifeline};
use crate::memory::{Memory, MemoryError};
use crate::ring::Fencing;
use crate::sync::{AtomicU64, Ordering, fence};
use crate::table::MAX_REGIONS;

/// Where the counts of mappings in use begin, behind the lives, so that a worker's count is in no line that an operation looks at.
const HOLDS_AT: u64 = MAX_REGIONS as u64 * 4;
/// Bytes of the lives of one side's grants, and of the peer's mappings of them.
pub(super) const LIVES_BYTES: u64 = 2 * HOLDS_AT;
/// In every key, so that zero and small numbers are none.
const KEY_TAG: u32 = 0x6b00_0000;
/// How long a peer may be inside one operation, or keep a mapping in use, before it counts as stuck: 1 GiB takes a quarter of a second.
const OPERATION_LIMIT: Duration = Duration::from_secs(5);

/// A slot and its life, as the key of a grant carries them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    index: u32,
    life: u32,
}

impl Slot {
    pub(super) fn key(self) -> u64 {
        u64::from(self.life) << 32 | u64::from(KEY_TAG | self.index)
    }

    /// From a peer's grant; `None` where no such slot can exist.
    pub(super) fn from_key(key: u64) -> Option<Self> {
        let slot = Self { index: key as u32 ^ KEY_TAG, life: (key >> 32) as u32 };
        (slot.index < MAX_REGIONS).then_some(slot)
    }
}

/// The lives of the grants that one side made, and how many mappings of each the other side uses.
struct Lives {
    memory: Arc<Memory>,
    base: u64,
}

impl Lives {
    fn word(&self, index: u32) -> Result<&crate::sync::AtomicU32, MemoryError> {
        self.memory.atomic_u32(self.base + u64::from(index) * 4)
    }

    fn holds_at(&self, index: u32) -> u64 {
        self.base + HOLDS_AT + u64::from(index) * 4
    }

    fn is_held(&self, slot: &Slot) -> bool {
        self.memory.atomic_u32(self.holds_at(slot.index)).is_ok_and(|holds| holds.load(Ordering::Acquire) != 0)
    }
}

/// Both sides' lives, as one side uses them.
pub(super) struct Revocations {
    own: Lives,
    peers: Lives,
    /// Slots of our own that are free.
    free: Vec<u32>,
    unused: u32,
    /// Says when we are inside the peer's memory.
    own_busy: SharedLines,
    /// Says when the peer is inside ours.
    peer_busy: SharedLines,
    fencing: Fencing,
}

/// Within an operation on the peer's memory.
pub(super) struct Inside<'a>(&'a AtomicU64);

impl Drop for Inside<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

impl Revocations {
    pub(super) fn new(
        memory: &Arc<Memory>,
        (own, peers): (u64, u64),
        (own_busy, peer_busy): (SharedLines, SharedLines),
        fencing: Fencing,
    ) -> Result<Self, MemoryError> {
        for base in [own, peers] {
            memory.at(base, LIVES_BYTES)?;
        }
        let lives = |base| Lives { memory: Arc::clone(memory), base };
        Ok(Self { own: lives(own), peers: lives(peers), free: Vec::new(), unused: 0, own_busy, peer_busy, fencing })
    }

    /// A slot for a new grant of ours; `None` where all are taken.
    pub(super) fn begin(&mut self) -> Option<Slot> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.unused < MAX_REGIONS => {
                self.unused += 1;
                self.unused - 1
            }
            None => return None,
        };
        let life = self.own.word(index).ok()?.load(Ordering::Relaxed);
        Some(Slot { index, life })
    }

    /// Ends grants of ours; when it returns, the peer is outside of every operation that could have used them, and uses no mapping of them.
    ///
    /// # Errors
    /// [`RevokeError`] where the peer does not come out: then the link is of no use any more.
    pub(super) fn end(&mut self, slots: &[Slot], peer_is_there: impl Fn() -> bool) -> Result<(), RevokeError> {
        if slots.is_empty() {
            return Ok(());
        }
        for slot in slots {
            let Ok(word) = self.own.word(slot.index) else { continue };
            // A peer that scribbles here revokes its own grants, or uses memory it has anyway.
            word.store(slot.life.wrapping_add(1), Ordering::SeqCst);
            if slot.life < u32::MAX - 1 {
                self.free.push(slot.index);
            }
        }
        match self.fencing {
            Fencing::Both => fence(Ordering::SeqCst),
            Fencing::Sleeper if barrier::global() => {}
            Fencing::Sleeper => return Err(RevokeError::Host),
        }
        let deadline = Instant::now() + OPERATION_LIMIT;
        let mut rounds = 0_u32;
        while self.peer_busy.busy().load(Ordering::Acquire) == 1 || slots.iter().any(|slot| self.own.is_held(slot)) {
            if Instant::now() > deadline {
                return Err(RevokeError::InUse { limit_ms: OPERATION_LIMIT.as_millis() as u64 });
            }
            if !peer_is_there() {
                return Ok(());
            }
            // An operation is over soon; a mapping may be in use for as long as a disk takes.
            rounds = rounds.saturating_add(1);
            if rounds > 1000 {
                std::thread::sleep(Duration::from_micros(50));
            } else {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }

    /// Begins the use of a mapping of the peer's grant `slot`; `None` where that grant has ended.
    pub(super) fn hold(&self, slot: Slot, lifeline: &Arc<Lifeline>) -> Option<Hold> {
        let hold = Hold::shared(&self.peers.memory, self.peers.holds_at(slot.index), lifeline)?;
        // As in `enter`, with a fence of our own, because nobody counts its nanoseconds.
        fence(Ordering::SeqCst);
        self.stands(slot).then_some(hold)
    }

    #[inline(always)]
    fn stands(&self, slot: Slot) -> bool {
        self.peers.word(slot.index).is_ok_and(|word| word.load(Ordering::Acquire) == slot.life)
    }

    /// Begins an operation on memory of the peer's grant `slot`, which lasts until the result is dropped; `None` where that grant has ended.
    #[inline(always)]
    pub(super) fn enter(&self, slot: Slot) -> Option<Inside<'_>> {
        let inside = Inside(self.own_busy.busy());
        inside.0.store(1, Ordering::Relaxed);
        // The order "busy, then looked at the life" against the owner's "life ended, then looked at busy": one of the two sees the other.
        // Without it an operation could begin after the owner was told that none will. The owner's half is in `end`.
        match self.fencing {
            Fencing::Both => fence(Ordering::SeqCst),
            Fencing::Sleeper => std::sync::atomic::compiler_fence(Ordering::SeqCst),
        }
        self.stands(slot).then_some(inside)
    }
}
