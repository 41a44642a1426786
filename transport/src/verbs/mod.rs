//! The RDMA fabric: one reliable-connected queue pair, whose device moves the bytes while neither host's CPU is asked.
//!
//! A write of 4 KiB and a message behind it are two work requests of one chain and one doorbell; the peer's poll finds the message in its completion
//! queue, and by then the 4 KiB are in its memory (InfiniBand Architecture Specification 1.4, volume 1, section 9.5: a reliable connection delivers
//! in order). Keys of granted memory travel on the control connection only.
//!
//! An operation on memory that its owner revoked ends the link: that is how a queue pair answers. Whoever revokes therefore tells the peer first,
//! and sessions revoke only what the peer gave back.

mod chain;
mod context;
mod counters;
mod device;
mod ending;
mod error;
mod establish;
mod inbox;
mod library;
mod objects;
mod outbox;
mod regions;
mod sending;
mod silence;
mod sleep;
mod sys;
#[cfg(test)]
mod tests;
mod windows;
mod wire;

pub use counters::{Counters, Watch};
pub use device::{DeviceChoice, DeviceInfo, Gid, PortInfo, check, devices};
pub use error::{NoRdma, VerbsError};
pub use windows::GrantMethod;
#[doc(hidden)]
pub use wire::{frame_again, slot_again};

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use self::chain::MAX_INLINE;
use self::context::Context;
use self::counters::Tally;
use self::inbox::Inbox;
use self::objects::{CompletionQueue, QueuePair};
use self::outbox::Outbox;
use self::regions::Books;
use self::sending::Kind;
use self::silence::Silence;
use self::sleep::Bed;
use self::sys::{IBV_WC_RECV_RDMA_WITH_IMM, IBV_WC_SUCCESS, ibv_wc};
use self::wire::{SLOT_BYTES, Slot};
use crate::fabric::{CloseReason, Event, Events, Fabric, Limits, MAX_MESSAGE, Message, Op, OpError, PostError, Signal};
use crate::link::control::Control;
use crate::span::RemoteSpan;
use crate::time::Nanos;

/// Marks the name of a receive; the rest is its slot. Work requests are counted from 1 and never come here.
const RECEIVE: u64 = 1 << 63;

/// Completions taken from the queue at once.
const AT_ONCE: usize = 16;

/// How often who polls without end looks for what raises no completion: the control connection and the device's own events.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long a goodbye, or what must be done before memory is given back, may take: a peer that is gone is known within a second.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Events that wait, from which on no completions are taken.
const READY_ENOUGH: usize = 256;

/// Events that may wait for a poll with room: those, what one look at the completion queue adds, and all reports of the outbox.
const MAX_READY: usize = 1024;

/// How far a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// Ends when request `goodbye` is done.
    Closing {
        goodbye: u64,
    },
    Ended(CloseReason),
    /// The caller was told.
    Over,
}

/// One end of a link over RDMA.
pub struct VerbsFabric {
    /// Goes first when the fabric is dropped, and when the link ends: then the device touches nothing of ours any more.
    pair: Option<QueuePair>,
    completions: Arc<CompletionQueue>,
    context: Arc<Context>,
    books: Books,
    outbox: Outbox,
    inbox: Inbox,
    ready: VecDeque<Event>,
    found: Box<[ibv_wc]>,
    phase: Phase,
    control: Box<dyn Control>,
    bed: Bed,
    asleep: bool,
    limits: Limits,
    /// Bytes of the longest single work request.
    piece: u32,
    inline: u32,
    silence: Silence,
    looked_at: Nanos,
    port_down: bool,
}

impl VerbsFabric {
    /// What was posted, and how, since the link began.
    pub fn counters(&self) -> Counters {
        self.outbox.tally.read()
    }

    /// The same, for whoever looks on from another thread.
    pub fn watch(&self) -> Watch {
        Tally::watch(&self.outbox.tally)
    }

    /// The limits of an end whose device takes `piece` bytes at once.
    fn limits_for(piece: u32) -> Limits {
        /// Longer operations cost nothing less a byte, and each keeps its buffer busy.
        const LONGEST: u32 = 64 << 20;
        const PIECES: u32 = outbox::DEPTH / 4;
        Limits {
            max_message: MAX_MESSAGE as u32,
            max_op_len: piece.saturating_mul(PIECES).min(LONGEST),
            queue_depth: outbox::DEPTH,
            immediate: false,
            peer_mappable: false,
            revocation_ends_link: true,
        }
    }

    /// Takes completions once, where there is room for what they tell; how many there were.
    #[inline]
    fn take(&mut self, out: Option<&mut Events>) -> usize {
        if self.ready.len() > READY_ENOUGH { 0 } else { self.take_now(out) }
    }

