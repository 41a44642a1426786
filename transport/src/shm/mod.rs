//! The shared-memory fabric: two processes of one host, or two threads, whose rings and granted memory are mapped into both.
//!
//! A write of 4 KiB is one memcpy into the peer's mapping, done when `post` returns; a message is one cache line in the peer's ring; a system
//! call is made only to wake a peer that sleeps. A lender may also hand mapped guest memory to the kernel or to an IOMMU (`map_remote`).

mod lines;
mod listen;
mod regions;
mod revoke;
mod setup;
mod socket;
#[cfg(test)]
mod tests;

pub use listen::{Connection, Greeted, HELLO_LIMIT, ListenError, Listener, connect, connect_if};

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use self::lines::{RING_BYTES, SLOTS, SharedLines};
use self::revoke::{LIVES_BYTES, Revocations, Slot};
use self::socket::GrantSocket;
use crate::barrier;
use crate::fabric::{CloseReason, Event, Events, Fabric, Limits, MAX_MESSAGE, Message, Op, OpError, PostError, Signal};
use crate::hold::Lifeline;
use crate::local::LocalRegions;
use crate::memory::Memory;
use crate::ring::{Consumer, Producer, RingError, Taken};
use crate::span::{LocalSpan, RegionName, RemoteSpan};
use crate::table::Table;
use crate::time::Nanos;

/// Slot kinds in a ring.
mod kind {
    pub(super) const MESSAGE: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const GOODBYE: u8 = 3;
}

/// How long a peer may be silent, and take nothing, before a poll asks the kernel whether it still lives, and between two such questions. One
/// that took a message and died at once is noticed at the second, so within 30 ms. Only for who polls without end: a sleeper is woken. A question is one
/// system call of a microsecond, so a ten-thousandth of such a poll's time.
const SILENCE: Duration = Duration::from_millis(15);

const LIMITS: Limits = Limits {
    max_message: MAX_MESSAGE as u32,
    max_op_len: 1 << 30,
    queue_depth: SLOTS,
    immediate: true,
    peer_mappable: true,
    revocation_ends_link: false,
};

/// Which of the two rings this side fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Makes the rings.
    Lender,
    /// Is given them.
    Borrower,
}

/// Choices of one end.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShmOptions {
    /// Import memory that is not sealed against shrinking (a file on hugetlbfs, say). Whoever can shrink it can crash this process.
    pub accept_unsealed: bool,
}

/// Both rings, then the lives of the lender's grants and of the borrower's.
const SHARED_BYTES: u64 = 2 * RING_BYTES + 2 * LIVES_BYTES;

/// A region of the peer's, mapped.
struct Remote {
    memory: Arc<Memory>,
    slot: Slot,
}

/// One end of a shared-memory link.
pub struct ShmFabric {
    tx: Producer<SharedLines>,
    rx: Consumer<SharedLines>,
    ready: VecDeque<Event>,
    locals: LocalRegions,
    remotes: Table<Remote>,
    /// Grants of ours that are alive, with the region they are of.
    granted: Vec<(RegionName, Slot)>,
    revocations: Revocations,
    closed: Option<CloseReason>,
    close_reported: bool,
    peer_left: bool,
    asleep: bool,
    /// When something came, or the peer was looked for.
    heard_at: Nanos,
    /// What the peer had taken then.
    taken_by_peer: u64,
    options: ShmOptions,
    own_wake: OwnedFd,
    peer_wake: OwnedFd,
    wait: OwnedFd,
    socket: GrantSocket,
    /// Shared with every mapping of the peer's memory in use; none once this end is closed.
    lifeline: Option<Arc<Lifeline>>,
}

