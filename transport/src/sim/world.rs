//! What happens between two simulated ends, and when: one agenda of arrivals in virtual time.
//!
//! A 4 KiB write posted at 100 us lands in three pieces at 107, 103 and 109 us; the message posted behind it arrives at 109 us or later,
//! and the write's own completion is back at 113 us. The agenda is the only place where time passes.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::fabric::{CloseReason, Event, Events, Full, Limits, Message, Op, OpError, OpId, Signal};
use crate::memory::Memory;
use crate::sim::Seed;
use crate::sim::options::{SimOptions, Violation};
use crate::sim::regions::Book;
use crate::span::{Access, LocalSpan, RemoteSpan};
use crate::time::Nanos;

/// One of the two ends.
pub(super) type SideIndex = usize;

#[derive(Debug, PartialEq, Eq)]
enum Life {
    Open,
    Ended { reason: CloseReason, reports_left: u8 },
}

/// An operation as the wire carries it; its spans stay checked because they are never changed.
#[derive(Clone, Copy, Debug)]
enum Carried {
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
    /// Refused when it was posted, or told to be lost.
    Nothing,
}

#[derive(Debug)]
struct Outstanding {
    signal: Signal,
    op: Carried,
    sent: bool,
    done: bool,
    result: Result<(), OpError>,
}

/// Where bytes of an operation will land, until they have.
#[derive(Debug)]
struct Landing {
    memory: usize,
    start: u64,
    end: u64,
    at: Nanos,
}

#[derive(Debug)]
pub(super) struct Side {
    pub(super) book: Book,
    life: Life,
    outstanding: VecDeque<Outstanding>,
    /// Number of the operation at the front of `outstanding`; each has one more than the one before.
    first: u64,
    /// Messages and notifications that the peer will still take.
    credits: u32,
    inbox: VecDeque<Event>,
    landings: Vec<Landing>,
    /// No operation of this side arrives before this.
    last_arrival: Nanos,
    armed: bool,
    wake: Option<Arc<OwnedFd>>,
}

#[derive(Debug)]
enum What {
    /// Some bytes of an operation move.
    Piece {
        side: SideIndex,
        number: u64,
        local: LocalSpan,
        remote: RemoteSpan,
        into_remote: bool,
        captured: Option<Arc<Memory>>,
    },
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
struct Due {
    at: Nanos,
    order: u64,
    what: What,
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
    limits: Limits,
    agenda: BinaryHeap<Reverse<Due>>,
    next_order: u64,
    cut: bool,
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

    fn breaks(&self, violation: Violation) -> bool {
        self.options.violate == Some(violation)
    }

    fn put(&mut self, at: Nanos, what: What) {
        let order = self.next_order;
        self.next_order += 1;
        self.agenda.push(Reverse(Due { at, order, what }));
    }

    /// When something that leaves `side` now is across.
    fn across(&mut self, side: SideIndex) -> Nanos {
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

    pub(super) fn post(&mut self, side: SideIndex, signal: Signal, op: Op<'_>) -> Result<(), Full> {
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
            return Err(Full);
        }
        if needs_credit && result.is_ok() {
            match this.credits.checked_sub(1) {
                Some(left) => this.credits = left,
                None if lossy => carried = Carried::Nothing,
                None => return Err(Full),
            }
        }
        this.outstanding.push_back(Outstanding {
            signal,
            op: carried,
            sent: false,
            done: false,
            result,
        });
        if self.seed.chance(self.options.eager_permille) {
            self.flush(side);
        }
        Ok(())
    }

