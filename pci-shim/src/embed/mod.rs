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
use std::time::Duration;

use farbus_remote_dma::{
    Activity, Attachment, AttachmentError, BarAddress, GuestAddress, GuestMemory, GuestRegion, Iova, MediationAnswer, ResetKind,
    Rest, Width, Window, WindowMemory,
};
use farbus_transport::{Access, Nanos};

use crate::access::AccessError;
use crate::function::{Function, FunctionError, FunctionOptions, InterruptOwner, QuiesceError, RestoreError, Restored};
use crate::irq::IrqSink;
use crate::mediation::{MAX_MEDIATIONS, MediationKind, MediationRequest};
use crate::reattach::Reattach;

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
        let mut function = Function::new(attachment, sink, OPTIONS)?;
        for window in windows(&memory) {
            function.map(window)?;
        }
        let mut embedded = Self { function, memory, buffer: Vec::new() };
        embedded.mediate();
        Ok(embedded)
    }

    /// The function of a state that [`Embedded::save`] gave, with `memory` as it was then, at the same addresses. On an attachment whose device is kept at the
    /// rest of that state it goes on there; a device that was reset is brought back by its profile. Nothing happens before [`Embedded::resume`].
    ///
    /// # Errors
    /// [`RestoreError`]; the attachment is dropped, and a device that was kept is not any more.
    pub fn restore(attachment: Box<dyn Attachment>, sink: S, memory: M, state: &[u8]) -> Result<(Self, Restored), RestoreError> {
        let (function, restored) = Function::restore(attachment, sink, OPTIONS, state, windows(&memory))?;
        Ok((Self { function, memory, buffer: Vec::new() }, restored))
    }

    /// As [`Function::reattaching`].
    #[must_use]
    pub fn reattaching(mut self, reattach: Box<dyn Reattach>) -> Self {
        self.function.reattach_by(reattach);
        self
    }

    /// Brings the device to rest, with all mediations made, so that the function can be saved. Stop the guest's CPUs first. Takes as long as what the
    /// device has begun, and at most `limit`.
    ///
    /// # Errors
    /// [`QuiesceError`]; the device goes on.
    pub fn quiesce(&mut self, limit: Duration) -> Result<Rest, QuiesceError> {
        let Self { function, memory, buffer } = self;
        function.quiesce_with(limit, |function| {
            make_all(function, memory, buffer);
            Ok(())
        })
    }

    /// As [`Function::save`].
    ///
    /// # Errors
    /// [`QuiesceError`].
    pub fn save(&mut self) -> Result<Vec<u8>, QuiesceError> {
        self.function.save()
    }

    /// As [`Function::leave`].
    ///
    /// # Errors
    /// [`QuiesceError`].
    pub fn leave(&mut self, lease: Duration) -> Result<(), QuiesceError> {
        self.function.leave(lease)
    }

    /// As [`Function::resume`].
    pub fn resume(&mut self) {
        self.function.resume();
        self.mediate();
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

    fn mediate(&mut self) -> bool {
        make_all(&mut self.function, &self.memory, &mut self.buffer)
    }
}

const OPTIONS: FunctionOptions = FunctionOptions { interrupts: InterruptOwner::Function };

/// All of a VMM's memory, at its guest addresses.
fn windows(memory: &impl GuestMemory) -> Vec<Window> {
    let behind = |memory| match memory {
        Some((memory, offset)) => WindowMemory::Mapped { memory, offset, proven: true },
        None => WindowMemory::Mediated,
    };
    let window = |region: GuestRegion| Window {
        iova: Iova(region.start.0),
        len: region.len,
        access: Access::READ_WRITE,
        memory: behind(region.memory),
    };
    memory.regions().into_iter().map(window).collect()
}

/// Makes what waits; whether there was anything. Bounded: a device that never stops asking gets its turn with the next call.
fn make_all<S: IrqSink>(function: &mut Function<S>, memory: &impl GuestMemory, buffer: &mut Vec<u8>) -> bool {
    for made in 0..MAX_MEDIATIONS {
        let Some(request) = function.next_mediation() else {
            return made > 0;
        };
        make(function, memory, buffer, &request);
    }
    true
}

fn make<S: IrqSink>(function: &mut Function<S>, memory: &impl GuestMemory, buffer: &mut Vec<u8>, request: &MediationRequest) {
    let at = GuestAddress(request.iova.0);
    let result = match &request.kind {
        MediationKind::Fetch { len } => {
            buffer.resize(*len as usize, 0);
            let fetched = memory.read(at, buffer);
            fetched.map(|()| MediationAnswer::Fetched(buffer))
        }
        MediationKind::Store { bytes, .. } => memory.write(at, bytes).map(|()| MediationAnswer::Stored),
    };
    let answer = result.unwrap_or_else(|error| {
        tracing::warn!(%error, "the device's access to guest memory failed");
        MediationAnswer::Fault
    });
    function.answer(request.ticket, answer);
}
