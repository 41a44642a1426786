//! What this machine can do at best, measured in the same run as what is judged by it: a cache line between two cores, memcpy.
//!
//! A remote register read needs at least one cache-line round trip between two cores: 120 to 140 ns on the machine where this was written.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use farbus_transport::Memory;

use super::CalibrationError;
use super::latencies::{Latencies, Stopwatch};
use super::pin::{pin_to, two_cores};

/// Copies timed together, because one of 4 KiB is shorter than a look at the clock is exact.
pub(crate) const COPIES_PER_LOOK: u64 = 32;

/// A word on cache lines of its own: neighbouring lines are fetched in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicU64);

/// The word that tells the partner to stop.
const OVER: u64 = u64::MAX;

/// Ends a partner that spins, also where the measuring side returns early.
struct Release<'a>(&'a AtomicU64);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        self.0.store(OVER, Ordering::Release);
    }
}

/// A word stored here, seen and answered by a thread on another core, seen here: `samples` times.
///
/// # Errors
/// [`CalibrationError::Pin`] on a machine with one core.
pub fn cache_line_round_trip(samples: u64) -> Result<Latencies, CalibrationError> {
    let [here, there] = two_cores()?;
    // Nothing else may lie on the lines that the partner reads: a local of ours beside them would triple the figure.
    let (ping, pong) = (Line::default(), Line::default());
    std::thread::scope(|scope| {
        let partner = scope.spawn(|| -> Result<(), CalibrationError> {
            let _pinned = pin_to(there)?;
            let mut answered = 0;
            while answered != OVER {
                let asked = ping.0.load(Ordering::Acquire);
                if asked != answered {
                    pong.0.store(asked, Ordering::Release);
                    answered = asked;
                }
            }
            Ok(())
        });
        let measured = {
            let _release = Release(&ping.0);
            let _pinned = pin_to(here)?;
            let watch = Stopwatch::calibrate();
            let mut latencies = Latencies::new();
            let warm_up = samples / 10 + 1;
            for round in 1..=warm_up + samples {
                let start = Instant::now();
                ping.0.store(round, Ordering::Release);
                let mut polls = 0_u32;
                while pong.0.load(Ordering::Acquire) != round {
                    polls = polls.wrapping_add(1);
                    // A partner that could not be pinned will not answer.
                    if polls.is_multiple_of(1 << 16) && partner.is_finished() {
                        break;
                    }
                }
                let ns = watch.since(start);
                if round > warm_up {
                    latencies.record_ns(ns);
                }
            }
            latencies
        };
        partner.join().map_err(|_| CalibrationError::Partner)??;
        Ok(measured)
    })
}

/// Nanoseconds of one copy of `len` bytes between two places that stay in the nearest cache that holds them.
///
/// # Errors
/// [`CalibrationError::Memory`].
pub fn memcpy_hot(len: u64, samples: u64) -> Result<Latencies, CalibrationError> {
    let (from, to) = (filled("copy-from", len)?, filled("copy-to", len)?);
    let watch = Stopwatch::calibrate();
    let mut latencies = Latencies::new();
    for round in 0..samples + samples / 10 {
        let start = Instant::now();
        for _ in 0..COPIES_PER_LOOK {
            to.copy_from(0, &from, 0, len)?;
        }
        let ns = watch.since(start) / COPIES_PER_LOOK;
        if round >= samples / 10 {
            latencies.record_ns(ns);
        }
    }
    Ok(latencies)
}

/// Bytes per second of copies of `piece` bytes, one after the other through `working_set` bytes on each side, `total` bytes in all: the rate of
/// the median piece, so that somebody who takes the core away for a while is not taken for slow memory.
///
/// # Errors
/// [`CalibrationError::Memory`].
pub fn memcpy_bandwidth(piece: u64, working_set: u64, total: u64) -> Result<f64, CalibrationError> {
    let (from, to) = (filled("copy-from", working_set)?, filled("copy-to", working_set)?);
    let pieces = (working_set / piece).max(1);
    let watch = Stopwatch::calibrate();
    let mut latencies = Latencies::new();
    for copy in 0..total.div_ceil(piece) {
        let at = (copy % pieces) * piece;
        let start = Instant::now();
        to.copy_from(at, &from, at, piece)?;
        latencies.record_ns(watch.since(start));
    }
    Ok(latencies.rate(piece))
}

/// Memory whose pages are all there, so that no copy pays for a page fault.
fn filled(name: &str, len: u64) -> Result<Arc<Memory>, CalibrationError> {
    let memory = Memory::memfd(name, len)?;
    let pattern = [0x5a; 4096];
    for at in (0..len).step_by(pattern.len()) {
        let piece = pattern.len().min((len - at) as usize);
        memory.write(at, &pattern[..piece])?;
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_references_are_in_the_range_of_real_machines() {
        let line = cache_line_round_trip(20_000).unwrap();
        assert_eq!(line.count(), 20_000);
        assert!((20..20_000_000).contains(&line.p50_ns()), "{} ns", line.p50_ns());
        let copy = memcpy_hot(4096, 2000).unwrap();
        assert!((10..100_000).contains(&copy.p50_ns()), "{} ns", copy.p50_ns());
        let bandwidth = memcpy_bandwidth(1 << 20, 8 << 20, 32 << 20).unwrap();
        assert!((1e7..1e12).contains(&bandwidth), "{bandwidth} bytes/s");
    }
}
