//! A fabric that counts what passes through it and remembers the last of it.
//!
//! `handle.counters().since(&before)` after one MMIO read shows `sends: 1, doorbells: 1`; a test that fails prints the handle, and with it
//! the last 64 posts, flushes and events in order.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::fabric::{
    Event, Events, Fabric, Grant, GrantError, Limits, Op, OpError, PostError, Regions, RegisterError, RevokeError, Signal,
};
use crate::memory::{Mapped, Memory};
use crate::span::{Access, LocalRegion, LocalSpan, RemoteRegion, RemoteSpan};
use crate::time::Nanos;

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)*) => {
        /// What passed through one end since it was wrapped, or between two looks.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[doc = $doc])+ pub $name: u64,)*
        }

        impl Counters {
            /// What passed since `earlier`, which was taken from the same end.
            pub fn since(&self, earlier: &Self) -> Self {
                Self {
                    $($name: self.$name.saturating_sub(earlier.$name),)*
                }
            }
        }
    };
}

counters! {
    /// [`Op::Write`] posted.
    writes,
    /// [`Op::WriteNotify`] posted.
    write_notifies,
    /// [`Op::Read`] posted.
    reads,
    /// [`Op::Send`] posted.
    sends,
    /// Bytes of writes of both kinds.
    bytes_written,
    /// Bytes of reads.
    bytes_read,
    /// Bytes of messages sent.
    bytes_sent,
    /// Operations posted with [`Signal::Yes`].
    signalled,
    /// Polled stores made.
    polled_stores,
    /// Posts refused as [`PostError::Full`].
    fulls,
    /// Calls of `flush`.
    flushes,
    /// Calls of `flush` with something posted since the one before: what costs a doorbell.
    doorbells,
    /// Calls of `poll`.
    polls,
    /// Calls of `poll` that reported nothing.
    empty_polls,
    /// Calls of `arm` that allowed sleep.
    arms,
    /// [`Event::Done`] reported.
    done,
    /// [`Event::Failed`] reported.
    failed,
    /// [`Event::Message`] reported.
    messages,
    /// [`Event::Notify`] reported.
    notifies,
    /// [`Event::Closed`] reported.
    closed,
    /// Regions registered.
    registered,
    /// Regions deregistered.
    deregistered,
    /// Grants made.
    exported,
    /// Grants taken.
    imported,
    /// Grants given back.
    released,
}

impl Counters {
    /// Work requests: operations of all kinds.
    pub const fn work_requests(&self) -> u64 {
        self.writes + self.write_notifies + self.reads + self.sends
    }
}

/// One thing that passed through a traced end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A write of so many bytes to this offset of a remote region.
    Write {
        /// Bytes.
        len: u32,
        /// Where in the peer's region.
        to: u64,
        /// The notification that goes with it.
        notify: Option<u32>,
        /// Whether it was signalled.
        signal: Signal,
    },
    /// A read of so many bytes from this offset of a remote region.
    Read {
        /// Bytes.
        len: u32,
        /// Where in the peer's region.
        from: u64,
        /// Whether it was signalled.
        signal: Signal,
    },
    /// A message of so many bytes.
    Send {
        /// Bytes.
        len: u32,
        /// Its first eight bytes, or fewer, as a little-endian number.
        head: u64,
        /// Whether it was signalled.
        signal: Signal,
    },
    /// A polled store of so many bytes to this offset of a remote region.
    PolledStore {
        /// Bytes.
        len: u32,
        /// Where in the peer's region.
        to: u64,
    },
    /// A post was refused.
    Full,
    /// What was posted went on the wire.
    Doorbell,
    /// A poll reported this.
    Event(Event),
    /// The end was closed.
    Close,
}

#[derive(Debug)]
struct Log {
    counters: Counters,
    /// Filled to `keep` once, then the oldest makes room: nothing is allocated while tracing.
    last: VecDeque<(Nanos, Entry)>,
    keep: usize,
    now: Nanos,
}

impl Log {
    fn note(&mut self, entry: Entry) {
        if self.last.len() >= self.keep {
            self.last.pop_front();
        }
        if self.keep > 0 {
            self.last.push_back((self.now, entry));
        }
    }
}

