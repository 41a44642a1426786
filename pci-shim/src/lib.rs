//! The PCI function that a guest sees, and the doors to it: embedding in a VMM, and a vfio-user server for unmodified ones.
//!
//! A guest's 4-byte store to BAR0 + 0x1018 arrives in [`Function::bar_write`]; its profile decides what it means, and the function's
//! [`farbus_remote_dma::Attachment`] carries it to the device, wherever that is.

pub mod access;
pub mod config;
pub mod embed;
pub mod function;
mod interrupt;
pub mod irq;
pub mod mediation;
pub mod profile;
pub mod reattach;
mod routes;
#[cfg(test)]
mod scripted;
pub mod state;
pub mod vfio_user;

pub use access::AccessError;
pub use config::AddressSpace;
pub use embed::{Embedded, FunctionThread, FunctionThreadOptions, VcpuPort};
pub use function::{
    Counters, Function, FunctionError, FunctionOptions, InterruptOwner, QuiesceError, RecoveryParts, RestoreError, Restored,
};
pub use irq::{CallbackSink, IrqSink, IrqfdSink, MessageInterrupt, RecorderSink};
pub use mediation::{MediationKind, MediationRequest};
pub use reattach::{NotFound, Reattach, Reconnector, Search, SearchStop};
pub use state::{FunctionState, StateError};
