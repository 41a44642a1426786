//! What happens between two simulated ends, and when: one agenda of arrivals in virtual time.
//!
//! A 4 KiB write posted at 100 us lands in three pieces at 107, 103 and 109 us; the message posted behind it arrives at 109 us or later,
//! and the write's own completion is back at 113 us. The agenda is the only place where time passes.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::fabric::{CloseReason, Event, Events, Limits, Message, Op, OpError, OpId, PostError, Signal};
use crate::memory::Memory;
use crate::sim::Seed;
use crate::sim::options::{SimOptions, Violation};
use crate::sim::regions::Book;
use crate::span::{LocalSpan, RemoteSpan};
use crate::time::Nanos;

/// One of the two ends.
pub(super) type SideIndex = usize;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Life {
    Open,
    Ended { reason: CloseReason, reports_left: u8 },
}

/// An operation as the wire carries it; its spans stay checked because they are never changed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Carried {
    Write {
        from: LocalSpan,
        to: RemoteSpan,
        notify: Option<u32>,
    },
    Read {
        from: RemoteSpan,
        into: LocalSpan,
    },
    Send(Message),
    /// A write's notification whose bytes are there already.
    Notify(u32),
    /// Refused or carried out when it was posted, or told to be lost.
    Nothing,
}

#[derive(Debug)]
pub(super) struct Outstanding {
    pub(super) signal: Signal,
    pub(super) op: Carried,
    pub(super) sent: bool,
    pub(super) done: bool,
    pub(super) result: Result<(), OpError>,
}

/// Where bytes of an operation will land, until they have.
#[derive(Debug)]
pub(super) struct Landing {
    pub(super) memory: usize,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) at: Nanos,
}

#[derive(Debug)]
pub(super) struct Side {
    pub(super) book: Book,
    pub(super) life: Life,
    pub(super) outstanding: VecDeque<Outstanding>,
    /// Number of the operation at the front of `outstanding`; each has one more than the one before.
    first: u64,
    /// Messages and notifications that the peer will still take.
    pub(super) credits: u32,
    pub(super) inbox: VecDeque<Event>,
    pub(super) landings: Vec<Landing>,
    /// No operation of this side arrives before this.
    pub(super) last_arrival: Nanos,
    pub(super) armed: bool,
    pub(super) wake: Option<Arc<OwnedFd>>,
}

#[derive(Debug)]
pub(super) enum What {
    /// Some bytes of an operation move.
    Piece { side: SideIndex, number: u64, local: LocalSpan, remote: RemoteSpan, into_remote: bool, captured: Option<Arc<Memory>> },
    /// An operation takes effect at the peer.
    Arrive { side: SideIndex, number: u64, op: Carried },
    /// This side learns that its operation is done.
    Done { side: SideIndex, number: u64 },
    /// This side may send one more.
    Credit { side: SideIndex },
    /// The goodbye of `side` arrives at its peer.
    Goodbye { side: SideIndex },
    /// Nothing crosses any more.
    Cut,
    /// This side notices that its peer is gone.
    Gone { side: SideIndex },
}

#[derive(Debug)]
pub(super) struct Due {
    pub(super) at: Nanos,
    order: u64,
    pub(super) what: What,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// Both ends and all that is between them.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) now: Nanos,
    pub(super) seed: Seed,
    pub(super) options: SimOptions,
    pub(super) sides: [Side; 2],
    pub(super) limits: Limits,
    pub(super) agenda: BinaryHeap<Reverse<Due>>,
    next_order: u64,
    pub(super) cut: bool,
}

impl Inner {
    pub(super) fn new(seed: u64, options: SimOptions, wakes: [Option<Arc<OwnedFd>>; 2]) -> Self {
        let mut seed = Seed::new(seed);
        let sides = wakes.map(|wake| Side {
            book: Book::new(options.max_regions, seed.draw(), options.violate),
            life: Life::Open,
            outstanding: VecDeque::new(),
            first: 0,
            credits: options.receive_depth.max(1),
            inbox: VecDeque::new(),
            landings: Vec::new(),
            last_arrival: Nanos(0),
            armed: false,
            wake,
        });
        let mut inner = Self {
            now: Nanos(0),
            seed,
            limits: options.limits(),
            sides,
            agenda: BinaryHeap::new(),
            next_order: 0,
            cut: false,
            options,
        };
        if let Some(at) = inner.options.cut_at_ns {
            inner.put(Nanos(at), What::Cut);
        }
        inner
    }

