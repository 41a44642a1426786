//! What the kernel's own ways of waking a thread cost: an eventfd between two threads, and a unix socket's ping-pong.
//!
//! A region read over vfio-user sends 32 bytes and gets 36 back; `socket_ping_pong(32, 36, …)` is that without the device behind it.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::latencies::{Latencies, Stopwatch};
use super::pin::{pin_to, two_cores};
use super::{CalibrationError, host};

/// Long enough for a thread that says it will sleep to be asleep.
const TO_FALL_ASLEEP: Duration = Duration::from_micros(40);
/// A wake that takes longer is no figure but a failure.
const LOST: Duration = Duration::from_secs(5);

/// When the thread that sleeps was last signalled, told by whoever does it to whoever wakes; clones tell the same.
#[derive(Clone, Debug)]
pub struct Wakes {
    origin: Instant,
    at_ns: Arc<AtomicU64>,
}

impl Default for Wakes {
    fn default() -> Self {
        Self { origin: Instant::now(), at_ns: Arc::new(AtomicU64::new(0)) }
    }
}

impl Wakes {
    /// The signal goes out now.
    pub fn now(&self) {
        self.at_ns.store(self.origin.elapsed().as_nanos() as u64, Ordering::Release);
    }

    fn last(&self) -> Instant {
        self.origin + Duration::from_nanos(self.at_ns.load(Ordering::Acquire))
    }
}

/// What the waking side of [`eventfd_sleeper`] is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Signal the eventfd, soon or by somebody else, and have [`Wakes::now`] called when it begins.
    Now,
    /// Nothing; time passes.
    Idle,
}

/// From before the write to an eventfd until the thread that slept in a read of it runs, on another core.
///
/// # Errors
/// [`CalibrationError`].
pub fn eventfd_wake(samples: u64) -> Result<Latencies, CalibrationError> {
    let [here, there] = two_cores()?;
    let event = eventfd(0, EventfdFlags::CLOEXEC).map_err(host("make an eventfd"))?;
    let wakes = Wakes::default();
    let _pinned = pin_to(here)?;
    eventfd_sleeper(&event, there, samples, &wakes, |wake| {
        match wake {
            Wake::Now => {
                wakes.now();
                rustix::io::write(event.as_fd(), &1_u64.to_ne_bytes()).map_err(host("write an eventfd"))?;
            }
            Wake::Idle => std::hint::spin_loop(),
        }
        Ok(())
    })
}

/// A thread on core `there` sleeps in a blocking read of `event` and `wake` is called by this thread until it has been woken `samples` times:
/// from what `wakes` was told until the sleeper runs.
///
/// # Errors
/// What `wake` answered, or [`CalibrationError`].
pub fn eventfd_sleeper<E: From<CalibrationError>>(
    event: &OwnedFd,
    there: usize,
    samples: u64,
    wakes: &Wakes,
    mut wake: impl FnMut(Wake) -> Result<(), E>,
) -> Result<Latencies, E> {
    // The sleeper counts the wakes it is ready for.
    let (ready, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| -> Result<Latencies, CalibrationError> {
            let _pinned = pin_to(there)?;
            let watch = Stopwatch::calibrate();
            let mut latencies = Latencies::new();
            for round in 1..=samples {
                ready.store(round, Ordering::Release);
                let mut value = [0; 8];
                rustix::io::read(event, &mut value).map_err(host("read an eventfd"))?;
                if over.load(Ordering::Acquire) {
                    break;
                }
                latencies.record_ns(watch.since(wakes.last()));
            }
            ready.store(samples + 1, Ordering::Release);
            Ok(latencies)
        });
        let mut wake_all = || -> Result<(), E> {
            for round in 1..=samples {
                let waiting = Instant::now();
                while ready.load(Ordering::Acquire) != round {
                    if sleeper.is_finished() || waiting.elapsed() > LOST {
                        return Err(CalibrationError::Partner.into());
                    }
                    wake(Wake::Idle)?;
                }
                let asleep = Instant::now();
                while asleep.elapsed() < TO_FALL_ASLEEP {
                    wake(Wake::Idle)?;
                }
                wake(Wake::Now)?;
            }
            let waiting = Instant::now();
            while ready.load(Ordering::Acquire) != samples + 1 && waiting.elapsed() < LOST {
                wake(Wake::Idle)?;
            }
            Ok(())
        };
        let woke = wake_all();
        if woke.is_err() {
            // The sleeper must not wait for wakes that will not come.
            over.store(true, Ordering::Release);
            rustix::io::write(event, &1_u64.to_ne_bytes()).map_err(host("write an eventfd"))?;
        }
        let latencies = sleeper.join().map_err(|_| CalibrationError::Partner)?;
        woke?;
        Ok(latencies?)
    })
}

/// `request` bytes through a unix stream socket to a thread on another core, `reply` bytes back, both sides blocking.
///
/// # Errors
/// [`CalibrationError`].
pub fn socket_ping_pong(request: usize, reply: usize, samples: u64) -> Result<Latencies, CalibrationError> {
    let io = |what| move |source| CalibrationError::Host { what, source };
    let [here, there] = two_cores()?;
    let (mut ours, mut theirs) = UnixStream::pair().map_err(io("make a socket pair"))?;
    ours.set_read_timeout(Some(LOST)).map_err(io("set a timeout"))?;
    std::thread::scope(|scope| {
        let partner = scope.spawn(move || -> Result<(), CalibrationError> {
            let _pinned = pin_to(there)?;
            let (mut question, answer) = (vec![0; request], vec![1; reply]);
            // The other side hangs up when it has all its samples.
            while theirs.read_exact(&mut question).is_ok() {
                theirs.write_all(&answer).map_err(io("answer over a socket"))?;
            }
            Ok(())
        });
        let mut measure = || -> Result<Latencies, CalibrationError> {
            let _pinned = pin_to(here)?;
            let watch = Stopwatch::calibrate();
            let (question, mut answer) = (vec![2; request], vec![0; reply]);
            let mut latencies = Latencies::new();
            let warm_up = samples / 10 + 1;
            for round in 0..warm_up + samples {
                let start = Instant::now();
                ours.write_all(&question).map_err(io("ask over a socket"))?;
                ours.read_exact(&mut answer).map_err(io("hear the answer over a socket"))?;
                let ns = watch.since(start);
                if round >= warm_up {
                    latencies.record_ns(ns);
                }
            }
            Ok(latencies)
        };
        let measured = measure();
        // Hanging up ends the partner.
        ours.shutdown(std::net::Shutdown::Both).map_err(io("hang up"))?;
        partner.join().map_err(|_| CalibrationError::Partner)??;
        measured
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wakes_and_round_trips_are_all_counted_and_plausible() {
        let wakes = eventfd_wake(200).unwrap();
        assert_eq!(wakes.count(), 200);
        assert!((200..1_000_000_000).contains(&wakes.p50_ns()), "{} ns", wakes.p50_ns());
        let trips = socket_ping_pong(32, 36, 200).unwrap();
        assert_eq!(trips.count(), 200);
        assert!((500..1_000_000_000).contains(&trips.p50_ns()), "{} ns", trips.p50_ns());
    }
}
