//! Why the driver could not do what it was asked, sorted by who is to blame, and the status of one command.
//!
//! A read past the last block ends with `CommandStatus` 0x0080, printed as "LBA out of range (status 0/0x80)"; a controller whose
//! lender was killed answers all ones, which is `DriverError::Gone`.

use std::fmt;

use farbus_transport::MemoryError;
use thiserror::Error;

use super::prp::PrpError;

/// The status field of a completion entry without its phase bit: 15 bits (NVMe 1.4, section 4.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandStatus(pub u16);

impl CommandStatus {
    /// Whether the command succeeded.
    pub const fn ok(self) -> bool {
        self.code() == 0 && self.code_type() == 0
    }

    /// Status code.
    pub const fn code(self) -> u8 {
        (self.0 & 0xff) as u8
    }

    /// Status code type: 0 generic, 1 command specific, 2 media and data integrity.
    pub const fn code_type(self) -> u8 {
        ((self.0 >> 8) & 7) as u8
    }

    /// Whether trying again cannot help.
    pub const fn do_not_retry(self) -> bool {
        self.0 & (1 << 14) != 0
    }
}

impl fmt::Display for CommandStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match (self.code_type(), self.code()) {
            (0, 0x00) => "success",
            (0, 0x01) => "invalid command opcode",
            (0, 0x02) => "invalid field in command",
            (0, 0x04) => "data transfer error",
            (0, 0x05) => "aborted by loss of power",
            (0, 0x06) => "internal error",
            (0, 0x07) => "aborted by request",
            (0, 0x08) => "aborted because its queue was deleted",
            (0, 0x0b) => "invalid namespace or format",
            (0, 0x13) => "invalid PRP offset",
            (0, 0x20) => "namespace is write protected",
            (0, 0x80) => "LBA out of range",
            (1, 0x00) => "invalid completion queue",
            (1, 0x01) => "invalid queue identifier",
            (1, 0x02) => "invalid queue size",
            (1, 0x08) => "invalid interrupt vector",
            (2, 0x80) => "write fault",
            (2, 0x81) => "unrecovered read error",
            (2, 0x85) => "compare failure",
            _ => "failed",
        };
        write!(f, "{name} (status {}/{:#04x})", self.code_type(), self.code())
    }
}

/// Why the driver could not go on.
#[derive(Debug, Error)]
pub enum DriverError {
    /// The device: every register reads as all ones.
    #[error("the controller is gone: its status register reads as all ones")]
    Gone,
    /// The device: controller fatal status.
    #[error("the controller reports a fatal status (CSTS {csts:#x}) and needs a reset")]
    Fatal {
        /// The status register.
        csts: u32,
    },
    /// The device: it did not become ready, not ready, or shut down.
    #[error("the controller did not {what} within {timeout_ms} ms (CSTS {csts:#x})")]
    Ready {
        /// What it was to do.
        what: &'static str,
        /// The time allowed.
        timeout_ms: u64,
        /// The status register.
        csts: u32,
    },
    /// The device: a command did not complete.
    #[error("{in_flight} commands of queue {queue} did not complete within {timeout_ms} ms; the controller is up (CSTS {csts:#x})")]
    Timeout {
        /// Queue, 0 for the admin queue.
        queue: u16,
        /// Commands that have not completed.
        in_flight: usize,
        /// The time allowed.
        timeout_ms: u64,
        /// The status register.
        csts: u32,
    },
    /// The device: a command failed.
    #[error("{command}: {status}")]
    Command {
        /// What was asked.
        command: &'static str,
        /// The answer.
        status: CommandStatus,
    },
    /// The device: a completion for a command that is not in flight.
    #[error("queue {queue}: a completion for command {command}, which is not in flight")]
    StrayCompletion {
        /// Queue.
        queue: u16,
        /// Command identifier that the controller named.
        command: u16,
    },
    /// The device: it lacks what the driver needs.
    #[error("the controller cannot be driven: {0}")]
    Unsupported(&'static str),
    /// A limit: the driver's memory is too small.
    #[error("{needed:#x} bytes of DMA memory are needed where {left:#x} are left")]
    DmaMemory {
        /// Bytes asked for.
        needed: u64,
        /// Bytes left.
        left: u64,
    },
    /// A limit: queues or a depth that the controller does not give.
    #[error("{what}: asked for {asked}, the controller allows {allowed}")]
    Limit {
        /// What was asked for.
        what: &'static str,
        /// How many.
        asked: u64,
        /// How many there are.
        allowed: u64,
    },
    /// A limit: the queue is full; reap first.
    #[error("queue {queue} is full")]
    Full {
        /// Queue.
        queue: u16,
    },
    /// A limit: no such queue.
    #[error("there is no queue {queue}")]
    NoQueue {
        /// Queue.
        queue: u16,
    },
    /// A limit: the buffer cannot be described.
    #[error(transparent)]
    Prp(#[from] PrpError),
    /// The host: memory of the driver's own.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The host: waiting for an interrupt failed.
    #[error("cannot wait for an interrupt: {0}")]
    Wait(#[source] std::io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_says_what_the_controller_said() {
        let status = CommandStatus(0x4080);
        assert!(!status.ok() && status.do_not_retry());
        assert_eq!(status.to_string(), "LBA out of range (status 0/0x80)");
        assert!(!CommandStatus(0x0281).ok());
        assert!(CommandStatus(0).ok());
    }
}
