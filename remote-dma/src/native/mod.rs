//! A device in the guest's own process: no link, no grants, DMA straight at the guest's memory. What "native" means in every comparison.
//!
//! `Native::inline(nvme)` runs the device inside the register access that wakes it, as a plain emulator does; `Native::threaded(nvme, …)` gives
//! it a thread of its own, as hardware has: a store of 17 to BAR0 + 0x1018 is one cache line to that thread.

mod bus;
mod device_thread;
mod home;
mod threaded;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_transport::{CloseReason, Memory, Nanos};

use self::bus::{DirectBus, Raised};
pub use self::home::Home;
pub use self::threaded::ThreadedNative;
use crate::address::{BarAddress, Iova, Width};
use crate::attachment::{Activity, Attachment, AttachmentError, CANNOT_REST, Host, MapError, MediationAnswer, Ticket, Window};
use crate::backend::{AttachError, Backend, InterruptMode, ResetKind};
use crate::device::DeviceDescription;
use crate::dirty_log::DirtyLog;
use crate::lender::{PollOptions, StillKept};
use crate::rest::{Continued, Kept, Lease, Rest, RestToken};

/// How long a device may take to end what is in flight.
const QUIESCE_LIMIT: Duration = Duration::from_secs(10);

/// A device that runs inside the calls of its function.
pub struct Native {
    /// `None` when the device was left at home.
    backend: Option<Box<dyn Backend>>,
    description: DeviceDescription,
    bus: DirectBus,
    asked: Option<RestToken>,
    continues: Option<RestToken>,
    home: Option<Home>,
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
        Ok(Self::over(backend, bus, None))
    }

    /// As [`Native::inline`], with a device that an earlier function left: it is at rest until the new one tells it to go on.
    ///
    /// # Errors
    /// [`StillKept`], with the device for another try.
    pub fn continued(device: Continued) -> Result<Self, StillKept> {
        let Continued { mut backend, token } = device;
        let mut bus = DirectBus::default();
        match backend.unpark(&mut bus) {
            Ok(()) => Ok(Self::over(backend, bus, Some(token))),
            Err(error) => Err((error, Kept::new(backend, Lease { token, time: Duration::from_secs(30) }))),
        }
    }

    fn over(backend: Box<dyn Backend>, bus: DirectBus, continues: Option<RestToken>) -> Self {
        let description = backend.description().clone();
        Self { backend: Some(backend), description, bus, asked: None, continues, home: None }
    }

    /// Where the device goes when its function leaves it; without a home it cannot be kept.
    #[must_use]
    pub fn at_home(mut self, home: &Home) -> Self {
        self.home = Some(home.clone());
        self
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
        let Some(backend) = &mut self.backend else { return Ok(()) };
        let started = Instant::now();
        while backend.in_flight() > 0 {
            self.bus.set_now(Nanos::now());
            backend.poll(&mut self.bus);
            if started.elapsed() > QUIESCE_LIMIT {
                return Err(AttachmentError::Deadline { deadline_ms: 10_000 });
            }
        }
        Ok(())
    }
}

/// Said where the device was left at home.
const LEFT: AttachmentError = AttachmentError::Gone(CloseReason::Local);

impl Attachment for Native {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn bar_read(&mut self, at: BarAddress, width: Width, host: &mut dyn Host) -> u64 {
        let Some(backend) = &mut self.backend else { return width.all_ones() };
        let value = backend.bar_read(at, width, &mut self.bus);
        self.deliver(host);
        width.truncate(value)
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, host: &mut dyn Host) {
        self.asked = None;
        if let Some(backend) = &mut self.backend {
            backend.bar_write(at, width, value, &mut self.bus);
            self.deliver(host);
        }
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
        if let Some(backend) = &mut self.backend {
            backend.set_interrupt_mode(mode, &mut self.bus);
            self.deliver(host);
        }
    }

    fn set_bus_master(&mut self, enabled: bool, _host: &mut dyn Host) {
        self.bus.set_bus_master(enabled);
    }

    fn reset(&mut self, kind: ResetKind, host: &mut dyn Host) -> Result<(), AttachmentError> {
        self.asked = None;
        self.backend.as_mut().ok_or(LEFT)?.fence();
        self.quiesce()?;
        if let Some(backend) = &mut self.backend {
            backend.reset(kind, &mut self.bus);
        }
        self.deliver(host);
        Ok(())
    }

    fn poll(&mut self, now: Nanos, host: &mut dyn Host) -> Activity {
        let Some(backend) = &mut self.backend else { return Activity::Idle(None) };
        self.bus.set_now(now);
        let activity = backend.poll(&mut self.bus);
        self.deliver(host);
        activity
    }

    fn arm(&mut self) -> bool {
        self.backend.as_mut().is_none_or(|backend| backend.arm())
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.as_ref()?.wake_fd()
    }

    fn gone(&self) -> Option<CloseReason> {
        self.backend.is_none().then_some(CloseReason::Local)
    }

    fn pause(&mut self, token: RestToken, _host: &mut dyn Host) -> Result<(), AttachmentError> {
        if !self.backend.as_mut().ok_or(LEFT)?.pause() {
            return Err(AttachmentError::Refused(CANNOT_REST));
        }
        self.asked = Some(token);
        Ok(())
    }

    fn rest(&mut self) -> Result<Option<Rest>, AttachmentError> {
        let backend = self.backend.as_ref().ok_or(LEFT)?;
        let quiet = backend.is_at_rest() && backend.in_flight() == 0 && !self.bus.has_raised();
        let mark = backend.journal().map(crate::Journal::mark);
        Ok(self.asked.filter(|_| quiet).map(|token| Rest { token, mark }))
    }

    fn resume(&mut self, host: &mut dyn Host) {
        (self.asked, self.continues) = (None, None);
        if let Some(backend) = &mut self.backend {
            backend.resume(&mut self.bus);
            self.deliver(host);
        }
    }

    fn keep(&mut self, lease: Duration, _host: &mut dyn Host) -> Result<(), AttachmentError> {
        let rest = self.rest()?.ok_or(AttachmentError::Refused("the device is not at rest"))?;
        let home = self.home.as_ref().ok_or(AttachmentError::Refused("the device has no home here"))?;
        let mut backend = self.backend.take().ok_or(LEFT)?;
        backend.park();
        self.bus.let_go_of_all();
        home.put(Kept::new(backend, Lease { token: rest.token, time: lease }));
        Ok(())
    }

    fn continues(&self) -> Option<RestToken> {
        self.continues
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
        if let Some(backend) = &mut self.backend {
            backend.fence();
        }
        if let Err(error) = self.quiesce() {
            tracing::error!(%error, "a device was dropped with work in flight");
        }
        if let Some(backend) = &mut self.backend {
            backend.detach();
        }
    }
}
