//! A bound on how fast a borrower's device moves data: over it, the device begins nothing more until the time has caught up.
//!
//! At 100 MiB/s a device that has moved 130 MiB in its first second is held for 0.28 s: what it has begun ends, register accesses are served, and its commands wait in
//! the guest's memory. 20 ms of the rate may be saved up.

use std::time::Duration;

use farbus_transport::{Fabric, Nanos};

use super::{LenderSession, Waiting};

/// Of a second, how much may be saved up: 1/50.
const SAVED: u64 = 50;
/// Bytes that may always be saved up: a command of the largest size is never in debt by itself.
const LEAST_SAVED: u64 = 256 << 10;
/// Bytes that a piece of mediated DMA has at most.
const MEDIATED: u64 = 4096;

/// How much may be moved, in bytes times nanoseconds, so that no look at the clock rounds anything away.
#[derive(Debug)]
pub(super) struct Throttle {
    rate: u64,
    credit: i128,
    spent: u64,
    at: Nanos,
    /// The device was told to begin nothing more, for this.
    held: bool,
}

impl Throttle {
    fn new(rate: u64, now: Nanos) -> Self {
        let mut throttle = Self { rate: rate.max(1), credit: 0, spent: 0, at: now, held: false };
        throttle.credit = throttle.most();
        throttle
    }

    fn most(&self) -> i128 {
        i128::from((self.rate / SAVED).max(LEAST_SAVED)) * 1_000_000_000
    }

    /// `total` bytes were moved so far; how long to wait until more may be, where that is not now.
    fn look(&mut self, now: Nanos, total: u64) -> Option<Duration> {
        let earned = i128::from(self.rate) * now.since(self.at).as_nanos() as i128;
        self.at = now;
        let spent = i128::from(total.wrapping_sub(self.spent)) * 1_000_000_000;
        self.spent = total;
        self.credit = (self.credit + earned).min(self.most()) - spent;
        let debt = u64::try_from(-self.credit / i128::from(self.rate)).ok().filter(|_| self.credit < 0)?;
        Some(Duration::from_nanos(debt + 1))
    }
}

impl<F: Fabric> LenderSession<F> {
    /// Lets the device move no more than `rate` bytes in a second, both directions together. For devices that can be told to begin nothing more
    /// ([`crate::Backend::pause`]); others are not bound.
    #[must_use]
    pub fn limited_to(mut self, rate: u64) -> Self {
        self.throttle = Some(Throttle::new(rate, Nanos::now()));
        self
    }

    /// Holds the device where it has moved too much, and lets it go on where not; how long it is held.
    #[inline]
    pub(super) fn throttled(&mut self) -> Option<Duration> {
        let throttle = self.throttle.as_mut()?;
        let counters = &self.bus.counters;
        let total = counters.direct_bytes + counters.lent_bytes + counters.mediated * MEDIATED;
        let wait = throttle.look(self.bus.now, total);
        // A device that rests because its borrower wants that is let go on by its borrower.
        if self.rest.is_some() || self.waiting.iter().any(|waiting| matches!(waiting, Waiting::Rest { .. })) {
            throttle.held = false;
            return None;
        }
        match wait {
            Some(_) if !throttle.held => throttle.held = self.backend.pause(),
            None if throttle.held => {
                throttle.held = false;
                self.backend.resume(&mut self.bus);
            }
            _ => {}
        }
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn who_moves_too_much_waits_until_the_time_has_caught_up() {
        let start = Nanos::now();
        let mut throttle = Throttle::new(100 * MIB, start);
        // What is saved up: 2 MiB.
        assert_eq!(throttle.look(start, 2 * MIB), None);
        let wait = throttle.look(start, 3 * MIB).unwrap();
        assert_eq!(wait.as_millis(), 10);
        assert!(throttle.look(start + Duration::from_millis(9), 3 * MIB).is_some());
        assert_eq!(throttle.look(start + Duration::from_millis(11), 3 * MIB), None);
        // An hour of silence is no more than 20 ms.
        let later = start + Duration::from_secs(3600);
        assert_eq!(throttle.look(later, 5 * MIB), None);
        assert!(throttle.look(later, 6 * MIB).is_some());
    }

    #[test]
    fn looks_that_follow_each_other_fast_lose_nothing() {
        let start = Nanos::now();
        let mut throttle = Throttle::new(1000, start);
        assert!(throttle.look(start, LEAST_SAVED + 1000).is_some());
        // A byte takes a millisecond, and 999 looks of 1 us bring none.
        let before = (1..1_000_000)
            .step_by(1000)
            .all(|micro| throttle.look(start + Duration::from_micros(micro), LEAST_SAVED + 1000).is_some());
        assert!(before && throttle.look(start + Duration::from_secs(1), LEAST_SAVED + 1000).is_none());
    }
}
