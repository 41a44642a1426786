//! Latencies in nanoseconds: a histogram of fixed size, and a stopwatch that knows what looking at it costs.
//!
//! Of a register read that took 160 ns between two looks at the clock, 25 ns were the clock's own; `Stopwatch::calibrate` found that
//! beforehand, and 135 ns are recorded.

use std::time::Instant;

use hdrhistogram::Histogram;

/// The longest latency that is told apart, in nanoseconds: 60 s.
const LONGEST_NS: u64 = 60_000_000_000;

/// A latency distribution. Recording neither allocates nor fails: what is longer than 60 s counts as 60 s.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        Self::new()
    }
}

impl Latencies {
    /// Empty, with three significant digits.
    #[expect(clippy::expect_used, reason = "the bounds are constants that the library accepts, as the tests show")]
    pub fn new() -> Self {
        Self(Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("valid bounds"))
    }

    /// Counts one latency.
    #[inline]
    pub fn record_ns(&mut self, ns: u64) {
        self.0.saturating_record(ns.max(1));
    }

    /// Adds all of `other`.
    pub fn add(&mut self, other: &Self) {
        for value in other.0.iter_recorded() {
            self.0.saturating_record_n(value.value_iterated_to(), value.count_since_last_iteration());
        }
    }

    /// How many were recorded.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The latency that `percentile` (0 to 100) of all do not exceed, in nanoseconds; 0 where nothing was recorded.
    pub fn percentile_ns(&self, percentile: f64) -> u64 {
        if self.0.is_empty() { 0 } else { self.0.value_at_percentile(percentile) }
    }

    /// What the median of operations on `bytes` bytes each comes to, in bytes per second.
    pub fn rate(&self, bytes: u64) -> f64 {
        bytes as f64 * 1e9 / self.p50_ns().max(1) as f64
    }

    /// The shortest in nanoseconds; 0 where nothing was recorded.
    pub fn least_ns(&self) -> u64 {
        if self.0.is_empty() { 0 } else { self.0.min() }
    }

    /// The median in nanoseconds.
    pub fn p50_ns(&self) -> u64 {
        self.percentile_ns(50.0)
    }

    /// What one in a hundred exceeds, in nanoseconds.
    pub fn p99_ns(&self) -> u64 {
        self.percentile_ns(99.0)
    }
}

/// Measures intervals, less the cost of measuring.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch {
    overhead_ns: u64,
}

impl Stopwatch {
    /// Finds the least time between two looks at the clock.
    pub fn calibrate() -> Self {
        let mut seen = Latencies::new();
        for _ in 0..10_000 {
            let start = Instant::now();
            seen.record_ns(nanos(start.elapsed()));
        }
        Self { overhead_ns: seen.percentile_ns(10.0) }
    }

    /// Nanoseconds that a measurement itself takes.
    pub fn overhead_ns(&self) -> u64 {
        self.overhead_ns
    }

    /// Nanoseconds since `start`, less the overhead.
    #[inline]
    pub fn since(&self, start: Instant) -> u64 {
        nanos(start.elapsed()).saturating_sub(self.overhead_ns)
    }
}

fn nanos(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_what_was_recorded() {
        let mut latencies = Latencies::new();
        assert_eq!(latencies.p50_ns(), 0);
        for ns in 1..=1000 {
            latencies.record_ns(ns * 100);
        }
        assert!((49_900..=50_200).contains(&latencies.p50_ns()), "{}", latencies.p50_ns());
        assert!((98_900..=99_200).contains(&latencies.p99_ns()), "{}", latencies.p99_ns());
        let mut both = Latencies::new();
        both.record_ns(u64::MAX);
        both.add(&latencies);
        assert_eq!(both.count(), 1001);
        assert!(both.percentile_ns(100.0) >= LONGEST_NS / 2, "an hour must not vanish");
    }

    #[test]
    fn the_clock_costs_less_than_what_is_measured_with_it() {
        let watch = Stopwatch::calibrate();
        assert!(watch.overhead_ns() < 2000, "{} ns", watch.overhead_ns());
    }
}
