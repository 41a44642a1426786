//! From what the device raises to what the guest is told: masks, pending bits and levels, for MSI-X, MSI and INTx.
//!
//! Vector 3 raised while its mask bit is set becomes bit 3 of the pending-bit array, and one message when the guest clears the mask. All of
//! it is pure state; [`crate::Function`] feeds it and owns the sink.

pub(crate) mod intx;
pub(crate) mod msi;
pub(crate) mod msix;

use crate::irq::MessageInterrupt;

/// What became of a vector that the device raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Raised {
    /// Tell the guest.
    Deliver(MessageInterrupt),
    /// Masked: its pending bit is set.
    Pending,
    /// The function has no such vector.
    NoVector,
}