    fn carry(&self, op: Op<'_>) -> Result<Carried, OpError> {
        match op {
            Op::Write { from, to } => self.carry_write(from, to, None),
            Op::WriteNotify { from, to, notify } => self.carry_write(from, to, Some(notify)),
            Op::Read { from, into } => {
                let (from_len, into_len) = self.check_lengths(from.len, into.len)?;
                self.check_access(from.access, into.access)?;
                Ok(Carried::Read {
                    from: RemoteSpan { len: from_len, ..from },
                    into: LocalSpan { len: into_len, ..into },
                })
            }
            Op::Send { message } => {
                let limit = self.limits.max_message;
                let too_long = OpError::TooLong {
                    len: u32::try_from(message.len()).unwrap_or(u32::MAX),
                    limit,
                };
                let cut = message
                    .get(..limit as usize)
                    .filter(|_| self.breaks(Violation::CutLongMessage));
                let shortened = message.split_last().filter(|_| self.breaks(Violation::ShortenMessage));
                let bytes = cut.or(shortened.map(|(_, rest)| rest)).unwrap_or(message);
                Message::new(bytes).map(Carried::Send).ok_or(too_long)
            }
        }
    }

    fn carry_write(&self, from: LocalSpan, to: RemoteSpan, notify: Option<u32>) -> Result<Carried, OpError> {
        let (from_len, to_len) = self.check_lengths(from.len, to.len)?;
        self.check_access(from.access, to.access)?;
        Ok(Carried::Write {
            from: LocalSpan { len: from_len, ..from },
            to: RemoteSpan { len: to_len, ..to },
            notify,
        })
    }

    fn check_lengths(&self, from: u32, to: u32) -> Result<(u32, u32), OpError> {
        let shorter = from.min(to);
        let too_long = shorter > self.limits.max_op_len && !self.breaks(Violation::IgnoreMaxOpLen);
        if (from != to && !self.breaks(Violation::IgnoreMismatch)) || too_long {
            return Err(OpError::Mismatch { from, to });
        }
        Ok((shorter, shorter))
    }

