//! Fabrics around fabrics: one that counts and remembers, one that makes things go wrong, one that breaks the contract for a test to notice.
//!
//! `Trace::new(fabric, 64)` shows that an MMIO read costs two work requests and one doorbell; `Faults::new(fabric, 7, rates)`
//! says `Full` when there is room and holds events back. Both are fabrics, so data paths hold no test code.

mod broken;
mod faults;
mod trace;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::fabric::{
    Events, Fabric, Grant, GrantError, Limits, Op, OpError, PostError, Regions, RegisterError, RevokeError, Signal,
};
use crate::memory::{Mapped, Memory};
use crate::span::{Access, LocalRegion, LocalSpan, RemoteRegion, RemoteSpan};
use crate::time::Nanos;
pub use broken::{Breach, Broken};
pub use faults::{FaultRates, Faults};
pub use trace::{Counters, Entry, Trace, TraceHandle};

// A boxed fabric is one too, so that wrappers fit around `Box<dyn Fabric>`.
impl<R: Regions + ?Sized> Regions for Box<R> {
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        (**self).register(memory, access)
    }

    fn register_for_peer(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        (**self).register_for_peer(memory, access)
    }

    fn deregister(&mut self, region: LocalRegion) -> Result<(), RevokeError> {
        (**self).deregister(region)
    }

    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        (**self).local_memory(region)
    }

    fn map_local(&self, span: LocalSpan) -> Option<Mapped> {
        (**self).map_local(span)
    }

    fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError> {
        (**self).export(region, access)
    }

    fn import(&mut self, grant: &Grant) -> Result<RemoteRegion, GrantError> {
        (**self).import(grant)
    }

    fn release(&mut self, region: RemoteRegion) {
        (**self).release(region);
    }

    fn map_remote(&self, span: RemoteSpan) -> Option<Mapped> {
        (**self).map_remote(span)
    }
}

impl<F: Fabric + ?Sized> Fabric for Box<F> {
    fn limits(&self) -> &Limits {
        (**self).limits()
    }

    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), PostError> {
        (**self).post(signal, op)
    }

    fn store_polled(&mut self, to: RemoteSpan, bytes: &[u8]) -> Result<(), OpError> {
        (**self).store_polled(to, bytes)
    }

    fn flush(&mut self) {
        (**self).flush();
    }

    fn poll(&mut self, now: Nanos, out: &mut Events) {
        (**self).poll(now, out);
    }

    fn arm(&mut self) -> bool {
        (**self).arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).wake_fd()
    }

    fn close(&mut self) {
        (**self).close();
    }
}
