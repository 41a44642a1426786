//! The windows that a device's IOMMU maps: each piece stays held until the kernel has unmapped it.
//!
//! A window of 3 GiB is three pieces of 1 GiB at consecutive addresses; if the third cannot be mapped, the first two are unmapped again, and the
//! guest's side hears that it has no window.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use farbus_transport::Access;

use super::counters::{VfioCounters, count};
use super::host::PciAddress;
use super::sys::Iommu;
use crate::address::Iova;
use crate::backend::{DeviceWindow, WindowError};
use crate::dma_buffer::DmaBuffer;

/// A range that the IOMMU maps.
struct Piece {
    len: u64,
    memory: DmaBuffer,
}

/// All of one device.
pub(super) struct Windows {
    iommu: Iommu,
    address: PciAddress,
    /// By first address.
    pieces: BTreeMap<u64, Piece>,
    stuck: usize,
    counters: Arc<VfioCounters>,
}

impl Windows {
    pub(super) fn new(iommu: Iommu, address: PciAddress, counters: Arc<VfioCounters>) -> Self {
        Self { iommu, address, pieces: BTreeMap::new(), stuck: 0, counters }
    }

    /// Pieces that the kernel did not unmap: the device may be in them until this process ends.
    pub(super) fn stuck(&self) -> usize {
        self.stuck
    }

    /// Maps a window, or nothing of it.
    pub(super) fn map(&mut self, window: DeviceWindow) -> Result<(), WindowError> {
        let DeviceWindow { iova: first, access, pieces } = window;
        let mut iova = first;
        for memory in pieces {
            let len = memory.len();
            if let Err(error) = self.map_piece(iova, access, memory) {
                if iova > first {
                    self.take(first.0, iova.0 - 1);
                }
                return Err(error);
            }
            iova = Iova(iova.0.wrapping_add(len));
        }
        Ok(())
    }

    /// Ends the IOMMU's maps whose first addresses are in the range. What it does not end stays held, and keeps the session from ending.
    pub(super) fn take(&mut self, first: u64, last: u64) {
        let starts: Vec<u64> = self.pieces.range(first..=last).map(|(start, _)| *start).collect();
        for start in starts {
            let Some(piece) = self.pieces.remove(&start) else { continue };
            if let Err(error) = self.iommu.unmap(Iova(start), piece.len) {
                tracing::error!(%error, "the IOMMU does not unmap {} + {:#x} of {}", Iova(start), piece.len, self.address);
                self.stuck += 1;
                // The device may write there for as long as this process lives, so the memory must not go.
                std::mem::forget(piece);
                continue;
            }
            self.counters.windows.fetch_sub(1, Ordering::Relaxed);
            let (memory, offset, len) = (Arc::clone(piece.memory.parts().0), piece.memory.parts().1, piece.len);
            // Marks what was written, and lets go of the pages.
            drop(piece);
            for other in self.pieces.values() {
                let (its, at) = other.memory.parts();
                if Arc::ptr_eq(its, &memory) && at < offset + len && offset < at + other.len {
                    other.memory.hold();
                }
            }
        }
    }

    fn map_piece(&mut self, iova: Iova, access: Access, memory: DmaBuffer) -> Result<(), WindowError> {
        let (len, limits) = (memory.len(), self.iommu.limits());
        if !limits.allow(iova, len) {
            return Err(WindowError::Range { iova, len });
        }
        let address = memory.as_ptr();
        if [iova.0, len, address as u64].iter().any(|number| !number.is_multiple_of(limits.page)) {
            return Err(WindowError::Unaligned { iova, len, page: limits.page });
        }
        // SAFETY: `memory` keeps the bytes mapped and is kept until `take` has unmapped them, or for ever; guest memory may be written
        // by others at any time (`DmaBuffer::as_ptr`).
        unsafe { self.iommu.map(iova, len, address, access) }.map_err(|source| WindowError::Host { iova, len, source })?;
        self.pieces.insert(iova.0, Piece { len, memory });
        count(&self.counters.windows, 1);
        Ok(())
    }
}
