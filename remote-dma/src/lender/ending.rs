//! How a lender's session ends: the device is fenced, what is under way ends, the device is reset, and only then the borrower hears of it.
//!
//! A disk that hangs keeps four of the device's threads in guest memory: after 10 s `end` gives back a [`Wedged`] session, which still holds
//! the borrower's memory, its link and the device. Nobody else gets the device before those threads are out: a write of before would land on
//! the image after one of the next borrower's, or, by way of a mapping, in memory that is somebody else's by then.

use std::fmt;
use std::time::Duration;

use farbus_transport::{Fabric, Nanos};

use super::LenderSession;
use crate::attachment::Activity;
use crate::backend::{Backend, ResetKind};
use crate::wait::Waker;

/// How long the device may take to end what is in flight before its session counts as wedged.
const QUIESCE_LIMIT: Duration = Duration::from_secs(10);

/// What became of what a device had begun when it was to begin nothing more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// All of it has ended, and the guest's side was told.
    Done,
    /// So many DMAs and direct accesses to guest memory had not ended in time; commands that make none just then are not among them.
    Late(usize),
    /// The device cannot be told to begin nothing more.
    Unable,
    /// The link ended.
    Over,
}

impl<F: Fabric> LenderSession<F> {
    /// Lets the device begin nothing more, and waits until all that it has begun has ended and was told: up to `limit`, or until `hurry` is set. What the
    /// guest asked for and was not begun stays unanswered. To be said before [`LenderSession::end`] where a session ends on purpose.
    pub fn drain(&mut self, limit: Duration, hurry: &Waker) -> Drained {
        if self.closed.is_some() {
            return Drained::Over;
        }
        if !self.backend.pause() {
            return Drained::Unable;
        }
        let deadline = Nanos::now() + limit;
        loop {
            let now = Nanos::now();
            let activity = self.pump(now);
            if self.closed.is_some() {
                return Drained::Over;
            }
            let in_flight = self.backend.in_flight();
            if in_flight == 0 && self.backend.is_at_rest() && !self.bus.has_pending() {
                self.tell_counters();
                return Drained::Done;
            }
            if now >= deadline || hurry.is_set() {
                return Drained::Late(in_flight);
            }
            if activity != Activity::Busy {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }

    /// Ends the session: no DMA of the device touches the borrower's memory when this returns, and the device is as after power-on.
    ///
    /// # Errors
    /// [`Wedged`] where the device has not ended what is in flight after 10 s.
    pub fn end(self) -> Result<Box<dyn Backend>, Wedged<F>> {
        self.end_within(QUIESCE_LIMIT)
    }

    /// As [`LenderSession::end`], with another limit.
    ///
    /// # Errors
    /// [`Wedged`] where the device has not ended what is in flight after `limit`.
    pub fn end_within(mut self, limit: Duration) -> Result<Box<dyn Backend>, Wedged<F>> {
        self.backend.fence();
        Wedged { session: Box::new(self) }.wait(limit)
    }
}

/// A session whose device is fenced and does not end what is in flight. It cannot be lent again, and its borrower's memory is not free.
///
/// Dropping it waits for the device's threads, however long they take.
pub struct Wedged<F: Fabric> {
    session: Box<LenderSession<F>>,
}

impl<F: Fabric> Wedged<F> {
    /// DMAs and direct accesses to guest memory that have not ended.
    pub fn in_flight(&self) -> usize {
        self.session.backend.in_flight()
    }

    /// Waits for them; then the session ends as by [`LenderSession::end`].
    ///
    /// # Errors
    /// The same again where they have not ended after `limit`.
    pub fn wait(self, limit: Duration) -> Result<Box<dyn Backend>, Self> {
        let Self { mut session } = self;
        let deadline = Nanos::now() + limit;
        while !session.is_quiet() {
            if Nanos::now() > deadline {
                tracing::error!(in_flight = session.backend.in_flight(), "the device does not end what is in flight");
                return Err(Self { session });
            }
            if session.closed.is_none() {
                session.pump(Nanos::now());
            }
            if session.backend.poll(&mut session.bus) != Activity::Busy {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        let LenderSession { mut backend, mut bus, .. } = *session;
        backend.reset(ResetKind::Conventional, &mut bus);
        backend.detach();
        // Said last, whatever ended the session: a borrower that hears it may reuse its memory.
        bus.close();
        Ok(backend)
    }
}

impl<F: Fabric> fmt::Debug for Wedged<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wedged").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl<F: Fabric> LenderSession<F> {
    /// Ends what nobody but the guest's side would end, and says whether anything is left.
    fn is_quiet(&mut self) -> bool {
        self.bus.set_now(Nanos::now());
        self.bus.fail_pending(self.closed.is_some());
        self.tell_finished();
        self.backend.in_flight() == 0 && !self.bus.has_pending()
    }
}
