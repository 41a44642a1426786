//! Why there is no RDMA link, sorted by who can mend it: this host, the device, or the peer.
//!
//! A machine without `libibverbs.so.1` and one whose kernel has no InfiniBand both end as [`NoRdma`], with a reason and never with a crash.

use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::link::control::ControlError;
use crate::memory::MemoryError;

/// Why this host has no usable RDMA device. Shared memory works without one.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NoRdma {
    /// The library is not installed, or too old.
    #[error("no RDMA library: {0}; on Debian: apt-get install libibverbs1 ibverbs-providers")]
    Library(String),
    /// The library finds no devices, or the kernel has no RDMA.
    #[error("no RDMA device on this host; soft-RoCE: modprobe rdma_rxe && rdma link add rxe0 type rxe netdev eth0")]
    Device,
    /// No device of that name.
    #[error("no RDMA device is called {wanted}; there are: {}", .found.join(", "))]
    NoSuchDevice {
        /// The name asked for.
        wanted: String,
        /// The devices of this host.
        found: Vec<String>,
    },
    /// Several devices fit, and it is not for us to guess which network the peer is on.
    #[error("several RDMA devices have an active port: {}; choose one with dev=", .found.join(", "))]
    Ambiguous {
        /// The devices that fit.
        found: Vec<String>,
    },
    /// The port does not exist.
    #[error("{device} has no port {port}; it has {ports}")]
    NoSuchPort {
        /// The device.
        device: String,
        /// The port asked for; ports are counted from 1.
        port: u8,
        /// How many there are.
        ports: u8,
    },
    /// The port has no link.
    #[error("port {port} of {device} is {state}, not active: bring its network interface up")]
    PortDown {
        /// The device.
        device: String,
        /// The port.
        port: u8,
        /// What the device calls its state.
        state: &'static str,
    },
    /// No address of the wanted kind.
    #[error("port {port} of {device} has no RoCE v2 address{}: give its network interface an IP address", .index.map(|index| format!(" at index {index}")).unwrap_or_default())]
    NoGid {
        /// The device.
        device: String,
        /// The port.
        port: u8,
        /// The index that was asked for.
        index: Option<u32>,
    },
}

/// Why two hosts could not be linked by queue pairs.
#[derive(Debug, Error)]
pub enum VerbsError {
    /// This host has no device for it.
    #[error(transparent)]
    NoRdma(#[from] NoRdma),
    /// The host or the device refused.
    #[error("the RDMA device {device} cannot {what}: {source}")]
    Device {
        /// Which device.
        device: String,
        /// What was tried.
        what: &'static str,
        /// What it answered.
        source: io::Error,
    },
    /// Memory of our own cannot be registered.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The connection beside the link ended or was abused.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The peer did not answer.
    #[error("no queue pair from the peer within {} ms", .allowed.as_millis())]
    Deadline {
        /// What was allowed.
        allowed: Duration,
    },
    /// The peer described its queue pair wrongly.
    #[error("the peer's queue pair is described wrongly: {0}")]
    Attributes(&'static str),
}
