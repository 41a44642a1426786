//! How often the command says that a stranger was turned away: who knocks without end does not fill a log.
//!
//! Of a thousand who say nothing within a second the first eight are told of one by one; the next, a second later, is told of with "and 992 others".

use std::time::{Duration, Instant};

/// Told at once, after a time without any.
const BURST: u32 = 8;
/// From then on, one in this time.
const EVERY: Duration = Duration::from_secs(1);

/// What may still be said.
pub struct Quota {
    left: u32,
    /// Up to when the quota was refilled.
    filled: Instant,
    unsaid: u64,
}

impl Quota {
    /// A full one.
    pub fn new(now: Instant) -> Self {
        Self { left: BURST, filled: now, unsaid: 0 }
    }

    /// Whether the next may be told of, and how many were not before it.
    pub fn take(&mut self, now: Instant) -> Option<u64> {
        let periods = now.saturating_duration_since(self.filled).as_secs() / EVERY.as_secs();
        if periods > 0 {
            self.left = self.left.saturating_add(u32::try_from(periods).unwrap_or(BURST)).min(BURST);
            self.filled = now;
        }
        if self.left == 0 {
            self.unsaid += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.unsaid))
    }

    /// How many nobody was told of.
    pub fn unsaid(&self) -> u64 {
        self.unsaid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_told_of_at_once_then_one_a_second_with_those_that_were_not() {
        let start = Instant::now();
        let mut quota = Quota::new(start);
        assert_eq!((0..20).filter_map(|_| quota.take(start)).collect::<Vec<_>>(), [0; 8]);
        assert_eq!(quota.unsaid(), 12);
        let later = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(quota.take(later(1)), Some(12));
        assert_eq!(quota.take(later(1)), None);
        // A quiet hour fills it, and no more than that.
        let said: Vec<_> = (0..20).filter_map(|_| quota.take(later(3600))).collect();
        assert_eq!(said, [1, 0, 0, 0, 0, 0, 0, 0]);
    }
}
