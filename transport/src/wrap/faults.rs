//! A fabric that behaves as badly as the contract allows, and whose link can be made to drop at a chosen operation.
//!
//! With `full_permille: 100` every tenth post is refused although there is room, with `drop_at: Some(500)` the five hundredth operation
//! is the last: the owner hears that the peer is gone, and the peer hears goodbye.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::fabric::{
    CloseReason, Event, Events, Fabric, Grant, GrantError, Limits, Op, OpError, OpId, PostError, Regions, RegisterError,
    RevokeError, Signal,
};
use crate::memory::{Mapped, Memory};
use crate::sim::Seed;
use crate::span::{Access, LocalRegion, LocalSpan, RemoteRegion, RemoteSpan};
use crate::time::Nanos;

/// How often what goes wrong. All of it is within the contract.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultRates {
    /// How many posts in a thousand are refused as [`PostError::Full`] although there is room; below 1000.
    pub full_permille: u32,
    /// How many flushes in a thousand are put off.
    pub late_flush_permille: u32,
    /// How many polls pass at most before a flush that was put off is made.
    pub flush_polls: u64,
    /// How many events in a thousand are held back.
    pub late_event_permille: u32,
    /// How many polls at most an event is held back; those behind it wait, too.
    pub event_polls: u64,
    /// The operation, counted from 1, with which the link drops: it and all that is outstanding fail.
    pub drop_at: Option<u64>,
}

impl FaultRates {
    /// Rates that are drawn; the link does not drop.
    pub fn drawn(seed: &mut Seed) -> Self {
        Self {
            full_permille: seed.between(0, 300) as u32,
            late_flush_permille: seed.between(0, 500) as u32,
            flush_polls: seed.between(1, 5),
            late_event_permille: seed.between(0, 500) as u32,
            event_polls: seed.between(1, 5),
            drop_at: None,
        }
    }
}

/// `F`, with faults.
#[derive(Debug)]
pub struct Faults<F> {
    inner: F,
    rates: FaultRates,
    seed: Seed,
    posted: u64,
    /// Polls left until a flush that was put off is made.
    flush_in: Option<u64>,
    /// Events that were reported below and not yet here; each with the polls it still waits.
    held: VecDeque<(u64, Event)>,
    /// Signalled operations without an outcome yet, oldest first; kept only where the link is going to drop.
    awaited: VecDeque<OpId>,
    dropped: bool,
    scratch: Events,
}

impl<F: Fabric> Faults<F> {
    /// Wraps `inner`; `seed` decides when what goes wrong.
    pub fn new(inner: F, seed: u64, rates: FaultRates) -> Self {
        Self {
            inner,
            rates,
            seed: Seed::new(seed),
            posted: 0,
            flush_in: None,
            held: VecDeque::new(),
            awaited: VecDeque::new(),
            dropped: false,
            scratch: Events::new(),
        }
    }

    /// Drops the link now: what is outstanding fails, and the owner hears [`CloseReason::PeerGone`] behind all that was there before.
    pub fn drop_link(&mut self) {
        if std::mem::replace(&mut self.dropped, true) || self.has_ended() {
            return;
        }
        self.inner.close();
        for id in std::mem::take(&mut self.awaited) {
            let failed = Event::Failed(Some(id), OpError::Closed);
            self.held.push_back((0, failed));
        }
        self.held.push_back((0, Event::Closed(CloseReason::PeerGone)));
    }

    fn has_ended(&self) -> bool {
        self.held.iter().any(|(_, event)| matches!(event, Event::Closed(_)))
    }

    fn count(&mut self, signal: Signal) {
        self.posted += 1;
        if let (Some(_), Signal::Yes(id)) = (self.rates.drop_at, signal) {
            self.awaited.push_back(id);
        }
        if self.rates.drop_at == Some(self.posted) {
            self.drop_link();
        }
    }

    fn hold(&mut self, event: Event) {
        if let Event::Done(id) | Event::Failed(Some(id), _) = event
            && let Some(at) = self.awaited.iter().position(|awaited| *awaited == id)
        {
            self.awaited.remove(at);
        }
        let late = self.seed.chance(self.rates.late_event_permille);
        let polls = if late { self.seed.between(1, self.rates.event_polls) } else { 0 };
        self.held.push_back((polls, event));
    }

    fn flush_when_due(&mut self) {
        match self.flush_in {
            Some(0) => {
                self.flush_in = None;
                self.inner.flush();
            }
            Some(polls) => self.flush_in = Some(polls - 1),
            None => {}
        }
    }
}

