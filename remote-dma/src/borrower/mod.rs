//! The borrower's session: the function's register accesses, maps and resets on their way to the lender, and what comes back.
//!
//! A store of 17 to BAR0 + 0x1018 is posted and forgotten; a load follows it on the same link and waits, taking interrupts that come before
//! its answer in their order, and at the deadline answers all ones. Nothing here polls guest memory, and nothing here blocks without a limit.

mod attachment;
mod counters;
mod memory;
mod staging;

use std::sync::Arc;
use std::time::Duration;

use farbus_transport::{CloseReason, Event, Events, Fabric, GrantError, Nanos, OpError, Tally, Teller};

pub use self::counters::{Counters, READ_WAITS};
use self::memory::Memories;
use self::staging::Staging;
use crate::attachment::{AttachmentError, Host, MapError, Mediation};
use crate::device::DeviceDescription;
use crate::endpoint::Endpoint;
use crate::message::{Outcome, Sequence, ToBorrower, ToLender};
use crate::rest::{Rest, RestToken};
use crate::wait::{Patience, SpinThenSleep, sleep_until_readable};

/// How long a borrower waits.
#[derive(Clone, Copy, Debug)]
pub struct BorrowerOptions {
    /// For the answer to a register read; then it is all ones, as from a dead slot.
    pub read_deadline: Duration,
    /// For a map, unmap or reset; then the link is given up, because the device's side cannot be known.
    pub control_deadline: Duration,
    /// How long to poll for an answer before sleeping.
    pub spin: Duration,
}

impl Default for BorrowerOptions {
    fn default() -> Self {
        Self { read_deadline: Duration::from_secs(2), control_deadline: Duration::from_secs(10), spin: Duration::from_micros(200) }
    }
}

#[derive(Clone, Copy, Debug)]
enum Answer {
    Value(u64),
    Outcome(Outcome),
}

/// A function's device on the other side of a link.
pub struct BorrowerSession<F: Fabric> {
    link: Endpoint<F>,
    description: DeviceDescription,
    options: BorrowerOptions,
    patience: Box<dyn Patience>,
    memories: Memories,
    staging: Staging,
    events: Events,
    sequence: Sequence,
    answer: Option<(Sequence, Answer)>,
    /// A register read waits: stores that come before its answer must not wait for it.
    flushing: bool,
    /// The last register read was answered by its deadline.
    overdue: bool,
    gone: Option<CloseReason>,
    /// A register write was posted and not flushed.
    unflushed: bool,
    /// The link was given up, and the lender may nevertheless be in the guest's memory: it did not come out in time.
    in_doubt: bool,
    rest: RestState,
    /// An earlier function left the device under this name.
    continues: Option<RestToken>,
    counters: Counters,
    /// How long the last answer was waited for.
    waited: Duration,
    /// Hears of the counters now and then.
    teller: Option<Teller>,
    polls: u32,
}

/// How far the device is from its rest.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum RestState {
    #[default]
    Running,
    Asked(Sequence, RestToken),
    Refused,
    Resting(Rest),
}

impl<F: Fabric> BorrowerSession<F> {
    /// A session over a link that is ready, for the device that the lender described in its hello.
    ///
    /// # Errors
    /// [`GrantError`] where staging memory cannot be shared.
    pub fn new(fabric: F, description: DeviceDescription, options: BorrowerOptions) -> Result<Self, GrantError> {
        Self::with_patience(fabric, description, options, Box::new(SpinThenSleep::new(options.spin)))
    }

    /// As [`BorrowerSession::new`], with another idea of time: a simulation advances its clock where a real session spins.
    ///
    /// # Errors
    /// As [`BorrowerSession::new`].
    pub fn with_patience(
        mut fabric: F,
        description: DeviceDescription,
        options: BorrowerOptions,
        patience: Box<dyn Patience>,
    ) -> Result<Self, GrantError> {
        let staging = Staging::new(&mut fabric)?;
        let mut session = Self {
            link: Endpoint::new(fabric),
            description,
            options,
            patience,
            memories: Memories::default(),
            staging,
            events: Events::new(),
            sequence: 0,
            answer: None,
            flushing: false,
            overdue: false,
            gone: None,
            unflushed: false,
            in_doubt: false,
            rest: RestState::default(),
            continues: None,
            counters: Counters::default(),
            waited: Duration::ZERO,
            teller: None,
            polls: 0,
        };
        session.send(ToLender::Staging(session.staging.store_grant()));
        session.link.flush();
        Ok(session)
    }

    /// Says that the lender goes on with a device that an earlier function left under `token`, as the two agreed before they were linked.
    #[must_use]
    pub fn continuing(mut self, token: RestToken) -> Self {
        self.continues = Some(token);
        self
    }

