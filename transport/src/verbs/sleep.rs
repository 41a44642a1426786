//! One descriptor for everything that may wake a verbs end: its completion queue, its device, the control connection, and an alarm clock.
//!
//! An end that sleeps for 5 s with nothing to do is woken six times by the clock, to ask a silent peer whether it is there, and six times by the answer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};

use crate::time::Nanos;

/// How much too early an alarm may be: so much is not worth setting the clock anew.
const EARLY: Duration = Duration::from_millis(100);

pub(super) struct Bed {
    all: OwnedFd,
    clock: OwnedFd,
    alarm: Nanos,
}

impl Bed {
    /// Over the descriptors of `sources`, which must stay open as long as this is used.
    pub(super) fn new(sources: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let all = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let clock = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        for (number, source) in sources.iter().copied().chain([clock.as_fd()]).enumerate() {
            epoll::add(&all, source, epoll::EventData::new_u64(number as u64), epoll::EventFlags::IN)?;
        }
        Ok(Self { all, clock, alarm: Nanos(0) })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.all.as_fd()
    }

    /// Makes the descriptor readable at `at`, or a little earlier.
    pub(super) fn wake_at(&mut self, at: Nanos, now: Nanos) {
        if self.alarm > now && self.alarm <= at && at.since(self.alarm) < EARLY {
            return;
        }
        // A clock that is set to zero is off.
        let left = at.since(now).max(Duration::from_nanos(1));
        let it_value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        match timerfd_settime(&self.clock, TimerfdTimerFlags::empty(), &once) {
            Ok(_) => self.alarm = at,
            Err(errno) => tracing::warn!(%errno, "a sleeper's clock cannot be set: a silent peer is not asked while it sleeps"),
        }
    }

    /// Empties the clock; the others are emptied by whoever they belong to.
    pub(super) fn wake_up(&self) {
        let mut ticks = [0; 8];
        if let Err(errno) = rustix::io::read(&self.clock, &mut ticks)
            && errno != rustix::io::Errno::AGAIN
        {
            tracing::warn!(%errno, "a sleeper's clock cannot be read");
        }
    }
}
