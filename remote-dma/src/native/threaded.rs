//! A native device on a thread of its own, as hardware is concurrent to the CPU: register accesses are cache lines to that thread.
//!
//! The function's thread pushes "BAR0 + 0x1018 := 17" and goes on; the device's thread takes it, copies slot 16 out of guest memory, copies
//! 4 KiB in, stores the completion. Maps and resets, which nobody times, go through a channel that the ring points to.

use std::os::fd::BorrowedFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use farbus_transport::{CloseReason, Memory, Nanos};

use super::Home;
use super::bus::{DirectBus, Logs};
use super::device_thread::{Control, Device, kind};
use crate::address::{BarAddress, Iova, Width};
use crate::attachment::{Activity, Attachment, AttachmentError, CANNOT_REST, Host, MapError, MediationAnswer, Ticket, Window};
use crate::backend::{AttachError, Backend, InterruptMode, ResetKind};
use crate::device::DeviceDescription;
use crate::dirty_log::DirtyLog;
use crate::lender::PollOptions;
use crate::message::{ToBorrower, ToLender};
use crate::rest::{Continued, Lease, Rest, RestToken};
use crate::wait::{Patience, SpinThenSleep, sleep_until_readable};
use crate::wire::{Tap, Wire, wire};

/// A device in this process on a thread of its own.
pub struct ThreadedNative {
    description: DeviceDescription,
    out: Wire,
    back: Tap,
    control: Sender<Control>,
    logs: Logs,
    log: Option<DirtyLog>,
    patience: SpinThenSleep,
    sequence: u32,
    thread: Option<JoinHandle<()>>,
    /// The device's thread was found dead with a full ring.
    died: bool,
    rest: Option<Rest>,
    /// What the device is asked for: `Err` where it said that it cannot.
    asked: Option<Result<RestToken, ()>>,
    continues: Option<RestToken>,
    home: Option<Home>,
}

impl ThreadedNative {
    pub(super) fn start(mut backend: Box<dyn Backend>, options: PollOptions) -> Result<Self, AttachError> {
        super::can_be_native(&*backend)?;
        let mut bus = DirectBus::default();
        backend.attach(&mut bus)?;
        Self::run(backend, bus, options)
    }

    /// As [`super::Native::threaded`], with a device that an earlier function left.
    ///
    /// # Errors
    /// [`AttachError`]; the device is lost, and with it its lease.
    pub fn continued(device: Continued, options: PollOptions) -> Result<Self, AttachError> {
        let Continued { mut backend, token } = device;
        let mut bus = DirectBus::default();
        backend.unpark(&mut bus)?;
        let mut native = Self::run(backend, bus, options)?;
        native.continues = Some(token);
        Ok(native)
    }

    /// Where the device goes when its function leaves it; without a home it cannot be kept.
    #[must_use]
    pub fn at_home(mut self, home: &Home) -> Self {
        self.home = Some(home.clone());
        self
    }

    fn run(backend: Box<dyn Backend>, bus: DirectBus, options: PollOptions) -> Result<Self, AttachError> {
        let failed = |error: std::io::Error| AttachError::Device(error.to_string());
        let (out, device_in) = wire().map_err(failed)?;
        let (device_out, back) = wire().map_err(failed)?;
        let (control, commands) = channel();
        let logs = Logs::default();
        let description = backend.description().clone();
        let device = Device { backend, bus, taken: device_in, out: device_out, commands, logs: Arc::clone(&logs), asked: None };
        let thread = std::thread::Builder::new().name("farbus-device".into()).spawn(move || device.run(options)).map_err(failed)?;
        let patience = SpinThenSleep::new(Duration::from_micros(200));
        Ok(Self {
            description,
            out,
            back,
            control,
            logs,
            log: None,
            patience,
            sequence: 0,
            thread: Some(thread),
            died: false,
            rest: None,
            asked: None,
            continues: None,
            home: None,
        })
    }

    /// The device's thread, to pin it to a core.
    pub fn thread(&self) -> Option<&JoinHandle<()>> {
        self.thread.as_ref()
    }

    fn ask<E: From<AttachmentError>>(&mut self, make: impl FnOnce(Sender<Result<(), E>>) -> Control) -> Result<(), E> {
        let (answer, answered) = channel();
        let gone = || AttachmentError::Gone(CloseReason::PeerGone);
        self.control.send(make(answer)).map_err(|_| gone())?;
        self.push(kind::CONTROL, &[]);
        answered.recv().map_err(|_| gone())?
    }

    fn send(&mut self, message: ToLender) {
        let encoded = message.encode();
        self.push(kind::MESSAGE, encoded.as_slice());
    }

    /// Waits for room as long as there is somebody to make it; what a dead device's thread would have taken is dropped.
    fn push(&mut self, kind: u8, bytes: &[u8]) {
        /// Rounds between two looks at whether the thread still runs.
        const ROUNDS_PER_LOOK: u32 = 1024;
        let mut rounds = 0_u32;
        while !self.died && !self.out.try_push(kind, bytes) {
            self.out.flush();
            std::thread::yield_now();
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(ROUNDS_PER_LOOK) && !self.is_alive() {
                tracing::warn!("the thread of a device is gone: what it is told is dropped");
                self.died = true;
            }
        }
        self.out.flush();
    }

