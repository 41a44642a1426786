//! The function as the server serves it: forwarding, and the client's interrupts as the function's sink.
//!
//! A server given a `Function<ClientInterrupts>` needs nothing else: a vector that the device raises lands in [`ClientInterrupts`] and leaves
//! by the eventfd that the client sent.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use farbus_remote_dma::{
    Activity, AttachmentError, BarAddress, DeviceDescription, InterruptMode, Iova, MapError, MediationAnswer, ResetKind, Ticket,
    Width, Window,
};
use farbus_transport::{CloseReason, Memory, Nanos};

use super::irqs::ClientInterrupts;
use super::served::{NoRegister, Served};
use crate::access::AccessError;
use crate::function::Function;
use crate::irq::{IrqSink, MessageInterrupt};
use crate::mediation::MediationRequest;

impl IrqSink for ClientInterrupts {
    fn pin(&mut self, asserted: bool) {
        Self::pin(self, asserted);
    }

    fn message(&mut self, irq: MessageInterrupt) {
        Self::message(self, irq.vector);
    }
}

impl From<AccessError> for NoRegister {
    fn from(_: AccessError) -> Self {
        Self
    }
}

impl Served for Function<ClientInterrupts> {
    fn description(&self) -> &DeviceDescription {
        Self::description(self)
    }

    fn config_read(&mut self, offset: u16, into: &mut [u8]) -> Result<(), NoRegister> {
        Ok(Self::config_read(self, offset, into)?)
    }

    fn config_write(&mut self, offset: u16, bytes: &[u8]) -> Result<(), NoRegister> {
        Ok(Self::config_write(self, offset, bytes)?)
    }

    fn bar_read(&mut self, at: BarAddress, width: Width) -> Result<u64, NoRegister> {
        Ok(Self::bar_read(self, at, width)?)
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64) -> Result<(), NoRegister> {
        Ok(Self::bar_write(self, at, width, value)?)
    }

    fn map(&mut self, window: Window) -> Result<(), MapError> {
        Self::map(self, window)
    }

    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), MapError> {
        Self::unmap(self, iova, len)
    }

    fn prove(&mut self, memory: &Arc<Memory>) {
        Self::prove(self, memory);
    }

    fn next_mediation(&mut self) -> Option<MediationRequest> {
        Self::next_mediation(self)
    }

    fn answer(&mut self, ticket: Ticket, answer: MediationAnswer<'_>) {
        Self::answer(self, ticket, answer);
    }

    fn set_client_interrupts(&mut self, mode: InterruptMode) {
        Self::set_client_interrupts(self, mode);
    }

    fn reset(&mut self, kind: ResetKind) -> Result<(), AttachmentError> {
        Self::reset(self, kind)
    }

    fn poll(&mut self, now: Nanos) -> Activity {
        Self::poll(self, now)
    }

    fn arm(&mut self) -> bool {
        Self::arm(self)
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Self::wake_fd(self)
    }

    fn gone(&self) -> Option<CloseReason> {
        Self::gone(self)
    }

    fn interrupts(&mut self) -> &mut ClientInterrupts {
        self.sink_mut()
    }
}
