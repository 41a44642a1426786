//! A function inside a VMM of one's own: give it guest memory, a sink and an attachment, and put it on the bus.
//!
//! With 512 MiB of guest memory at address 0 the device may DMA to every byte of it at its guest address; a store that the device cannot
//! make itself is made here, before the register read that would reveal it returns.
//!
//! ```
//! use farbus_pci_shim::{Embedded, FunctionError, IrqSink};
//! use farbus_remote_dma::{Attachment, BarAddress, GuestMemory, Width};
//!
//! fn put_on_bus<S: IrqSink, M: GuestMemory>(device: Box<dyn Attachment>, sink: S, memory: M) -> Result<(), FunctionError> {
//!     let mut function = Embedded::new(device, sink, memory)?;
//!     // The guest enables memory decoding, then its store to BAR0 exits.
//!     let command = function.config_write(0x04, &[0x06, 0x00]);
//!     let doorbell = function.bar_write(BarAddress { bar: 0, offset: 0x1018 }, Width::B4, 17);
//!     assert!(command.is_ok() && doorbell.is_ok());
//!     Ok(())
//! }
//! ```

mod thread;
mod vcpu;

use std::os::fd::BorrowedFd;

use farbus_remote_dma::{
    Activity, Attachment, AttachmentError, BarAddress, GuestAddress, GuestMemory, Iova, MediationAnswer, ResetKind, Width, Window,
    WindowMemory,
};
use farbus_transport::{Access, Nanos};

use crate::access::AccessError;
use crate::function::{Function, FunctionError, FunctionOptions, InterruptOwner};
use crate::irq::IrqSink;
use crate::mediation::{MAX_MEDIATIONS, MediationKind, MediationRequest};

pub use self::thread::{FunctionThread, FunctionThreadOptions};
pub use self::vcpu::VcpuPort;

/// A [`Function`] that reaches guest memory by itself. DMA addresses are guest addresses.
#[derive(Debug)]
pub struct Embedded<S: IrqSink, M: GuestMemory> {
    function: Function<S>,
    memory: M,
    buffer: Vec<u8>,
}

impl<S: IrqSink, M: GuestMemory> Embedded<S, M> {
    /// The function of an attachment's device, with all of `memory` mapped for it. Memory that has a descriptor is granted directly: the
    /// VMM itself says that it is what the guest sees.
    ///
    /// # Errors
    /// [`FunctionError`].
    pub fn new(attachment: Box<dyn Attachment>, sink: S, memory: M) -> Result<Self, FunctionError> {
        let options = FunctionOptions { interrupts: InterruptOwner::Function };
        let mut function = Function::new(attachment, sink, options)?;
        for region in memory.regions() {
            let behind = match region.memory {
                Some((memory, offset)) => WindowMemory::Mapped { memory, offset, proven: true },
                None => WindowMemory::Mediated,
            };
            function.map(Window { iova: Iova(region.start.0), len: region.len, access: Access::READ_WRITE, memory: behind })?;
        }
        let mut embedded = Self { function, memory, buffer: Vec::new() };
        embedded.mediate();
        Ok(embedded)
    }

    /// The function, to look at it.
    pub fn function(&self) -> &Function<S> {
        &self.function
    }

    /// The function itself: for what this wrapper does not offer. Mediations that its methods leave are made by the next method here.
    pub fn function_mut(&mut self) -> &mut Function<S> {
        &mut self.function
    }

    /// As [`Function::config_read`].
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn config_read(&mut self, offset: u16, into: &mut [u8]) -> Result<(), AccessError> {
        self.function.config_read(offset, into)
    }

    /// As [`Function::config_write`].
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn config_write(&mut self, offset: u16, bytes: &[u8]) -> Result<(), AccessError> {
        let written = self.function.config_write(offset, bytes);
        self.mediate();
        written
    }

    /// As [`Function::bar_read`]; earlier stores of the device are in guest memory when it returns.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn bar_read(&mut self, at: BarAddress, width: Width) -> Result<u64, AccessError> {
        let value = self.function.bar_read(at, width);
        self.mediate();
        value
    }

    /// As [`Function::bar_write`].
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn bar_write(&mut self, at: BarAddress, width: Width, value: u64) -> Result<(), AccessError> {
        let written = self.function.bar_write(at, width, value);
        self.mediate();
        written
    }

    /// As [`Function::post_write`].
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn post_write(&mut self, at: BarAddress, width: Width, value: u64) -> Result<(), AccessError> {
        self.function.post_write(at, width, value)
    }

    /// As [`Function::flush`].
    pub fn flush(&mut self) {
        self.function.flush();
        self.mediate();
    }

    /// As [`Function::reset`].
    ///
    /// # Errors
    /// [`AttachmentError`].
    pub fn reset(&mut self, kind: ResetKind) -> Result<(), AttachmentError> {
        let reset = self.function.reset(kind);
        self.mediate();
        reset
    }

    /// As [`Function::poll`], with all mediations made.
    pub fn poll(&mut self, now: Nanos) -> Activity {
        let activity = self.function.poll(now);
        if self.mediate() { Activity::Busy } else { activity }
    }

    /// As [`Function::arm`].
    pub fn arm(&mut self) -> bool {
        self.function.arm()
    }

    /// As [`Function::wake_fd`].
    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.function.wake_fd()
    }

    /// Makes what waits; whether there was anything. Bounded: a device that never stops asking gets its turn with the next call.
    fn mediate(&mut self) -> bool {
        for made in 0..MAX_MEDIATIONS {
            let Some(request) = self.function.next_mediation() else {
                return made > 0;
            };
            self.make(&request);
        }
        true
    }

    fn make(&mut self, request: &MediationRequest) {
        let at = GuestAddress(request.iova.0);
        let result = match &request.kind {
            MediationKind::Fetch { len } => {
                self.buffer.resize(*len as usize, 0);
                let fetched = self.memory.read(at, &mut self.buffer);
                fetched.map(|()| MediationAnswer::Fetched(&self.buffer))
            }
            MediationKind::Store { bytes, .. } => self.memory.write(at, bytes).map(|()| MediationAnswer::Stored),
        };
        let answer = result.unwrap_or_else(|error| {
            tracing::warn!(%error, "the device's access to guest memory failed");
            MediationAnswer::Fault
        });
        self.function.answer(request.ticket, answer);
    }
}
