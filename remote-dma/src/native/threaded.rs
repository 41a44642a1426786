//! A native device on a thread of its own, as hardware is concurrent to the CPU: register accesses are cache lines to that thread.
//!
//! The function's thread pushes "BAR0 + 0x1018 := 17" and goes on; the device's thread takes it, copies slot 16 out of guest memory, copies
//! 4 KiB in, stores the completion. Maps and resets, which nobody times, go through a channel that the ring points to.

use std::os::fd::BorrowedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use farbus_transport::{CloseReason, Memory, Nanos};

use super::QUIESCE_LIMIT;
use super::bus::{DirectBus, Logs, Raised};
use crate::address::{BarAddress, Iova, Width};
use crate::attachment::{Activity, Attachment, AttachmentError, Host, MapError, MediationAnswer, Ticket, Window};
use crate::backend::{AttachError, Backend, InterruptMode, ResetKind};
use crate::device::DeviceDescription;
use crate::dirty_log::DirtyLog;
use crate::lender::PollOptions;
use crate::message::{ToBorrower, ToLender};
use crate::wait::{Patience, SpinThenSleep, relax, sleep_until_readable};
use crate::wire::{Tap, Wire, wire};

/// How often a device with nothing else to do looks for room for interrupts that nobody takes.
const ROOM_CHECK: Duration = Duration::from_millis(1);

/// What a ring's slot means here.
mod kind {
    pub(super) const MESSAGE: u8 = 1;
    /// Something is in the channel.
    pub(super) const CONTROL: u8 = 2;
}

enum Control {
    Map(Window, Sender<Result<(), MapError>>),
    Unmap(Iova, u64, Sender<Result<(), MapError>>),
    Reset(ResetKind, Sender<Result<(), AttachmentError>>),
    End,
}

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
}

