//! The lender's session: hands BAR accesses to the device in order, and the device's DMA and interrupts to the borrower's guest.
//!
//! A doorbell write of 17 is taken from the link, given to the backend, whose reads of slot 16 and writes of 4 KiB go through `lender/bus.rs` as
//! one-sided operations on the borrower's memory; then the completion and vector 3 follow on the same link, and so cannot pass the data.
//!
//! One thread owns a session. [`LenderSession::run`] polls, and sleeps after a bounded time without work.

mod bus;
mod counters;
mod dma;
mod ending;
mod giving;
mod mediation;
mod polling;
mod rest;
mod throttle;
mod windows;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use farbus_transport::{CloseReason, Event, Events, Fabric, Nanos, OpError, Teller};

use self::bus::LenderBus;
use self::throttle::Throttle;
use crate::attachment::Activity;
use crate::backend::{AttachError, Backend, DmaFault, ReadTicket, ResetKind};
use crate::message::{Outcome, Sequence, ToBorrower, ToLender};
use crate::rest::{Lease, RestToken};
use crate::wait::{Awake, Waker, relax, sleep_until_readable};

pub use self::counters::Counters;
pub use self::ending::{Drained, Wedged};
pub use self::mediation::MAX_MEDIATIONS;
pub(crate) use self::mediation::{FIRST_STORE, MAX_STORES, SLOT_BYTES, SLOTS, STAGING_BYTES};
pub use self::polling::PollOptions;
pub use self::rest::{LONGEST_LEASE, StillKept};

/// Questions that may wait for DMA to end; a borrower waits for each answer before it asks the next.
const MAX_WAITING: usize = 16;

/// A question whose answer waits for DMA to end.
enum Waiting {
    Unmap { sequence: Sequence, in_use: Weak<()> },
    Reset { sequence: Sequence, kind: ResetKind },
    Rest { sequence: Sequence, token: RestToken },
}

/// One borrower's use of one device.
pub struct LenderSession<F: Fabric> {
    /// Dropped before the bus: the device waits for its own threads, and only then the borrower may hear that nothing is left of them.
    backend: Box<dyn Backend>,
    bus: LenderBus<F>,
    events: Events,
    waiting: VecDeque<Waiting>,
    closed: Option<CloseReason>,
    /// The device is at rest under this name.
    rest: Option<RestToken>,
    /// The borrower left, and was promised this.
    lease: Option<Lease>,
    keep_at_most: Duration,
    /// Register reads whose answers the device still owes.
    reads_put_off: u32,
    /// Hears of the counters now and then.
    teller: Option<Teller>,
    polls: u32,
    throttle: Option<Throttle>,
}

/// A device that could not be attached comes back with the reason.
pub type Refused = (AttachError, Box<dyn Backend>);

impl<F: Fabric> LenderSession<F> {
    /// Attaches `backend` to a link that is ready.
    ///
    /// # Errors
    /// [`AttachError`], with the backend.
    pub fn new(fabric: F, mut backend: Box<dyn Backend>) -> Result<Self, Refused> {
        if backend.takes_windows() && !fabric.limits().peer_mappable {
            let why = "it reaches memory by itself, and this link's memory cannot be mapped here: lend it over shared memory";
            return Err((AttachError::Device(why.to_owned()), backend));
        }
        let mut bus = match LenderBus::new(fabric) {
            Ok(bus) => bus,
            Err(error) => return Err((error, backend)),
        };
        if let Err(error) = backend.attach(&mut bus) {
            return Err((error, backend));
        }
        Ok(Self::over(bus, backend))
    }

    fn over(bus: LenderBus<F>, backend: Box<dyn Backend>) -> Self {
        let (events, waiting) = (Events::new(), VecDeque::new());
        Self {
            bus,
            backend,
            events,
            waiting,
            closed: None,
            rest: None,
            lease: None,
            keep_at_most: LONGEST_LEASE,
            reads_put_off: 0,
            teller: None,
            polls: 0,
            throttle: None,
        }
    }

