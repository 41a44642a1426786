//! One end of a session's link: a fabric, and what to do when its queue is full.
//!
//! A burst of 300 doorbell writes into a ring of 256 slots: the 257th post finds the queue full, takes the peer's messages into a backlog (so
//! that two full queues cannot wait for each other), and goes on when there is room; a peer that takes nothing for seconds is given up.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use farbus_transport::{CloseReason, Event, Events, Fabric, Nanos, Op, PostError, Signal};

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
    /// Nothing can be sent any more; what is posted is dropped, and whoever takes the events learns why.
    closed: bool,
}

impl<F: Fabric> Endpoint<F> {
    pub(crate) fn new(fabric: F) -> Self {
        Self { fabric, backlog: VecDeque::new(), scratch: Events::new(), stalled: false, closed: false }
    }

    /// Events in order, earlier ones first.
    #[inline]
    pub(crate) fn poll(&mut self, now: Nanos, events: &mut Events) {
        while events.has_room() {
            let Some(event) = self.backlog.pop_front() else { break };
            events.push(event);
        }
        if self.backlog.is_empty() {
            let before = events.as_slice().len();
            self.fabric.poll(now, events);
            self.closed |= events.as_slice().get(before..).is_some_and(|new| matches!(new.last(), Some(Event::Closed(_))));
        }
    }

    /// Posts; where the queue is full, waits a bounded time for room. False where the link ended, the peer is stuck, or an access was made at
    /// once and failed, as an event will say: what depends on it must not be said.
    #[inline]
    pub(crate) fn post(&mut self, signal: Signal, op: Op<'_>) -> bool {
        self.is_open()
            && match self.fabric.post(signal, op) {
                Ok(()) => true,
                Err(error) => self.post_again(error, signal, op),
            }
    }

    /// Whether anything that is posted can still be carried out.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        !self.closed && !self.stalled
    }

    #[inline]
    pub(crate) fn send(&mut self, message: &[u8]) {
        // What cannot be sent to a link that ended is dropped; whoever takes the events learns why.
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

    /// Nothing is posted from now on; the peer does not hear of it.
    pub(crate) fn refuse(&mut self) {
        self.closed = true;
    }

    pub(crate) fn close(&mut self) {
        self.closed = true;
        self.fabric.close();
    }

    /// The peer took nothing from a full queue for too long, and something was therefore not sent.
    pub(crate) fn stalled(&self) -> Option<CloseReason> {
        self.stalled.then_some(CloseReason::Protocol("the peer takes nothing from a full queue"))
    }

    #[cold]
    fn post_again(&mut self, mut error: PostError, signal: Signal, op: Op<'_>) -> bool {
        let started = Nanos::now();
        let mut rounds = 0_u32;
        while self.is_open() && error == PostError::Full {
            self.fabric.flush();
            let now = Nanos::now();
            self.scratch.clear();
            if self.backlog.len() < MAX_BACKLOG {
                self.fabric.poll(now, &mut self.scratch);
            }
            self.closed = self.scratch.as_slice().iter().any(|event| matches!(event, Event::Closed(_)));
            self.backlog.extend(self.scratch.as_slice());
            match self.fabric.post(signal, op) {
                Ok(()) => return true,
                Err(again) => error = again,
            }
            self.stalled = now.since(started) > STALL_LIMIT;
            rounds = rounds.saturating_add(1);
            if rounds > 1000 {
                std::thread::yield_now();
            }
        }
        false
    }
}
