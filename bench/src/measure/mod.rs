//! How figures are taken: two sides in alternating rounds on pinned threads, beside calibrations from the same run.
//!
//! `interleave(7, native, remote)` runs native, remote, remote, native, … so that a machine that slows down slows both; the ratio is the
//! median of the seven rounds' ratios, with the spread that tells whether it means anything.

mod allocations;
mod calibrate;
mod handshake;
mod latencies;
mod pin;
mod rounds;
mod syscalls;

pub use allocations::{CountingAllocator, allocations_here};
pub(crate) use calibrate::COPIES_PER_LOOK;
pub use calibrate::{cache_line_round_trip, memcpy_bandwidth, memcpy_hot};
pub use handshake::{Wake, Wakes, eventfd_sleeper, eventfd_wake, socket_ping_pong};
pub use latencies::{Latencies, Stopwatch};
pub use pin::{PinError, Pinned, cores, pin_to, two_cores};
pub use rounds::{LEAST_ROUNDS, Pairs, Series, interleave};
pub use syscalls::{SyscallCounts, SyscallError, count_syscalls};

/// Why a calibration failed.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// A thread could not be pinned.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The kernel refused.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] farbus_transport::MemoryError),
    /// The other thread ended early.
    #[error("the other thread of a calibration ended early")]
    Partner,
}

fn host(what: &'static str) -> impl Fn(rustix::io::Errno) -> CalibrationError {
    move |errno| CalibrationError::Host { what, source: errno.into() }
}
