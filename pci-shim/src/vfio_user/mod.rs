//! A vfio-user server over a PCI function (QEMU, docs/interop/vfio-user.rst), so that an unmodified VMM can give it to an unmodified guest.
//!
//! QEMU with `-device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/nvme.sock"}}'` connects, maps its guest's memory by
//! descriptor, hands over an eventfd for each MSI-X vector and forwards the guest's register accesses one message at a time.
//!
//! ```text
//!   client ──bytes──► socket ──message──► message (parsed) ──► session ──► Served (the function)
//!                                                                │ maps, irqs
//!   client ◄─DMA_READ, DMA_WRITE── mediation ◄───────────────────┘ share: is a map's file the guest's memory?
//! ```

pub mod backend;
pub mod client;
mod client_error;
mod client_memory;
mod commands;
mod door;
mod held;
mod irqs;
mod maps;
mod mediation;
pub mod message;
mod options;
mod served;
mod server;
mod session;
mod share;
pub mod socket;
pub mod version;
pub mod wire;

pub use backend::{BackendOptions, OpenError, VfioUserBackend};
pub use irqs::ClientInterrupts;
pub use options::{ClientEnd, OnGone, Options, ServeError};
pub use served::Served;
pub use server::{BindError, Ended, Server, SocketAccess, StopHandle, serve_all};
pub use share::OnUnshared;
