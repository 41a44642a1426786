//! How a function comes to rest, and is saved: what was posted is at the device, what the device began has ended, and the guest has heard of it or will.
//!
//! The VMM stops its vCPUs, `quiesce(1 s)` returns within some microseconds of the device's slowest command, `save` gives 6 KiB, and then either the function
//! goes on (`resume`), or it leaves and the device is kept for the function that is restored elsewhere (`leave(30 s)`).

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use farbus_remote_dma::{AttachmentError, Rest, RestToken};
use farbus_transport::Nanos;
use thiserror::Error;

use super::Function;
use crate::irq::IrqSink;
use crate::profile::GoOn;
use crate::state::{DeviceIdentity, FunctionState};

/// Why a function does not come to rest, or is not at rest.
#[derive(Debug, Error)]
pub enum QuiesceError {
    /// The device's side refused, or is gone.
    #[error(transparent)]
    Attachment(#[from] AttachmentError),
    /// It took too long.
    #[error("the device is not at rest after {limit_ms} ms")]
    Deadline {
        /// The time allowed.
        limit_ms: u64,
    },
    /// The owner must make mediations before the device can end what it began: begin, and poll.
    #[error("the device waits for accesses to guest memory that the function's owner makes")]
    Mediations,
    /// Something was written, mapped or reset since.
    #[error("the function is not at rest: quiesce it, and let no guest run until it is saved")]
    NotAtRest,
    /// No random bytes.
    #[error("cannot draw a token: {0}")]
    Host(#[from] std::io::Error),
}

impl<S: IrqSink> Function<S> {
    /// Begins to bring the device to rest. Stop the guest's CPUs first: what they do now ends the rest. Posted writes go to the device before; then
    /// poll, and make mediations, until [`Function::quiesced`] says that it is done.
    ///
    /// # Errors
    /// [`QuiesceError`]; the device goes on.
    pub fn begin_quiesce(&mut self) -> Result<(), QuiesceError> {
        let token = RestToken::random()?;
        self.send_all();
        self.attachment.pause(token, &mut self.front)?;
        self.quiesced = Some(self.changes());
        self.settle();
        Ok(())
    }

    /// The rest that the device came to since [`Function::begin_quiesce`]: every store of before is in guest memory, every interrupt was told or is held
    /// pending by its mask. `None` while it has not.
    ///
    /// # Errors
    /// [`QuiesceError`]: it will not come to rest, or was disturbed.
    pub fn quiesced(&mut self) -> Result<Option<Rest>, QuiesceError> {
        if self.quiesced != Some(self.changes()) {
            return Err(QuiesceError::NotAtRest);
        }
        let rest = self.attachment.rest()?;
        Ok(rest.filter(|_| self.front.mediations.is_quiet()))
    }

    /// Brings the device to rest within `limit`, as [`Function::begin_quiesce`]. Where the device needs mediations the owner polls by itself.
    ///
    /// # Errors
    /// [`QuiesceError`]; the device goes on.
    pub fn quiesce(&mut self, limit: Duration) -> Result<Rest, QuiesceError> {
        self.quiesce_with(
            limit,
            |function| if function.front.mediations.waiting() { Err(QuiesceError::Mediations) } else { Ok(()) },
        )
    }

    /// As [`Function::quiesce`], with `between` two polls.
    pub(crate) fn quiesce_with(
        &mut self,
        limit: Duration,
        mut between: impl FnMut(&mut Self) -> Result<(), QuiesceError>,
    ) -> Result<Rest, QuiesceError> {
        let began = Instant::now();
        self.begin_quiesce()?;
        loop {
            self.poll(Nanos::now());
            let found = between(self).and_then(|()| self.quiesced());
            match found {
                Ok(Some(rest)) => return Ok(rest),
                Ok(None) if began.elapsed() <= limit => std::hint::spin_loop(),
                Ok(None) => {
                    self.resume();
                    let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                    return Err(QuiesceError::Deadline { limit_ms });
                }
                Err(error) => {
                    self.resume();
                    return Err(error);
                }
            }
        }
    }

    /// The function's state, while it is at rest.
    ///
    /// # Errors
    /// [`QuiesceError`].
    pub fn save(&mut self) -> Result<Vec<u8>, QuiesceError> {
        let rest = self.quiesced()?.ok_or(QuiesceError::NotAtRest)?;
        let saved_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let state = FunctionState {
            device: DeviceIdentity::of(&self.description),
            rest,
            saved_ms: u64::try_from(saved_ms).unwrap_or(u64::MAX),
            config: Box::new(*self.front.space.save()),
            interrupts: self.front.save(),
            windows: self.windows.save(),
            profile: self.profile.save(&self.windows),
        };
        Ok(state.encode())
    }

    /// The function leaves, at rest, and its device is kept as it is for `lease`, for a function restored from the state that was saved in this rest. All
    /// guest memory is taken back when this returns; the function is as one whose device is gone.
    ///
    /// # Errors
    /// [`QuiesceError`].
    pub fn leave(&mut self, lease: Duration) -> Result<(), QuiesceError> {
        self.quiesced()?.ok_or(QuiesceError::NotAtRest)?;
        self.attachment.keep(lease, &mut self.front)?;
        // It left on purpose.
        self.recovery = None;
        Ok(())
    }

    /// The device goes on: after [`Function::quiesce`], or after a restore.
    pub fn resume(&mut self) {
        self.quiesced = None;
        self.front.hold(false);
        self.attachment.resume(&mut self.front);
        let go_on = self.profile.go_on(&self.windows);
        self.go_on(go_on);
    }

    /// Tells the device, and then the guest, what they have perhaps not heard of.
    pub(super) fn go_on(&mut self, go_on: GoOn) {
        for (at, width, value) in go_on.writes {
            self.attachment.bar_write(at, width, value, &mut self.front);
        }
        self.attachment.flush();
        for vector in go_on.vectors {
            self.front.raise_again(vector);
        }
        self.front.tell();
        self.settle();
    }

    /// Counts all that may change the device's state or the function's.
    fn changes(&self) -> u64 {
        let counters = self.front.counters;
        counters.bar_writes_remote + counters.bar_writes_local + counters.config_writes + counters.resets + self.map_changes
    }
}
