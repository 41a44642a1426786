//! The RDMA fabric: one reliable-connected queue pair, whose device moves the bytes while neither host's CPU is asked.
//!
//! A write of 4 KiB and a message behind it are two work requests of one chain and one doorbell; the peer's poll finds the message in its completion
//! queue, and by then the 4 KiB are in its memory (InfiniBand Architecture Specification 1.4, volume 1, section 9.5: a reliable connection delivers
//! in order). Keys of granted memory travel on the control connection only.
//!
//! An operation on memory that its owner revoked ends the link: that is how a queue pair answers. Whoever revokes therefore tells the peer first,
//! and sessions revoke only what the peer gave back.

mod chain;
mod counters;
mod device;
mod error;
mod establish;
mod inbox;
mod library;
mod objects;
mod outbox;
mod regions;
mod sleep;
mod sys;
mod wire;

pub use counters::{Counters, Watch};
pub use device::{DeviceChoice, DeviceInfo, Gid, PortInfo, devices};
pub use error::{NoRdma, VerbsError};

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::chain::{Bytes, MAX_INLINE, What};
use self::counters::Tally;
use self::inbox::Inbox;
use self::objects::{CompletionQueue, Context, QueuePair};
use self::outbox::Outbox;
use self::regions::Books;
use self::sleep::Bed;
use self::sys::{
    IBV_WC_LOC_PROT_ERR, IBV_WC_RECV_RDMA_WITH_IMM, IBV_WC_REM_ACCESS_ERR, IBV_WC_REM_INV_REQ_ERR, IBV_WC_REM_OP_ERR,
    IBV_WC_SUCCESS, IBV_WC_WR_FLUSH_ERR, ibv_wc,
};
use self::wire::{SLOT_BYTES, SLOTS, Slot};
use crate::fabric::{CloseReason, Event, Events, Fabric, Full, Limits, MAX_MESSAGE, Message, Op, OpError, Signal};
use crate::link::control::Control;
use crate::span::{LocalSpan, RemoteSpan};
use crate::time::Nanos;

/// Marks the name of a receive; the rest is its slot. Work requests are counted from 1 and never come here.
const RECEIVE: u64 = 1 << 63;

/// Completions taken from the queue at once.
const AT_ONCE: usize = 16;

/// How often who polls without end looks for what raises no completion: the control connection and the device's own events.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How long a peer may be silent before it is asked whether it is there. A black hole raises no event, so only a question that is not
/// acknowledged tells: see `establish::RETRIES`.
const SILENCE: Duration = Duration::from_secs(1);

