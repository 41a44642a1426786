//! Software devices behind [`crate::Backend`]: an NVMe controller over a file or memory, and the register file of QEMU's `edu`.
//!
//! They know nothing of links: `Nvme` hears of a doorbell through `bar_write`, and reaches guest memory only through [`crate::Bus`].

pub mod edu;
pub mod nvme;

pub use edu::Edu;
pub use nvme::{Nvme, NvmeOptions};
