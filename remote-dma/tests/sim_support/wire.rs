//! A simulated fabric for sessions that share one thread: every poll lets virtual time pass, and a full queue can always empty.
//!
//! A lender that finds the peer's receive queue full waits for the borrower, which waits for the lender further down the same stack; so a
//! full queue has the peer's events taken into an inbox, as a host with a second thread would.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use farbus_transport::sim::{SimFabric, SimOptions, World, pair};
use farbus_transport::{
    Access, Event, Events, Fabric, Grant, GrantError, Limits, LocalRegion, LocalSpan, Mapped, Memory, Nanos, Op, OpError,
    PostError, Regions, RegisterError, RemoteRegion, RemoteSpan, RevokeError, Signal,
};

/// The longest step of the clock, so that whoever waits is asked often.
const STEP: Duration = Duration::from_millis(5);

struct Ends {
    ends: [SimFabric; 2],
    inboxes: [VecDeque<Event>; 2],
    world: World,
}

impl Ends {
    fn poll(&mut self, side: usize, out: &mut Events) {
        let now = self.world.now();
        let to = self.world.step().min(now + STEP);
        self.ends[side].poll(to, out);
    }

    fn take_for_the_peer_of(&mut self, side: usize) {
        let mut events = Events::new();
        self.poll(1 - side, &mut events);
        self.inboxes[1 - side].extend(events.as_slice());
    }
}

/// One end.
pub struct Wire {
    shared: Arc<Mutex<Ends>>,
    side: usize,
    limits: Limits,
}

/// The lender's end, the borrower's end, and the clock.
pub fn wires(seed: u64, options: SimOptions) -> (Wire, Wire, World) {
    let (lender, borrower, world) = pair(seed, options);
    let limits = *lender.limits();
    let ends = Ends { ends: [lender, borrower], inboxes: [VecDeque::new(), VecDeque::new()], world: world.clone() };
    let shared = Arc::new(Mutex::new(ends));
    let end = |side| Wire { shared: Arc::clone(&shared), side, limits };
    (end(0), end(1), world)
}

impl Wire {
    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.shared.lock().unwrap()
    }
}

impl Regions for Wire {
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.ends().ends[self.side].register(memory, access)
    }
    fn deregister(&mut self, region: LocalRegion) -> Result<(), RevokeError> {
        self.ends().ends[self.side].deregister(region)
    }
    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        self.ends().ends[self.side].local_memory(region)
    }
    fn map_local(&self, span: LocalSpan) -> Option<Mapped> {
        self.ends().ends[self.side].map_local(span)
    }
    fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError> {
        self.ends().ends[self.side].export(region, access)
    }
    fn import(&mut self, grant: &Grant) -> Result<RemoteRegion, GrantError> {
        self.ends().ends[self.side].import(grant)
    }
    fn release(&mut self, region: RemoteRegion) {
        self.ends().ends[self.side].release(region);
    }
    fn map_remote(&self, span: RemoteSpan) -> Option<Mapped> {
        self.ends().ends[self.side].map_remote(span)
    }
}

impl Fabric for Wire {
    fn limits(&self) -> &Limits {
        &self.limits
    }
    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        let mut ends = self.ends();
        let posted = ends.ends[self.side].post(signal, op);
        if posted == Err(PostError::Full) {
            ends.take_for_the_peer_of(self.side);
        }
        posted
    }
    fn store_polled(&mut self, to: RemoteSpan, bytes: &[u8]) -> Result<(), OpError> {
        self.ends().ends[self.side].store_polled(to, bytes)
    }
    fn flush(&mut self) {
        self.ends().ends[self.side].flush();
    }
    fn poll(&mut self, _now: Nanos, out: &mut Events) {
        let mut ends = self.ends();
        while out.has_room() {
            let Some(event) = ends.inboxes[self.side].pop_front() else { break };
            out.push(event);
        }
        if ends.inboxes[self.side].is_empty() {
            ends.poll(self.side, out);
        }
    }
    fn arm(&mut self) -> bool {
        false
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn close(&mut self) {
        self.ends().ends[self.side].close();
    }
}
