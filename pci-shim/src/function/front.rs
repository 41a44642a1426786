//! The guest's side of a function: configuration space, interrupt state and the sink, as one [`Host`] for the attachment to talk to.
//!
//! In the middle of `bar_read` the attachment says `interrupt(3)`; the front finds a store that the owner has not made yet, keeps the vector,
//! and tells the guest when the store is answered.

use farbus_remote_dma::device::{BAR_COUNT, DescriptionError};
use farbus_remote_dma::{DeviceDescription, Host, InterruptMode, Mediation, ResetKind, Ticket};

use super::options::{Counters, InterruptOwner};
use crate::config::{PowerState, Space};
use crate::interrupt::Raised;
use crate::interrupt::intx::Intx;
use crate::interrupt::msi::Msi;
use crate::interrupt::msix::Msix;
use crate::irq::{IrqSink, MessageInterrupt};
use crate::mediation::{Mediations, Signal};
use crate::state::{FunctionState, InterruptState};

pub(super) struct Front<S> {
    pub(super) sink: S,
    pub(super) owner: InterruptOwner,
    pub(super) space: Space,
    pub(super) msix: Option<Msix>,
    pub(super) mediations: Mediations,
    pub(super) counters: Counters,
    /// With [`InterruptOwner::Client`]: what the client said.
    pub(super) client_mode: InterruptMode,
    /// Vectors of the device, of whatever kind it has more.
    vectors: u16,
    has_pin: bool,
    msi: Msi,
    intx: Intx,
    /// The device is being reset: nothing of before may reach the guest.
    fenced: bool,
    /// The function is being restored, and the guest does not run.
    held: bool,
}

impl<S: IrqSink> Front<S> {
    pub(super) fn new(description: &DeviceDescription, sink: S, owner: InterruptOwner) -> Result<Self, DescriptionError> {
        let msix_vectors = description.msix.as_ref().map_or(0, |msix| msix.vectors);
        Ok(Self {
            sink,
            owner,
            space: Space::new(description)?,
            msix: (msix_vectors > 0).then(|| Msix::new(msix_vectors)),
            mediations: Mediations::default(),
            counters: Counters::default(),
            client_mode: InterruptMode::Pin,
            vectors: msix_vectors.max(u16::from(description.msi_vectors)),
            has_pin: description.pin,
            msi: Msi::default(),
            intx: Intx::default(),
            fenced: false,
            held: false,
        })
    }

    /// How the function signals now. MSI-X wins where software enables both, which it must not (PCIe 5.0, section 6.1.4).
    pub(super) fn mode(&self) -> InterruptMode {
        if self.owner == InterruptOwner::Client {
            return self.client_mode;
        }
        let msi = self.space.msi();
        match (self.space.msix().enabled, msi.enabled) {
            (true, _) => InterruptMode::Msix,
            (false, true) => InterruptMode::Msi(msi.vectors),
            (false, false) => InterruptMode::Pin,
        }
    }

    /// A bit for each BAR whose accesses are carried out: all where the client decodes.
    pub(super) fn decoded(&self) -> u8 {
        if self.owner == InterruptOwner::Client {
            return u8::MAX;
        }
        (0..BAR_COUNT as u8).fold(0, |bits, bar| bits | u8::from(self.space.decodes(bar)) << bar)
    }

    /// After anything that may have opened or closed a mask: tells the guest what it may hear now, once.
    pub(super) fn tell(&mut self) {
        if self.fenced || self.held {
            return;
        }
        let mode = self.mode();
        let powered = self.owner == InterruptOwner::Client || self.space.power_state() == PowerState::D0;
        let open = mode == InterruptMode::Pin && powered && !self.space.interrupt_disabled();
        if let Some(level) = self.intx.update(open) {
            self.counters.pin_changes += 1;
            self.sink.pin(level);
        }
        if self.owner == InterruptOwner::Client || !self.space.bus_master() {
            return;
        }
        match mode {
            InterruptMode::Msix if !self.space.msix().masked => {
                while let Some(irq) = self.msix.as_mut().and_then(Msix::take_ready) {
                    self.message(irq);
                }
            }
            InterruptMode::Msi(_) => {
                while let Some(irq) = self.msi.take_ready(self.space.msi()) {
                    self.message(irq);
                }
                self.space.show_msi_pending(self.msi.pending());
            }
            InterruptMode::Msix | InterruptMode::Pin => {}
        }
    }

    /// Signals whose stores the owner has made.
    pub(super) fn release(&mut self) {
        while let Some(signal) = self.mediations.release() {
            self.signal(signal);
        }
    }

