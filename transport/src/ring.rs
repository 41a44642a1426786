//! A ring of cache lines between one producer and one consumer, in memory that two processes share.
//!
//! Pushing 17 bytes as message 1,000 fills one 64-byte line, its stamp last; the consumer polls that stamp and nothing else, so a message costs
//! one cache-line transfer. Neither side trusts the other: a wild length, kind or index is a [`RingError`], never an access outside the ring.
//!
//! Sleeping needs an order between two words of different owners. The consumer says "armed", then looks at the ring once more; the producer
//! stamps, then looks at "armed". One of them must see the other. Either both place a full fence between their two steps
//! ([`Fencing::Both`]), or the sleeper alone makes every running thread fence ([`Fencing::Sleeper`], membarrier(2)) and the producer pays nothing.

use crate::fabric::MAX_MESSAGE;
use crate::sync::{Arc, AtomicU32, AtomicU64, Ordering, fence};

/// Bytes of a line, and of a slot.
pub const LINE_BYTES: usize = 64;
const WORDS: usize = MAX_MESSAGE / 8;

/// One slot: a stamp that says which push filled it, what it is, and 56 bytes.
#[repr(C, align(64))]
pub struct Line {
    stamp: AtomicU32,
    /// Bits 0 to 7 length, bits 8 to 15 kind.
    meta: AtomicU32,
    words: [AtomicU64; WORDS],
}

/// The shared part of a ring: where its lines are.
pub trait Lines: Send {
    /// Slots; a power of two, the same at every call.
    fn capacity(&self) -> u32;
    /// The slot of push number `position`.
    fn line(&self, position: u32) -> &Line;
    /// Pushes the consumer has taken, published now and then.
    fn consumed(&self) -> &AtomicU64;
    /// 1 while the consumer sleeps or is about to.
    fn armed(&self) -> &AtomicU64;
}

/// Who pays for the order between "stamped" and "armed".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fencing {
    /// Both sides fence; works everywhere.
    Both,
    /// The sleeper fences for both by membarrier(2); both processes must have registered.
    Sleeper,
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The producer's kind.
    pub kind: u8,
    /// Bytes used.
    pub len: u8,
    /// The bytes; zero past `len` words.
    pub bytes: [u8; MAX_MESSAGE],
}

/// The peer wrote what no ring of ours writes.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum RingError {
    /// A length over [`MAX_MESSAGE`].
    #[error("a slot claims {0} bytes")]
    Length(u8),
    /// The consumer claims to have taken what was never pushed.
    #[error("the consumer claims {consumed} of {produced} slots")]
    Consumed {
        /// What it claims.
        consumed: u64,
        /// What was pushed.
        produced: u64,
    },
}

/// The pushing end.
pub struct Producer<L> {
    lines: L,
    produced: u64,
    consumed: u64,
    fencing: Fencing,
}

/// The taking end.
pub struct Consumer<L> {
    lines: L,
    taken: u64,
    published: u64,
    fencing: Fencing,
}

impl<L: Lines> Producer<L> {
    /// The pushing end of a ring that is all zero.
    pub fn new(lines: L, fencing: Fencing) -> Self {
        Self { lines, produced: 0, consumed: 0, fencing }
    }

    /// Whether a push would fit.
    ///
    /// # Errors
    /// [`RingError::Consumed`] where the consumer's index cannot be true.
    #[inline]
    pub fn has_room(&mut self) -> Result<bool, RingError> {
        let capacity = u64::from(self.lines.capacity());
        if self.produced - self.consumed < capacity {
            return Ok(true);
        }
        self.look_for_room(capacity)
    }

    #[cold]
    fn look_for_room(&mut self, capacity: u64) -> Result<bool, RingError> {
        let consumed = self.lines.consumed().load(Ordering::Acquire);
        if consumed < self.consumed || consumed > self.produced {
            return Err(RingError::Consumed { consumed, produced: self.produced });
        }
        self.consumed = consumed;
        Ok(self.produced - self.consumed < capacity)
    }

    /// What the consumer says it has taken, unchecked: it moves as long as somebody takes, a quarter of the ring at a time.
    pub fn consumer_progress(&self) -> u64 {
        self.lines.consumed().load(Ordering::Relaxed)
    }

