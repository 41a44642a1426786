//! A user-space NVMe driver: what a guest's driver does, in one process and without a kernel, so that it can be measured.
//!
//! `Driver::start(registers, memory, options)` resets the controller and makes its queues; `submit`, `ring` and `reap` then move one 4 KiB
//! read with two stores to registers, one load of a completion's phase bit, and neither an allocation nor a system call.
//!
//! ```text
//!   submit ─► slot in memory … ring ─► tail doorbell        device: entry, data, completion
//!   reap   ◄─ phase bit in memory … head doorbell ◄─ all new entries taken
//! ```

mod command;
mod dma;
mod error;
mod identify;
mod lifecycle;
mod prp;
mod queue;
mod registers;

use std::time::{Duration, Instant};

use farbus_remote_dma::Width;

pub use command::{COMPLETION_BYTES, Command, SUBMISSION_BYTES, StatusWord};
pub use dma::{DmaBuffer, DmaMemory, PAGE_BYTES};
pub use error::{CommandStatus, DriverError};
pub use identify::{IDENTIFY_BYTES, Identity, Namespace};
pub use prp::{ENTRIES_PER_PAGE, PrpError, Prps, build as build_prps, list_pages};
pub use queue::Completion;
use queue::QueuePair;
pub use registers::{
    ACQ, ALL_ONES, AQA, ASQ, CAP, CC, CC_ENABLE, CC_ENTRY_SIZES, CC_SHUTDOWN_NORMAL, CSTS, Capabilities, DOORBELLS, Registers,
    Status, VS,
};

/// What the driver asks of the controller.
#[derive(Clone, Debug)]
pub struct DriverOptions {
    /// I/O queue pairs, at least 1.
    pub queues: u16,
    /// Entries of each I/O queue; one less commands can be in flight.
    pub depth: u16,
    /// Bytes of the longest transfer; the controller's own limit counts too.
    pub max_transfer: u64,
    /// The vector of each I/O queue, the first for queue 1; empty: completions are polled and no interrupt is asked for.
    pub vectors: Vec<u16>,
    /// How long one command may take.
    pub command_timeout: Duration,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self { queues: 1, depth: 64, max_transfer: 128 << 10, vectors: Vec::new(), command_timeout: Duration::from_secs(10) }
    }
}

/// An I/O queue pair of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueIndex(pub u16);

/// What to do with the namespace.
#[derive(Clone, Debug)]
pub enum Io<'a> {
    /// Blocks into a buffer; the buffer's length says how many.
    Read {
        /// First block.
        block: u64,
        /// Where they go.
        into: &'a DmaBuffer,
    },
    /// A buffer into blocks.
    Write {
        /// First block.
        block: u64,
        /// What to write.
        from: &'a DmaBuffer,
    },
    /// Everything completed before is on the medium.
    Flush,
}

/// A controller that is up, with its queues.
#[derive(Debug)]
pub struct Driver<R: Registers> {
    registers: R,
    dma: DmaMemory,
    capabilities: Capabilities,
    options: DriverOptions,
    max_transfer: u64,
    identity: Identity,
    namespace: Namespace,
    admin: QueuePair,
    queues: Vec<QueuePair>,
}

impl<R: Registers> Driver<R> {
    /// What the controller says of itself.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The namespace that [`Io`] names blocks of: the first active one.
    pub fn namespace(&self) -> Namespace {
        self.namespace
    }

    /// Bytes of the longest transfer that both sides allow.
    pub fn max_transfer(&self) -> u64 {
        self.max_transfer
    }

    /// How long one command may take.
    pub fn command_timeout(&self) -> Duration {
        self.options.command_timeout
    }

    /// I/O queue pairs.
    pub fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    /// The registers, for whoever needs to look beside the driver.
    pub fn registers_mut(&mut self) -> &mut R {
        &mut self.registers
    }

    /// A new buffer, page-aligned, that lives as long as the driver.
    ///
    /// # Errors
    /// [`DriverError::DmaMemory`].
    pub fn allocate(&mut self, len: u64) -> Result<DmaBuffer, DriverError> {
        self.dma.allocate(len)
    }

