//! What carries a PCIe device across a link: BAR accesses in order, DMA into windows of guest memory, interrupts after data.
//!
//! A guest's store of 17 to BAR0 + 0x1018 becomes one posted message in a [`borrower`] session; the [`lender`] session hands it to a
//! [`Backend`], whose DMA goes through [`Bus`] to guest memory and whose vector 3 comes back after the data it announces.

pub mod address;
pub mod attachment;
pub mod backend;
pub mod borrower;
pub mod device;
pub mod dirty_log;
pub mod dma_buffer;
mod endpoint;
pub mod guest_memory;
pub mod holder;
pub mod iova_map;
pub mod journal;
pub mod lender;
pub mod message;
pub mod model;
pub mod native;
pub mod rest;
pub mod shared_window;
#[cfg(feature = "vfio")]
pub mod vfio;
pub mod wait;
pub mod wire;

pub use address::{BarAddress, GuestAddress, Iova, Width};
pub use attachment::{
    Activity, Attachment, AttachmentError, Host, MapError, Mediation, MediationAnswer, Ticket, Window, WindowMemory,
};
pub use backend::{
    AttachError, Backend, Bus, DeviceWindow, DmaFault, DmaTag, InterruptMode, Progress, ReadTicket, ResetKind, WindowError,
};
pub use device::{BarDescription, BarKind, Constant, DeviceDescription, MsixLocation};
pub use dma_buffer::DmaBuffer;
pub use guest_memory::{GuestMemory, GuestMemoryError, GuestRegion};
pub use holder::{Claim, HolderNote, HolderToken, Holders, Holding};
pub use journal::{BlockRange, Journal, Mark, Since};
pub use rest::{Continued, Kept, Lease, Rest, RestToken};
pub use shared_window::SharedWindow;