    fn check_access(&self, source: Access, target: Access) -> Result<(), OpError> {
        let fits = source.allows(Access::READ) && target.allows(Access::WRITE);
        if fits || self.breaks(Violation::IgnoreAccess) {
            Ok(())
        } else {
            Err(OpError::Denied)
        }
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
        let after = if self.options.descriptors {
            0
        } else {
            self.seed.between(min, max)
        };
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

    fn has_events(&self, side: SideIndex) -> bool {
        let this = &self.sides[side];
        let mut done = this.outstanding.iter().take_while(|out| out.done);
        !this.inbox.is_empty()
            || done.any(|out| out.event().is_some())
            || matches!(this.life, Life::Ended { reports_left: 1.., .. })
    }

    // ---- what happens on the way ----

    /// Lets everything happen that is due by `to`.
    pub(super) fn advance(&mut self, to: Nanos) {
        while let Some(Reverse(due)) = self.agenda.peek()
            && due.at <= to
            && let Some(Reverse(due)) = self.agenda.pop()
        {
            self.now = self.now.max(due.at);
            self.happen(due.what);
        }
        self.now = self.now.max(to);
    }

    fn send_off(&mut self, side: SideIndex, number: u64, op: Carried) {
        let floor = self.sides[side].last_arrival.max(self.now);
        let mut arrive = self.across(side).max(floor);
        match op {
            Carried::Write { from, to, .. } => {
                if self.breaks(Violation::DoneBeforeData) {
                    self.put(self.now, What::Done { side, number });
                }
                let late = self.breaks(Violation::MessageBeforeData) || self.breaks(Violation::NotifyBeforeData);
                for (start, len) in self.pieces(from.len) {
                    let (Some(local), Some(remote)) = (from.part(start, len), to.part(start, len)) else {
                        continue;
                    };
                    let mut at = self.landing(side, &remote);
                    if late || self.breaks(Violation::DoneBeforeData) {
                        at = Nanos(at.0 + 2 * (self.options.latency_max_ns + 1));
                    }
                    if !late {
                        arrive = arrive.max(at);
                    }
                    self.put_piece(at, side, number, (local, remote), true);
                }
            }
            Carried::Read { from, into } => {
                for (start, len) in self.pieces(into.len) {
                    let (Some(local), Some(remote)) = (into.part(start, len), from.part(start, len)) else {
                        continue;
                    };
                    // Bytes are sampled when all earlier writes are there; later ones may be there too.
                    let at = if self.breaks(Violation::ReadPassesWrite) {
                        self.now
                    } else {
                        self.across(side).max(floor)
                    };
                    arrive = arrive.max(at);
                    self.put_piece(at, side, number, (local, remote), false);
                }
                // The read holds up its own completion, not the operations behind it.
                self.put(arrive, What::Arrive { side, number, op });
                return;
            }
            Carried::Send(_) | Carried::Nothing => {}
        }
        self.sides[side].last_arrival = arrive;
        self.put(arrive, What::Arrive { side, number, op });
    }

    fn put_piece(&mut self, at: Nanos, side: SideIndex, number: u64, spans: (LocalSpan, RemoteSpan), into_remote: bool) {
        let (local, remote) = spans;
        let keeps = self.breaks(Violation::WriteAfterRevoke) && into_remote;
        let captured = self.remote_memory(side, &remote).ok().filter(|_| keeps);
        self.put(
            at,
            What::Piece {
                side,
                number,
                local,
                remote,
                into_remote,
                captured,
            },
        );
    }

    /// When a piece lands: any time, but never before bytes of an earlier write to the same place.
    fn landing(&mut self, side: SideIndex, remote: &RemoteSpan) -> Nanos {
        let mut at = self.across(side);
        let Ok(memory) = self.remote_memory(side, remote) else {
            return at;
        };
        let (memory, start, end) = (
            Arc::as_ptr(&memory) as usize,
            remote.offset,
            remote.offset + u64::from(remote.len),
        );
        let now = self.now;
        let landings = &mut self.sides[side].landings;
        landings.retain(|landing| landing.at >= now);
        for earlier in landings.iter() {
            if earlier.memory == memory && earlier.start < end && start < earlier.end {
                at = at.max(earlier.at);
            }
        }
        landings.push(Landing { memory, start, end, at });
        at
    }

    /// Cuts `len` bytes into pieces, in any order.
    fn pieces(&mut self, len: u32) -> Vec<(u32, u32)> {
        let count = self.seed.between(1, u64::from(self.options.max_pieces.max(1)));
        let mut cuts: Vec<u32> = (1..count).map(|_| self.seed.below(u64::from(len)) as u32).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        let mut pieces: Vec<_> = cuts.windows(2).map(|pair| (pair[0], pair[1] - pair[0])).collect();
        for last in (1..pieces.len()).rev() {
            pieces.swap(last, self.seed.below(last as u64 + 1) as usize);
        }
        pieces
    }

    fn remote_memory(&self, side: SideIndex, span: &RemoteSpan) -> Result<Arc<Memory>, OpError> {
        self.sides[side].book.remote(span, &self.sides[1 - side].book)
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Cut => self.cut(),
            What::Gone { side } => self.end(side, CloseReason::PeerGone),
            _ if self.cut => {}
            What::Piece {
                side,
                number,
                local,
                remote,
                into_remote,
                captured,
            } => {
                let moved = self.move_bytes(side, &local, &remote, into_remote, captured);
                if let Err(error) = moved {
                    self.fail(side, number, error);
                }
            }
            What::Arrive { side, number, op } => self.arrive(side, number, op),
            What::Done { side, number } => {
                if let Some(out) = self.sides[side].find(number) {
                    out.done = true;
                }
                self.rouse(side);
            }
            What::Credit { side } => self.sides[side].credits += 1,
            What::Goodbye { side } => {
                if !self.breaks(Violation::LoseClose) {
                    self.end(1 - side, CloseReason::PeerClosed);
                }
            }
        }
    }

