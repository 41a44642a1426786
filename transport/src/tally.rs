//! Counters that another thread looks at while the thread of a session counts.
//!
//! A session that has made 1,200 register reads since it last told adds 1,200 to its [`Tally`] by one relaxed addition, now and then, and never waits for who
//! reads it. Two sessions of one borrower, one after the other or both at once, have one tally, whose values only grow.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A counter's name, as in `bar_reads`, and what it counts, in a sentence.
pub type Named = (&'static str, &'static str);

/// Sums of counters, for whoever wants to know. Each value is right by itself; two of them may be of different instants.
#[derive(Debug)]
pub struct Tally {
    names: &'static [Named],
    values: Box<[AtomicU64]>,
}

impl Tally {
    /// All zero, in the order of `names`.
    pub fn new(names: &'static [Named]) -> Arc<Self> {
        Arc::new(Self { names, values: names.iter().map(|_| AtomicU64::new(0)).collect() })
    }

    /// The counters that it has.
    pub fn names(&self) -> &'static [Named] {
        self.names
    }

    /// What was told so far, in the order of the names.
    pub fn values(&self) -> Vec<u64> {
        self.values.iter().map(|value| value.load(Ordering::Relaxed)).collect()
    }

    /// Adds to the counter at `index`; nothing where there is none.
    #[inline]
    pub fn add(&self, index: usize, more: u64) {
        if let Some(value) = self.values.get(index) {
            value.fetch_add(more, Ordering::Relaxed);
        }
    }
}

/// Tells a tally what one session counts.
#[derive(Debug)]
pub struct Teller {
    tally: Arc<Tally>,
    told: Box<[u64]>,
}

impl Teller {
    /// For counters that begin at zero.
    pub fn new(tally: Arc<Tally>) -> Self {
        let told = tally.values.iter().map(|_| 0).collect();
        Self { tally, told }
    }

    /// The counters are at `now`, in the order of the tally's names. No lock, no allocation, no system call; what did not change costs a comparison.
    #[inline]
    pub fn tell(&mut self, now: &[u64]) {
        for (index, (told, now)) in self.told.iter_mut().zip(now).enumerate() {
            let more = now.wrapping_sub(*told);
            if more != 0 {
                self.tally.add(index, more);
                *told = *now;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &[Named] = &[("reads", "Reads."), ("writes", "Writes.")];

    #[test]
    fn what_two_sessions_count_is_one_sum_that_never_falls() {
        let tally = Tally::new(NAMES);
        let (mut first, mut second) = (Teller::new(Arc::clone(&tally)), Teller::new(Arc::clone(&tally)));
        first.tell(&[3, 0]);
        second.tell(&[10, 1]);
        first.tell(&[4, 0]);
        first.tell(&[4, 0]);
        assert_eq!(tally.values(), [14, 1]);
        // Counters that nobody knows, and one too many, change nothing.
        second.tell(&[10, 1, 99]);
        tally.add(7, 1);
        assert_eq!((tally.values(), tally.names().len()), (vec![14, 1], 2));
    }

    #[test]
    fn telling_from_another_thread_loses_nothing() {
        let tally = Tally::new(NAMES);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let mut teller = Teller::new(Arc::clone(&tally));
                scope.spawn(move || (1..=1000).for_each(|count| teller.tell(&[count, 2 * count])));
            }
        });
        assert_eq!(tally.values(), [4000, 8000]);
    }
}
