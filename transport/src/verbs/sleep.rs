//! One descriptor for everything that may wake a verbs end: its completion queue, its device, the control connection, and a clock.
//!
//! An end that sleeps for 5 s with nothing to do is woken five times by the clock, to ask a silent peer whether it is there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};

/// Seconds between two looks of a sleeper.
const TICK: i64 = 1;

pub(super) struct Bed {
    all: OwnedFd,
    clock: OwnedFd,
}

impl Bed {
    /// Over the descriptors of `sources`, which must stay open as long as this is used.
    pub(super) fn new(sources: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let all = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let clock = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let tick = Timespec { tv_sec: TICK, tv_nsec: 0 };
        timerfd_settime(&clock, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: tick, it_value: tick })?;
        for (number, source) in sources.iter().copied().chain([clock.as_fd()]).enumerate() {
            epoll::add(&all, source, epoll::EventData::new_u64(number as u64), epoll::EventFlags::IN)?;
        }
        Ok(Self { all, clock })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.all.as_fd()
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
