//! Real PCIe devices, by VFIO: a device that vfio-pci has is lent as it is, and reaches the borrower's memory through this host's IOMMU.
//!
//! `farbus lend --device vfio:0000:03:00.0` looks at the device by [`Host::look`], which names what is missing and the commands for it, and opens
//! it by [`Vfio::open`]. It needs a link whose memory can be mapped here: hardware cannot be asked to wait until its data has come.
//!
//! What the device writes passes the CPU, so no log sees it page by page: all of a window that it may write counts as written for as long as the
//! window is there ([`crate::dirty_log::DirtyLog::hold`]).

mod backend;
pub mod config;
mod counters;
mod faults;
mod host;
mod interrupts;
mod registers;
mod sys;
mod windows;

pub use backend::{OpenError, Vfio};
pub use counters::VfioCounters;
pub use host::{Candidate, Host, NoAddress, Obstacle, PciAddress};
pub use interrupts::InterruptError;
