//! One end of a session's link: a fabric, and what to do when its queue is full.
//!
//! A burst of 300 doorbell writes into a ring of 256 slots: the 257th post finds the queue full, takes the peer's messages into a backlog (so
//! that two full queues cannot wait for each other), and goes on when there is room; a peer that takes nothing for seconds is given up.
//!
//! Where an operation is a work request, short messages that follow each other travel in one: three messages of 17, 26 and 5 bytes, then `flush`, are
//! one post of 48. Nothing overtakes them, and where a message is in the peer's ring as soon as it is posted none waits.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use farbus_transport::{CloseReason, Event, Events, Fabric, Nanos, Op, PostError, Signal, fabric::MAX_MESSAGE};

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
    /// The fabric has reported its end: nothing more comes, and nothing of this side is reached.
    over: bool,
    /// Messages wait here for others, until a flush or anything else that is posted.
    gathers: bool,
    gathered: [u8; MAX_MESSAGE],
    gathered_len: usize,
}

impl<F: Fabric> Endpoint<F> {
    pub(crate) fn new(fabric: F) -> Self {
        let gathers = !fabric.limits().immediate;
        Self {
            fabric,
            backlog: VecDeque::new(),
            scratch: Events::new(),
            stalled: false,
            closed: false,
            over: false,
            gathers,
            gathered: [0; MAX_MESSAGE],
            gathered_len: 0,
        }
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
            self.over |= events.as_slice().get(before..).is_some_and(|new| matches!(new.last(), Some(Event::Closed(_))));
            self.closed |= self.over;
        }
    }

    /// Posts; where the queue is full, waits a bounded time for room. False where the link ended, the peer is stuck, or an access was made at
    /// once and failed, as an event will say: what depends on it must not be said.
    #[inline]
    pub(crate) fn post(&mut self, signal: Signal, op: Op<'_>) -> bool {
        if self.gathered_len > 0 {
            self.post_gathered();
        }
        self.post_now(signal, op)
    }

    #[inline]
    fn post_now(&mut self, signal: Signal, op: Op<'_>) -> bool {
        self.is_open()
            && match self.fabric.post(signal, op) {
                Ok(()) => true,
                Err(error) => self.post_again(error, signal, op),
            }
    }

    fn post_gathered(&mut self) {
        let (len, bytes) = (std::mem::take(&mut self.gathered_len), self.gathered);
        self.post_now(Signal::No, Op::Send { message: bytes.get(..len).unwrap_or_default() });
    }

    /// Whether anything that is posted can still be carried out.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        !self.closed && !self.stalled
    }

    #[inline]
    pub(crate) fn send(&mut self, message: &[u8]) {
        if self.gathers {
            return self.gather(message);
        }
        // What cannot be sent to a link that ended is dropped; whoever takes the events learns why.
        self.post_now(Signal::No, Op::Send { message });
    }

    fn gather(&mut self, message: &[u8]) {
        if self.gathered_len + message.len() > MAX_MESSAGE {
            self.post_gathered();
        }
        if let Some(room) = self.gathered.get_mut(self.gathered_len..self.gathered_len + message.len()) {
            room.copy_from_slice(message);
            self.gathered_len += message.len();
        }
    }

    #[inline]
    pub(crate) fn flush(&mut self) {
        if self.gathered_len > 0 {
            self.post_gathered();
        }
        self.fabric.flush();
    }

    pub(crate) fn arm(&mut self) -> bool {
        if self.gathered_len > 0 {
            self.flush();
        }
        self.backlog.is_empty() && self.fabric.arm()
    }

    pub(crate) fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.fabric.wake_fd()
    }

    /// Whether the fabric has reported its end.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Takes a link that was closed here to its end: until then the peer may still reach what it was granted. What comes is of no interest.
    pub(crate) fn finish(&mut self, now: Nanos) {
        if !self.over {
            self.scratch.clear();
            self.fabric.poll(now, &mut self.scratch);
            self.over = matches!(self.scratch.as_slice().last(), Some(Event::Closed(_)));
        }
    }

    /// Nothing is posted from now on; the peer does not hear of it.
    pub(crate) fn refuse(&mut self) {
        self.closed = true;
    }

    pub(crate) fn close(&mut self) {
        if self.gathered_len > 0 && self.is_open() {
            self.post_gathered();
        }
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
            self.over |= matches!(self.scratch.as_slice().last(), Some(Event::Closed(_)));
            self.closed |= self.over;
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