    /// Tells `tally`, which has [`Counters::NAMES`], what it counts: every 64 polls, and before each sleep.
    #[must_use]
    pub fn telling(mut self, tally: Arc<Tally>) -> Self {
        self.teller = Some(Teller::new(tally));
        self
    }

    #[inline]
    fn tell_counters(&mut self) {
        if let Some(teller) = &mut self.teller {
            teller.tell(&self.counters.values());
        }
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    #[inline]
    fn send(&mut self, message: ToLender) {
        let encoded = message.encode();
        self.link.send(encoded.as_slice());
    }

    fn next_sequence(&mut self) -> Sequence {
        self.sequence = self.sequence.wrapping_add(1);
        self.answer = None;
        self.sequence
    }

    /// Gives the link up, and takes the guest's memory back: whatever the reason, the lender is outside of it when this returns, or in doubt.
    fn close(&mut self, reason: CloseReason) {
        if self.gone.is_some() {
            return;
        }
        tracing::debug!(%reason, "the link to the lender ended");
        self.gone = Some(reason);
        self.link.close();
        if let Err(error) = self.memories.revoke_all(&mut self.link.fabric) {
            tracing::error!(%error, "the lender may still write guest memory: it must not be used for anything else while the lender runs");
            self.in_doubt = true;
        }
    }

    /// Takes events; true where there were some.
    #[inline]
    fn take_events(&mut self, now: Nanos, host: &mut dyn Host) -> bool {
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        self.link.poll(now, &mut events);
        let count = events.as_slice().len();
        for event in events.as_slice() {
            // What comes behind the end, or behind a fault, is not obeyed: each message could cost a wait.
            if self.gone.is_some() {
                break;
            }
            self.handle(event, host);
        }
        self.events = events;
        if let Some(reason) = self.link.stalled() {
            self.close(reason);
        }
        count > 0
    }

    /// Gives back the slots of stores that the guest's side has and has not made: while it waits for an answer it makes none, and the answer
    /// comes behind all of them.
    fn give_slots_back(&mut self) {
        let Some(mut ticket) = self.staging.take() else { return };
        loop {
            self.send(ToLender::Taken { ticket });
            match self.staging.take() {
                Some(next) => ticket = next,
                None => break,
            }
        }
        self.link.flush();
    }

    /// Waits for the answer to `sequence`; `None` at the deadline or when the link is gone.
    #[inline]
    fn wait_for(&mut self, sequence: Sequence, limit: Duration, host: &mut dyn Host) -> Option<Answer> {
        self.unflushed = false;
        self.link.flush();
        let started = self.patience.begin();
        let mut now = started;
        loop {
            self.take_events(now, host);
            if let Some((_, answer)) = self.answer.take_if(|(answered, _)| *answered == sequence) {
                self.waited = now.since(started);
                return Some(answer);
            }
            if self.gone.is_some() || now.since(started) >= limit {
                return None;
            }
            now = self.patience.idle();
            if self.patience.wants_sleep() && self.link.arm() {
                let left = limit.saturating_sub(now.since(started));
                sleep_until_readable(&[self.link.wake_fd()], Some(left));
                now = self.patience.begin();
            }
        }
    }

    fn ask(&mut self, sequence: Sequence, question: ToLender, host: &mut dyn Host) -> Result<(), MapError> {
        if let Some(reason) = self.gone {
            return Err(AttachmentError::Gone(reason).into());
        }
        self.send(question);
        match self.wait_for(sequence, self.options.control_deadline, host) {
            Some(Answer::Outcome(Outcome::Done)) => Ok(()),
            Some(Answer::Outcome(outcome)) => Err(AttachmentError::Refused(refusal(outcome)).into()),
            Some(Answer::Value(_)) => {
                self.close(CloseReason::Protocol("a value where an acknowledgement was due"));
                Err(AttachmentError::Refused("it broke the protocol").into())
            }
            None => {
                let gone = self.gone;
                // Whether it was done cannot be known any more.
                self.close(CloseReason::Protocol("no acknowledgement within the deadline"));
                let deadline_ms = u64::try_from(self.options.control_deadline.as_millis()).unwrap_or(u64::MAX);
                Err(gone.map_or(AttachmentError::Deadline { deadline_ms }, AttachmentError::Gone).into())
            }
        }
    }

    #[inline]
    fn handle(&mut self, event: &Event, host: &mut dyn Host) {
        match *event {
            Event::Message(ref message) => {
                let mut bytes = message.bytes();
                loop {
                    match ToBorrower::parse(bytes) {
                        Ok((message, rest)) => {
                            self.obey(message, host);
                            bytes = rest;
                        }
                        Err(error) => self.close(CloseReason::Protocol(error.text())),
                    }
                    if bytes.is_empty() || self.gone.is_some() {
                        break;
                    }
                }
            }
            Event::Closed(reason) => self.close(reason),
            // The link ended with it under way; why is said by the event that follows.
            Event::Failed(_, OpError::Closed) => {}
            Event::Failed(_, error) => {
                tracing::warn!(%error, "an operation on the lender's staging memory failed");
                self.close(CloseReason::Protocol("an operation on the peer's memory failed"));
            }
            Event::Done(_) => {}
            Event::Notify(_) => self.close(CloseReason::Protocol("a notification that was not asked for")),
        }
    }

    #[inline]
    fn obey(&mut self, message: ToBorrower, host: &mut dyn Host) {
        match message {
            ToBorrower::BarValue { sequence, value } => self.answer = Some((sequence, Answer::Value(value))),
            ToBorrower::Ack { sequence, outcome } => match self.rest {
                RestState::Asked(asked, _) if asked == sequence => self.rest = RestState::Refused,
                _ => self.answer = Some((sequence, Answer::Outcome(outcome))),
            },
            ToBorrower::Rested { sequence, mark } => match self.rest {
                RestState::Asked(asked, token) if asked == sequence => self.rest = RestState::Resting(Rest { token, mark }),
                _ => tracing::debug!("the device came to a rest that nobody waits for"),
            },
            ToBorrower::Interrupt { vector } => {
                self.counters.interrupts += 1;
                host.interrupt(vector);
            }
            ToBorrower::Pin { asserted } => {
                self.counters.interrupts += 1;
                host.pin(asserted);
            }
            ToBorrower::StorePolled { iova, len, bytes } => {
                let bytes = bytes.get(..usize::from(len)).unwrap_or_default();
                self.counters.late += u64::from(!self.memories.store_polled(iova, bytes));
            }
            ToBorrower::Dirty { iova, len } => self.counters.late += u64::from(!self.memories.mark(iova, len)),
            ToBorrower::Fetch { ticket, iova, len } => {
                self.counters.mediations += 1;
                match self.staging.begin_fetch(ticket, iova, len) {
                    Ok(()) => host.mediate(ticket, Mediation::Fetch { iova, len }),
                    Err(what) => self.close(CloseReason::Protocol(what)),
                }
            }
            ToBorrower::Store { ticket, slot, iova, len, polled } => {
                self.counters.mediations += 1;
                let mut bytes = [0; staging::SLOT_BYTES as usize];
                match self.staging.begin_store((ticket, slot), iova, len, &mut bytes) {
                    Ok(bytes) => host.mediate(ticket, Mediation::Store { iova, bytes, polled }),
                    Err(what) => return self.close(CloseReason::Protocol(what)),
                }
                if self.flushing {
                    self.give_slots_back();
                }
            }
            ToBorrower::Staging(grant) => {
                if let Err(error) = self.staging.set_fetch_staging(&mut self.link.fabric, &grant) {
                    tracing::warn!(%error, "the lender's staging memory cannot be used");
                    self.close(CloseReason::Protocol("staging memory that cannot be used"));
                }
            }
        }
    }

    /// Takes back an offer that no window uses.
    fn withdraw(&mut self, key: u64, host: &mut dyn Host) -> Result<(), MapError> {
        let sequence = self.next_sequence();
        let asked = self.ask(sequence, ToLender::Withdraw { sequence, key }, host);
        self.out_of_it(asked)?;
        self.forget(key)
    }

    /// The answer to a question that takes memory away. Where the link is given up there is none, but the memory was taken back.
    fn out_of_it(&self, asked: Result<(), MapError>) -> Result<(), MapError> {
        match self.gone {
            None => asked,
            Some(_) if !self.in_doubt => Ok(()),
            Some(reason) => Err(AttachmentError::Gone(reason).into()),
        }
    }

    fn forget(&mut self, key: u64) -> Result<(), MapError> {
        self.memories.forget(&mut self.link.fabric, key).map_err(|error| {
            tracing::error!(%error, "the lender gave memory back that it is still in");
            AttachmentError::Refused("it does not let go of memory that was taken back").into()
        })
    }
}

impl<F: Fabric> Drop for BorrowerSession<F> {
    /// Who drops the session may use the guest's memory for something else.
    fn drop(&mut self) {
        self.close(CloseReason::Local);
    }
}

fn refusal(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Done => "nothing",
        Outcome::Overlap => "the range overlaps another window",
        Outcome::Range => "the range is no range",
        Outcome::TooMany => "too many windows",
        Outcome::Grant => "the memory cannot be used there: it must be sealed against shrinking, or the lender told to accept it",
        Outcome::UnknownKey => "the memory was not offered",
        Outcome::Unreachable => "the device's IOMMU does not map that range: see what the lender says",
        Outcome::Restless => "the device cannot be brought to rest, or is not at rest",
    }
}
