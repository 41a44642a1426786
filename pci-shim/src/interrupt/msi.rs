//! MSI (PCIe 5.0, section 6.1.4 and 7.7.1): the pending bits, and the message that a vector becomes.
//!
//! With 4 vectors enabled, address 0xfee0_0000 and data 0x4050, vector 3 is a store of 0x4053; raised while its mask bit is set it waits.

use super::Raised;
use crate::config::MsiControl;
use crate::irq::MessageInterrupt;

/// Vectors that were raised while masked; everything else of MSI lies in configuration space.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Msi {
    pending: u32,
}

impl Msi {
    pub(crate) fn reset(&mut self) {
        self.pending = 0;
    }

    /// Takes what was saved.
    pub(crate) fn load(&mut self, pending: u32) {
        self.pending = pending;
    }

    /// For the pending bits register.
    pub(crate) fn pending(self) -> u32 {
        self.pending
    }

    /// The device raised `vector`; `open` where the function may send at all. A vector beyond those enabled shares one that is: it was
    /// raised before the device heard how many it has.
    pub(crate) fn raise(&mut self, vector: u16, control: MsiControl, open: bool) -> Raised {
        if vector >= 32 || control.vectors == 0 {
            return Raised::NoVector;
        }
        let vector = vector & u16::from(control.vectors - 1);
        let bit = 1u32 << vector;
        if !open || control.mask & bit != 0 {
            self.pending |= bit;
            return Raised::Pending;
        }
        Raised::Deliver(message(vector, control))
    }

    /// The next vector that is pending and no longer masked; its pending bit is cleared.
    pub(crate) fn take_ready(&mut self, control: MsiControl) -> Option<MessageInterrupt> {
        let ready = self.pending & !control.mask;
        if ready == 0 || control.vectors == 0 {
            return None;
        }
        let vector = ready.trailing_zeros() as u16;
        self.pending &= !(1 << vector);
        Some(message(vector & u16::from(control.vectors - 1), control))
    }
}

fn message(vector: u16, control: MsiControl) -> MessageInterrupt {
    // Software leaves the low bits of the data to the function, as many as it enabled vectors.
    let base = control.data & !u16::from(control.vectors - 1);
    MessageInterrupt { vector, address: control.address, data: u32::from(base | vector) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUR: MsiControl = MsiControl { enabled: true, vectors: 4, address: 0xfee0_0000, data: 0x4050, mask: 0 };

    #[test]
    fn a_vector_raised_while_masked_waits_and_is_told_once() {
        let mut msi = Msi::default();
        let masked = MsiControl { mask: 0b1000, ..FOUR };
        assert_eq!(msi.raise(3, masked, true), Raised::Pending);
        assert_eq!(msi.raise(3, masked, true), Raised::Pending);
        assert_eq!((msi.pending(), msi.take_ready(masked)), (0b1000, None));
        assert_eq!(msi.take_ready(FOUR).map(|irq| irq.data), Some(0x4053));
        assert_eq!((msi.pending(), msi.take_ready(FOUR)), (0, None));
    }

    #[test]
    fn a_vector_that_was_not_given_to_the_function_never_writes_another_devices_message() {
        let mut msi = Msi::default();
        for vector in 0..32 {
            let Raised::Deliver(irq) = msi.raise(vector, FOUR, true) else { panic!("vector {vector} was not delivered") };
            assert!((0x4050..0x4054).contains(&irq.data) && irq.vector < 4);
        }
        assert_eq!(msi.raise(32, FOUR, true), Raised::NoVector);
    }
}