    /// Takes one message; the value and its sequence where it is one.
    fn take(&mut self, host: &mut dyn Host) -> Option<Option<(u32, u64)>> {
        let (_, message) = self.back.take()?;
        match ToBorrower::parse(message.bytes()) {
            Ok((ToBorrower::BarValue { sequence, value }, [])) => return Some(Some((sequence, value))),
            Ok((ToBorrower::Interrupt { vector }, [])) => host.interrupt(vector),
            Ok((ToBorrower::Pin { asserted }, [])) => host.pin(asserted),
            Ok((ToBorrower::Rested { sequence, mark }, [])) if sequence == self.sequence => {
                self.rest = self.asked.and_then(Result::ok).map(|token| Rest { token, mark });
            }
            Ok((ToBorrower::Rested { .. }, [])) => tracing::debug!("the device came to a rest that nobody waits for"),
            Ok((ToBorrower::Ack { .. }, [])) => self.asked = Some(Err(())),
            other => tracing::error!(?other, "a device in this process said what it never says"),
        }
        Some(None)
    }

    fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Attachment for ThreadedNative {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn bar_read(&mut self, at: BarAddress, width: Width, host: &mut dyn Host) -> u64 {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        self.send(ToLender::BarRead { sequence, at, width });
        self.patience.begin();
        loop {
            while let Some(taken) = self.take(host) {
                if let Some((_, value)) = taken.filter(|(answered, _)| *answered == sequence) {
                    return width.truncate(value);
                }
            }
            self.patience.idle();
            if self.patience.wants_sleep() {
                if !self.is_alive() {
                    return width.all_ones();
                }
                if self.back.arm() {
                    sleep_until_readable(&[Some(self.back.fd())], Some(Duration::from_millis(100)));
                }
                self.patience.begin();
            }
        }
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, _host: &mut dyn Host) {
        (self.rest, self.asked) = (None, None);
        self.send(ToLender::BarWrite { at, width, value });
    }

    /// A write is in the device thread's ring, and the thread awake, when it was posted.
    fn flush(&mut self) {}

    fn map(&mut self, window: Window, _host: &mut dyn Host) -> Result<(), MapError> {
        self.ask(|answer| Control::Map(window, answer))
    }

    fn unmap(&mut self, iova: Iova, len: u64, _host: &mut dyn Host) -> Result<(), MapError> {
        self.ask(|answer| Control::Unmap(iova, len, answer))
    }

    fn prove(&mut self, _memory: &Arc<Memory>, _host: &mut dyn Host) {}

    fn answer(&mut self, _ticket: Ticket, _answer: MediationAnswer<'_>, _host: &mut dyn Host) {}

    fn set_interrupt_mode(&mut self, mode: InterruptMode, _host: &mut dyn Host) {
        self.send(ToLender::InterruptMode(mode));
    }

    fn set_bus_master(&mut self, enabled: bool, _host: &mut dyn Host) {
        self.send(ToLender::BusMaster(enabled));
    }

    fn reset(&mut self, kind: ResetKind, _host: &mut dyn Host) -> Result<(), AttachmentError> {
        (self.rest, self.asked) = (None, None);
        self.ask(|answer| Control::Reset(kind, answer))
    }

    fn poll(&mut self, _now: Nanos, host: &mut dyn Host) -> Activity {
        let mut activity = Activity::Idle(None);
        while self.take(host).is_some() {
            activity = Activity::Busy;
        }
        activity
    }

    fn arm(&mut self) -> bool {
        self.back.arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.back.fd())
    }

    fn gone(&self) -> Option<CloseReason> {
        (!self.is_alive()).then_some(CloseReason::PeerGone)
    }

    fn pause(&mut self, token: RestToken, _host: &mut dyn Host) -> Result<(), AttachmentError> {
        self.sequence = self.sequence.wrapping_add(1);
        (self.rest, self.asked) = (None, Some(Ok(token)));
        self.send(ToLender::Pause { sequence: self.sequence, token });
        Ok(())
    }

    fn rest(&mut self) -> Result<Option<Rest>, AttachmentError> {
        match (self.gone(), self.asked) {
            (Some(reason), _) => Err(AttachmentError::Gone(reason)),
            (None, Some(Err(()))) => Err(AttachmentError::Refused(CANNOT_REST)),
            (None, _) => Ok(self.rest),
        }
    }

    fn resume(&mut self, _host: &mut dyn Host) {
        (self.rest, self.asked, self.continues) = (None, None, None);
        self.send(ToLender::Resume);
    }

    fn keep(&mut self, lease: Duration, _host: &mut dyn Host) -> Result<(), AttachmentError> {
        let rest = self.rest()?.ok_or(AttachmentError::Refused("the device is not at rest"))?;
        let home = self.home.clone().ok_or(AttachmentError::Refused("the device has no home here"))?;
        let (answer, kept) = channel();
        let lease = Lease { token: rest.token, time: lease };
        let gone = AttachmentError::Gone(CloseReason::PeerGone);
        self.control.send(Control::Keep(lease, answer)).map_err(|_| gone)?;
        self.push(kind::CONTROL, &[]);
        home.put(kept.recv().map_err(|_| gone)?);
        Ok(())
    }

    fn continues(&self) -> Option<RestToken> {
        self.continues
    }

    fn dirty_log(&mut self, memory: &Arc<Memory>, _host: &mut dyn Host) -> Option<&DirtyLog> {
        let logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        self.log = logs.of(memory).cloned();
        drop(logs);
        self.log.as_ref()
    }
}

impl Drop for ThreadedNative {
    fn drop(&mut self) {
        if self.control.send(Control::End).is_ok() {
            self.push(kind::CONTROL, &[]);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a device ended badly");
        }
    }
}