/// `F`, counted. Takes an uncontended lock at each call, which the fabrics themselves never do: for tests and for looking, not for speed.
#[derive(Debug)]
pub struct Trace<F> {
    inner: F,
    log: Arc<Mutex<Log>>,
    unflushed: bool,
}

/// Reads what a [`Trace`] has counted, from anywhere, also when the end was handed on or is gone.
#[derive(Clone, Debug)]
pub struct TraceHandle {
    log: Arc<Mutex<Log>>,
}

fn lock(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<F: Fabric> Trace<F> {
    /// Wraps `inner`, remembering the last `keep` entries.
    pub fn new(inner: F, keep: usize) -> Self {
        let log = Log { counters: Counters::default(), last: VecDeque::with_capacity(keep), keep, now: Nanos::default() };
        Self { inner, log: Arc::new(Mutex::new(log)), unflushed: false }
    }

    /// A reader of what is counted here.
    pub fn handle(&self) -> TraceHandle {
        TraceHandle { log: Arc::clone(&self.log) }
    }
}

impl TraceHandle {
    /// The counts so far.
    pub fn counters(&self) -> Counters {
        lock(&self.log).counters
    }

    /// The last entries, oldest first, each with the time of the poll before it.
    pub fn last(&self) -> Vec<(Nanos, Entry)> {
        lock(&self.log).last.iter().copied().collect()
    }
}

impl std::fmt::Display for TraceHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let log = lock(&self.log);
        for (at, entry) in &log.last {
            writeln!(f, "{:>12} ns  {entry:?}", at.0)?;
        }
        write!(f, "{:?}", log.counters)
    }
}

impl<F: Fabric> Fabric for Trace<F> {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        let posted = self.inner.post(signal, op);
        let mut log = lock(&self.log);
        if posted == Err(PostError::Full) {
            log.counters.fulls += 1;
            log.note(Entry::Full);
            return posted;
        }
        self.unflushed = true;
        let counters = &mut log.counters;
        counters.signalled += u64::from(matches!(signal, Signal::Yes(_)));
        let entry = match op {
            Op::Write { from, to } => {
                counters.writes += 1;
                counters.bytes_written += u64::from(from.len());
                Entry::Write { len: from.len(), to: to.offset(), notify: None, signal }
            }
            Op::WriteNotify { from, to, notify } => {
                counters.write_notifies += 1;
                counters.bytes_written += u64::from(from.len());
                Entry::Write { len: from.len(), to: to.offset(), notify: Some(notify), signal }
            }
            Op::Read { from, into } => {
                counters.reads += 1;
                counters.bytes_read += u64::from(into.len());
                Entry::Read { len: into.len(), from: from.offset(), signal }
            }
            Op::Send { message } => {
                counters.sends += 1;
                counters.bytes_sent += message.len() as u64;
                let mut head = [0; 8];
                for (to, from) in head.iter_mut().zip(message) {
                    *to = *from;
                }
                Entry::Send { len: u32::try_from(message.len()).unwrap_or(u32::MAX), head: u64::from_le_bytes(head), signal }
            }
        };
        log.note(entry);
        posted
    }

    fn store_polled(&mut self, to: RemoteSpan, bytes: &[u8]) -> Result<(), OpError> {
        let stored = self.inner.store_polled(to, bytes);
        if stored.is_ok() {
            let mut log = lock(&self.log);
            log.counters.polled_stores += 1;
            log.note(Entry::PolledStore { len: to.len(), to: to.offset() });
        }
        stored
    }

    fn flush(&mut self) {
        self.inner.flush();
        let mut log = lock(&self.log);
        log.counters.flushes += 1;
        if std::mem::take(&mut self.unflushed) {
            log.counters.doorbells += 1;
            log.note(Entry::Doorbell);
        }
    }

    fn poll(&mut self, now: Nanos, out: &mut Events) {
        let before = out.as_slice().len();
        self.inner.poll(now, out);
        let news = out.as_slice().get(before..).unwrap_or_default();
        let mut log = lock(&self.log);
        log.now = now;
        log.counters.polls += 1;
        log.counters.empty_polls += u64::from(news.is_empty());
        for event in news {
            let counters = &mut log.counters;
            let counter = match event {
                Event::Done(_) => &mut counters.done,
                Event::Failed(..) => &mut counters.failed,
                Event::Message(_) => &mut counters.messages,
                Event::Notify(_) => &mut counters.notifies,
                Event::Closed(_) => &mut counters.closed,
            };
            *counter += 1;
            log.note(Entry::Event(*event));
        }
    }

    fn arm(&mut self) -> bool {
        let armed = self.inner.arm();
        lock(&self.log).counters.arms += u64::from(armed);
        armed
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wake_fd()
    }

    fn close(&mut self) {
        self.inner.close();
        lock(&self.log).note(Entry::Close);
    }
}

