//! What a vfio-user server needs of a PCI function, so that it can serve any.
//!
//! A client's 4-byte read of region 0 at 0x1c becomes `bar_read(BAR0 + 0x1c, B4)`, its write of 0x0006 to region 7 at 0x04 becomes
//! `config_write(4, [6, 0])`; a device that raises vector 3 says so in its [`ClientInterrupts`].

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use farbus_remote_dma::{
    Activity, AttachmentError, BarAddress, DeviceDescription, InterruptMode, Iova, MapError, MediationAnswer, ResetKind, Ticket,
    Width, Window,
};
use farbus_transport::{CloseReason, Memory, Nanos};

use super::irqs::ClientInterrupts;
use crate::{AccessError, Function, IrqSink, MediationRequest, MessageInterrupt};

/// A PCI function as a server sees it; the methods mean what those of `Function` of the same names mean. A register access
/// blocks for no longer than a register read of the attachment may; maps, resets and the dirty log for as long as its questions may.
pub trait Served {
    /// What the device is.
    fn description(&self) -> &DeviceDescription;

    /// Reads configuration space, any bytes of its 4,096.
    ///
    /// # Errors
    /// [`AccessError`] past its end.
    fn config_read(&mut self, offset: u16, into: &mut [u8]) -> Result<(), AccessError>;

    /// Writes configuration space.
    ///
    /// # Errors
    /// [`AccessError`] past its end.
    fn config_write(&mut self, offset: u16, bytes: &[u8]) -> Result<(), AccessError>;

    /// Reads a register; all ones where the device is gone.
    ///
    /// # Errors
    /// [`AccessError`] for an address outside the BARs, or misaligned.
    fn bar_read(&mut self, at: BarAddress, width: Width) -> Result<u64, AccessError>;

    /// Posts a register write; it may wait until [`Served::flush`].
    ///
    /// # Errors
    /// As [`Served::bar_read`].
    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64) -> Result<(), AccessError>;

    /// Sends the writes that wait.
    fn flush(&mut self);

    /// Lets the device use a range.
    ///
    /// # Errors
    /// [`MapError`]; nothing was mapped.
    fn map(&mut self, window: Window) -> Result<(), MapError>;

    /// Takes away the windows inside a range. When it returns, the device touches them no more.
    ///
    /// # Errors
    /// [`MapError`]; nothing was taken.
    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), MapError>;

    /// Windows of `memory` may be accessed directly from now on.
    fn prove(&mut self, memory: &Arc<Memory>);

    /// The next access that the client must make, in the device's order.
    fn next_mediation(&mut self) -> Option<MediationRequest>;

    /// The outcome of one. A ticket that nobody waits for any more is ignored.
    fn answer(&mut self, ticket: Ticket, answer: MediationAnswer<'_>);

    /// How the client is signalled from now on.
    fn set_client_interrupts(&mut self, mode: InterruptMode);

    /// Fences DMA, then resets. Windows stay.
    ///
    /// # Errors
    /// [`AttachmentError`].
    fn reset(&mut self, kind: ResetKind) -> Result<(), AttachmentError>;

    /// How often the function was reset, by whatever asked for it.
    fn resets(&self) -> u64;

    /// Takes what has happened.
    fn poll(&mut self, now: Nanos) -> Activity;

    /// Prepares to sleep: true where [`Served::wake_fd`] becomes readable at the next event, or there can be none.
    fn arm(&mut self) -> bool;

    /// Readable when armed and something happened.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Why the device is gone, once it is.
    fn gone(&self) -> Option<CloseReason>;

    /// Whether interrupts are told only once the stores before them are answered. Where not, the server holds them back.
    fn orders_interrupts(&self) -> bool {
        false
    }

    /// The client's interrupts: what the device raised, and whom to tell.
    fn interrupts(&mut self) -> &mut ClientInterrupts;
}

/// Make it with [`crate::InterruptOwner::Client`].
impl Served for Function<ClientInterrupts> {
    fn description(&self) -> &DeviceDescription {
        self.description()
    }

    fn config_read(&mut self, offset: u16, into: &mut [u8]) -> Result<(), AccessError> {
        self.config_read(offset, into)
    }

    fn config_write(&mut self, offset: u16, bytes: &[u8]) -> Result<(), AccessError> {
        self.config_write(offset, bytes)
    }

    fn bar_read(&mut self, at: BarAddress, width: Width) -> Result<u64, AccessError> {
        self.bar_read(at, width)
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64) -> Result<(), AccessError> {
        self.post_write(at, width, value)
    }

    fn flush(&mut self) {
        self.flush();
    }

    fn map(&mut self, window: Window) -> Result<(), MapError> {
        self.map(window)
    }

    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), MapError> {
        self.unmap(iova, len)
    }

    fn prove(&mut self, memory: &Arc<Memory>) {
        self.prove(memory);
    }

    fn next_mediation(&mut self) -> Option<MediationRequest> {
        self.next_mediation()
    }

    fn answer(&mut self, ticket: Ticket, answer: MediationAnswer<'_>) {
        self.answer(ticket, answer);
    }

    fn set_client_interrupts(&mut self, mode: InterruptMode) {
        self.set_client_interrupts(mode);
    }

    fn reset(&mut self, kind: ResetKind) -> Result<(), AttachmentError> {
        self.reset(kind)
    }

    fn resets(&self) -> u64 {
        self.counters().resets
    }

    fn poll(&mut self, now: Nanos) -> Activity {
        self.poll(now)
    }

    fn arm(&mut self) -> bool {
        self.arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.wake_fd()
    }

    fn gone(&self) -> Option<CloseReason> {
        self.gone()
    }

    fn orders_interrupts(&self) -> bool {
        true
    }

    fn interrupts(&mut self) -> &mut ClientInterrupts {
        self.sink_mut()
    }
}

impl IrqSink for ClientInterrupts {
    fn pin(&mut self, asserted: bool) {
        self.pin(asserted);
    }

    fn message(&mut self, irq: MessageInterrupt) {
        self.message(irq.vector);
    }
}