    /// Commands that `queue` takes now.
    ///
    /// # Errors
    /// [`DriverError::NoQueue`].
    pub fn room(&mut self, queue: QueueIndex) -> Result<usize, DriverError> {
        Ok(self.queue(queue)?.0.room())
    }

    /// Commands of `queue` submitted and not yet reaped.
    ///
    /// # Errors
    /// [`DriverError::NoQueue`].
    pub fn in_flight(&mut self, queue: QueueIndex) -> Result<usize, DriverError> {
        Ok(self.queue(queue)?.0.in_flight())
    }

    /// Puts `io` into the queue under the name `token`. The controller hears of it by [`Driver::ring`].
    ///
    /// # Errors
    /// [`DriverError::Full`], [`DriverError::NoQueue`], [`DriverError::Limit`] for a buffer that is no whole number of blocks, too long or
    /// leaves the namespace, [`DriverError::Prp`]. Nothing was submitted.
    pub fn submit(&mut self, queue: QueueIndex, io: &Io<'_>, token: u64) -> Result<(), DriverError> {
        let namespace = self.namespace;
        let (command, data) = match io {
            Io::Read { block, into } => (Command::read(namespace.id, *block, self.blocks(*block, into.len())?), Some(*into)),
            Io::Write { block, from } => (Command::write(namespace.id, *block, self.blocks(*block, from.len())?), Some(*from)),
            Io::Flush => (Command::flush(namespace.id), None),
        };
        self.queue(queue)?.0.submit(&command, data, token)
    }

    /// Rings the tail doorbell, once for everything submitted since the last time.
    ///
    /// # Errors
    /// [`DriverError::NoQueue`].
    pub fn ring(&mut self, queue: QueueIndex) -> Result<(), DriverError> {
        let (queue, registers) = self.queue(queue)?;
        queue.ring(registers);
        Ok(())
    }

    /// Hands every completion that is there to `each`; where there is none, the device's carrier is polled once. Never blocks.
    /// Returns how many there were.
    ///
    /// # Errors
    /// [`DriverError::NoQueue`], [`DriverError::StrayCompletion`]. A command that failed is no error here: see [`Completion::status`].
    #[inline]
    pub fn reap(&mut self, queue: QueueIndex, mut each: impl FnMut(Completion)) -> Result<usize, DriverError> {
        let (queue, registers) = self.queue(queue)?;
        let count = queue.reap(registers, &mut each)?;
        if count > 0 {
            return Ok(count);
        }
        registers.poll();
        queue.reap(registers, each)
    }

    /// As [`Driver::reap`], but returns only with completions, or with an error when the deadline of a command has passed. Spins.
    ///
    /// # Errors
    /// As [`Driver::reap`]; [`DriverError::Timeout`], [`DriverError::Gone`], [`DriverError::Fatal`].
    pub fn reap_some(&mut self, queue: QueueIndex, mut each: impl FnMut(Completion)) -> Result<usize, DriverError> {
        let mut patience = Patience::new(self.options.command_timeout);
        loop {
            let count = self.reap(queue, &mut each)?;
            if count > 0 {
                return Ok(count);
            }
            if patience.exhausted(&self.registers) {
                return Err(self.diagnose(queue.0));
            }
            std::hint::spin_loop();
        }
    }

    /// As [`Driver::reap_some`], but sleeps in `wait(registers, vector, at_most)` where there is no completion: `wait` returns when the
    /// queue's vector was signalled or the time is over, and lets the device's carrier make progress meanwhile.
    ///
    /// # Errors
    /// As [`Driver::reap_some`]; [`DriverError::Wait`]; [`DriverError::Unsupported`] where the driver was started without vectors.
    pub fn reap_by_interrupt(
        &mut self,
        queue: QueueIndex,
        mut wait: impl FnMut(&mut R, u16, Duration) -> std::io::Result<()>,
        mut each: impl FnMut(Completion),
    ) -> Result<usize, DriverError> {
        let index = usize::from(queue.0).wrapping_sub(1);
        let Some(&vector) = self.options.vectors.get(index) else {
            return Err(DriverError::Unsupported("the queue was made without an interrupt vector"));
        };
        let start = Instant::now();
        loop {
            let count = self.reap(queue, &mut each)?;
            if count > 0 {
                return Ok(count);
            }
            let Some(left) = self.options.command_timeout.checked_sub(start.elapsed()) else {
                return Err(self.diagnose(queue.0));
            };
            wait(&mut self.registers, vector, left).map_err(DriverError::Wait)?;
        }
    }