impl ThreadedNative {
    pub(super) fn start(mut backend: Box<dyn Backend>, options: PollOptions) -> Result<Self, AttachError> {
        let failed = |error: std::io::Error| AttachError::Device(error.to_string());
        let (out, device_in) = wire().map_err(failed)?;
        let (device_out, back) = wire().map_err(failed)?;
        let (control, commands) = channel();
        let logs = Logs::default();
        super::can_be_native(&*backend)?;
        let mut bus = DirectBus::default();
        backend.attach(&mut bus)?;
        let description = backend.description().clone();
        let device = Device { backend, bus, taken: device_in, out: device_out, commands, logs: Arc::clone(&logs) };
        let thread = std::thread::Builder::new().name("farbus-device".into()).spawn(move || device.run(options)).map_err(failed)?;
        let patience = SpinThenSleep::new(Duration::from_micros(200));
        Ok(Self { description, out, back, control, logs, log: None, patience, sequence: 0, thread: Some(thread), died: false })
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

/// The device's side: everything its thread owns.
struct Device {
    backend: Box<dyn Backend>,
    bus: DirectBus,
    taken: Tap,
    out: Wire,
    commands: Receiver<Control>,
    logs: Logs,
}

impl Device {
    fn run(mut self, options: PollOptions) {
        let mut idle_since = Nanos::now();
        let (mut polls, mut empty_polls) = (0_u32, 0_u32);
        loop {
            let mut activity = Activity::Idle(None);
            while let Some((kind, message)) = self.taken.take() {
                activity = Activity::Busy;
                if kind == kind::CONTROL {
                    match self.commands.try_recv() {
                        Ok(Control::End) | Err(_) => return self.end(),
                        Ok(control) => self.control(control),
                    }
                } else if let Ok((message, [])) = ToLender::parse(message.bytes()) {
                    self.obey(message);
                }
                self.send_raised();
            }
            let activity = activity.and(self.backend.poll(&mut self.bus));
            self.send_raised();
            let Activity::Idle(mut limit) = activity else {
                polls = 63;
                empty_polls = 0;
                idle_since = Nanos::now();
                self.bus.set_now(idle_since);
                continue;
            };
            polls = polls.wrapping_add(1);
            empty_polls = empty_polls.saturating_add(1);
            if !polls.is_multiple_of(64) {
                relax(empty_polls);
                continue;
            }
            let now = Nanos::now();
            self.bus.set_now(now);
            if now.since(idle_since) >= options.spin {
                if self.bus.has_raised() {
                    // Nothing says when there is room for them.
                    limit = Some(limit.map_or(ROOM_CHECK, |limit| limit.min(ROOM_CHECK)));
                }
                if self.backend.arm() && self.taken.arm() {
                    sleep_until_readable(&[Some(self.taken.fd()), self.backend.wake_fd()], limit);
                }
                idle_since = Nanos::now();
                self.bus.set_now(idle_since);
            }
        }
    }

    fn obey(&mut self, message: ToLender) {
        match message {
            ToLender::BarWrite { at, width, value } => self.backend.bar_write(at, width, value, &mut self.bus),
            ToLender::BarRead { sequence, at, width } => {
                let value = self.backend.bar_read(at, width, &mut self.bus);
                // The function waits for the value and takes what comes before it, so there will be room.
                while self.bus.has_raised() {
                    self.send_raised();
                    std::hint::spin_loop();
                }
                let encoded = ToBorrower::BarValue { sequence, value }.encode();
                self.out.push(kind::MESSAGE, encoded.as_slice());
                self.out.flush();
            }
            ToLender::InterruptMode(mode) => self.backend.set_interrupt_mode(mode, &mut self.bus),
            ToLender::BusMaster(enabled) => self.bus.set_bus_master(enabled),
            other => tracing::error!(?other, "a function in this process said what it never says"),
        }
    }

    fn control(&mut self, control: Control) {
        // Whoever asked may be gone; then nobody wants the answer.
        let unheard = |_| tracing::debug!("an answer that nobody waits for");
        match control {
            Control::Map(window, answer) => {
                let mapped = self.bus.map(&window);
                self.bus.share_logs(&self.logs);
                answer.send(mapped).unwrap_or_else(|error| unheard(error.0.is_ok()));
            }
            Control::Unmap(iova, len, answer) => {
                let unmapped = self.bus.unmap(iova, len).and_then(|()| Ok(self.quiesce()?));
                if unmapped.is_ok() {
                    self.bus.prune_logs();
                }
                self.bus.share_logs(&self.logs);
                answer.send(unmapped).unwrap_or_else(|error| unheard(error.0.is_ok()));
            }
            Control::Reset(kind, answer) => {
                self.backend.fence();
                let quiet = self.quiesce();
                if quiet.is_ok() {
                    self.backend.reset(kind, &mut self.bus);
                }
                answer.send(quiet).unwrap_or_else(|error| unheard(error.0.is_ok()));
            }
            Control::End => {}
        }
    }

    fn quiesce(&mut self) -> Result<(), AttachmentError> {
        let started = Nanos::now();
        while self.backend.in_flight() > 0 {
            self.bus.set_now(Nanos::now());
            self.backend.poll(&mut self.bus);
            if Nanos::now().since(started) > QUIESCE_LIMIT {
                return Err(AttachmentError::Deadline { deadline_ms: 10_000 });
            }
        }
        Ok(())
    }

    /// Sends what was raised, as far as there is room. Never waits for it: the function may be waiting for this thread.
    fn send_raised(&mut self) {
        let mut any = false;
        while let Some(raised) = self.bus.first_raised() {
            let message = match raised {
                Raised::Vector(vector) => ToBorrower::Interrupt { vector },
                Raised::Pin(asserted) => ToBorrower::Pin { asserted },
            };
            if !self.out.try_push(kind::MESSAGE, message.encode().as_slice()) {
                break;
            }
            self.bus.next_raised();
            any = true;
        }
        if any {
            self.out.flush();
        }
    }

    fn end(mut self) {
        self.backend.fence();
        if let Err(error) = self.quiesce() {
            tracing::error!(%error, "a device was dropped with work in flight");
        }
        self.backend.detach();
    }
}