    pub(super) fn next_at(&self) -> Option<Nanos> {
        self.agenda.peek().map(|Reverse(due)| due.at)
    }

    pub(super) fn is_open(&self, side: SideIndex) -> bool {
        self.sides[side].life == Life::Open
    }

    pub(super) fn breaks(&self, violation: Violation) -> bool {
        self.options.violate == Some(violation)
    }

    pub(super) fn put(&mut self, at: Nanos, what: What) {
        let order = self.next_order;
        self.next_order += 1;
        self.agenda.push(Reverse(Due { at, order, what }));
    }

    /// When something that leaves `side` now is across.
    pub(super) fn across(&mut self, side: SideIndex) -> Nanos {
        if self.options.descriptors {
            return self.now;
        }
        let (min, max) = (self.options.latency_min_ns, self.options.latency_max_ns);
        let mut way = self.seed.between(min, max);
        if self.seed.chance(self.options.tail_permille) {
            way += self.seed.between(0, self.options.tail_ns);
        }
        if let Some((slow, times)) = self.options.slow
            && slow == side
        {
            way = way.saturating_mul(times);
        }
        Nanos(self.now.0 + way)
    }

    // ---- what the ends call ----

    pub(super) fn post(&mut self, side: SideIndex, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        let needs_credit = matches!(op, Op::Send { .. } | Op::WriteNotify { .. });
        let mut result = Ok(());
        let mut carried = self.carry(op).unwrap_or_else(|error| {
            result = Err(error);
            Carried::Nothing
        });
        let lossy = self.breaks(Violation::LoseMessage);
        let queue_depth = self.options.queue_depth.max(1) as usize;
        let this = &mut self.sides[side];
        if this.life != Life::Open || this.outstanding.len() >= queue_depth {
            return Err(PostError::Full);
        }
        if needs_credit && result.is_ok() {
            match this.credits.checked_sub(1) {
                Some(left) => this.credits = left,
                None if lossy => carried = Carried::Nothing,
                None => return Err(PostError::Full),
            }
        }
        let at_once = self.options.is_immediate() && matches!(op, Op::Write { .. } | Op::Read { .. });
        if self.options.is_immediate() && result.is_ok() {
            (carried, result) = self.at_once(side, carried);
        }
        self.sides[side].outstanding.push_back(Outstanding { signal, op: carried, sent: false, done: at_once, result });
        if at_once && signal == Signal::No && result.is_err() && !self.breaks(Violation::HideFailure) {
            return Err(PostError::Failed);
        }
        if self.seed.chance(self.options.eager_permille) {
            self.flush(side);
        }
        Ok(())
    }

    pub(super) fn flush(&mut self, side: SideIndex) {
        let this = &mut self.sides[side];
        let unsent = this.outstanding.iter().rposition(|out| out.sent).map_or(0, |last| last + 1);
        for index in unsent..self.sides[side].outstanding.len() {
            let this = &mut self.sides[side];
            let number = this.first + index as u64;
            let Some(out) = this.outstanding.get_mut(index) else { break };
            out.sent = true;
            let op = out.op;
            self.send_off(side, number, op);
        }
        if self.options.descriptors {
            self.advance(self.now);
        }
    }

    pub(super) fn close(&mut self, side: SideIndex) {
        if !self.is_open(side) {
            return;
        }
        self.flush(side);
        let at = self.across(side).max(self.sides[side].last_arrival);
        self.put(at, What::Goodbye { side });
        self.end(side, CloseReason::Local);
        if self.options.descriptors {
            self.advance(self.now);
        }
    }

    /// The end of `side` is dropped without a goodbye.
    pub(super) fn vanish(&mut self, side: SideIndex) {
        if self.is_open(side) {
            self.end(side, CloseReason::Local);
            self.notice_gone(1 - side);
        }
        if self.options.descriptors {
            self.advance(self.now);
        }
    }

