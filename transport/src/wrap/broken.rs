//! A fabric that breaks one rule of the contract on purpose, so that whoever claims to watch over that rule can be watched.
//!
//! `Broken::new(fabric, Breach::MessageBeforeData, late)` lets the message "done" pass while the 4 KiB posted ahead of it wait for `late`; a test
//! that then finds nothing wrong looks at nothing. Unlike [`super::Faults`] this is never within the contract.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::fabric::{
    Event, Events, Fabric, Grant, GrantError, Limits, Message, Op, OpError, PostError, Regions, RegisterError, RevokeError, Signal,
};
use crate::memory::{Mapped, Memory};
use crate::span::{Access, LocalRegion, LocalSpan, RemoteRegion, RemoteSpan};
use crate::time::Nanos;

/// The rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breach {
    /// Messages and notifications go ahead of the writes that were posted before them.
    MessageBeforeData,
    /// Reads and writes are reported done at once, and carried out late.
    DoneBeforeData,
    /// Reads go ahead of the writes that were posted before them.
    ReadPassesWrite,
    /// Of two messages the second goes first.
    MessagesSwapped,
    /// Memory that is deregistered stays within the peer's reach.
    RevocationForgotten,
    /// Grants that were given back are still used.
    ReleaseForgotten,
}

impl Breach {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::MessageBeforeData,
        Self::DoneBeforeData,
        Self::ReadPassesWrite,
        Self::MessagesSwapped,
        Self::RevocationForgotten,
        Self::ReleaseForgotten,
    ];
}

/// An operation that waits here, with its own copy of a message.
enum Held {
    Write(LocalSpan, RemoteSpan),
    Read(RemoteSpan, LocalSpan),
    Message(Message),
}

/// `F`, with one rule broken.
pub struct Broken<F> {
    inner: F,
    breach: Breach,
    late: Duration,
    /// Each with the time when it goes, known from the first poll after it was posted.
    held: VecDeque<(Option<Nanos>, Signal, Held)>,
    /// Reports made up here.
    early: VecDeque<Event>,
    /// Regions that this side was told to forget and the fabric below still has.
    kept: Vec<LocalRegion>,
}

impl<F: Fabric> Broken<F> {
    /// Wraps `inner`. `late` is how long what is held back waits, in the time that polls are given.
    pub fn new(inner: F, breach: Breach, late: Duration) -> Self {
        Self { inner, breach, late, held: VecDeque::new(), early: VecDeque::new(), kept: Vec::new() }
    }

    /// The operation as it waits; `None` where it does not.
    fn held(&self, op: &Op<'_>) -> Option<Held> {
        match (self.breach, *op) {
            (Breach::MessageBeforeData | Breach::DoneBeforeData | Breach::ReadPassesWrite, Op::Write { from, to }) => {
                Some(Held::Write(from, to))
            }
            (Breach::DoneBeforeData, Op::Read { from, into }) => Some(Held::Read(from, into)),
            // One that is too long is for the fabric below to refuse.
            (Breach::MessagesSwapped, Op::Send { message }) if self.held.is_empty() => Message::new(message).map(Held::Message),
            _ => None,
        }
    }

    /// Whether what waits must go before this operation, because the rule between the two is not the broken one.
    fn follows(&self, op: &Op<'_>) -> bool {
        match self.breach {
            Breach::MessageBeforeData => matches!(op, Op::Read { .. }),
            Breach::ReadPassesWrite => matches!(op, Op::Send { .. } | Op::WriteNotify { .. }),
            _ => false,
        }
    }

    fn hold(&mut self, signal: Signal, held: Held) {
        let signal = match (self.breach, signal) {
            (Breach::DoneBeforeData, Signal::Yes(id)) => {
                self.early.push_back(Event::Done(id));
                Signal::No
            }
            (_, signal) => signal,
        };
        self.held.push_back((None, signal, held));
    }

    /// Posts what waits and is due at `until`, or all of it; false where there was no room for some.
    fn release(&mut self, until: Option<Nanos>) -> bool {
        while let Some((due, signal, held)) = self.held.front() {
            if until.is_some_and(|until| due.is_none_or(|due| due > until)) {
                break;
            }
            let op = match held {
                Held::Write(from, to) => Op::Write { from: *from, to: *to },
                Held::Read(from, into) => Op::Read { from: *from, into: *into },
                Held::Message(message) => Op::Send { message: message.bytes() },
            };
            if self.inner.post(*signal, op).is_err() {
                return false;
            }
            self.held.pop_front();
        }
        true
    }
}

impl<F: Fabric> Fabric for Broken<F> {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        if self.follows(&op) && !self.release(None) {
            return Err(PostError::Full);
        }
        if let (Breach::MessageBeforeData, Op::WriteNotify { from, to, notify }) = (self.breach, op)
            && let (Some(no_from), Some(no_to)) = (from.part(0, 0), to.part(0, 0))
        {
            self.inner.post(Signal::No, Op::WriteNotify { from: no_from, to: no_to, notify })?;
            self.hold(signal, Held::Write(from, to));
            return Ok(());
        }
        if let Some(held) = self.held(&op) {
            self.hold(signal, held);
            return Ok(());
        }
        self.inner.post(signal, op)?;
        if self.breach == Breach::MessagesSwapped && matches!(op, Op::Send { .. }) {
            // Whether there is room or not: what is not released now is released by a poll.
            self.release(None);
        }
        Ok(())
    }

    fn store_polled(&mut self, to: RemoteSpan, bytes: &[u8]) -> Result<(), OpError> {
        self.inner.store_polled(to, bytes)
    }

    fn flush(&mut self) {
        self.inner.flush();
    }

    fn poll(&mut self, now: Nanos, out: &mut Events) {
        for (due, ..) in &mut self.held {
            due.get_or_insert(now + self.late);
        }
        self.release(Some(now));
        self.inner.flush();
        while out.has_room() {
            let Some(event) = self.early.pop_front() else { break };
            out.push(event);
        }
        self.inner.poll(now, out);
    }

    fn arm(&mut self) -> bool {
        // Nothing below would wake anybody for what waits here.
        self.held.is_empty() && self.early.is_empty() && self.inner.arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wake_fd()
    }

    fn close(&mut self) {
        self.inner.close();
    }
}

impl<F: Fabric> Regions for Broken<F> {
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.inner.register(memory, access)
    }

    fn register_for_peer(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.inner.register_for_peer(memory, access)
    }

    fn deregister(&mut self, region: LocalRegion) -> Result<(), RevokeError> {
        if self.breach == Breach::RevocationForgotten {
            self.kept.push(region);
            return Ok(());
        }
        self.inner.deregister(region)
    }

    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        if self.kept.contains(region) { None } else { self.inner.local_memory(region) }
    }

    fn map_local(&self, span: LocalSpan) -> Option<Mapped> {
        self.inner.map_local(span)
    }

    fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError> {
        self.inner.export(region, access)
    }

    fn import(&mut self, grant: &Grant) -> Result<RemoteRegion, GrantError> {
        self.inner.import(grant)
    }

    fn release(&mut self, region: RemoteRegion) {
        if self.breach != Breach::ReleaseForgotten {
            self.inner.release(region);
        }
    }

    fn map_remote(&self, span: RemoteSpan) -> Option<Mapped> {
        self.inner.map_remote(span)
    }
}
