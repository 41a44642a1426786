//! A device in the guest's own process: no link, no grants, DMA straight at the guest's memory. What "native" means in every comparison.
//!
//! `Native::inline(nvme)` runs the device inside the register access that wakes it, as a plain emulator does; `Native::threaded(nvme, …)` gives
//! it a thread of its own, as hardware has: a store of 17 to BAR0 + 0x1018 is one cache line to that thread.

mod bus;
mod threaded;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_transport::{CloseReason, Memory, Nanos};

use self::bus::{DirectBus, Raised};
pub use self::threaded::ThreadedNative;
use crate::address::{BarAddress, Iova, Width};
use crate::attachment::{Activity, Attachment, AttachmentError, Host, MapError, MediationAnswer, Ticket, Window};
use crate::backend::{AttachError, Backend, InterruptMode, ResetKind};
use crate::device::DeviceDescription;
use crate::dirty_log::DirtyLog;
use crate::lender::PollOptions;

/// How long a device may take to end what is in flight.
const QUIESCE_LIMIT: Duration = Duration::from_secs(10);

/// A device that runs inside the calls of its function.
pub struct Native {
    backend: Box<dyn Backend>,
    bus: DirectBus,
}

impl Native {
    /// The device runs in the caller's thread: a doorbell write returns when its command has been carried out, as far as nothing blocks.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn inline(mut backend: Box<dyn Backend>) -> Result<Self, AttachError> {
        can_be_native(&*backend)?;
        let mut bus = DirectBus::default();
        backend.attach(&mut bus)?;
        Ok(Self { backend, bus })
    }

    /// The device runs in a thread of its own.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn threaded(backend: Box<dyn Backend>, options: PollOptions) -> Result<ThreadedNative, AttachError> {
        ThreadedNative::start(backend, options)
    }

    fn deliver(&mut self, host: &mut dyn Host) {
        while let Some(raised) = self.bus.next_raised() {
            match raised {
                Raised::Vector(vector) => host.interrupt(vector),
                Raised::Pin(asserted) => host.pin(asserted),
            }
        }
    }

    /// Polls until the device has nothing in flight; the caller fenced it, or removed the windows that must not be used.
    fn quiesce(&mut self) -> Result<(), AttachmentError> {
        let started = Instant::now();
        while self.backend.in_flight() > 0 {
            self.bus.set_now(Nanos::now());
            self.backend.poll(&mut self.bus);
            if started.elapsed() > QUIESCE_LIMIT {
                return Err(AttachmentError::Deadline { deadline_ms: 10_000 });
            }
        }
        Ok(())
    }
}

impl Attachment for Native {
    fn description(&self) -> &DeviceDescription {
        self.backend.description()
    }

    fn bar_read(&mut self, at: BarAddress, width: Width, host: &mut dyn Host) -> u64 {
        let value = self.backend.bar_read(at, width, &mut self.bus);
        self.deliver(host);
        width.truncate(value)
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, host: &mut dyn Host) {
        self.backend.bar_write(at, width, value, &mut self.bus);
        self.deliver(host);
    }

    /// A write has happened when it was posted.
    fn flush(&mut self) {}

    fn map(&mut self, window: Window, _host: &mut dyn Host) -> Result<(), MapError> {
        self.bus.map(&window)
    }

    fn unmap(&mut self, iova: Iova, len: u64, _host: &mut dyn Host) -> Result<(), MapError> {
        self.bus.unmap(iova, len)?;
        self.quiesce()?;
        self.bus.prune_logs();
        Ok(())
    }

    fn prove(&mut self, _memory: &Arc<Memory>, _host: &mut dyn Host) {}

    fn answer(&mut self, _ticket: Ticket, _answer: MediationAnswer<'_>, _host: &mut dyn Host) {}

    fn set_interrupt_mode(&mut self, mode: InterruptMode, host: &mut dyn Host) {
        self.backend.set_interrupt_mode(mode, &mut self.bus);
        self.deliver(host);
    }

    fn set_bus_master(&mut self, enabled: bool, _host: &mut dyn Host) {
        self.bus.set_bus_master(enabled);
    }

    fn reset(&mut self, kind: ResetKind, host: &mut dyn Host) -> Result<(), AttachmentError> {
        self.backend.fence();
        self.quiesce()?;
        self.backend.reset(kind, &mut self.bus);
        self.deliver(host);
        Ok(())
    }

    fn poll(&mut self, now: Nanos, host: &mut dyn Host) -> Activity {
        self.bus.set_now(now);
        let activity = self.backend.poll(&mut self.bus);
        self.deliver(host);
        activity
    }

    fn arm(&mut self) -> bool {
        self.backend.arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.wake_fd()
    }

    fn gone(&self) -> Option<CloseReason> {
        None
    }

    fn dirty_log(&mut self, memory: &Arc<Memory>, _host: &mut dyn Host) -> Option<&DirtyLog> {
        self.bus.log_of(memory)
    }
}

/// Nothing here maps windows for hardware.
///
/// # Errors
/// [`AttachError::Device`] for a device that needs that.
fn can_be_native(backend: &dyn Backend) -> Result<(), AttachError> {
    if backend.takes_windows() {
        return Err(AttachError::Device("it reaches memory by itself, and only a lender gives it the windows for that".to_owned()));
    }
    Ok(())
}

impl Drop for Native {
    fn drop(&mut self) {
        self.backend.fence();
        if let Err(error) = self.quiesce() {
            tracing::error!(%error, "a device was dropped with work in flight");
        }
        self.backend.detach();
    }
}
