//! The device's side of a native device on a thread: it takes what its function pushed, lets the device work, and says what it raised.
//!
//! "BAR0 + 0x1018 := 17" comes out of the ring, the device carries its commands out, vector 3 goes into the ring back; with nothing to do for a while it sleeps.

use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use farbus_transport::Nanos;

use super::QUIESCE_LIMIT;
use super::bus::{DirectBus, Logs, Raised};
use crate::address::Iova;
use crate::attachment::{Activity, AttachmentError, MapError, Window};
use crate::backend::{Backend, ResetKind};
use crate::lender::PollOptions;
use crate::message::{Outcome, ToBorrower, ToLender};
use crate::rest::{Kept, Lease};
use crate::wait::{relax, sleep_until_readable};
use crate::wire::{Tap, Wire};

/// How often a device with nothing else to do looks for room for interrupts that nobody takes.
const ROOM_CHECK: Duration = Duration::from_millis(1);

/// What a ring's slot means here.
pub(super) mod kind {
    pub(in super::super) const MESSAGE: u8 = 1;
    /// Something is in the channel.
    pub(in super::super) const CONTROL: u8 = 2;
}

/// What a function asks beside the ring.
pub(super) enum Control {
    Map(Window, Sender<Result<(), MapError>>),
    Unmap(Iova, u64, Sender<Result<(), MapError>>),
    Reset(ResetKind, Sender<Result<(), AttachmentError>>),
    /// The device parks and comes back, or nothing does where it is not at rest.
    Keep(Lease, Sender<Kept>),
    End,
}

/// The device's side: everything its thread owns.
pub(super) struct Device {
    pub(super) backend: Box<dyn Backend>,
    pub(super) bus: DirectBus,
    pub(super) taken: Tap,
    pub(super) out: Wire,
    pub(super) commands: Receiver<Control>,
    pub(super) logs: Logs,
    /// Who waits for the device's rest.
    pub(super) asked: Option<u32>,
}

impl Device {
    /// Serves the function until it leaves.
    pub(super) fn run(mut self, options: PollOptions) {
        let mut idle_since = Nanos::now();
        let (mut polls, mut empty_polls) = (0_u32, 0_u32);
        loop {
            let mut activity = Activity::Idle(None);
            while let Some((kind, message)) = self.taken.take() {
                activity = Activity::Busy;
                if kind == kind::CONTROL {
                    match self.commands.try_recv() {
                        Ok(Control::End) | Err(_) => return self.end(),
                        Ok(Control::Keep(lease, answer)) => return self.leave(lease, &answer),
                        Ok(control) => self.control(control),
                    }
                } else if let Ok((message, [])) = ToLender::parse(message.bytes()) {
                    self.obey(message);
                }
                self.send_raised();
            }
            let activity = activity.and(self.backend.poll(&mut self.bus));
            self.send_raised();
            self.tell_rest();
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
                if self.bus.has_raised() || self.asked.is_some() {
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
            ToLender::Pause { sequence, .. } if self.backend.pause() => self.asked = Some(sequence),
            ToLender::Pause { sequence, .. } => {
                let encoded = ToBorrower::Ack { sequence, outcome: Outcome::Restless }.encode();
                self.out.push(kind::MESSAGE, encoded.as_slice());
                self.out.flush();
            }
            ToLender::Resume => {
                self.asked = None;
                self.backend.resume(&mut self.bus);
            }
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
            Control::Keep(..) | Control::End => {}
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

    /// Says that the device is at rest, behind all that it raised, once there is room.
    fn tell_rest(&mut self) {
        let Some(sequence) = self.asked else { return };
        if self.bus.has_raised() || self.backend.in_flight() > 0 || !self.backend.is_at_rest() {
            return;
        }
        let mark = self.backend.journal().map(crate::Journal::mark);
        if self.out.try_push(kind::MESSAGE, ToBorrower::Rested { sequence, mark }.encode().as_slice()) {
            self.asked = None;
            self.out.flush();
        }
    }

    /// The function leaves, and the device goes home.
    fn leave(mut self, lease: Lease, answer: &Sender<Kept>) {
        if !self.backend.is_at_rest() {
            tracing::error!("a device in this process was to be kept, and is not at rest");
            return self.end();
        }
        self.backend.park();
        if answer.send(Kept::new(self.backend, lease)).is_err() {
            tracing::error!("nobody takes a device home: it is gone");
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