    fn move_bytes(
        &mut self,
        side: SideIndex,
        local: &LocalSpan,
        remote: &RemoteSpan,
        into_remote: bool,
        captured: Option<Arc<Memory>>,
    ) -> Result<(), OpError> {
        if !self.is_open(1 - side) {
            return Err(OpError::Closed);
        }
        let here = self.sides[side].book.local(local)?;
        let there = captured.map_or_else(|| self.remote_memory(side, remote), Ok)?;
        let (len, here_at, there_at) = (u64::from(local.len), local.offset, remote.offset);
        let copied = if into_remote {
            there.copy_from(there_at, &here, here_at, len)
        } else {
            here.copy_from(here_at, &there, there_at, len)
        };
        if into_remote && len > 0 && self.breaks(Violation::FlipBit) && self.seed.chance(20) {
            let (at, mut byte) = (there_at + self.seed.below(len), [0]);
            let flipped = there.read(at, &mut byte).and_then(|()| there.write(at, &[byte[0] ^ 0x10]));
            debug_assert!(flipped.is_ok());
        }
        // The grant was compared with the memory when it was imported, so this is a region that changed since.
        copied.map_err(|_| OpError::Revoked)
    }

    fn arrive(&mut self, side: SideIndex, number: u64, op: Carried) {
        if !self.is_open(1 - side) {
            return;
        }
        let event = match op {
            Carried::Send(message) => Some(Event::Message(message)),
            Carried::Write { notify, to, .. } => {
                let stands = self.remote_memory(side, &to);
                if let Err(error) = stands {
                    self.fail(side, number, error);
                }
                let failed = self.sides[side].find(number).is_some_and(|out| out.result.is_err());
                // A failed write notifies nobody, so the place kept for its notification is free again.
                if failed && notify.is_some() {
                    self.sides[side].credits += 1;
                }
                notify.filter(|_| !failed).map(Event::Notify)
            }
            Carried::Read { .. } | Carried::Nothing => None,
        };
        if let Some(event) = event {
            self.deliver(1 - side, event);
        }
        let done = self.across(1 - side);
        self.put(done, What::Done { side, number });
    }

    fn deliver(&mut self, to: SideIndex, event: Event) {
        let is_message = matches!(event, Event::Message(_));
        let repeat = is_message && self.breaks(Violation::RepeatMessage) && self.seed.chance(50);
        let swap = is_message && self.breaks(Violation::ReorderMessages);
        let inbox = &mut self.sides[to].inbox;
        match inbox.len().checked_sub(1).filter(|_| swap) {
            Some(before_last) => inbox.insert(before_last, event),
            None => inbox.push_back(event),
        }
        if repeat {
            inbox.push_back(event);
        }
        self.rouse(to);
    }

    fn fail(&mut self, side: SideIndex, number: u64, error: OpError) {
        if let Some(out) = self.sides[side].find(number) {
            out.result = Err(error);
        }
    }

    /// The link is over for `side`: what it waits for fails, and the reason is reported behind that.
    fn end(&mut self, side: SideIndex, reason: CloseReason) {
        if !self.is_open(side) {
            return;
        }
        let reports_left = if self.breaks(Violation::CloseTwice) { 2 } else { 1 };
        let this = &mut self.sides[side];
        this.life = Life::Ended { reason, reports_left };
        for out in this.outstanding.iter_mut().filter(|out| !out.done) {
            out.done = true;
            out.result = Err(OpError::Closed);
        }
        self.rouse(side);
    }

    fn rouse(&mut self, side: SideIndex) {
        if !self.sides[side].armed || !self.has_events(side) {
            return;
        }
        if self.breaks(Violation::LoseWake) && self.seed.chance(20) {
            return;
        }
        if let Some(wake) = &self.sides[side].wake {
            // The counter cannot overflow: it is cleared by every poll, and one write is made for each time a side is armed.
            let written = rustix::io::write(wake, &1_u64.to_ne_bytes());
            debug_assert!(written.is_ok(), "an eventfd of our own refused a write");
        }
    }
}

impl Side {
    fn find(&mut self, number: u64) -> Option<&mut Outstanding> {
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