    /// Pushes `bytes` (at most [`MAX_MESSAGE`]; more are cut off, which callers check before); false where there is no room.
    ///
    /// # Errors
    /// As [`Producer::has_room`].
    #[inline]
    pub fn push(&mut self, kind: u8, bytes: &[u8]) -> Result<bool, RingError> {
        if !self.has_room()? {
            return Ok(false);
        }
        let line = self.lines.line(self.produced as u32);
        let (chunks, rest) = bytes.as_chunks::<8>();
        for (word, chunk) in line.words.iter().zip(chunks) {
            word.store(u64::from_le_bytes(*chunk), Ordering::Relaxed);
        }
        if let Some(word) = line.words.get(chunks.len()).filter(|_| !rest.is_empty()) {
            word.store(rest.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)), Ordering::Relaxed);
        }
        line.meta.store(bytes.len().min(MAX_MESSAGE) as u32 | u32::from(kind) << 8, Ordering::Relaxed);
        self.produced += 1;
        // Release: whoever sees the stamp sees the words, and every plain copy that this thread made before.
        line.stamp.store(self.produced as u32, Ordering::Release);
        Ok(true)
    }

    /// Whether the consumer must be woken for what was pushed. True at most once per sleep.
    #[inline]
    pub fn must_wake(&mut self) -> bool {
        match self.fencing {
            Fencing::Both => fence(Ordering::SeqCst),
            // The sleeper's membarrier(2) orders what this thread executes; that the compiler keeps stamp and look in this order is our part.
            Fencing::Sleeper => std::sync::atomic::compiler_fence(Ordering::SeqCst),
        }
        let armed = self.lines.armed();
        armed.load(Ordering::Relaxed) == 1 && armed.swap(0, Ordering::AcqRel) == 1
    }
}

impl<L: Lines> Consumer<L> {
    /// The taking end of a ring that is all zero.
    pub fn new(lines: L, fencing: Fencing) -> Self {
        Self { lines, taken: 0, published: 0, fencing }
    }

    /// Whether something can be taken.
    #[inline]
    pub fn is_ready(&self) -> bool {
        let line = self.lines.line(self.taken as u32);
        line.stamp.load(Ordering::Acquire) == (self.taken as u32).wrapping_add(1)
    }

    /// Takes the next slot.
    ///
    /// # Errors
    /// [`RingError::Length`]; the slot is gone.
    #[inline]
    pub fn take(&mut self) -> Result<Option<Taken>, RingError> {
        if !self.is_ready() {
            return Ok(None);
        }
        let line = self.lines.line(self.taken as u32);
        let meta = line.meta.load(Ordering::Relaxed);
        let (len, kind) = (meta as u8, (meta >> 8) as u8);
        let mut bytes = [0; MAX_MESSAGE];
        for (into, word) in bytes.chunks_exact_mut(8).zip(&line.words).take(usize::from(len).div_ceil(8)) {
            into.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        self.taken += 1;
        // Published in quarters: the producer always has three quarters to go on with, and its line is rarely disturbed.
        if self.taken - self.published >= u64::from(self.lines.capacity() / 4).max(1) {
            self.publish();
        }
        if usize::from(len) > MAX_MESSAGE {
            return Err(RingError::Length(len));
        }
        Ok(Some(Taken { kind, len, bytes }))
    }

    /// Prepares to sleep: true where the producer will say [`Producer::must_wake`] at its next push; false where something is there already.
    /// `barrier` makes every running thread of both processes fence; called for [`Fencing::Sleeper`] only.
    pub fn arm(&mut self, barrier: impl FnOnce()) -> bool {
        self.publish();
        // An exchange, so that it comes after a producer's late exchange also in the eyes of the model checker, which does not know that
        // nothing fits between an exchange and the store it read.
        self.lines.armed().swap(1, Ordering::Relaxed);
        match self.fencing {
            Fencing::Both => fence(Ordering::SeqCst),
            Fencing::Sleeper => barrier(),
        }
        let asleep = !self.is_ready();
        if !asleep {
            self.disarm();
        }
        asleep
    }

    /// Awake again.
    pub fn disarm(&mut self) {
        self.lines.armed().store(0, Ordering::Relaxed);
    }

    /// The shared part, for tests that play a peer who lies.
    #[cfg(test)]
    pub(crate) fn lines(&self) -> &L {
        &self.lines
    }

    fn publish(&mut self) {
        self.published = self.taken;
        self.lines.consumed().store(self.taken, Ordering::Release);
    }
}

/// A ring's shared part on the heap: for two threads of one process, and for the model checker.
pub struct HeapLines {
    shared: Arc<Shared>,
}

struct Shared {
    lines: Vec<Line>,
    consumed: Padded,
    armed: Padded,
}

/// A word on a pair of cache lines of its own.
#[repr(align(128))]
struct Padded(AtomicU64);

impl Clone for HeapLines {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl HeapLines {
    /// `capacity` empty slots; rounded up to a power of two.
    pub fn new(capacity: u32) -> Self {
        let line = || Line { stamp: AtomicU32::new(0), meta: AtomicU32::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) };
        let lines = (0..capacity.max(1).next_power_of_two()).map(|_| line()).collect();
        let word = || Padded(AtomicU64::new(0));
        Self { shared: Arc::new(Shared { lines, consumed: word(), armed: word() }) }
    }
}

impl Lines for HeapLines {
    fn capacity(&self) -> u32 {
        self.shared.lines.len() as u32
    }

