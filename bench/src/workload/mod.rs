//! The six cases that are run native and remote, and the proof that every byte moved was the right one.
//!
//! `randread-4k-qd32` keeps 32 reads of 4 KiB at random places in flight for 300 ms and answers IOPS and the latency distribution;
//! `Workload::verify` then reads all 256 MiB through the same driver and compares them with what must be there.
//!
//! The scheme of the writes is in [`contents`]: a write leaves a pattern that names its place and its age, the runner remembers the ages,
//! and `Workload::restore` puts the original bytes back, so that at the end the whole device equals the original file again.

pub mod contents;
mod run;
mod verify;

use std::time::Duration;

use thiserror::Error;

pub use contents::Contents;
pub use verify::Verified;

use crate::driver::{CommandStatus, DmaBuffer, Driver, DriverError, QueueIndex, Registers};
use crate::measure::Latencies;

/// Bytes of the unit in which contents are remembered.
pub const UNIT_BYTES: u64 = 4096;
/// Bytes of a large transfer.
pub const LARGE_BYTES: u64 = 128 << 10;
/// The deepest queue of any case.
pub const MAX_IN_FLIGHT: usize = 32;

/// One of the six.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    /// Its name in reports.
    pub name: &'static str,
    /// Writes instead of reads.
    pub write: bool,
    /// Random places instead of one after the other.
    pub random: bool,
    /// Bytes of one command.
    pub bytes: u64,
    /// Commands in flight.
    pub in_flight: usize,
}

/// The cases of the demo, in its order. Sequential ones keep 8 commands in flight, as a reader that reads 1 MiB ahead does.
pub const CASES: [Case; 6] = [
    small("randread-4k-qd1", false, 1),
    small("randwrite-4k-qd1", true, 1),
    small("randread-4k-qd32", false, 32),
    small("randwrite-4k-qd32", true, 32),
    large("read-128k", false),
    large("write-128k", true),
];

const fn small(name: &'static str, write: bool, in_flight: usize) -> Case {
    Case { name, write, random: true, bytes: UNIT_BYTES, in_flight }
}

const fn large(name: &'static str, write: bool) -> Case {
    Case { name, write, random: false, bytes: LARGE_BYTES, in_flight: 8 }
}

impl Case {
    /// The case of that name.
    pub fn named(name: &str) -> Option<Self> {
        CASES.into_iter().find(|case| case.name == name)
    }
}

/// How long to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// This long.
    Time(Duration),
    /// This many commands.
    Commands(u64),
}

/// What one run of a case found.
#[derive(Clone, Debug)]
pub struct CaseRun {
    /// Commands completed.
    pub commands: u64,
    /// From the first submission to the last completion.
    pub elapsed: Duration,
    /// From just before a command was submitted until its completion was reaped.
    pub latencies: Latencies,
}

impl CaseRun {
    /// Commands per second.
    pub fn iops(&self) -> f64 {
        self.commands as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Why a case or a verification stopped.
#[derive(Debug, Error)]
pub enum WorkloadError {
    /// The device or its driver.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A command failed.
    #[error("{case}: a command failed: {status}")]
    Command {
        /// What was running.
        case: &'static str,
        /// The answer.
        status: CommandStatus,
    },
    /// A completion for a buffer that has no command: the driver named a token of ours that is not in flight.
    #[error("{case}: a completion for slot {token}, which is not in flight")]
    Slot {
        /// What was running.
        case: &'static str,
        /// The name it came under.
        token: u64,
    },
    /// **The disaster**: the device returned other bytes than were there.
    #[error("wrong data at byte {at} of the device ({expected}): found {found:02x?} where {wanted:02x?} must be")]
    WrongData {
        /// First differing byte of the device.
        at: u64,
        /// Where the right bytes come from: "as in the file", or a write of ours.
        expected: String,
        /// Up to eight bytes as read.
        found: Vec<u8>,
        /// Up to eight bytes as they must be.
        wanted: Vec<u8>,
    },
    /// The device and the original do not fit.
    #[error(
        "the device has {device} bytes where the original file has {original}; both must be equal and a multiple of {UNIT_BYTES}"
    )]
    Size {
        /// Bytes of the namespace.
        device: u64,
        /// Bytes of the file.
        original: u64,
    },
    /// The device is too small for the case.
    #[error("{case} needs a device of {needed} bytes or more; this one has {device}")]
    TooSmall {
        /// The case.
        case: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes of the namespace.
        device: u64,
    },
    /// The original file could not be read.
    #[error("cannot read the original file: {0}")]
    Original(#[source] std::io::Error),
    /// The driver's memory could not be reached.
    #[error(transparent)]
    Memory(#[from] farbus_transport::MemoryError),
}

/// How far a long operation got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// The cases over one driver: its buffers, and what must be on its device.
#[derive(Debug)]
pub struct Workload {
    queue: QueueIndex,
    contents: Contents,
    /// Buffers side by side, so that neighbours do not compete for the same sets of a cache.
    small: Vec<DmaBuffer>,
    large: Vec<DmaBuffer>,
    random: rand::rngs::SmallRng,
    next_sequential: u64,
    watch: crate::measure::Stopwatch,
}

impl Workload {
    /// Prepares the cases on `queue` (of more than [`MAX_IN_FLIGHT`] entries) of `driver`, whose device holds what `contents` says.
    /// The device must not be the original file itself: the cases write to it.
    ///
    /// # Errors
    /// [`WorkloadError::Size`], or no room for the buffers (5 MiB).
    pub fn new<R: Registers>(
        driver: &mut Driver<R>,
        queue: QueueIndex,
        contents: Contents,
        seed: u64,
    ) -> Result<Self, WorkloadError> {
        let device = driver.namespace().bytes();
        if device != contents.len() || device == 0 || !device.is_multiple_of(UNIT_BYTES) {
            let original = contents.len();
            return Err(WorkloadError::Size { device, original });
        }
        let room = driver.room(queue)?;
        if room < MAX_IN_FLIGHT {
            return Err(WorkloadError::Driver(DriverError::Limit {
                what: "commands in flight",
                asked: MAX_IN_FLIGHT as u64,
                allowed: room as u64,
            }));
        }
        let mut buffers =
            |bytes, count: usize| -> Result<Vec<DmaBuffer>, DriverError> { (0..count).map(|_| driver.allocate(bytes)).collect() };
        Ok(Self {
            queue,
            contents,
            small: buffers(UNIT_BYTES, MAX_IN_FLIGHT)?,
            large: buffers(LARGE_BYTES, MAX_IN_FLIGHT)?,
            random: rand::SeedableRng::seed_from_u64(seed),
            next_sequential: 0,
            watch: crate::measure::Stopwatch::calibrate(),
        })
    }

    /// What must be on the device.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }
}
