//! Two ends on a bench: posts that wait for room, polls that collect events, and memory with known bytes.
//!
//! `rig.post(0, Signal::No, op)` waits while the queue is full, as a careful caller does; `rig.next(1)` pumps both ends until the second has
//! an event. Whatever waits gives up when nothing at all has happened for the provider's patience.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Pair, Provider};
use crate::fabric::{Event, Events, Fabric, Op, OpError, OpId, PostError, Signal};
use crate::memory::Memory;
use crate::sim::Seed;
use crate::span::{Access, LocalRegion, RemoteRegion};
use crate::time::Nanos;

/// Why a case ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The fabric broke the contract.
    Failed(String),
    /// There is nothing to test here.
    NotRun(String),
}

impl<E: std::error::Error> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(format!("unexpected error: {error}"))
    }
}

/// What a case returns.
pub(super) type Outcome<T = ()> = Result<T, Stop>;

/// Fails the case with a message unless the condition holds.
macro_rules! ensure {
    ($holds:expr, $($why:tt)+) => {
        if !$holds {
            return Err($crate::conformance::Stop::Failed(format!($($why)+)));
        }
    };
}
pub(super) use ensure;

/// Memory of one side, registered there.
pub(super) struct Piece {
    pub(super) memory: Arc<Memory>,
    pub(super) region: LocalRegion,
}

impl Piece {
    pub(super) fn bytes(&self, at: u64, len: usize) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.memory.read(at, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn all(&self) -> Outcome<Vec<u8>> {
        self.bytes(0, self.memory.len() as usize)
    }
}

/// Two connected ends and what they have reported.
pub(super) struct Rig<'a> {
    provider: &'a dyn Provider,
    pub(super) pair: Pair,
    pub(super) seen: [VecDeque<Event>; 2],
    pub(super) seed: Seed,
    events: Events,
    last_progress: Instant,
}

impl<'a> Rig<'a> {
    pub(super) fn new(provider: &'a dyn Provider, seed: u64) -> Outcome<Self> {
        Ok(Self {
            provider,
            pair: provider.connect(seed).map_err(Stop::NotRun)?,
            seen: Default::default(),
            // A stream of its own, so that the suite's choices are not the fabric's.
            seed: Seed::new(seed ^ 0x5eed_0000_0000),
            events: Events::new(),
            last_progress: Instant::now(),
        })
    }

    pub(super) fn end(&mut self, side: usize) -> &mut dyn Fabric {
        &mut *self.pair.ends[side]
    }

    pub(super) fn now(&mut self) -> Nanos {
        (self.pair.clock)()
    }

    // ---- memory ----

    pub(super) fn memory(&mut self, side: usize, len: u64, access: Access) -> Outcome<Piece> {
        let memory = self.provider.memory(len)?;
        let region = self.end(side).register(Arc::clone(&memory), access)?;
        ensure!(region.len() == len, "a region of {} bytes for memory of {len}", region.len());
        Ok(Piece { memory, region })
    }

    /// Memory filled with seeded bytes.
    pub(super) fn filled(&mut self, side: usize, len: u64) -> Outcome<Piece> {
        let piece = self.memory(side, len, Access::READ_WRITE)?;
        let bytes = self.bytes(len as usize);
        piece.memory.write(0, &bytes)?;
        Ok(piece)
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.seed.fill(&mut bytes);
        bytes
    }

    /// Gives the other side of `side` access to its piece.
    pub(super) fn grant(&mut self, side: usize, piece: &Piece, access: Access) -> Outcome<RemoteRegion> {
        let grant = self.end(side).export(&piece.region, access)?;
        let remote = self.end(1 - side).import(&grant)?;
        ensure!(remote.len() == piece.region.len() && remote.access() == access, "a grant of {grant:?} was imported as {remote:?}");
        Ok(remote)
    }

    // ---- operations ----

    pub(super) fn try_post(&mut self, side: usize, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        self.end(side).post(signal, op)
    }

    /// Posts, and while the queue is full flushes and polls both sides.
    pub(super) fn post(&mut self, side: usize, signal: Signal, op: Op<'_>) -> Outcome {
        let failed = self.offer(side, signal, op)?;
        ensure!(!failed, "{op:?} failed when it was posted");
        Ok(())
    }

    /// As [`Rig::post`], for an operation that may fail: true where `post` said that it did.
    pub(super) fn offer(&mut self, side: usize, signal: Signal, op: Op<'_>) -> Outcome<bool> {
        self.last_progress = Instant::now();
        loop {
            match self.try_post(side, signal, op) {
                Err(PostError::Full) => {}
                posted => return Ok(posted.is_err()),
            }
            self.end(side).flush();
            self.pump();
            self.be_patient("room in the queue")?;
        }
    }