    pub(super) fn cut(&mut self) {
        if !std::mem::replace(&mut self.cut, true) {
            self.notice_gone(0);
            self.notice_gone(1);
        }
    }

    fn notice_gone(&mut self, side: SideIndex) {
        let (min, max) = self.options.detection_ns;
        let after = if self.options.descriptors { 0 } else { self.seed.between(min, max) };
        self.put(Nanos(self.now.0 + after), What::Gone { side });
    }

    pub(super) fn arm(&mut self, side: SideIndex) -> bool {
        if self.has_events(side) && !self.breaks(Violation::ArmWithEvents) {
            return false;
        }
        self.sides[side].armed = true;
        true
    }

    pub(super) fn poll(&mut self, side: SideIndex, now: Nanos, out: &mut Events) {
        self.advance(now);
        self.sides[side].armed = false;
        if !self.breaks(Violation::WakeForEver) {
            self.sides[side].quiet();
        }
        if self.breaks(Violation::CloseFirst) {
            self.report_end(side, out);
        }
        // Which of the two queues is looked at first is nobody's promise.
        if self.seed.chance(500) {
            self.report_done(side, out);
            self.report_received(side, out);
        } else {
            self.report_received(side, out);
            self.report_done(side, out);
        }
        if self.sides[side].outstanding.is_empty() && self.sides[side].inbox.is_empty() {
            self.report_end(side, out);
        }
    }

    // ---- what poll reports ----

    fn report_done(&mut self, side: SideIndex, out: &mut Events) {
        if self.breaks(Violation::ReorderDone)
            && let [first, second, ..] = self.sides[side].outstanding.make_contiguous()
            && first.done
            && second.done
        {
            std::mem::swap(first, second);
        }
        while let Some(front) = self.sides[side].outstanding.front().filter(|front| front.done) {
            let event = front.event();
            if event.is_some() && !out.has_room() {
                return;
            }
            self.sides[side].outstanding.pop_front();
            self.sides[side].first += 1;
            let Some(event) = event else { continue };
            if self.breaks(Violation::LoseDone) && self.seed.chance(50) {
                continue;
            }
            out.push(event);
            if self.breaks(Violation::RepeatDone) && self.seed.chance(50) {
                out.push(event);
            }
        }
    }

    fn report_received(&mut self, side: SideIndex, out: &mut Events) {
        while out.has_room()
            && let Some(event) = self.sides[side].inbox.pop_front()
        {
            out.push(event);
            let at = self.across(side);
            self.put(at, What::Credit { side: 1 - side });
        }
        if self.options.descriptors {
            self.advance(self.now);
        }
    }

    fn report_end(&mut self, side: SideIndex, out: &mut Events) {
        if let Life::Ended { reason, reports_left } = &mut self.sides[side].life
            && *reports_left > 0
            && out.push(Event::Closed(*reason))
        {
            *reports_left -= 1;
        }
    }

    pub(super) fn has_events(&self, side: SideIndex) -> bool {
        let this = &self.sides[side];
        let mut done = this.outstanding.iter().take_while(|out| out.done);
        !this.inbox.is_empty()
            || done.any(|out| out.event().is_some())
            || matches!(this.life, Life::Ended { reports_left: 1.., .. })
    }
}

impl Side {
    pub(super) fn find(&mut self, number: u64) -> Option<&mut Outstanding> {
        let index = number.checked_sub(self.first)?;
        self.outstanding.get_mut(usize::try_from(index).ok()?)
    }

    fn quiet(&self) {
        if let Some(wake) = &self.wake {
            // Empty is the usual answer.
            let _empty = rustix::io::read(wake, &mut [0; 8]);
        }
    }
}

impl Outstanding {
    const fn event(&self) -> Option<Event> {
        let id: Option<OpId> = match self.signal {
            Signal::Yes(id) => Some(id),
            Signal::No => None,
        };
        match (self.result, id) {
            (Ok(()), Some(id)) => Some(Event::Done(id)),
            (Ok(()), None) => None,
            (Err(error), id) => Some(Event::Failed(id, error)),
        }
    }
}
