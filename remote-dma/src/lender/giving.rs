//! Windows for a device that reaches guest memory by itself: given as they are mapped, and as their memory is proven.
//!
//! A guest's RAM of 512 MiB is mapped while it is yet unproven: the device does not reach it; the borrower's store proves it, and the IOMMU maps it.

use farbus_transport::{CloseReason, Fabric};

use super::LenderSession;
use crate::address::Iova;
use crate::message::Outcome;

impl<F: Fabric> LenderSession<F> {
    /// Gives a device that reaches memory by itself the window that was just mapped. Memory that is not proven, or must be mediated, is out of
    /// its reach: such DMA ends in a fault of the IOMMU, and in no wrong byte.
    pub(super) fn give_window(&mut self, iova: Iova, len: u64) -> Outcome {
        if !self.backend.takes_windows() {
            return Outcome::Done;
        }
        let Some(window) = self.bus.device_window(iova, len) else {
            tracing::warn!(
                "the device does not reach {iova} + {len:#x}: it is not proven to be the guest's memory, or cannot be mapped"
            );
            return Outcome::Done;
        };
        match self.backend.map_window(window) {
            Ok(()) => Outcome::Done,
            Err(error) => {
                tracing::warn!(%error, "the device cannot have a window of its borrower's memory");
                if self.bus.unmap_windows(iova, len).is_err() {
                    self.close(CloseReason::Protocol("a window that the device cannot have and that does not go"));
                }
                Outcome::Unreachable
            }
        }
    }

    /// A memory is proven: the device reaches its windows from now on.
    pub(super) fn prove(&mut self, key: u64) {
        for (iova, len) in self.bus.prove(key) {
            if self.give_window(iova, len) != Outcome::Done {
                // Nobody awaits an answer, and a window that the borrower believes in may not go without one.
                self.close(CloseReason::Protocol("memory that the device cannot reach"));
            }
        }
    }
}