    /// Events go to `out`, and to `ready` where it is full or there is none.
    #[inline]
    fn take_now(&mut self, mut out: Option<&mut Events>) -> usize {
        if self.pair.is_none() {
            return 0;
        }
        let count = match self.completions.poll(&mut self.found) {
            Ok(count) => count,
            Err(error) => {
                tracing::error!(%error, "the completion queue cannot be used");
                self.end(CloseReason::Device("its completion queue overran"));
                return 0;
            }
        };
        if count > 0 {
            self.silence.hear();
        }
        for index in 0..count {
            let Some(completion) = self.found.get(index).copied() else { break };
            match (completion.status, completion.wr_id & RECEIVE != 0) {
                (IBV_WC_SUCCESS, true) => self.received(&completion, &mut out),
                (IBV_WC_SUCCESS, false) => self.sent(completion.wr_id, &mut out),
                _ => {
                    self.broken(index, count);
                    break;
                }
            }
        }
        if self.inbox.must_post() {
            self.give_slots_back();
        }
        count
    }

    /// Events come in order: past those that wait already none goes straight to the caller.
    #[inline]
    fn tell(&mut self, event: Event, out: &mut Option<&mut Events>) {
        let told = self.ready.is_empty() && out.as_mut().is_some_and(|out| out.push(event));
        if !told {
            self.ready.push_back(event);
        }
    }

    #[inline]
    fn sent(&mut self, number: u64, out: &mut Option<&mut Events>) {
        if !self.outbox.complete(number) {
            return self.end(CloseReason::Device("it reported a request that was not made"));
        }
        while let Some(event) = self.outbox.next_event() {
            self.tell(event, out);
        }
        if let Phase::Closing { goodbye } = self.phase
            && self.outbox.is_done(goodbye)
        {
            self.end(CloseReason::Local);
        }
    }

    #[inline]
    fn received(&mut self, completion: &ibv_wc, out: &mut Option<&mut Events>) {
        let slot = (completion.wr_id & !RECEIVE) as u32;
        self.outbox.tally.received();
        if !self.inbox.receives.came_back(slot) {
            return self.end(CloseReason::Device("it reported a receive slot that it did not have"));
        }
        let event = if completion.opcode == IBV_WC_RECV_RDMA_WITH_IMM {
            Some(Event::Notify(objects::immediate(completion)))
        } else {
            self.said(slot, completion.byte_len).map(Event::Message)
        };
        self.inbox.receives.push(slot);
        if self.inbox.overrun() {
            return self.end(CloseReason::Protocol("more messages than it was given room for"));
        }
        // What comes after this side said goodbye, or behind the peer's, is not told.
        if let Some(event) = event
            && self.phase == Phase::Open
        {
            self.tell(event, out);
        }
    }

    /// What lies in a slot, where that is a message for the caller.
    #[inline]
    fn said(&mut self, slot: u32, len: u32) -> Option<Message> {
        let Some((message_len, taken)) = wire::message(self.inbox.receives.header(slot), len) else {
            self.said_by_the_fabric(slot, len);
            return None;
        };
        if !self.inbox.credited(taken) {
            self.end(CloseReason::Protocol("credits that cannot be true"));
            return None;
        }
        Message::filled(message_len, |bytes| self.inbox.receives.read(slot, wire::HEADER, bytes))
    }

    /// As [`Self::said`], for the words of the fabric's own and for what is none.
    #[cold]
    fn said_by_the_fabric(&mut self, slot: u32, len: u32) {
        let mut bytes = [0; SLOT_BYTES];
        self.inbox.receives.read(slot, 0, &mut bytes);
        match Slot::parse(&bytes, len) {
            Ok((_, returned)) if !self.inbox.credited(returned) => self.end(CloseReason::Protocol("credits that cannot be true")),
            Ok((Slot::Credits, _)) => {}
            Ok((Slot::Revoke(number), _)) => {
                if let Err(reason) = self.books.revoked_by_peer(number) {
                    self.end(reason);
                }
            }
            Ok((Slot::Goodbye, _)) => self.end(CloseReason::PeerClosed),
            Ok((Slot::Message(_), _)) => self.end(CloseReason::Protocol("a message that is too long")),
            Err(what) => self.end(CloseReason::Protocol(what)),
        }
    }

    /// Posts the slots again that were taken.
    fn give_slots_back(&mut self) {
        let Some(pair) = &mut self.pair else { return };
        let count = self.inbox.receives.len();
        if let Err(error) = pair.post_receives(&mut self.inbox.receives) {
            tracing::error!(%error, "the device refused receive buffers");
            return self.end(CloseReason::Device("it refused a receive buffer"));
        }
        self.inbox.posted_again(count);
    }
}

