//! Which writes a device began and which it acknowledged, numbered, so that who goes back in time can be told what the device did meanwhile.
//!
//! A machine is deposited at write 1,200 and its host dies at write 1,317: `since` says "117 writes, 115 of them acknowledged: blocks 8 to 15, …", all
//! of which the device may hold in a state newer than the machine's memory. The last 65,536 are kept one by one; older ones are only counted.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Writes that are kept one by one.
pub const KEPT: usize = 1 << 16;

/// A moment in a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Which journal: a device that is opened anew begins another.
    pub life: u64,
    /// Writes begun before.
    pub begun: u64,
    /// Writes acknowledged before.
    pub acknowledged: u64,
}

/// A stretch of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockRange {
    /// First logical block.
    pub first: u64,
    /// Blocks.
    pub blocks: u64,
}

/// What a device did since a mark.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Since {
    /// Writes that it acknowledged: their blocks are other than the machine of the mark knows.
    pub acknowledged: u64,
    /// Writes that it began and never acknowledged: their blocks are as before, as after, or partly so.
    pub unacknowledged: u64,
    /// Where the acknowledged ones went, sorted and joined.
    pub ranges: Vec<BlockRange>,
    /// Where the others went.
    pub torn: Vec<BlockRange>,
    /// Writes begun so long ago that only their number is known: where there are any, every block may have been written.
    pub unlisted: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Write {
    first: u64,
    blocks: u32,
    acknowledged: bool,
}

/// The journal of one device, for as long as it is open.
#[derive(Debug)]
pub struct Journal {
    life: u64,
    begun: u64,
    acknowledged: u64,
    /// Write number n is at n modulo [`KEPT`]; made whole at the start, so that no write allocates.
    writes: Box<[Write]>,
}

impl Default for Journal {
    fn default() -> Self {
        Self::new()
    }
}

impl Journal {
    /// An empty one.
    pub fn new() -> Self {
        let life = RandomState::new().build_hasher().finish();
        Self { life, begun: 0, acknowledged: 0, writes: vec![Write::default(); KEPT].into() }
    }

    /// A write begins; its number.
    #[inline]
    pub fn begin(&mut self, first: u64, blocks: u32) -> u64 {
        let number = self.begun;
        if let Some(write) = self.writes.get_mut(number as usize % KEPT) {
            *write = Write { first, blocks, acknowledged: false };
        }
        self.begun += 1;
        number
    }

    /// Write `number` is about to be acknowledged.
    #[inline]
    pub fn acknowledge(&mut self, number: u64) {
        self.acknowledged += 1;
        if self.begun - number <= KEPT as u64
            && let Some(write) = self.writes.get_mut(number as usize % KEPT)
        {
            write.acknowledged = true;
        }
    }

    /// Now.
    pub fn mark(&self) -> Mark {
        Mark { life: self.life, begun: self.begun, acknowledged: self.acknowledged }
    }

    /// What happened since `mark`; `None` where it is no mark of this journal.
    pub fn since(&self, mark: Mark) -> Option<Since> {
        if mark.life != self.life || mark.begun > self.begun || mark.acknowledged > self.acknowledged {
            return None;
        }
        let listed_from = mark.begun.max(self.begun.saturating_sub(KEPT as u64));
        let mut since =
            Since { acknowledged: self.acknowledged - mark.acknowledged, unlisted: listed_from - mark.begun, ..Since::default() };
        since.unacknowledged = (self.begun - mark.begun).saturating_sub(since.acknowledged);
        for number in listed_from..self.begun {
            let Some(write) = self.writes.get(number as usize % KEPT) else { continue };
            let range = BlockRange { first: write.first, blocks: u64::from(write.blocks) };
            if write.acknowledged { since.ranges.push(range) } else { since.torn.push(range) }
        }
        join(&mut since.ranges);
        join(&mut since.torn);
        Some(since)
    }
}

/// Sorts, and makes one of ranges that touch.
fn join(ranges: &mut Vec<BlockRange>) {
    ranges.sort_unstable();
    ranges.dedup_by(|next, range| {
        let end = range.first.saturating_add(range.blocks);
        let touches = next.first <= end;
        if touches {
            range.blocks = end.max(next.first.saturating_add(next.blocks)) - range.first;
        }
        touches
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, blocks: u64) -> BlockRange {
        BlockRange { first, blocks }
    }

    #[test]
    fn what_was_written_since_a_mark_is_told_and_nothing_of_before() {
        let mut journal = Journal::new();
        let before = journal.begin(1000, 8);
        journal.acknowledge(before);
        let mark = journal.mark();
        let numbers = [(8, 8), (0, 8), (100, 1), (16, 4)].map(|(first, blocks)| journal.begin(first, blocks));
        for number in [numbers[0], numbers[1], numbers[3]] {
            journal.acknowledge(number);
        }
        let since = journal.since(mark).unwrap();
        assert_eq!((since.acknowledged, since.unacknowledged, since.unlisted), (3, 1, 0));
        assert_eq!((since.ranges, since.torn), (vec![range(0, 20)], vec![range(100, 1)]));
        assert_eq!(journal.since(journal.mark()), Some(Since::default()));
    }

    #[test]
    fn writes_that_are_no_longer_kept_are_counted_and_said_to_be_unlisted() {
        let mut journal = Journal::new();
        let mark = journal.mark();
        for at in 0..KEPT as u64 + 5 {
            let number = journal.begin(at * 2, 1);
            journal.acknowledge(number);
        }
        let since = journal.since(mark).unwrap();
        assert_eq!((since.acknowledged, since.unlisted), (KEPT as u64 + 5, 5));
        assert_eq!(since.ranges.first(), Some(&range(10, 1)));
    }

    #[test]
    fn a_mark_of_another_life_says_nothing() {
        let journal = Journal::new();
        assert_eq!(journal.since(Journal::new().mark()), None);
        let mark = journal.mark();
        assert_eq!(journal.since(Mark { begun: 1, ..mark }), None);
    }
}