impl ShmFabric {
    /// Both ends in this process: for tests, and for measuring what two threads can reach.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn pair(options: ShmOptions) -> io::Result<(Self, Self)> {
        let (lender, borrower) = UnixStream::pair()?;
        let borrower = std::thread::spawn(move || Self::establish(borrower, Side::Borrower, options));
        let lender = Self::establish(lender, Side::Lender, options);
        let borrower = borrower.join().map_err(|_| io::Error::other("the borrower's end could not be made"))?;
        Ok((lender?, borrower?))
    }

    #[cold]
    fn fail(&mut self, error: RingError) {
        let what = match error {
            RingError::Length(_) => "a ring slot with a wild length",
            RingError::Consumed { .. } => "a ring index that cannot be true",
        };
        self.closed.get_or_insert(CloseReason::Protocol(what));
    }

    #[inline]
    fn push(&mut self, kind: u8, bytes: &[u8]) -> Result<(), PostError> {
        match self.tx.push(kind, bytes) {
            Ok(true) => Ok(()),
            Ok(false) => Err(PostError::Full),
            Err(error) => {
                self.fail(error);
                Ok(())
            }
        }
    }

    #[inline]
    fn has_room(&mut self) -> bool {
        match self.tx.has_room() {
            Ok(room) => room && self.ready.len() < SLOTS as usize,
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    /// The one copy of a one-sided operation. Inlined, because spans that go through memory on the way cost as much as a tenth of the copy.
    #[inline(always)]
    fn copy(&mut self, local: LocalSpan, remote: RemoteSpan, to_remote: bool) -> Result<(), OpError> {
        let (from, to) = if to_remote { (local.len, remote.len) } else { (remote.len, local.len) };
        if from != to || from > LIMITS.max_op_len {
            return Err(OpError::Mismatch { from, to });
        }
        let (read, written) = if to_remote { (local.access, remote.access) } else { (remote.access, local.access) };
        if !read.read || !written.write {
            return Err(OpError::Denied);
        }
        let (ours, at) = self.locals.resolve(local).ok_or(OpError::Revoked)?;
        let theirs = self.remotes.find(remote.name).ok_or(OpError::Revoked)?;
        let len = u64::from(from);
        let (to, to_at, from, from_at) =
            if to_remote { (&*theirs.memory, remote.offset, ours, at) } else { (ours, at, &*theirs.memory, remote.offset) };
        let _inside = self.revocations.enter(theirs.slot).ok_or(OpError::Revoked)?;
        if to.try_copy_from(to_at, from, from_at, len) { Ok(()) } else { Err(OpError::Denied) }
    }

    /// What `post` says of an operation that is over; the rest is said by an event.
    #[inline(always)]
    fn finish(&mut self, signal: Signal, result: Result<(), OpError>, is_access: bool) -> Result<(), PostError> {
        if (signal, result) == (Signal::No, Ok(())) {
            return Ok(());
        }
        self.report(signal, result);
        if is_access && signal == Signal::No { Err(PostError::Failed) } else { Ok(()) }
    }

    #[cold]
    #[inline(never)]
    fn report(&mut self, signal: Signal, result: Result<(), OpError>) {
        let event = match (signal, result) {
            (Signal::No, Ok(())) => return,
            (Signal::Yes(id), Ok(())) => Event::Done(id),
            (Signal::Yes(id), Err(error)) => Event::Failed(Some(id), error),
            (Signal::No, Err(error)) => Event::Failed(None, error),
        };
        self.ready.push_back(event);
    }

    #[cold]
    fn post_closed(&mut self, signal: Signal, is_access: bool) -> Result<(), PostError> {
        // Nothing follows the event that said so.
        if self.close_reported || self.ready.len() >= SLOTS as usize {
            return Err(PostError::Full);
        }
        self.finish(signal, Err(OpError::Closed), is_access)
    }

    #[cold]
    fn wake_up(&mut self) {
        self.asleep = false;
        self.rx.disarm();
        let mut count = [0; 8];
        if let Err(errno) = rustix::io::read(&self.own_wake, &mut count)
            && errno != rustix::io::Errno::AGAIN
        {
            tracing::warn!(%errno, "a wake-up could not be read");
        }
        self.peer_left |= !self.socket.peer_is_there();
    }

    /// A lender whose completions lie in the guest's memory may have nothing to say for long; that it takes our messages is a sign of life.
    #[cold]
    fn look_for_peer(&mut self, now: Nanos) {
        self.heard_at = now;
        let taken = self.tx.consumer_progress();
        if std::mem::replace(&mut self.taken_by_peer, taken) == taken {
            self.peer_left |= !self.socket.peer_is_there();
        }
    }

    #[inline]
    fn accept(&mut self, taken: Taken, out: &mut Events) {
        let bytes = taken.bytes.get(..usize::from(taken.len)).unwrap_or_default();
        match taken.kind {
            kind::MESSAGE => {
                if let Some(message) = Message::of_slot(taken.len, taken.bytes) {
                    out.push(Event::Message(message));
                }
            }
            kind::NOTIFY => match bytes.first_chunk::<4>() {
                Some(notify) => {
                    out.push(Event::Notify(u32::from_le_bytes(*notify)));
                }
                None => self.closed = Some(CloseReason::Protocol("a notification of less than four bytes")),
            },
            kind::GOODBYE => self.closed = Some(CloseReason::PeerClosed),
            _ => self.closed = Some(CloseReason::Protocol("a ring slot of unknown kind")),
        }
    }
}

impl Fabric for ShmFabric {
    fn limits(&self) -> &Limits {
        &LIMITS
    }

    /// Inlined, because the operation is known wherever it is posted: one arm of the match is left.
    #[inline(always)]
    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        let is_access = matches!(op, Op::Write { .. } | Op::Read { .. });
        if self.closed.is_some() {
            return self.post_closed(signal, is_access);
        }
        // A copy takes no slot of the ring, but what it ends with may take one of `ready`.
        let room = if is_access { self.ready.len() < SLOTS as usize } else { self.has_room() };
        if !room {
            return Err(PostError::Full);
        }
        let result = match op {
            Op::Write { from, to } => self.copy(from, to, true),
            Op::Read { from, into } => self.copy(into, from, false),
            Op::WriteNotify { from, to, notify } => match self.copy(from, to, true) {
                Ok(()) => {
                    self.push(kind::NOTIFY, &notify.to_le_bytes())?;
                    Ok(())
                }
                failed => failed,
            },
            Op::Send { message } if message.len() > MAX_MESSAGE => {
                Err(OpError::TooLong { len: u32::try_from(message.len()).unwrap_or(u32::MAX), limit: LIMITS.max_message })
            }
            Op::Send { message } => {
                self.push(kind::MESSAGE, message)?;
                Ok(())
            }
        };
        self.finish(signal, result, is_access)
    }

    #[inline(always)]
    fn store_polled(&mut self, to: RemoteSpan, bytes: &[u8]) -> Result<(), OpError> {
        if self.closed.is_some() {
            return Err(OpError::Closed);
        }
        if bytes.len() != to.len as usize || !to.access.write {
            return Err(OpError::Denied);
        }
        let theirs = self.remotes.find(to.name).ok_or(OpError::Revoked)?;
        let _inside = self.revocations.enter(theirs.slot).ok_or(OpError::Revoked)?;
        if theirs.memory.try_store_last_word_last(to.offset, bytes) { Ok(()) } else { Err(OpError::Denied) }
    }

    #[inline]
    fn flush(&mut self) {
        if self.tx.must_wake()
            && let Err(errno) = rustix::io::write(&self.peer_wake, &1_u64.to_ne_bytes())
            && errno != rustix::io::Errno::AGAIN
        {
            // A full counter (EAGAIN) is a wake-up already; anything else means that the peer cannot be woken any more.
            tracing::warn!(%errno, "the peer could not be woken");
            self.peer_left = true;
        }
    }

    fn poll(&mut self, now: Nanos, out: &mut Events) {
        if self.asleep {
            self.wake_up();
        }
        while out.has_room() {
            let Some(event) = self.ready.pop_front() else { break };
            out.push(event);
        }
        let before = out.room();
        while self.closed.is_none() && out.has_room() {
            match self.rx.take() {
                Ok(Some(taken)) => self.accept(taken, out),
                Ok(None) => {
                    if self.peer_left {
                        self.closed = Some(CloseReason::PeerGone);
                    }
                    break;
                }
                Err(error) => self.fail(error),
            }
        }
        if out.room() != before {
            self.heard_at = now;
        } else if now.since(self.heard_at) >= SILENCE {
            self.look_for_peer(now);
        }
        if let Some(reason) = self.closed
            && !self.close_reported
            && self.ready.is_empty()
            && out.push(Event::Closed(reason))
        {
            self.close_reported = true;
        }
    }

    fn arm(&mut self) -> bool {
        if !self.ready.is_empty() || (self.closed.is_some() && !self.close_reported) || self.peer_left && self.closed.is_none() {
            return false;
        }
        let mut ordered = true;
        let empty = self.rx.arm(|| ordered = barrier::global());
        self.asleep = empty && ordered;
        if empty && !ordered {
            self.rx.disarm();
        }
        self.asleep
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wait.as_fd())
    }

    fn close(&mut self) {
        if self.closed.is_none() {
            // Who hears goodbye may use its memory for something else: while mappings of it are in use it is told by the last of them, and a
            // peer whose ring is full by the socket.
            let in_use = self.lifeline.as_mut().is_some_and(|lifeline| Arc::get_mut(lifeline).is_none());
            if !in_use && self.tx.push(kind::GOODBYE, &[]) == Ok(true) {
                self.flush();
            }
            self.closed = Some(CloseReason::Local);
        }
        self.lifeline = None;
    }
}

impl Drop for ShmFabric {
    fn drop(&mut self) {
        self.close();
    }
}

impl std::fmt::Debug for ShmFabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShmFabric").field("closed", &self.closed).field("asleep", &self.asleep).finish_non_exhaustive()
    }
}