    /// A reset begins: what was under way ends here, and nothing that the attachment still says is passed on.
    pub(super) fn fence(&mut self) {
        self.fenced = true;
        self.mediations.fence();
    }

    /// The device is reset, so are the registers; the guest sees its pin fall.
    pub(super) fn restart(&mut self, kind: ResetKind) {
        self.space.reset(kind);
        self.msi.reset();
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        self.fenced = false;
        self.signal(Signal::Pin(false));
    }

    /// For a saved state.
    pub(super) fn save(&self) -> InterruptState {
        InterruptState {
            owner: self.owner,
            client_mode: self.client_mode,
            pin: self.intx.asserted(),
            msi_pending: self.msi.pending(),
            msix: self.msix.as_ref().map(Msix::save).unwrap_or_default(),
        }
    }

    /// Takes what was saved. Nothing of it is told before the function goes on.
    ///
    /// # Errors
    /// What does not fit.
    pub(super) fn load(&mut self, state: &FunctionState) -> Result<(), &'static str> {
        let saved = &state.interrupts;
        if saved.owner != self.owner {
            return Err("interrupts of another owner");
        }
        let fits = match &mut self.msix {
            Some(msix) => msix.load(&saved.msix),
            None => saved.msix.is_empty(),
        };
        if !fits {
            return Err("another number of vectors");
        }
        if !self.space.load(&state.config) {
            return Err("another configuration space");
        }
        self.client_mode = saved.client_mode;
        self.msi.load(saved.msi_pending);
        self.intx.set(saved.pin);
        Ok(())
    }

    /// Nothing that the device says reaches the guest, but for the level of its pin, which is noted.
    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// A vector that the guest perhaps has not heard of, as the device would raise it.
    pub(super) fn raise_again(&mut self, vector: u16) {
        match self.mode() {
            // A pin says by itself what is there.
            InterruptMode::Pin => {}
            InterruptMode::Msi(vectors) if vector >= u16::from(vectors) => self.raise(0),
            InterruptMode::Msi(_) | InterruptMode::Msix => self.raise(vector),
        }
    }

    /// The device is gone: it holds no line.
    pub(super) fn gone(&mut self) {
        self.signal(Signal::Pin(false));
    }

    fn signal(&mut self, signal: Signal) {
        match signal {
            Signal::Pin(asserted) => {
                self.intx.set(asserted);
                self.space.show_interrupt(asserted);
                self.tell();
            }
            Signal::Vector(vector) => self.raise(vector),
        }
    }

    fn raise(&mut self, vector: u16) {
        if self.owner == InterruptOwner::Client {
            let (address, data) = (0, 0);
            return self.message(MessageInterrupt { vector, address, data });
        }
        // Without the right to send requests a message waits as if it were masked: late rather than lost.
        let may_send = self.space.bus_master();
        let raised = match (self.mode(), &mut self.msix) {
            (InterruptMode::Msix, Some(msix)) => msix.raise(vector, may_send && !self.space.msix().masked),
            (InterruptMode::Msi(_), _) => {
                let raised = self.msi.raise(vector, self.space.msi(), may_send);
                self.space.show_msi_pending(self.msi.pending());
                raised
            }
            _ => Raised::NoVector,
        };
        match raised {
            Raised::Deliver(irq) => self.message(irq),
            Raised::Pending => self.counters.pending += 1,
            Raised::NoVector => self.counters.dropped += 1,
        }
    }

    fn message(&mut self, irq: MessageInterrupt) {
        self.counters.messages += 1;
        self.sink.message(irq);
    }
}

impl<S: IrqSink> Host for Front<S> {
    fn interrupt(&mut self, vector: u16) {
        if self.held {
            return;
        }
        if self.fenced || vector >= self.vectors {
            self.counters.dropped += 1;
            return;
        }
        if self.mediations.pass(Signal::Vector(vector)) {
            self.raise(vector);
        }
    }

    fn pin(&mut self, asserted: bool) {
        if self.held {
            return self.intx.set(asserted);
        }
        if self.fenced || !self.has_pin {
            return;
        }
        if self.mediations.pass(Signal::Pin(asserted)) {
            self.signal(Signal::Pin(asserted));
        }
    }

    fn mediate(&mut self, ticket: Ticket, mediation: Mediation<'_>) {
        if self.fenced {
            return self.mediations.refuse(ticket);
        }
        self.mediations.ask(ticket, mediation);
    }
}