impl Fabric for VerbsFabric {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    #[inline]
    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        if self.phase != Phase::Open {
            return self.post_ended(signal);
        }
        let posted = match op {
            Op::Write { from, to } => self.transfer(signal, from, to, Kind::Write),
            Op::WriteNotify { from, to, notify } => self.transfer(signal, from, to, Kind::WriteNotify(notify)),
            Op::Read { from, into } => self.transfer(signal, into, from, Kind::Read),
            Op::Send { message } => {
                if !self.outbox.has_room(1) || !self.inbox.may_send() {
                    return Err(PostError::Full);
                }
                if message.len() > MAX_MESSAGE {
                    let len = u32::try_from(message.len()).unwrap_or(u32::MAX);
                    self.outbox.refuse(signal, OpError::TooLong { len, limit: self.limits.max_message });
                    return Ok(());
                }
                self.put(Slot::Message(message), false);
                self.outbox.report(signal, 1);
                Ok(())
            }
        };
        if self.pair.is_none() {
            // The device refused the batch that this one filled.
            self.answer_all();
        }
        posted
    }

    /// The peer's memory is not mapped here: its own CPU stores what may be polled.
    fn store_polled(&mut self, _to: RemoteSpan, _bytes: &[u8]) -> Result<(), OpError> {
        Err(OpError::Denied)
    }

    #[inline]
    fn flush(&mut self) {
        self.hand_over();
    }

    fn poll(&mut self, now: Nanos, out: &mut Events) {
        if self.asleep {
            self.asleep = false;
            self.bed.wake_up();
            self.completions.take_notifications();
            self.look(now);
        }
        loop {
            while out.has_room() {
                let Some(event) = self.ready.pop_front() else { break };
                out.push(event);
            }
            if !out.has_room() {
                return;
            }
            if let Phase::Ended(reason) = self.phase {
                out.push(Event::Closed(reason));
                self.phase = Phase::Over;
                return;
            }
            // Operations that were refused before they were posted wait for those before them, and for nothing else.
            while let Some(event) = self.outbox.next_event() {
                self.ready.push_back(event);
            }
            let found = self.take(Some(&mut *out));
            // Fewer than were asked for: there are no others, and the caller has something to do.
            if found < AT_ONCE && self.ready.is_empty() && !matches!(self.phase, Phase::Ended(_)) {
                if found == 0 && self.inbox.receives.len() > 0 {
                    self.give_slots_back();
                }
                break;
            }
        }
        if self.inbox.owes_credits() && self.phase == Phase::Open && self.say(Slot::Credits, false) {
            self.hand_over();
        }
        if now.0.saturating_sub(self.looked_at.0) >= LOOK_EVERY.as_nanos() as u64 {
            self.look(now);
        }
    }

    fn arm(&mut self) -> bool {
        self.flush();
        if let Err(error) = self.completions.request_notification() {
            tracing::error!(%error, "the completion queue cannot be armed");
            self.end(CloseReason::Device("its completion queue cannot be armed"));
        }
        // What came before the queue was armed wakes nobody, and none of it may be more than the fabric's own words.
        while self.take(None) > 0 {}
        self.give_slots_back();
        while let Some(event) = self.outbox.next_event() {
            self.ready.push_back(event);
        }
        self.asleep = true;
        let now = Nanos::now();
        self.bed.wake_at(self.silence.alarm(now), now);
        self.ready.is_empty() && !matches!(self.phase, Phase::Ended(_))
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bed.fd())
    }

    fn close(&mut self) {
        if self.phase != Phase::Open {
            return;
        }
        // A peer that takes nothing may leave no slot for a goodbye: it hears of the end when the control connection goes.
        if self.say(Slot::Goodbye, true) {
            self.phase = Phase::Closing { goodbye: self.outbox.last_posted() };
            self.hand_over();
        } else {
            self.end(CloseReason::Local);
        }
    }
}

impl Drop for VerbsFabric {
    fn drop(&mut self) {
        // A peer that hears no goodbye takes this side for dead; one that is on its way would be lost with the queue pair.
        self.close();
        if let Phase::Closing { goodbye } = self.phase {
            self.drain(|fabric| fabric.outbox.is_done(goodbye));
        }
        self.books.free_windows();
        self.pair = None;
    }
}

impl std::fmt::Debug for VerbsFabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsFabric")
            .field("device", &self.context.name())
            .field("phase", &self.phase)
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

const _: () = assert!(MAX_READY >= READY_ENOUGH + AT_ONCE + outbox::MAX_REPORTS && wire::SLOT_BYTES <= MAX_INLINE);
