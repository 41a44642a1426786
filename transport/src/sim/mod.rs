//! The simulated fabric: two ends and one clock that the test moves, everything else drawn from one seed.
//!
//! `sim::pair(7, SimOptions::default())` gives two ends and their [`World`]; `end.poll(world.step(), &mut events)` moves time to the next
//! arrival. Bytes land late, in pieces and in any order that the contract in [`crate::fabric`] allows, and never earlier or other than
//! it allows, unless [`SimOptions::violate`] says so.

mod carry;
pub mod one_thread;
mod options;
mod regions;
mod seed;
mod wire;
mod world;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::fabric::{
    Events, Fabric, Grant, GrantError, Limits, Op, OpError, PostError, Regions, RegisterError, RevokeError, Signal,
};
use crate::memory::{Mapped, Memory};
use crate::span::{Access, LocalRegion, LocalSpan, RemoteRegion, RemoteSpan};
use crate::time::Nanos;
pub use options::{SimOptions, Violation};
pub use seed::Seed;
use world::{Inner, SideIndex};

/// How long memory that is taken back waits for a mapping of it.
const MAPPING_LIMIT: Duration = Duration::from_millis(500);

/// Two connected ends and the world between them, all of it decided by `seed` and the order of calls.
///
/// # Panics
/// Where [`SimOptions::descriptors`] is asked for and the host has no descriptor left.
pub fn pair(seed: u64, options: SimOptions) -> (SimFabric, SimFabric, World) {
    let limits = options.limits();
    let wakes = [(); 2].map(|()| options.descriptors.then(descriptor));
    let inner = Arc::new(Mutex::new(Inner::new(seed, options, wakes.clone())));
    let [left, right] = wakes;
    let end = |side, wake| SimFabric { inner: Arc::clone(&inner), side, limits, wake };
    (end(0, left), end(1, right), World { inner: Arc::clone(&inner) })
}

#[expect(clippy::expect_used, reason = "a simulation without descriptors cannot run, and nothing here is a peer's doing")]
fn descriptor() -> Arc<OwnedFd> {
    let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    Arc::new(made.expect("the host has no descriptor left for a simulated fabric"))
}

/// One end of a simulated link. Dropping it is what a killed process is: the peer hears [`crate::CloseReason::PeerGone`] after a while.
#[derive(Debug)]
pub struct SimFabric {
    inner: Arc<Mutex<Inner>>,
    side: SideIndex,
    limits: Limits,
    wake: Option<Arc<OwnedFd>>,
}

/// A hand on the clock and on the wire of a simulated link.
#[derive(Clone, Debug)]
pub struct World {
    inner: Arc<Mutex<Inner>>,
}

/// A panic in a test must not hide behind a second one here.
fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// The present.
    pub fn now(&self) -> Nanos {
        lock(&self.inner).now
    }

    /// When the next thing happens; `None` where nothing is on its way.
    pub fn next_at(&self) -> Option<Nanos> {
        lock(&self.inner).next_at()
    }

    /// A time to poll at: mostly that of the next arrival, sometimes before it, so that whoever polls sees the states between.
    pub fn step(&self) -> Nanos {
        let mut inner = lock(&self.inner);
        let now = inner.now;
        let to = match inner.next_at() {
            Some(at) if inner.seed.chance(700) => at,
            Some(at) => Nanos(inner.seed.between(now.0, at.0)),
            None => now + Duration::from_micros(1),
        };
        to.max(now)
    }

    /// Lets time pass without anybody polling.
    pub fn advance(&self, by: Duration) {
        let mut inner = lock(&self.inner);
        let to = inner.now + by;
        inner.advance(to);
    }

    /// Cuts the link: nothing crosses any more, and both ends notice after [`SimOptions::detection_ns`].
    pub fn cut(&self) {
        lock(&self.inner).cut();
    }

    /// Makes `side` (0 or 1) this many times slower from now on, in place of whatever was slow.
    pub fn slow(&self, side: usize, times: u64) {
        lock(&self.inner).options.slow = Some((side, times));
    }
}

impl Regions for SimFabric {
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        lock(&self.inner).sides[self.side].book.register(memory, access)
    }

    fn deregister(&mut self, region: LocalRegion) -> Result<(), RevokeError> {
        let in_use = lock(&self.inner).sides[self.side].book.deregister(&region);
        // Mappings are dropped by threads of a test, in real time.
        let started = Instant::now();
        while in_use.iter().any(|users| Arc::strong_count(users) > 1) {
            if started.elapsed() > MAPPING_LIMIT {
                return Err(RevokeError::InUse { limit_ms: MAPPING_LIMIT.as_millis() as u64 });
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        fence(Ordering::Acquire);
        Ok(())
    }

    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        lock(&self.inner).sides[self.side].book.memory(region.name).cloned()
    }

    fn map_local(&self, span: LocalSpan) -> Option<Mapped> {
        let inner = lock(&self.inner);
        let memory = inner.sides[self.side].book.memory(span.name)?;
        Mapped::new(Arc::clone(memory), span.offset, u64::from(span.len)).ok()
    }

    fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError> {
        let mut inner = lock(&self.inner);
        if !inner.is_open(self.side) {
            return Err(GrantError::Closed);
        }
        inner.sides[self.side].book.export(region, access)
    }

    fn import(&mut self, grant: &Grant) -> Result<RemoteRegion, GrantError> {
        let mut inner = lock(&self.inner);
        if !inner.is_open(self.side) {
            return Err(GrantError::Closed);
        }
        let [left, right] = &mut inner.sides;
        let (ours, peers) = if self.side == 0 { (left, right) } else { (right, left) };
        ours.book.import(grant, &peers.book)
    }

    fn release(&mut self, region: RemoteRegion) {
        lock(&self.inner).sides[self.side].book.release(&region);
    }

    fn map_remote(&self, span: RemoteSpan) -> Option<Mapped> {
        let inner = lock(&self.inner);
        let (ours, peers) = (&inner.sides[self.side].book, &inner.sides[1 - self.side].book);
        let (memory, hold) = ours.hold(&span, peers).filter(|_| self.limits.peer_mappable)?;
        Mapped::new(memory, span.offset, u64::from(span.len)).ok().map(|mapped| mapped.held(hold))
    }
}

impl Fabric for SimFabric {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        lock(&self.inner).post(self.side, signal, op)
    }

    fn store_polled(&mut self, to: RemoteSpan, bytes: &[u8]) -> Result<(), OpError> {
        lock(&self.inner).store_polled(self.side, &to, bytes)
    }

    fn flush(&mut self) {
        lock(&self.inner).flush(self.side);
    }

    fn poll(&mut self, now: Nanos, out: &mut Events) {
        lock(&self.inner).poll(self.side, now, out);
    }

    fn arm(&mut self) -> bool {
        lock(&self.inner).arm(self.side)
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.wake.as_ref().map(|wake| wake.as_fd())
    }

    fn close(&mut self) {
        lock(&self.inner).close(self.side);
    }
}

impl Drop for SimFabric {
    fn drop(&mut self) {
        lock(&self.inner).vanish(self.side);
    }
}