impl<F: Fabric> Regions for Trace<F> {
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        let region = self.inner.register(memory, access)?;
        lock(&self.log).counters.registered += 1;
        Ok(region)
    }

    fn register_for_peer(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        let region = self.inner.register_for_peer(memory, access)?;
        lock(&self.log).counters.registered += 1;
        Ok(region)
    }

    fn deregister(&mut self, region: LocalRegion) -> Result<(), RevokeError> {
        let revoked = self.inner.deregister(region);
        lock(&self.log).counters.deregistered += 1;
        revoked
    }

    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        self.inner.local_memory(region)
    }

    fn map_local(&self, span: LocalSpan) -> Option<Mapped> {
        self.inner.map_local(span)
    }

    fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError> {
        let grant = self.inner.export(region, access)?;
        lock(&self.log).counters.exported += 1;
        Ok(grant)
    }

    fn import(&mut self, grant: &Grant) -> Result<RemoteRegion, GrantError> {
        let region = self.inner.import(grant)?;
        lock(&self.log).counters.imported += 1;
        Ok(region)
    }

    fn release(&mut self, region: RemoteRegion) {
        self.inner.release(region);
        lock(&self.log).counters.released += 1;
    }

    fn map_remote(&self, span: RemoteSpan) -> Option<Mapped> {
        self.inner.map_remote(span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::OpId;
    use crate::sim::{self, SimOptions};

    #[test]
    fn a_batch_is_counted_as_it_passes() {
        let (left, mut right, world) = sim::pair(1, SimOptions::default());
        let mut left = Trace::new(left, 4);
        let handle = left.handle();
        let memory = |bytes| Memory::memfd("trace", bytes).unwrap();
        let near = left.register(memory(4096), Access::READ_WRITE).unwrap();
        let far = right.register(memory(4096), Access::READ_WRITE).unwrap();
        let grant = right.export(&far, Access::READ_WRITE).unwrap();
        let remote = left.import(&grant).unwrap();
        let from = near.span(0, 100, Access::READ_WRITE).unwrap();
        let to = remote.span(64, 100, Access::READ_WRITE).unwrap();

        let before = handle.counters();
        left.flush();
        left.post(Signal::No, Op::Write { from, to }).unwrap();
        left.post(Signal::No, Op::WriteNotify { from, to, notify: 3 }).unwrap();
        left.post(Signal::No, Op::Read { from: to, into: from }).unwrap();
        left.post(Signal::Yes(OpId(9)), Op::Send { message: b"\x01\x02" }).unwrap();
        left.flush();
        let mut events = Events::new();
        let mut polls = 0;
        while events.as_slice().is_empty() {
            left.poll(world.step(), &mut events);
            polls += 1;
        }
        let counted = handle.counters().since(&before);
        let expected = Counters {
            writes: 1,
            write_notifies: 1,
            reads: 1,
            sends: 1,
            bytes_written: 200,
            bytes_read: 100,
            bytes_sent: 2,
            signalled: 1,
            flushes: 2,
            doorbells: 1,
            polls,
            empty_polls: polls - 1,
            done: 1,
            ..Counters::default()
        };
        assert_eq!(counted, expected);
        assert_eq!(counted.work_requests(), 4);
        assert_eq!((handle.counters().registered, handle.counters().imported), (1, 1));

        let last: Vec<_> = handle.last().into_iter().map(|(_, entry)| entry).collect();
        let signal = Signal::Yes(OpId(9));
        let send = Entry::Send { len: 2, head: 0x0201, signal };
        let read = Entry::Read { len: 100, from: 64, signal: Signal::No };
        assert_eq!(last, [read, send, Entry::Doorbell, Entry::Event(Event::Done(OpId(9)))]);
    }
}
