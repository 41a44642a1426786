//! A simulated fabric for sessions that share one thread: every poll lets virtual time pass, and a full queue can always empty.
//!
//! A lender that finds the peer's receive queue full waits for the borrower, which waits for the lender further down the same stack; so a
//! full queue has the peer's events taken into an inbox, as a host with a second thread would.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{SimFabric, SimOptions, World, pair};
use crate::fabric::{
    Event, Events, Fabric, Grant, GrantError, Limits, Op, OpError, PostError, Regions, RegisterError, RevokeError, Signal,
};
use crate::memory::{Mapped, Memory};
use crate::span::{Access, LocalRegion, LocalSpan, RemoteRegion, RemoteSpan};
use crate::time::Nanos;

/// The longest step of the clock, so that whoever waits is asked often.
const STEP: Duration = Duration::from_millis(5);

struct Ends {
    lender: SimFabric,
    borrower: SimFabric,
    inboxes: (VecDeque<Event>, VecDeque<Event>),
    world: World,
}

/// Which end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Lender,
    Borrower,
}

impl Side {
    const fn other(self) -> Self {
        match self {
            Self::Lender => Self::Borrower,
            Self::Borrower => Self::Lender,
        }
    }
}

impl Ends {
    fn end(&mut self, side: Side) -> &mut SimFabric {
        match side {
            Side::Lender => &mut self.lender,
            Side::Borrower => &mut self.borrower,
        }
    }

    fn inbox(&mut self, side: Side) -> &mut VecDeque<Event> {
        match side {
            Side::Lender => &mut self.inboxes.0,
            Side::Borrower => &mut self.inboxes.1,
        }
    }

    fn poll(&mut self, side: Side, out: &mut Events) {
        let now = self.world.now();
        let to = self.world.step().min(now + STEP);
        self.end(side).poll(to, out);
    }

    fn take_for_the_peer_of(&mut self, side: Side) {
        let mut events = Events::new();
        self.poll(side.other(), &mut events);
        self.inbox(side.other()).extend(events.as_slice());
    }
}

/// One end.
pub struct Wire {
    shared: Arc<Mutex<Ends>>,
    side: Side,
    limits: Limits,
    before_poll: Option<Box<dyn FnMut() + Send>>,
}

/// The lender's end, the borrower's end, and the clock.
pub fn wires(seed: u64, options: SimOptions) -> (Wire, Wire, World) {
    let (lender, borrower, world) = pair(seed, options);
    let limits = *lender.limits();
    let ends = Ends { lender, borrower, inboxes: (VecDeque::new(), VecDeque::new()), world: world.clone() };
    let shared = Arc::new(Mutex::new(ends));
    let end = |side| Wire { shared: Arc::clone(&shared), side, limits, before_poll: None };
    (end(Side::Lender), end(Side::Borrower), world)
}

impl Wire {
    /// Has `what` done before each poll of this end: a turn of the other side's, say, for who polls in a loop of their own.
    pub fn before_poll(&mut self, what: impl FnMut() + Send + 'static) {
        self.before_poll = Some(Box::new(what));
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Regions for Wire {
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.ends().end(self.side).register(memory, access)
    }
    fn deregister(&mut self, region: LocalRegion) -> Result<(), RevokeError> {
        self.ends().end(self.side).deregister(region)
    }
    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        self.ends().end(self.side).local_memory(region)
    }
    fn map_local(&self, span: LocalSpan) -> Option<Mapped> {
        self.ends().end(self.side).map_local(span)
    }
    fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError> {
        self.ends().end(self.side).export(region, access)
    }
    fn import(&mut self, grant: &Grant) -> Result<RemoteRegion, GrantError> {
        self.ends().end(self.side).import(grant)
    }
    fn release(&mut self, region: RemoteRegion) {
        self.ends().end(self.side).release(region);
    }
    fn map_remote(&self, span: RemoteSpan) -> Option<Mapped> {
        self.ends().end(self.side).map_remote(span)
    }
}

impl Fabric for Wire {
    fn limits(&self) -> &Limits {
        &self.limits
    }
    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        let side = self.side;
        let mut ends = self.ends();
        let posted = ends.end(side).post(signal, op);
        if posted == Err(PostError::Full) {
            ends.take_for_the_peer_of(side);
        }
        posted
    }
    fn store_polled(&mut self, to: RemoteSpan, bytes: &[u8]) -> Result<(), OpError> {
        self.ends().end(self.side).store_polled(to, bytes)
    }
    fn flush(&mut self) {
        self.ends().end(self.side).flush();
    }
    fn poll(&mut self, _now: Nanos, out: &mut Events) {
        if let Some(what) = &mut self.before_poll {
            what();
        }
        let side = self.side;
        let mut ends = self.ends();
        while out.has_room() {
            let Some(event) = ends.inbox(side).pop_front() else { break };
            out.push(event);
        }
        if ends.inbox(side).is_empty() {
            ends.poll(side, out);
        }
    }
    fn arm(&mut self) -> bool {
        false
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn close(&mut self) {
        self.ends().end(self.side).close();
    }
}
