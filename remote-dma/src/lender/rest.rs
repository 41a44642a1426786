//! How a borrower leaves on purpose: the device comes to rest, all of the borrower's memory is let go of, and the device is kept as it is.
//!
//! "Pause under token T" is answered when the last command that was begun has its completion and its interrupt; "keep it for 30 s" when no window and no
//! offer is left. Then the link ends, and [`LenderSession::into_kept`] hands out the device for whoever comes with T; a second session goes on with it.

use std::time::Duration;

use farbus_transport::{CloseReason, Fabric};

use super::bus::LenderBus;
use super::{LenderSession, Waiting};
use crate::backend::AttachError;
use crate::message::{Outcome, Sequence, ToBorrower};
use crate::rest::{Continued, Kept, Lease, RestToken};

/// The longest lease: who has not come back after a day has forgotten it.
pub const LONGEST_LEASE: Duration = Duration::from_secs(24 * 3600);

/// A kept device that could not be attached is kept on, with the reason.
pub type StillKept = (AttachError, Kept);

impl<F: Fabric> LenderSession<F> {
    /// Goes on with a device that an earlier session kept: it is at rest until its new borrower tells it to go on, and knows no memory until then.
    ///
    /// # Errors
    /// [`AttachError`], with the device for another try: its lease begins anew.
    pub fn continued(fabric: F, device: Continued) -> Result<Self, StillKept> {
        let Continued { mut backend, token } = device;
        let again = |backend, error| (error, Kept::new(backend, Lease { token, time: Duration::from_secs(30) }));
        let mut bus = match LenderBus::new(fabric) {
            Ok(bus) => bus,
            Err(error) => return Err(again(backend, error)),
        };
        if let Err(error) = backend.unpark(&mut bus) {
            return Err(again(backend, error));
        }
        let mut session = Self::over(bus, backend);
        session.rest = Some(token);
        Ok(session)
    }

    /// Keeps a device for no longer than this, whatever a borrower asks for; with zero no device is kept. A day unless this says otherwise.
    #[must_use]
    pub fn keeping_at_most(mut self, limit: Duration) -> Self {
        self.keep_at_most = limit.min(LONGEST_LEASE);
        self
    }

    /// What the borrower was promised before it left; the session's owner decides whether to keep it ([`LenderSession::into_kept`]) or to
    /// [`LenderSession::end`] it.
    pub fn lease(&self) -> Option<Lease> {
        self.lease
    }

    /// Ends the session, and keeps the device as the borrower left it.
    ///
    /// # Errors
    /// The session itself where the borrower did not ask for that, or left in another way: end it.
    pub fn into_kept(self) -> Result<Kept, Box<Self>> {
        let Some(lease) = self.lease.filter(|_| self.backend.is_at_rest()) else {
            return Err(Box::new(self));
        };
        let Self { mut backend, mut bus, .. } = self;
        backend.park();
        bus.close();
        Ok(Kept::new(backend, lease))
    }

    pub(super) fn pause(&mut self, sequence: Sequence, token: RestToken) {
        self.rest = None;
        if self.resetting() || !self.backend.pause() {
            return self.acknowledge(sequence, Outcome::Restless);
        }
        self.wait_for_dma(Waiting::Rest { sequence, token });
    }

    /// The device came to rest.
    pub(super) fn rested(&mut self, sequence: Sequence, token: RestToken) {
        self.rest = Some(token);
        let mark = self.backend.journal().map(crate::Journal::mark);
        // Behind every store that the guest's side is still to make for the device.
        self.bus.send_in_order(ToBorrower::Rested { sequence, mark });
        self.bus.flush();
    }

    pub(super) fn resume(&mut self) {
        self.rest = None;
        self.backend.resume(&mut self.bus);
    }

    pub(super) fn keep(&mut self, sequence: Sequence, lease_ms: u32) {
        let Some(token) = self.rest.filter(|_| !self.keep_at_most.is_zero()) else {
            return self.acknowledge(sequence, Outcome::Restless);
        };
        if !self.bus.let_go_of_all() {
            return self.close(CloseReason::Protocol("a device at rest that uses memory"));
        }
        let time = Duration::from_millis(u64::from(lease_ms)).min(self.keep_at_most);
        self.lease = Some(Lease { token, time });
        self.acknowledge(sequence, Outcome::Done);
    }
}
