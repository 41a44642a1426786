//! The PCI function that a guest sees, and the doors to it: embedding in a VMM, and a vfio-user server for unmodified ones.
//!
//! A guest's 4-byte store to BAR0 + 0x1018 arrives in [`Function::bar_write`]; its profile decides what it means, and the function's
//! [`farbus_remote_dma::Attachment`] carries it to the device, wherever that is.

pub mod vfio_user;