    /// One command from submission to completion, on a queue that has nothing else in flight.
    ///
    /// # Errors
    /// As [`Driver::submit`] and [`Driver::reap_some`]; [`DriverError::Command`] where the command failed.
    pub fn execute(&mut self, queue: QueueIndex, io: &Io<'_>) -> Result<(), DriverError> {
        self.submit(queue, io, 0)?;
        self.ring(queue)?;
        let mut status = CommandStatus(0);
        self.reap_some(queue, |completion| status = completion.status)?;
        let command = match io {
            Io::Read { .. } => "read",
            Io::Write { .. } => "write",
            Io::Flush => "flush",
        };
        if status.ok() { Ok(()) } else { Err(DriverError::Command { command, status }) }
    }

    /// Whether it is known that the device is gone.
    pub fn is_gone(&self) -> bool {
        self.registers.is_gone()
    }

    /// Why commands of `queue` do not complete: the device is gone, it failed, or it only takes too long.
    pub fn diagnose(&mut self, queue: u16) -> DriverError {
        let csts = self.registers.read(CSTS, Width::B4) as u32;
        let status = Status(csts);
        if status.gone() {
            return DriverError::Gone;
        }
        if status.fatal() {
            return DriverError::Fatal { csts };
        }
        let in_flight = match queue {
            0 => self.admin.in_flight(),
            _ => self.queue(QueueIndex(queue)).map_or(0, |(queue, _)| queue.in_flight()),
        };
        DriverError::Timeout { queue, in_flight, timeout_ms: self.options.command_timeout.as_millis() as u64, csts }
    }

    fn queue(&mut self, queue: QueueIndex) -> Result<(&mut QueuePair, &mut R), DriverError> {
        let index = usize::from(queue.0).wrapping_sub(1);
        let pair = self.queues.get_mut(index).ok_or(DriverError::NoQueue { queue: queue.0 })?;
        Ok((pair, &mut self.registers))
    }

    fn blocks(&self, block: u64, bytes: u64) -> Result<u32, DriverError> {
        let limit = |what, asked, allowed| DriverError::Limit { what, asked, allowed };
        if bytes > self.max_transfer {
            return Err(limit("bytes of a transfer", bytes, self.max_transfer));
        }
        if !bytes.is_multiple_of(self.namespace.block_bytes) {
            return Err(limit("bytes of a transfer, in whole blocks", bytes, self.namespace.block_bytes));
        }
        let blocks = bytes / self.namespace.block_bytes;
        if block.checked_add(blocks).is_none_or(|end| end > self.namespace.blocks) {
            return Err(limit("blocks of the namespace", block.saturating_add(blocks), self.namespace.blocks));
        }
        if blocks > 1 << 16 {
            return Err(limit("blocks of a transfer", blocks, 1 << 16));
        }
        Ok(blocks as u32)
    }
}

/// A deadline that looks at the clock only now and then, because a look costs as much as a poll; it has passed where the device is gone.
struct Patience {
    deadline: Option<Instant>,
    timeout: Duration,
    polls: u32,
}

impl Patience {
    fn new(timeout: Duration) -> Self {
        Self { deadline: None, timeout, polls: 0 }
    }

    fn exhausted(&mut self, registers: &impl Registers) -> bool {
        self.polls = self.polls.wrapping_add(1);
        if !self.polls.is_multiple_of(256) {
            return false;
        }
        let now = Instant::now();
        let timeout = self.timeout;
        registers.is_gone() || now > *self.deadline.get_or_insert_with(|| now + timeout)
    }
}