/// How long a goodbye, or what must be done before memory is given back, may take: a peer that is gone is known within 0.5 s.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Events that may wait for a poll with room: all receive slots, and all reports of the outbox.
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
    heard_at: Nanos,
    looked_at: Nanos,
    asked_at: Nanos,
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

    // ---- sending ----

    /// A one-sided operation: one work request for each piece that the device takes.
    #[inline]
    fn transfer(&mut self, signal: Signal, local: LocalSpan, remote: RemoteSpan, kind: Kind) -> Result<(), Full> {
        let reads = kind == Kind::Read;
        let (from, to) = if reads { (remote.len, local.len) } else { (local.len, remote.len) };
        // Nearly always; a division takes as long as the rest of the checks.
        let pieces = if from <= self.piece { 1 } else { from.div_ceil(self.piece) };
        let notifies = matches!(kind, Kind::WriteNotify(_));
        if !self.outbox.has_room(pieces) || (notifies && !self.inbox.may_send()) {
            return Err(Full);
        }
        if from != to || from > self.limits.max_op_len {
            self.outbox.refuse(signal, OpError::Mismatch { from, to });
            return Ok(());
        }
        let (read, written) = if reads { (remote.access, local.access) } else { (local.access, remote.access) };
        if !read.read || !written.write {
            self.outbox.refuse(signal, OpError::Denied);
            return Ok(());
        }
        let mut done = 0;
        for left in (0..pieces).rev() {
            let len = (from - done).min(self.piece);
            if !self.piece_of(signal, local, remote, kind, done, len, left == 0) {
                self.outbox.refuse(signal, OpError::Revoked);
                return Ok(());
            }
            done += len;
        }
        self.outbox.report(signal, pieces);
        Ok(())
    }

    /// One work request. False where a region is gone: nothing was posted, because all pieces are of the same two regions.
    #[inline]
    #[expect(clippy::too_many_arguments, reason = "spans by value stay in registers")]
    fn piece_of(
        &mut self,
        signal: Signal,
        local: LocalSpan,
        remote: RemoteSpan,
        kind: Kind,
        done: u32,
        len: u32,
        last: bool,
    ) -> bool {
        let offset = local.offset + u64::from(done);
        let (Some(ours), Some(theirs)) = (self.books.locals.find(local.name), self.books.remotes.find(remote.name)) else {
            return false;
        };
        let bytes = match &ours.region {
            _ if len == 0 => Bytes::Nothing,
            _ if len <= self.inline && kind != Kind::Read => Bytes::CopiedFrom { memory: &ours.memory, offset, len },
            Some(region) => Bytes::Registered { region, offset, len },
            None => return false,
        };
        let (address, key) = (theirs.address + remote.offset + u64::from(done), theirs.key);
        let (what, signalled) = match kind {
            Kind::Write => (What::Write { address, key }, false),
            Kind::WriteNotify(notify) if last => (What::WriteNotify { address, key, notify }, false),
            Kind::WriteNotify(_) => (What::Write { address, key }, false),
            // Whoever reads waits for it.
            Kind::Read => (What::Read { address, key }, last && signal != Signal::No),
        };
        if !self.outbox.push(signalled, what, bytes) {
            return false;
        }
        if matches!(what, What::WriteNotify { .. }) {
            self.inbox.notifying();
        }
        if self.outbox.sends.is_full() {
            self.hand_over();
        }
        true
    }

    /// Sends a word of the fabric's own, where both queues have room for it.
    fn say(&mut self, slot: Slot<'_>, signalled: bool) -> bool {
        if !self.inbox.may_send_own() || !self.outbox.has_reserve() {
            return false;
        }
        self.put(slot, signalled);
        true
    }

    #[inline]
    fn put(&mut self, slot: Slot<'_>, signalled: bool) {
        let (header, body) = slot.encode(self.inbox.sending());
        let pushed = self.outbox.push(signalled, What::Send, Bytes::Slot { header, body: body.as_ref() });
        debug_assert!(pushed, "a slot fits into every request");
        if self.outbox.sends.is_full() {
            self.hand_over();
        }
    }

    #[inline]
    fn hand_over(&mut self) {
        let Some(pair) = &mut self.pair else { return };
        if self.outbox.prepare()
            && let Err(error) = pair.post(&mut self.outbox.sends)
        {
            tracing::error!(%error, "the device refused work requests");
            self.end(CloseReason::Device("it refused a work request"));
        }
    }

    #[cold]
    fn post_ended(&mut self, signal: Signal) -> Result<(), Full> {
        // Nothing follows the event that said so.
        if self.phase == Phase::Over || self.ready.len() >= MAX_READY {
            return Err(Full);
        }
        self.ready.push_back(match signal {
            Signal::Yes(id) => Event::Failed(Some(id), OpError::Closed),
            Signal::No => Event::Failed(None, OpError::Closed),
        });
        Ok(())
    }

    // ---- receiving ----

    /// Takes completions once; how many there were. Their events go to `out`, and to `ready` where it is full or there is none.
    #[inline]
    fn take(&mut self, mut out: Option<&mut Events>) -> usize {
        if self.pair.is_none() || self.ready.len() > MAX_READY / 2 {
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
        let found = std::mem::take(&mut self.found);
        for completion in found.iter().take(count) {
            match (completion.status, completion.wr_id & RECEIVE != 0) {
                (IBV_WC_SUCCESS, true) => self.received(completion, &mut out),
                (IBV_WC_SUCCESS, false) => self.sent(completion.wr_id, &mut out),
                _ => self.broken(completion),
            }
        }
        self.found = found;
        if count > 0 && self.inbox.must_post() {
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
        let Some((len, taken)) = wire::message(self.inbox.receives.header(slot), len) else {
            self.said_by_the_fabric(slot, len);
            return None;
        };
        if !self.inbox.credited(taken) {
            self.end(CloseReason::Protocol("credits that cannot be true"));
            return None;
        }
        Message::filled(len, |bytes| self.inbox.receives.read(slot, wire::HEADER, bytes))
    }

    /// As [`Self::said`], for the words of the fabric's own and for what is none.
    #[cold]
    fn said_by_the_fabric(&mut self, slot: u32, len: u32) {
        let mut bytes = [0; SLOT_BYTES];
        self.inbox.receives.read(slot, 0, &mut bytes);
        match Slot::parse(&bytes, len) {
            Ok((_, returned)) if !self.inbox.credited(returned) => self.end(CloseReason::Protocol("credits that cannot be true")),
            Ok((Slot::Credits | Slot::Ping, _)) => {}
            Ok((Slot::Revoke(number), _)) => self.books.revoked_by_peer(number),
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
        if self.inbox.owes_credits() && self.phase == Phase::Open && self.say(Slot::Credits, false) {
            self.hand_over();
        }
    }

    // ---- ending ----

    /// A completion that failed: the queue pair is dead. The first that says more than "flushed" is the cause.
    #[cold]
    fn broken(&mut self, completion: &ibv_wc) {
        if matches!(self.phase, Phase::Ended(_) | Phase::Over) {
            return;
        }
        let receive = completion.wr_id & RECEIVE != 0;
        let (error, reason) = match completion.status {
            IBV_WC_REM_ACCESS_ERR | IBV_WC_REM_INV_REQ_ERR | IBV_WC_REM_OP_ERR => {
                (OpError::Revoked, CloseReason::Protocol("an operation on memory that its owner had revoked"))
            }
            IBV_WC_LOC_PROT_ERR => (OpError::Revoked, CloseReason::Device("it may not use memory of this side")),
            // Flushed, because the other direction failed: what its peer did is known by the device's own event, where it raises one.
            IBV_WC_WR_FLUSH_ERR => (OpError::Closed, self.why_flushed()),
            // No acknowledgement, however often it was sent.
            _ => (OpError::Closed, CloseReason::PeerGone),
        };
        tracing::debug!(status = completion.status, receive, %reason, "the queue pair broke");
        if !receive {
            self.outbox.fail(completion.wr_id, error);
        }
        self.end(reason);
    }

    #[cold]
    fn why_flushed(&mut self) -> CloseReason {
        if let Phase::Closing { .. } = self.phase {
            return CloseReason::Local;
        }
        while let Some(event) = self.context.next_async_event() {
            if matches!(event, sys::IBV_EVENT_QP_ACCESS_ERR | sys::IBV_EVENT_QP_REQ_ERR) {
                return CloseReason::Protocol("the peer used memory that it was not granted");
            }
        }
        CloseReason::PeerGone
    }

    /// The link ends now: the queue pair goes, so that the device touches nothing of ours any more, and what is not done will not be.
    #[cold]
    fn end(&mut self, reason: CloseReason) {
        if matches!(self.phase, Phase::Ended(_) | Phase::Over) {
            return;
        }
        let reason = if matches!(self.phase, Phase::Closing { .. }) { CloseReason::Local } else { reason };
        self.phase = Phase::Ended(reason);
        self.pair = None;
        self.outbox.end();
        while let Some(event) = self.outbox.next_event() {
            self.ready.push_back(event);
        }
    }

    /// Takes completions until `done`, the end, or the limit; events wait for the next poll.
    #[cold]
    fn drain(&mut self, done: impl Fn(&Self) -> bool) -> bool {
        let deadline = Instant::now() + DRAIN_LIMIT;
        let mut empty = 0_u32;
        while self.pair.is_some() && !done(self) {
            if self.take(None) > 0 {
                empty = 0;
                continue;
            }
            empty = empty.saturating_add(1);
            if Instant::now() > deadline {
                return false;
            }
            if empty > 1000 {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        true
    }

    // ---- what raises no completion ----

    #[cold]
    fn look(&mut self, now: Nanos) {
        self.looked_at = now;
        if let Err(reason) = self.books.take_frames(&mut *self.control) {
            // A goodbye that the device has taken already is better news than a connection that ended after it.
            while self.take(None) > 0 {}
            return self.end(reason);
        }
        while let Some(event) = self.context.next_async_event() {
            match event {
                sys::IBV_EVENT_DEVICE_FATAL => return self.end(CloseReason::Device("it failed")),
                sys::IBV_EVENT_QP_ACCESS_ERR | sys::IBV_EVENT_QP_REQ_ERR => {
                    return self.end(CloseReason::Protocol("the peer used memory that it was not granted"));
                }
                sys::IBV_EVENT_QP_FATAL | sys::IBV_EVENT_CQ_ERR => return self.end(CloseReason::Device("its queues failed")),
                // It may come back before the retries are used up; if not, they end the link.
                sys::IBV_EVENT_PORT_ERR => tracing::warn!(device = self.context.name(), "the port is down"),
                sys::IBV_EVENT_PORT_ACTIVE => tracing::info!(device = self.context.name(), "the port is up"),
                other => tracing::debug!(device = self.context.name(), event = other, "the device reports"),
            }
        }
        if self.phase == Phase::Open && now.since(self.heard_at) >= SILENCE && now.since(self.asked_at) >= SILENCE {
            self.asked_at = now;
            if self.inbox.may_send() && self.say(Slot::Ping, false) {
                self.hand_over();
            }
        }
    }
}

/// What a transfer is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write,
    WriteNotify(u32),
    Read,
}

impl Fabric for VerbsFabric {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    #[inline]
    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), Full> {
        if self.phase != Phase::Open {
            return self.post_ended(signal);
        }
        match op {
            Op::Write { from, to } => self.transfer(signal, from, to, Kind::Write),
            Op::WriteNotify { from, to, notify } => self.transfer(signal, from, to, Kind::WriteNotify(notify)),
            Op::Read { from, into } => self.transfer(signal, into, from, Kind::Read),
            Op::Send { message } => {
                if !self.outbox.has_room(1) || !self.inbox.may_send() {
                    return Err(Full);
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
        }
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
            if found > 0 {
                self.heard_at = now;
            }
            // Fewer than were asked for: there are no others, and the caller has something to do.
            if found < AT_ONCE && self.ready.is_empty() && !matches!(self.phase, Phase::Ended(_)) {
                if found == 0 && self.inbox.receives.len() > 0 {
                    self.give_slots_back();
                }
                break;
            }
        }
        if now.0.wrapping_sub(self.looked_at.0) >= LOOK_EVERY.as_nanos() as u64 {
            self.look(now);
        }
    }

    fn arm(&mut self) -> bool {
        self.flush();
        if let Err(error) = self.completions.request_notification() {
            tracing::error!(%error, "the completion queue cannot be armed");
            self.end(CloseReason::Device("its completion queue cannot be armed"));
        }
        // What came before the queue was armed wakes nobody.
        self.take(None);
        self.give_slots_back();
        while let Some(event) = self.outbox.next_event() {
            self.ready.push_back(event);
        }
        self.asleep = true;
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
        // A goodbye that is on its way would be lost with the queue pair.
        if let Phase::Closing { goodbye } = self.phase {
            self.drain(|fabric| fabric.outbox.is_done(goodbye));
        }
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

const _: () = assert!(MAX_READY as u32 > 2 * SLOTS + 2 * outbox::DEPTH - 2 * SLOTS && wire::SLOT_BYTES <= MAX_INLINE);