    /// Does what there is to do, without blocking.
    pub fn pump(&mut self, now: Nanos) -> Activity {
        /// Between two times that the counters are told.
        const POLLS_PER_TELL: u32 = 64;
        self.bus.set_now(now);
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(POLLS_PER_TELL) {
            self.tell_counters();
        }
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        self.bus.poll(&mut events);
        let mut activity = Activity::Idle(None);
        for event in events.as_slice() {
            // What comes behind the end, or behind a fault, is not obeyed: each message could cost a wait.
            if self.closed.is_some() {
                break;
            }
            activity = Activity::Busy;
            self.handle(event);
            // A register read that comes behind the end of a DMA finds the device knowing of it.
            self.tell_finished();
            if let Some(reason) = self.bus.fault() {
                self.close(reason);
            }
        }
        self.events = events;
        if self.closed.is_some() {
            return Activity::Idle(None);
        }
        activity = activity.and(self.backend.poll(&mut self.bus));
        if self.tell_finished() {
            activity = Activity::Busy;
        }
        if self.throttle.is_some() {
            activity = activity.and(Activity::Idle(self.throttled()));
        }
        if self.reads_put_off > 0 {
            self.answer_put_off();
        }
        if let Some(reason) = self.backend.gone() {
            self.close(CloseReason::DeviceLost(reason));
        }
        if !self.waiting.is_empty() {
            self.answer_waiting();
        }
        if let Some(reason) = self.bus.fault() {
            self.close(reason);
        }
        self.bus.flush();
        activity
    }

    /// Polls until the link ends or `stop` is set; sleeps when there is nothing to do.
    pub fn run(&mut self, options: PollOptions, stop: &Waker) -> CloseReason {
        /// Reading the clock costs more than a poll, so it is read now and then, busy or not.
        const POLLS_PER_LOOK: u32 = 64;
        let awake = Awake::begin();
        let mut now = Nanos::now();
        let mut busy_at = now;
        let (mut polls, mut empty_polls) = (0_u32, 0_u32);
        loop {
            let activity = self.pump(now);
            if let Some(reason) = self.closed {
                self.tell_counters();
                return reason;
            }
            polls = polls.wrapping_add(1);
            let look = polls.is_multiple_of(POLLS_PER_LOOK);
            if look {
                now = Nanos::now();
                if stop.is_set() {
                    self.tell_counters();
                    return CloseReason::Local;
                }
            }
            let Activity::Idle(wait) = activity else {
                busy_at = now;
                empty_polls = 0;
                continue;
            };
            empty_polls = empty_polls.saturating_add(1);
            if !look {
                relax(empty_polls);
                continue;
            }
            // While an answer waits for the device, nothing may announce its end: keep polling.
            if now.since(busy_at) >= awake.spin(options.spin) && self.waiting.is_empty() {
                if self.arm() {
                    self.tell_counters();
                    let fds = [self.bus.wake_fd(), self.backend.wake_fd(), Some(stop.fd())];
                    awake.asleep(|| sleep_until_readable(&fds, wait));
                }
                now = Nanos::now();
                busy_at = now;
            }
        }
    }

    /// Prepares to sleep: true where one of [`LenderSession::wake_fds`] will become readable at the next event.
    pub fn arm(&mut self) -> bool {
        self.bus.arm() && self.backend.arm()
    }

