//! Sleeping and being woken: the only places where a session's thread enters the kernel while nothing is wrong.
//!
//! A lender's thread that found no work for 50 us arms its link, then sleeps on the link, the device and a [`Waker`] that stops it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

/// A flag that also wakes whoever sleeps on its descriptor. Once set it stays set.
#[derive(Clone, Debug)]
pub struct Waker {
    inner: Arc<(AtomicBool, OwnedFd)>,
}

impl Waker {
    /// A flag that is not set.
    ///
    /// # Errors
    /// What eventfd(2) answers.
    pub fn new() -> io::Result<Self> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { inner: Arc::new((AtomicBool::new(false), fd)) })
    }

    /// Sets the flag and wakes every sleeper.
    pub fn set(&self) {
        self.inner.0.store(true, Ordering::Release);
        if let Err(errno) = rustix::io::write(&self.inner.1, &1_u64.to_ne_bytes()) {
            tracing::debug!(%errno, "a waker was set many times");
        }
    }

    /// Whether it was set.
    pub fn is_set(&self) -> bool {
        self.inner.0.load(Ordering::Acquire)
    }

    /// Readable once it is set.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.1.as_fd()
    }
}

/// Sleeps until one of `fds` is readable or closed, a signal arrives, or `limit` has passed.
pub fn sleep_until_readable(fds: &[Option<BorrowedFd<'_>>], limit: Option<Duration>) {
    let mut ready: Vec<PollFd<'_>> = fds.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let timeout = limit
        .map(|limit| Timespec { tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: limit.subsec_nanos().into() });
    if let Err(errno) = rustix::event::poll(&mut ready, timeout.as_ref())
        && errno != rustix::io::Errno::INTR
    {
        tracing::warn!(%errno, "a sleep failed");
    }
}

/// Lender's sessions of this process that are awake: working, or polling in the hope of work.
static AWAKE: AtomicUsize = AtomicUsize::new(0);

/// How long a session polls in vain where more of them are awake than there are cores: each poll takes time from one that has work.
const CROWDED_SPIN: Duration = Duration::from_micros(2);

/// A session that is awake while this lives. Counted when it goes to sleep and wakes up, not while it works.
#[derive(Debug)]
pub(crate) struct Awake {
    cores: usize,
}

impl Awake {
    pub(crate) fn begin() -> Self {
        AWAKE.fetch_add(1, Ordering::Relaxed);
        Self { cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get) }
    }

    /// How long to poll without work, of `spin` that was asked for. Who asked never to sleep does not.
    pub(crate) fn spin(&self, spin: Duration) -> Duration {
        let crowded = AWAKE.load(Ordering::Relaxed) > self.cores;
        if crowded && spin != Duration::MAX { spin.min(CROWDED_SPIN) } else { spin }
    }

    /// Carries out a sleep.
    pub(crate) fn asleep(&self, sleep: impl FnOnce()) {
        AWAKE.fetch_sub(1, Ordering::Relaxed);
        sleep();
        AWAKE.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        AWAKE.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How a session that must wait for an answer passes the time.
pub trait Patience: Send {
    /// A wait begins, or goes on after a sleep; the time now.
    fn begin(&mut self) -> farbus_transport::Nanos;

    /// Nothing came: passes a little time and says how late it is.
    fn idle(&mut self) -> farbus_transport::Nanos;

    /// Whether it is time to sleep on the link's descriptor instead.
    fn wants_sleep(&self) -> bool;
}

/// Leaves the core to its other hardware thread for a moment, once `empty_polls` have found nothing. Not at once: the answer to what was just
/// sent is a few hundred nanoseconds away, and each such moment (10 to 60 ns) is time in which it is not seen.
#[inline]
pub fn relax(empty_polls: u32) {
    const EAGER_POLLS: u32 = 256;
    if empty_polls >= EAGER_POLLS {
        std::hint::spin_loop();
    }
}

/// Polls for a bounded time, then sleeps. The clock is read now and then only: reading it costs more than a poll.
#[derive(Debug)]
pub struct SpinThenSleep {
    spin: Duration,
    began: farbus_transport::Nanos,
    now: farbus_transport::Nanos,
    rounds: u32,
}

impl SpinThenSleep {
    /// Polls for `spin` before it wants to sleep.
    pub fn new(spin: Duration) -> Self {
        let now = farbus_transport::Nanos::now();
        Self { spin, began: now, now, rounds: 0 }
    }
}

impl Patience for SpinThenSleep {
    #[inline]
    fn begin(&mut self) -> farbus_transport::Nanos {
        self.now = farbus_transport::Nanos::now();
        self.began = self.now;
        self.rounds = 0;
        self.now
    }

    #[inline]
    fn idle(&mut self) -> farbus_transport::Nanos {
        const ROUNDS_PER_CLOCK: u32 = 64;
        self.rounds = self.rounds.wrapping_add(1);
        if self.rounds.is_multiple_of(ROUNDS_PER_CLOCK) {
            self.now = farbus_transport::Nanos::now();
        } else {
            relax(self.rounds);
        }
        self.now
    }

    fn wants_sleep(&self) -> bool {
        self.now.since(self.began) >= self.spin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_sessions_than_cores_do_not_poll_in_each_others_way() {
        let spin = Duration::from_micros(50);
        let all: Vec<_> = (0..1000).map(|_| Awake::begin()).collect();
        let one = Awake { cores: 500 };
        assert_eq!(one.spin(spin), CROWDED_SPIN);
        assert_eq!(one.spin(Duration::MAX), Duration::MAX);
        drop(all);
        assert_eq!(one.spin(spin), spin, "those that have ended count still");
        // It was not counted by `begin`.
        std::mem::forget(one);
    }
}
