//! Why an access to a function is refused at the edge, before it can reach a device.
//!
//! A 4-byte read at BAR0 + 0x1016 of a 16 KiB BAR is [`AccessError::Misaligned`]; at BAR0 + 0x4000 it is [`AccessError::PastEnd`]; a
//! vfio-user server answers both with an errno, a VMM's bus with all ones.

use farbus_remote_dma::{BarAddress, Width};
use thiserror::Error;

/// An access that cannot have come from working hardware: the owner of the function made a mistake, or passes on someone else's.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum AccessError {
    /// The function has no such BAR (the upper half of a 64-bit one is none).
    #[error("the function has no BAR{bar}")]
    NoBar {
        /// The BAR asked for.
        bar: u8,
    },
    /// The access leaves its BAR.
    #[error("{} bytes at {at} leave a BAR of {size:#x} bytes", width.bytes())]
    PastEnd {
        /// First byte.
        at: BarAddress,
        /// Bytes of the access.
        width: Width,
        /// Bytes of the BAR.
        size: u64,
    },
    /// The access is not naturally aligned.
    #[error("{at} is not aligned to {} bytes", width.bytes())]
    Misaligned {
        /// First byte.
        at: BarAddress,
        /// Bytes of the access.
        width: Width,
    },
    /// Eight bytes at once in I/O space, where no instruction moves more than four.
    #[error("8 bytes at once at {at}, which is I/O space")]
    TooWide {
        /// First byte.
        at: BarAddress,
    },
    /// The range leaves the 4,096 bytes of configuration space.
    #[error("{len} bytes at {offset:#x} leave the configuration space of 4096 bytes")]
    Config {
        /// First byte.
        offset: u16,
        /// Bytes.
        len: usize,
    },
}