    /// What to sleep on.
    pub fn wake_fds(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.bus.wake_fd(), self.backend.wake_fd()]
    }

    /// Why the link ended, once it has.
    pub fn closed(&self) -> Option<CloseReason> {
        self.closed
    }

    /// Tells the device which of its DMAs ended; true where one did.
    #[inline]
    fn tell_finished(&mut self) -> bool {
        let mut any = false;
        while let Some((tag, result)) = self.bus.next_finished() {
            any = true;
            self.backend.dma_done(tag, result, &mut self.bus);
        }
        any
    }

    /// Nothing is begun any more. The borrower hears of it from [`LenderSession::end`], when what is under way has ended.
    fn close(&mut self, reason: CloseReason) {
        if self.closed.is_none() {
            self.closed = Some(reason);
            self.bus.refuse();
        }
    }

    #[inline]
    fn handle(&mut self, event: &Event) {
        match *event {
            Event::Message(ref message) => {
                let mut bytes = message.bytes();
                loop {
                    match ToLender::parse(bytes) {
                        Ok((message, rest)) => {
                            self.obey(message);
                            // Before what lies behind it in the same slot: an announcement that nothing comes of costs seconds, and three fit.
                            if let Some(reason) = self.bus.fault() {
                                self.close(reason);
                            }
                            bytes = rest;
                        }
                        Err(error) => self.close(CloseReason::Protocol(error.text())),
                    }
                    if bytes.is_empty() || self.closed.is_some() {
                        break;
                    }
                }
            }
            Event::Done(id) => self.bus.operation_done(id, Ok(())),
            Event::Failed(Some(id), error) => {
                tracing::warn!(%error, "an operation on the borrower's memory failed");
                self.bus.operation_done(id, Err(DmaFault::Fenced));
            }
            // The link ended with it under way; why is said by the event that follows.
            Event::Failed(None, OpError::Closed) => {}
            Event::Failed(None, error) => {
                tracing::error!(%error, "an operation that nobody waits for failed");
                self.close(CloseReason::Protocol("an operation on the peer's memory failed"));
            }
            Event::Notify(_) => self.close(CloseReason::Protocol("a notification that was not asked for")),
            Event::Closed(reason) => self.close(reason),
        }
    }

    #[inline]
    fn obey(&mut self, message: ToLender) {
        if self.lease.is_some() {
            return self.close(CloseReason::Protocol("a message after the last"));
        }
        match message {
            ToLender::BarWrite { at, width, value } => {
                if !self.inside(at.bar, at.offset, width.bytes()) {
                    return self.close(CloseReason::Protocol("a register write outside the device"));
                }
                self.bus.counters.bar_writes += 1;
                // Whatever it does, the device is not any more what was saved.
                self.rest = None;
                if !self.resetting() {
                    self.backend.bar_write(at, width, value, &mut self.bus);
                }
            }
            ToLender::BarRead { sequence, at, width } => {
                if !self.inside(at.bar, at.offset, width.bytes()) {
                    return self.close(CloseReason::Protocol("a register read outside the device"));
                }
                self.bus.counters.bar_reads += 1;
                if self.resetting() {
                    self.answer_read(sequence, width.all_ones());
                } else {
                    match self.backend.bar_read_later(ReadTicket(sequence), at, width, &mut self.bus) {
                        Some(value) => self.answer_read(sequence, width.truncate(value)),
                        None => self.reads_put_off += 1,
                    }
                }
            }
            ToLender::InterruptMode(mode) => self.backend.set_interrupt_mode(mode, &mut self.bus),
            ToLender::BusMaster(enabled) => {
                self.bus.set_bus_master(enabled);
                if !self.resetting() {
                    self.backend.set_bus_master(enabled);
                }
            }
            ToLender::Offer { sequence, memory, dirty, proven } => {
                let outcome = self.bus.offer(memory, dirty, proven);
                self.acknowledge(sequence, outcome);
            }
            ToLender::Map { sequence, iova, len, memory, offset, access } => {
                let outcome = match self.bus.map_window(iova, len, memory, offset, access) {
                    Outcome::Done => self.give_window(iova, len),
                    refused => refused,
                };
                if outcome == Outcome::Done {
                    let shared = self.bus.shared_window(iova, len, access);
                    self.backend.window_mapped(iova, len, access, shared, &mut self.bus);
                }
                self.acknowledge(sequence, outcome);
            }
            ToLender::Unmap { sequence, iova, len } => match self.bus.unmap_windows(iova, len) {
                Ok(in_use) => {
                    self.backend.window_unmapped(iova, len, &mut self.bus);
                    self.backend.unmap_windows(iova, len);
                    self.wait_for_dma(Waiting::Unmap { sequence, in_use });
                }
                Err(outcome) => self.acknowledge(sequence, outcome),
            },
            ToLender::Withdraw { sequence, key } => {
                let outcome = self.bus.withdraw(key);
                self.acknowledge(sequence, outcome);
            }
            ToLender::Prove { key } => self.prove(key),
            ToLender::Reset { sequence, kind } => {
                self.rest = None;
                self.backend.fence();
                self.bus.fail_pending(false);
                self.wait_for_dma(Waiting::Reset { sequence, kind });
            }
            ToLender::Fence { sequence } => self.acknowledge(sequence, Outcome::Done),
            ToLender::Fetched { ticket, ok } => self.bus.fetched(ticket, ok),
            ToLender::Stored { ticket, ok } => self.bus.stored(ticket, ok),
            ToLender::Staging(grant) => self.bus.set_store_staging(&grant),
            ToLender::Taken { ticket } => self.bus.taken(ticket),
            ToLender::Pause { sequence, token } => self.pause(sequence, token),
            ToLender::Resume => self.resume(),
            ToLender::Keep { sequence, lease_ms } => self.keep(sequence, lease_ms),
        }
    }

    #[inline]
    fn answer_read(&mut self, sequence: Sequence, value: u64) {
        self.bus.send_in_order(ToBorrower::BarValue { sequence, value });
        self.bus.flush();
    }

    fn answer_put_off(&mut self) {
        while let Some((ReadTicket(sequence), value)) = self.backend.next_read() {
            self.reads_put_off = self.reads_put_off.saturating_sub(1);
            self.answer_read(sequence, value);
        }
    }

    fn inside(&self, bar: u8, offset: u64, len: u64) -> bool {
        self.backend.description().contains(bar, offset, len) && offset.is_multiple_of(len)
    }

    fn resetting(&self) -> bool {
        self.waiting.iter().any(|waiting| matches!(waiting, Waiting::Reset { .. }))
    }

    fn acknowledge(&mut self, sequence: Sequence, outcome: Outcome) {
        self.bus.send_answer(ToBorrower::Ack { sequence, outcome });
        self.bus.flush();
    }

    fn wait_for_dma(&mut self, question: Waiting) {
        if self.waiting.len() >= MAX_WAITING {
            return self.close(CloseReason::Protocol("more questions at once than a borrower has"));
        }
        self.waiting.push_back(question);
        self.answer_waiting();
    }

    /// Answers the questions whose DMA has ended, in the order they were asked.
    fn answer_waiting(&mut self) {
        while let Some(waiting) = self.waiting.front() {
            match waiting {
                Waiting::Unmap { sequence, in_use } => {
                    // Also where a device that reaches memory by itself is still in it.
                    let in_it = self.backend.takes_windows() && self.backend.in_flight() > 0;
                    if in_use.strong_count() > 0 || self.backend.is_unmapping() || in_it {
                        return;
                    }
                    let sequence = *sequence;
                    self.waiting.pop_front();
                    self.acknowledge(sequence, Outcome::Done);
                }
                Waiting::Reset { sequence, kind } => {
                    if self.backend.in_flight() > 0 || self.bus.has_pending() {
                        return;
                    }
                    let (sequence, kind) = (*sequence, *kind);
                    self.backend.reset(kind, &mut self.bus);
                    self.waiting.pop_front();
                    self.acknowledge(sequence, Outcome::Done);
                }
                Waiting::Rest { sequence, token } => {
                    let busy = !self.backend.is_at_rest() || self.backend.in_flight() > 0 || self.bus.has_pending();
                    let paused = self.backend.pause();
                    if busy && paused {
                        return;
                    }
                    let (sequence, token) = (*sequence, *token);
                    self.waiting.pop_front();
                    if paused { self.rested(sequence, token) } else { self.acknowledge(sequence, Outcome::Restless) }
                }
            }
        }
    }
}

/// A token that everything in flight holds: when its count falls to zero, what began under it has ended.
type InUse = Arc<()>;
