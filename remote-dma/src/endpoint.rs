//! One end of a session's link: a fabric, and what to do when its queue is full.
//!
//! A burst of 300 doorbell writes into a ring of 256 slots: the 257th post finds the queue full, takes the peer's messages into a backlog (so
//! that two full queues cannot wait for each other), and goes on when there is room; a peer that takes nothing for seconds is given up.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use farbus_transport::{CloseReason, Event, Events, Fabric, Nanos, Op, Signal};

/// How long a full queue may stay full before the peer counts as stuck.
const STALL_LIMIT: Duration = Duration::from_secs(5);
/// Events taken early, while waiting for room, at most.
const MAX_BACKLOG: usize = 1 << 16;

/// A fabric with a backlog.
pub(crate) struct Endpoint<F> {
    pub(crate) fabric: F,
    backlog: VecDeque<Event>,
    scratch: Events,
    stalled: bool,
    /// The link's end was polled; nothing follows it.
    ended: bool,
}

impl<F: Fabric> Endpoint<F> {
    pub(crate) fn new(fabric: F) -> Self {
        Self { fabric, backlog: VecDeque::new(), scratch: Events::new(), stalled: false, ended: false }
    }

    /// Events in order, earlier ones first.
    #[inline]
    pub(crate) fn poll(&mut self, now: Nanos, events: &mut Events) {
        while events.has_room() {
            let Some(event) = self.backlog.pop_front() else { break };
            events.push(event);
        }
        if self.backlog.is_empty() {
            self.fabric.poll(now, events);
            self.ended |= ends(events);
        }
    }

    /// Posts; where the queue is full, waits a bounded time for room.
    #[inline]
    pub(crate) fn post(&mut self, signal: Signal, op: Op<'_>) {
        if self.fabric.post(signal, op).is_err() {
            self.post_when_there_is_room(signal, op);
        }
    }

    #[inline]
    pub(crate) fn send(&mut self, message: &[u8]) {
        self.post(Signal::No, Op::Send { message });
    }

    #[inline]
    pub(crate) fn flush(&mut self) {
        self.fabric.flush();
    }

    pub(crate) fn arm(&mut self) -> bool {
        self.backlog.is_empty() && self.fabric.arm()
    }

    pub(crate) fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.fabric.wake_fd()
    }

    pub(crate) fn close(&mut self) {
        self.fabric.close();
    }

    /// The peer took nothing from a full queue for too long, and something was therefore not sent.
    pub(crate) fn stalled(&self) -> Option<CloseReason> {
        self.stalled.then_some(CloseReason::Protocol("the peer takes nothing from a full queue"))
    }

    #[cold]
    fn post_when_there_is_room(&mut self, signal: Signal, op: Op<'_>) {
        let started = Nanos::now();
        let mut rounds = 0_u32;
        // A link that has ended has no room ever again; what is not sent is lost with it.
        while !self.stalled && !self.ended {
            self.fabric.flush();
            let now = Nanos::now();
            self.scratch.clear();
            if self.backlog.len() < MAX_BACKLOG {
                self.fabric.poll(now, &mut self.scratch);
            }
            self.backlog.extend(self.scratch.as_slice());
            self.ended = ends(&self.scratch);
            if self.fabric.post(signal, op).is_ok() {
                return;
            }
            self.stalled = now.since(started) > STALL_LIMIT;
            rounds = rounds.saturating_add(1);
            if rounds > 1000 {
                std::thread::yield_now();
            }
        }
    }
}

/// The end of a link is the last event of all.
#[inline]
fn ends(events: &Events) -> bool {
    matches!(events.as_slice().last(), Some(Event::Closed(_)))
}
