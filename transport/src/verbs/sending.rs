//! How operations become work requests, and work requests a batch.
//!
//! A write of 20 MiB is twenty requests in one chain; its caller's report hangs on the last. A message is one request
//! that carries its slot inside.

use super::chain::{Bytes, What};
use super::wire::{self, Slot};
use super::{MAX_READY, Phase, VerbsFabric};
use crate::fabric::{CloseReason, Event, OpError, PostError, Signal};
use crate::span::{LocalSpan, RemoteSpan};

/// What a transfer is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Write,
    WriteNotify(u32),
    Read,
}

impl VerbsFabric {
    /// A one-sided operation: one work request for each piece that the device takes.
    #[inline]
    pub(super) fn transfer(&mut self, signal: Signal, local: LocalSpan, remote: RemoteSpan, kind: Kind) -> Result<(), PostError> {
        let reads = kind == Kind::Read;
        let (from, to) = if reads { (remote.len, local.len) } else { (local.len, remote.len) };
        let fits = from == to && from <= self.limits.max_op_len;
        // One, nearly always: a division takes as long as the rest of the checks.
        let pieces = if fits && from > self.piece { from.div_ceil(self.piece) } else { 1 };
        let notifies = matches!(kind, Kind::WriteNotify(_));
        if !self.outbox.has_room(pieces) || (notifies && !self.inbox.may_send()) {
            return Err(PostError::Full);
        }
        if !fits {
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
            self.make_room();
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
    pub(super) fn piece_of(
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
            _ if len == 0 => Bytes::Copied(&[]),
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
        true
    }

    /// Hands a full batch over before the next request: after it, the last one's report could no longer be asked for.
    #[inline]
    pub(super) fn make_room(&mut self) {
        if self.outbox.sends.is_full() {
            self.hand_over();
        }
    }

    /// Sends a word of the fabric's own, where both queues have room for it.
    pub(super) fn say(&mut self, slot: Slot<'_>, signalled: bool) -> bool {
        let fits = if slot == Slot::Credits { self.inbox.may_send_credits() } else { self.inbox.may_send_own() };
        if self.pair.is_none() || !fits || !self.outbox.has_reserve() {
            return false;
        }
        self.put(slot, signalled);
        true
    }

    #[inline]
    pub(super) fn put(&mut self, slot: Slot<'_>, signalled: bool) {
        self.make_room();
        let taken = self.inbox.sending();
        let pushed = if let Slot::Message(body) = slot {
            let header = wire::message_header(body.len() as u8, taken);
            self.outbox.push(signalled, What::Send, Bytes::Slot { header, body })
        } else {
            let (bytes, len) = slot.encode(taken);
            self.outbox.push(signalled, What::Send, Bytes::Copied(bytes.get(..len).unwrap_or_default()))
        };
        if !pushed {
            self.end(CloseReason::Device("its batch of work requests cannot be handed over"));
        }
    }

    #[inline]
    pub(super) fn hand_over(&mut self) {
        let Some(pair) = &mut self.pair else { return };
        if self.outbox.prepare()
            && let Err(error) = pair.post(&mut self.outbox.sends)
        {
            tracing::error!(%error, "the device refused work requests");
            self.end(CloseReason::Device("it refused a work request"));
        }
    }

    #[cold]
    pub(super) fn post_ended(&mut self, signal: Signal) -> Result<(), PostError> {
        // Nothing follows the event that said so.
        if self.phase == Phase::Over || self.ready.len() >= MAX_READY {
            return Err(PostError::Full);
        }
        self.ready.push_back(match signal {
            Signal::Yes(id) => Event::Failed(Some(id), OpError::Closed),
            Signal::No => Event::Failed(None, OpError::Closed),
        });
        Ok(())
    }
}