impl<F: Fabric> Fabric for Faults<F> {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        if self.dropped || self.seed.chance(self.rates.full_permille) {
            return Err(PostError::Full);
        }
        // One that would be over when `post` returns cannot fail later.
        let at_once = self.inner.limits().immediate && matches!((signal, op), (Signal::No, Op::Write { .. } | Op::Read { .. }));
        if at_once && self.rates.drop_at == Some(self.posted + 1) {
            self.posted += 1;
            self.held.push_back((0, Event::Failed(None, OpError::Closed)));
            self.drop_link();
            return Err(PostError::Failed);
        }
        self.inner.post(signal, op)?;
        self.count(signal);
        Ok(())
    }

    fn store_polled(&mut self, to: RemoteSpan, bytes: &[u8]) -> Result<(), OpError> {
        if self.dropped {
            return Err(OpError::Closed);
        }
        self.inner.store_polled(to, bytes)
    }

    fn flush(&mut self) {
        if self.seed.chance(self.rates.late_flush_permille) {
            let polls = self.seed.between(0, self.rates.flush_polls);
            self.flush_in.get_or_insert(polls);
        } else {
            self.flush_in = None;
            self.inner.flush();
        }
    }

    fn poll(&mut self, now: Nanos, out: &mut Events) {
        self.flush_when_due();
        let mut below = std::mem::take(&mut self.scratch);
        below.clear();
        // What is held here is bounded: nothing more is taken while a whole poll's events wait.
        if self.held.len() < Events::CAPACITY {
            self.inner.poll(now, &mut below);
        }
        if !self.dropped {
            for event in below.as_slice() {
                self.hold(*event);
            }
        }
        self.scratch = below;
        while let Some((polls, event)) = self.held.front_mut() {
            if *polls > 0 {
                *polls -= 1;
                break;
            }
            if !out.push(*event) {
                break;
            }
            self.held.pop_front();
        }
    }

    fn arm(&mut self) -> bool {
        // Whatever waits here for a poll would not be announced by the descriptor below.
        self.held.is_empty() && self.flush_in.is_none() && self.inner.arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wake_fd()
    }

    fn close(&mut self) {
        if !self.dropped {
            self.inner.close();
        }
    }
}

impl<F: Fabric> Regions for Faults<F> {
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.inner.register(memory, access)
    }

    fn register_for_peer(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.inner.register_for_peer(memory, access)
    }

    fn deregister(&mut self, region: LocalRegion) -> Result<(), RevokeError> {
        self.inner.deregister(region)
    }

    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        self.inner.local_memory(region)
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
        self.inner.release(region);
    }

    fn map_remote(&self, span: RemoteSpan) -> Option<Mapped> {
        self.inner.map_remote(span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{self, SimOptions};

    #[test]
    fn a_dropped_link_answers_everything_once_and_then_ends() {
        for drop_at in 1..40 {
            let rates = FaultRates { late_event_permille: 300, event_polls: 4, drop_at: Some(drop_at), ..FaultRates::default() };
            let (left, mut right, world) = sim::pair(drop_at, SimOptions::default());
            let mut left = Faults::new(left, drop_at, rates);
            let (mut heard, mut peer_heard, mut events) = (Vec::new(), Vec::new(), Events::new());
            let mut posted = Vec::new();
            for round in 0..5000_u64 {
                if round < 60 && left.post(Signal::Yes(OpId(round)), Op::Send { message: b"fault" }).is_ok() {
                    posted.push(OpId(round));
                }
                left.flush();
                for (end, log) in [(&mut left as &mut dyn Fabric, &mut heard), (&mut right, &mut peer_heard)] {
                    events.clear();
                    end.poll(world.step(), &mut events);
                    log.extend_from_slice(events.as_slice());
                }
            }
            let answered: Vec<_> = heard
                .iter()
                .filter_map(|event| match event {
                    Event::Done(id) | Event::Failed(Some(id), OpError::Closed) => Some(*id),
                    _ => None,
                })
                .collect();
            assert_eq!(posted.len() as u64, drop_at);
            assert_eq!(answered, posted);
            assert_eq!(heard.last(), Some(&Event::Closed(CloseReason::PeerGone)));
            assert_eq!(heard.iter().filter(|event| matches!(event, Event::Closed(_))).count(), 1);
            assert_eq!(peer_heard.last(), Some(&Event::Closed(CloseReason::PeerClosed)));
        }
    }
}
