//! What happened to a real device, counted, so that whoever watches it sees what nobody else says: refused DMA, failed resets.
//!
//! After a borrower that left a window unmapped under its drive, `dma_faults` is at least 1, and the data says the rest.

use std::sync::atomic::{AtomicU64, Ordering};

/// What happened to a device, counted since it was opened; shared with whoever watches.
#[derive(Debug, Default)]
pub struct VfioCounters {
    /// Interrupts taken.
    pub interrupts: AtomicU64,
    /// Resets done.
    pub resets: AtomicU64,
    /// Resets that the kernel refused.
    pub failed_resets: AtomicU64,
    /// DMA that the IOMMU refused, as far as the kernel's log says: at least so many.
    pub dma_faults: AtomicU64,
    /// Errors that the device or its link could not correct (PCIe 5.0, section 6.2).
    pub errors: AtomicU64,
    /// Register accesses that are the host's own: the MSI-X table and its pending bits.
    pub protected: AtomicU64,
    /// Windows of guest memory that the IOMMU maps now, in pieces of at most 1 GiB.
    pub windows: AtomicU64,
    /// Windows that could not be mapped.
    pub refused_windows: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}