    #[inline]
    fn line(&self, position: u32) -> &Line {
        let slot = position as usize & (self.shared.lines.len() - 1);
        // A power of two of lines, and the index masked by one less: never out of bounds.
        &self.shared.lines[slot]
    }

    fn consumed(&self) -> &AtomicU64 {
        &self.shared.consumed.0
    }

    fn armed(&self) -> &AtomicU64 {
        &self.shared.armed.0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn ring(capacity: u32) -> (Producer<HeapLines>, Consumer<HeapLines>) {
        let lines = HeapLines::new(capacity);
        (Producer::new(lines.clone(), Fencing::Both), Consumer::new(lines, Fencing::Both))
    }

    #[test]
    fn every_length_arrives_as_sent_through_many_laps() {
        let (mut producer, mut consumer) = ring(8);
        for round in 0..1000_usize {
            let bytes: Vec<u8> = (0..round % (MAX_MESSAGE + 1)).map(|i| (i * 7 + round) as u8).collect();
            assert!(producer.push(round as u8, &bytes).unwrap());
            let taken = consumer.take().unwrap().unwrap();
            assert_eq!((taken.kind, &taken.bytes[..usize::from(taken.len)]), (round as u8, &bytes[..]));
        }
        assert_eq!(consumer.take(), Ok(None));
    }

    #[test]
    fn a_full_ring_refuses_and_loses_nothing() {
        let (mut producer, mut consumer) = ring(8);
        let pushed = (0..100_u8).take_while(|n| producer.push(0, &[*n]).unwrap()).count();
        assert_eq!(pushed, 8);
        for n in 0..8 {
            assert_eq!(consumer.take().unwrap().unwrap().bytes[0], n);
        }
        assert!(producer.push(0, b"again").unwrap());
    }

    #[test]
    fn a_peer_that_lies_about_lengths_or_indexes_is_found_out() {
        let (mut producer, mut consumer) = ring(4);
        producer.push(0, b"x").unwrap();
        producer.lines.line(0).meta.store(57, Ordering::Relaxed);
        assert_eq!(consumer.take(), Err(RingError::Length(57)));
        while producer.push(0, b"x") == Ok(true) {}
        for lie in [u64::MAX, 0, 99] {
            consumer.lines.consumed().store(lie, Ordering::Relaxed);
            assert!(matches!(producer.push(0, b"x"), Ok(false) | Err(RingError::Consumed { .. })), "{lie}");
        }
    }

    #[test]
    fn a_sleeper_is_woken_once_and_a_late_push_keeps_it_awake() {
        let (mut producer, mut consumer) = ring(4);
        assert!(!producer.must_wake());
        assert!(consumer.arm(|| ()));
        producer.push(0, b"x").unwrap();
        assert!(producer.must_wake());
        assert!(!producer.must_wake());
        assert!(!consumer.arm(|| ()), "something is there");
        assert!(!producer.must_wake());
    }
}
