//! The device's interrupts: which of the server's are on, and what they become on the bus.
//!
//! MSI-X of 65 vectors is five `DEVICE_SET_IRQS` of up to 16 eventfds each. INTx is a level that the server signals once and then masks: the pin is
//! asserted until the driver next accesses a register, and then unmasked, so that a level that still stands is signalled again.

use std::os::fd::BorrowedFd;

use farbus_remote_dma::{Bus, InterruptMode};
use farbus_transport::Nanos;

use super::VfioUserBackend;
use super::asked::Ask;
use super::link::bytes;
use crate::vfio_user::wire::{INTX, IrqSet, MSI, MSIX, SET_ACTION_TRIGGER, SET_ACTION_UNMASK, SET_DATA_EVENTFD, SET_DATA_NONE};

/// Bits of the command register (PCI 3.0, section 6.2.2).
const COMMAND: u8 = 0x04;
const SPACES: u16 = 1 | 2;
const BUS_MASTER: u16 = 4;
const INTX_DISABLE: u16 = 1 << 10;
/// Message control (PCIe 5.0, sections 7.7.1.2 and 7.7.2.2): enable bits.
const MSI_ENABLE: u16 = 1;
const MSIX_ENABLE: u16 = 1 << 15;

fn irq_set(flags: u32, index: u32, start: usize, count: usize) -> IrqSet {
    IrqSet { argsz: size_of::<IrqSet>() as u32, flags, index, start: start as u32, count: count as u32 }
}

impl VfioUserBackend {
    /// Hands on what was signalled.
    pub(super) fn tell_interrupts(&mut self, bus: &mut dyn Bus) {
        let Self { signals, mode, .. } = self;
        let heard = !self.dma.fenced && self.lent;
        if std::mem::take(&mut signals.pin_raised) && heard && *mode == InterruptMode::Pin && !self.pin {
            self.pin = true;
            self.counters.interrupts += 1;
            bus.set_pin(true);
        }
        for vector in signals.raised.drain(..) {
            let on = match *mode {
                InterruptMode::Pin => false,
                InterruptMode::Msi(vectors) => vector < u16::from(vectors),
                InterruptMode::Msix => true,
            };
            if on && heard {
                self.counters.interrupts += 1;
                bus.interrupt(vector);
            }
        }
    }

    /// After an access to a register: a driver serves a level by one, so the level is asked for anew.
    pub(super) fn end_of_interrupt(&mut self, bus: &mut dyn Bus) {
        if !std::mem::take(&mut self.pin) {
            return;
        }
        bus.set_pin(false);
        let unmask = irq_set(SET_DATA_NONE | SET_ACTION_UNMASK, INTX, 0, 1);
        self.link.ask(Ask::Irqs, [bytes(&unmask), &[]], Nanos::now());
    }

    /// The command register as the guest wants it, as far as the device must know.
    pub(super) fn set_command(&mut self) {
        let master = if self.bus_master { BUS_MASTER } else { 0 };
        let pin = if self.mode == InterruptMode::Pin { 0 } else { INTX_DISABLE };
        self.config_write(COMMAND, SPACES | master | pin);
    }

    /// Nothing is signalled any more.
    pub(super) fn silence(&mut self) {
        if let Some(index) = self.enabled.take() {
            let off = irq_set(SET_DATA_NONE | SET_ACTION_TRIGGER, index, 0, 0);
            self.link.ask(Ask::IrqsOff, [bytes(&off), &[]], Nanos::now());
        }
        self.signals.forget();
    }

    /// Turns on what the mode says, and all else off.
    pub(super) fn listen(&mut self) {
        self.silence();
        let (index, count) = match self.mode {
            InterruptMode::Pin => (INTX, usize::from(self.description.pin)),
            InterruptMode::Msi(vectors) => (MSI, usize::from(vectors.min(self.description.msi_vectors))),
            InterruptMode::Msix => (MSIX, self.description.msix.as_ref().map_or(0, |msix| usize::from(msix.vectors))),
        };
        if let Some(control) = self.controls.msi {
            let vectors = self.description.msi_vectors.max(1);
            let on = matches!(self.mode, InterruptMode::Msi(_));
            self.config_write(control, if on { MSI_ENABLE | (vectors.ilog2() as u16) << 4 } else { 0 });
        }
        if let Some(control) = self.controls.msix {
            self.config_write(control, if self.mode == InterruptMode::Msix { MSIX_ENABLE } else { 0 });
        }
        self.set_command();
        if count == 0 {
            return;
        }
        self.enabled = Some(index);
        let flags = SET_DATA_EVENTFD | SET_ACTION_TRIGGER;
        if index == INTX {
            let set = irq_set(flags, INTX, 0, 1);
            return self.link.ask_with(Ask::Irqs, bytes(&set), &[self.signals.pin()], Nanos::now());
        }
        let fds: Vec<BorrowedFd<'_>> = self.signals.vectors().take(count).collect();
        for (start, fds) in (0..).step_by(self.limits.max_fds).zip(fds.chunks(self.limits.max_fds)) {
            let set = irq_set(flags, index, start, fds.len());
            self.link.ask_with(Ask::Irqs, bytes(&set), fds, Nanos::now());
        }
    }
}
