//! What a borrower's session counts: accesses, interrupts, and how long register reads waited, in a histogram.
//!
//! A read that was answered after 14 us adds 14,000 to the sum and 1 to the bucket of 10 to 100 us. The clock is not read for that: it is looked at once in 64 polls
//! of a wait anyway.

use std::time::Duration;

use farbus_transport::tally::Named;

/// What a borrower did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Register reads sent.
    pub bar_reads: u64,
    /// Register writes sent.
    pub bar_writes: u64,
    /// Register reads that were answered all ones because nobody else did in time.
    pub reads_timed_out: u64,
    /// Interrupts received.
    pub interrupts: u64,
    /// Mediations asked for by the lender.
    pub mediations: u64,
    /// Polled bytes or dirty marks for memory that is no longer mapped.
    pub late: u64,
    /// How long answered register reads waited, all together, in nanoseconds, rounded down to the last look at the clock: one in 64 polls.
    pub read_wait_ns: u64,
    /// How many answered register reads waited for up to each of [`READ_WAITS`] and longer than the one before it, and for longer than all.
    pub reads_by_wait: [u64; READ_WAITS.len() + 1],
}

/// The upper bounds of [`Counters::reads_by_wait`].
pub const READ_WAITS: [Duration; 6] = [
    Duration::from_micros(10),
    Duration::from_micros(100),
    Duration::from_millis(1),
    Duration::from_millis(10),
    Duration::from_millis(100),
    Duration::from_secs(1),
];

impl Counters {
    /// Their names, in the order of [`Counters::values`]. What begins with `read_wait` is a histogram: the sum, then what is in each of its buckets.
    pub const NAMES: &'static [Named] = &[
        ("bar_reads", "Register reads sent."),
        ("bar_writes", "Register writes sent."),
        ("reads_timed_out", "Register reads that were answered all ones because nobody else did in time."),
        ("interrupts", "Interrupts received."),
        ("mediations", "Mediations asked for by the lender."),
        ("late", "Polled bytes or dirty marks for memory that is no longer mapped."),
        ("read_wait_ns", "Nanoseconds that register reads waited."),
        ("read_wait_10us", "Register reads that waited for up to 10 us."),
        ("read_wait_100us", "Register reads that waited for 10 to 100 us."),
        ("read_wait_1ms", "Register reads that waited for 100 us to 1 ms."),
        ("read_wait_10ms", "Register reads that waited for 1 to 10 ms."),
        ("read_wait_100ms", "Register reads that waited for 10 to 100 ms."),
        ("read_wait_1s", "Register reads that waited for 100 ms to 1 s."),
        ("read_wait_more", "Register reads that waited for longer than 1 s."),
    ];

    /// All of them.
    pub const fn values(&self) -> [u64; 14] {
        let Self { bar_reads, bar_writes, reads_timed_out, interrupts, mediations, late, read_wait_ns, reads_by_wait } = *self;
        let [a, b, c, d, e, f, g] = reads_by_wait;
        [bar_reads, bar_writes, reads_timed_out, interrupts, mediations, late, read_wait_ns, a, b, c, d, e, f, g]
    }

    pub(super) fn read_waited(&mut self, time: Duration) {
        self.read_wait_ns = self.read_wait_ns.wrapping_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        let bucket = READ_WAITS.iter().position(|limit| time <= *limit).unwrap_or(READ_WAITS.len());
        if let Some(count) = self.reads_by_wait.get_mut(bucket) {
            *count += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_in_the_bucket_whose_bound_it_does_not_pass() {
        let mut counters = Counters::default();
        for micros in [0, 10, 11, 100, 999_999, 1_000_000, 1_000_001] {
            counters.read_waited(Duration::from_micros(micros));
        }
        assert_eq!(counters.reads_by_wait, [2, 2, 0, 0, 0, 2, 1]);
        assert_eq!((counters.read_wait_ns, counters.values().len()), (3_000_121_000, Counters::NAMES.len()));
    }
}
