//! How the guest is told: the [`IrqSink`] seam, and the sinks for an embedding VMM.
//!
//! The device raises vector 3; the function finds it unmasked and calls [`IrqSink::message`] with the address 0xfee0_1000 and data 0x4023
//! that the guest programmed; an [`IrqfdSink`] has KVM route them once, then writes 1 to vector 3's eventfd.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// One MSI or MSI-X message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageInterrupt {
    /// Vector, from 0.
    pub vector: u16,
    /// The address that the guest programmed; 0 where the owner's client keeps the table.
    pub address: u64,
    /// The data that the guest programmed, with MSI's vector bits in it; 0 where the owner's client keeps the table.
    pub data: u32,
}

/// How the guest is told. One per function; called from the function's methods only.
pub trait IrqSink: Send {
    /// The level of the function's INTx pin changed; command register bit 10 has been applied already.
    fn pin(&mut self, asserted: bool);

    /// One message; all data that it announces is in guest memory.
    fn message(&mut self, irq: MessageInterrupt);
}

/// What a [`RecorderSink`] was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// [`IrqSink::pin`].
    Pin(bool),
    /// [`IrqSink::message`].
    Message(MessageInterrupt),
}

/// Keeps all that it is told, in order: for tests, and for programs that drive a function themselves and poll.
#[derive(Clone, Debug, Default)]
pub struct RecorderSink {
    told: Vec<Told>,
}

impl RecorderSink {
    /// All that was told since the last call.
    pub fn take(&mut self) -> Vec<Told> {
        std::mem::take(&mut self.told)
    }
}

impl IrqSink for RecorderSink {
    fn pin(&mut self, asserted: bool) {
        self.told.push(Told::Pin(asserted));
    }

    fn message(&mut self, irq: MessageInterrupt) {
        self.told.push(Told::Message(irq));
    }
}

/// Calls two closures: for a VMM with an interrupt controller of its own.
#[derive(Clone, Debug)]
pub struct CallbackSink<P, M> {
    pin: P,
    message: M,
}

impl<P: FnMut(bool) + Send, M: FnMut(MessageInterrupt) + Send> CallbackSink<P, M> {
    /// `pin` gets INTx levels, `message` messages.
    pub fn new(pin: P, message: M) -> Self {
        Self { pin, message }
    }
}

impl<P: FnMut(bool) + Send, M: FnMut(MessageInterrupt) + Send> IrqSink for CallbackSink<P, M> {
    fn pin(&mut self, asserted: bool) {
        (self.pin)(asserted);
    }

    fn message(&mut self, irq: MessageInterrupt) {
        (self.message)(irq);
    }
}

type Route = Box<dyn FnMut(MessageInterrupt) + Send>;

/// An eventfd for each vector and one for the pin: for KVM's irqfd.
///
/// KVM injects what its routing table says, so `route` is called before a vector's first signal with a new address or data, and must have
/// changed the table when it returns.
pub struct IrqfdSink {
    vectors: Vec<Routed>,
    pin: OwnedFd,
    asserted: bool,
    route: Route,
}

struct Routed {
    eventfd: OwnedFd,
    known: Option<(u64, u32)>,
}

impl IrqfdSink {
    /// Eventfds for `vectors` vectors and a pin.
    ///
    /// # Errors
    /// Where the kernel gives no more descriptors.
    pub fn new(vectors: u16, route: impl FnMut(MessageInterrupt) + Send + 'static) -> io::Result<Self> {
        let make = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let routed = |_| {
            Ok(Routed {
                eventfd: make()?,
                known: None,
            })
        };
        Ok(Self {
            vectors: (0..vectors).map(routed).collect::<io::Result<_>>()?,
            pin: make()?,
            asserted: false,
            route: Box::new(route),
        })
    }

    /// The descriptor of a vector, to register as its irqfd.
    pub fn vector_fd(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        Some(self.vectors.get(usize::from(vector))?.eventfd.as_fd())
    }

    /// The descriptor of the pin, to register as a level-triggered irqfd with a resample descriptor.
    pub fn pin_fd(&self) -> BorrowedFd<'_> {
        self.pin.as_fd()
    }

    /// The guest ended the pin's interrupt (the resample descriptor was signalled): raises it again if the level is still asserted.
    pub fn resample(&mut self) {
        if self.asserted {
            signal(&self.pin);
        }
    }
}

impl IrqSink for IrqfdSink {
    fn pin(&mut self, asserted: bool) {
        self.asserted = asserted;
        self.resample();
    }

    fn message(&mut self, irq: MessageInterrupt) {
        let Some(vector) = self.vectors.get_mut(usize::from(irq.vector)) else {
            tracing::warn!(
                vector = irq.vector,
                "a vector without an eventfd was raised: the guest does not hear of it"
            );
            return;
        };
        let wanted = (irq.address, irq.data);
        if vector.known != Some(wanted) {
            (self.route)(irq);
            vector.known = Some(wanted);
        }
        signal(&vector.eventfd);
    }
}

impl std::fmt::Debug for IrqfdSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IrqfdSink")
            .field("vectors", &self.vectors.len())
            .field("asserted", &self.asserted)
            .finish_non_exhaustive()
    }
}

fn signal(fd: &OwnedFd) {
    match rustix::io::write(fd, &1u64.to_ne_bytes()) {
        // A counter that is full has been signalled and not been read: nothing is lost.
        Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
        Err(error) => tracing::error!(%error, "an eventfd cannot be signalled: the guest misses an interrupt"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    fn count(fd: BorrowedFd<'_>) -> u64 {
        let mut value = [0; 8];
        match rustix::io::read(fd, &mut value) {
            Ok(_) => u64::from_ne_bytes(value),
            Err(_) => 0,
        }
    }

    #[test]
    fn kvm_never_injects_a_message_that_the_guest_has_replaced() {
        let routes = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&routes);
        let mut sink = IrqfdSink::new(2, move |irq| seen.lock().unwrap().push(irq)).unwrap();
        let first = MessageInterrupt {
            vector: 1,
            address: 0xfee0_0000,
            data: 0x41,
        };
        let moved = MessageInterrupt { data: 0x51, ..first };
        for irq in [first, first, moved] {
            sink.message(irq);
        }
        assert_eq!(*routes.lock().unwrap(), [first, moved]);
        assert_eq!(count(sink.vector_fd(1).unwrap()), 3);
        assert_eq!(count(sink.vector_fd(0).unwrap()), 0);
        assert!(sink.vector_fd(2).is_none());
    }

    #[test]
    fn a_level_that_stays_asserted_is_raised_again_after_the_guest_ended_the_interrupt() {
        let mut sink = IrqfdSink::new(0, |_| {}).unwrap();
        sink.pin(true);
        assert_eq!(count(sink.pin_fd()), 1);
        sink.resample();
        assert_eq!(count(sink.pin_fd()), 1);
        sink.pin(false);
        sink.resample();
        assert_eq!(count(sink.pin_fd()), 0);
    }
}