    /// Posts an unsignalled operation that must fail, and gives the reason that the one event of it says. `post` itself says that it failed
    /// exactly where the contract wants it.
    pub(super) fn fail(&mut self, side: usize, op: Op<'_>) -> Outcome<OpError> {
        let is_access = matches!(op, Op::Write { .. } | Op::Read { .. });
        let at_once = is_access && self.end(side).limits().immediate;
        let told = self.offer(side, Signal::No, op)?;
        ensure!(told == at_once, "an unsignalled {op:?} that must fail was posted, and that it failed was said: {told}");
        self.flush(side);
        match self.next(side)? {
            Event::Failed(None, error) => Ok(error),
            event => Err(Stop::Failed(format!("an unsignalled {op:?} that must fail ended as {event:?}"))),
        }
    }

    pub(super) fn send(&mut self, side: usize, message: &[u8]) -> Outcome {
        self.post(side, Signal::No, Op::Send { message })
    }

    pub(super) fn flush(&mut self, side: usize) {
        self.end(side).flush();
    }

    // ---- events ----

    /// Polls one side once; true where it had something to say.
    pub(super) fn poll(&mut self, side: usize) -> bool {
        let now = self.now();
        self.events.clear();
        self.pair.ends[side].poll(now, &mut self.events);
        let news = !self.events.as_slice().is_empty();
        if news {
            self.last_progress = Instant::now();
        }
        self.seen[side].extend(self.events.as_slice());
        news
    }

    /// Polls both sides once.
    pub(super) fn pump(&mut self) -> bool {
        let left = self.poll(0);
        self.poll(1) || left
    }

    pub(super) fn be_patient(&self, wanted: &str) -> Outcome {
        let waited = self.last_progress.elapsed();
        ensure!(
            waited < self.provider.patience(),
            "no {wanted} within {} ms; unread events: {:?}",
            waited.as_millis(),
            self.seen.each_ref().map(|seen| seen.iter().take(4).collect::<Vec<_>>())
        );
        Ok(())
    }

    /// The next event of a side that `choose` takes; those before it are kept for later. The other side is polled before this one, so
    /// what the event promises can be checked before anything more happens.
    pub(super) fn wait<T>(&mut self, side: usize, wanted: &str, choose: impl Fn(&Event) -> Option<T>) -> Outcome<T> {
        self.last_progress = Instant::now();
        loop {
            let found = self.seen[side].iter().enumerate().find_map(|(at, event)| Some((at, choose(event)?)));
            if let Some((at, found)) = found {
                self.seen[side].remove(at);
                return Ok(found);
            }
            self.poll(1 - side);
            self.poll(side);
            self.be_patient(wanted)?;
        }
    }

    /// The next event of a side, whatever it is.
    pub(super) fn next(&mut self, side: usize) -> Outcome<Event> {
        self.wait(side, "event", |event| Some(*event))
    }

    /// The bytes of the next message.
    pub(super) fn message(&mut self, side: usize) -> Outcome<Vec<u8>> {
        self.wait(side, "message", |event| match event {
            Event::Message(message) => Some(message.bytes().to_vec()),
            _ => None,
        })
    }

    /// The outcome of the signalled operation `id`.
    pub(super) fn outcome(&mut self, side: usize, id: OpId) -> Outcome<Result<(), OpError>> {
        self.wait(side, "outcome of a signalled operation", |event| match event {
            Event::Done(done) if *done == id => Some(Ok(())),
            Event::Failed(Some(failed), error) if *failed == id => Some(Err(*error)),
            _ => None,
        })
    }

    /// Posts one signalled operation, flushes and waits for its outcome.
    pub(super) fn perform(&mut self, side: usize, op: Op<'_>) -> Outcome<Result<(), OpError>> {
        let id = OpId(self.seed.draw());
        self.post(side, Signal::Yes(id), op)?;
        self.flush(side);
        self.outcome(side, id)
    }

    /// Polls on until nothing has been reported for a while.
    pub(super) fn settle(&mut self) {
        let (mut quiet, mut since) = (0, Instant::now());
        while quiet < 200 || since.elapsed() < Duration::from_millis(5) {
            if self.pump() {
                (quiet, since) = (0, Instant::now());
            } else {
                quiet += 1;
            }
        }
    }

    /// The link still carries a message each way, and nothing unexpected was reported before.
    pub(super) fn still_works(&mut self) -> Outcome {
        for side in [0, 1] {
            let sent = self.bytes(8);
            self.send(side, &sent)?;
            self.flush(side);
            let got = self.message(1 - side)?;
            ensure!(got == sent, "message {sent:02x?} arrived as {got:02x?}");
        }
        self.nothing_left()
    }

    pub(super) fn nothing_left(&self) -> Outcome {
        ensure!(self.seen.iter().all(VecDeque::is_empty), "unexpected events: {:?}", self.seen);
        Ok(())
    }
}
