//! A vCPU's way to a function that another thread owns: what it writes is posted, what it reads it waits for, in its own order.
//!
//! The guest's store of 17 to BAR0 + 0x1018 exits on vCPU 2; its thread puts 26 bytes into its own wire, one cache line, and resumes the guest. The
//! function's thread rings the fabric's doorbell, once for all that came meanwhile.
//!
//! Eight of the bytes are a ticket. A driver that stores 5 under a lock on vCPU 0 and 6 under the same lock on vCPU 1 has the device see 5 first, as on
//! hardware (Linux: memory-barriers.txt, "Kernel I/O barrier effects"): who draws a ticket later, in whatever way he knows that it is later, has a higher one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use farbus_remote_dma::wait::{Patience, SpinThenSleep, sleep_until_readable};
use farbus_remote_dma::wire::{Tap, Wire, wire};
use farbus_remote_dma::{BarAddress, Width};

use crate::access::AccessError;
use crate::config::CONFIG_BYTES;
use crate::routes::Routes;

/// How long a vCPU polls for an answer before it sleeps.
const SPIN: Duration = Duration::from_micros(200);
/// How often a vCPU that sleeps looks whether the function's thread is still there.
const LOOK: Duration = Duration::from_millis(100);
/// Bytes of configuration space that one access moves, at most.
const MAX_CONFIG: usize = 8;

/// What a message on the wire is.
mod kind {
    pub(super) const BAR_WRITE: u8 = 1;
    pub(super) const BAR_READ: u8 = 2;
    pub(super) const CONFIG_WRITE: u8 = 3;
    pub(super) const CONFIG_READ: u8 = 4;
    pub(super) const ANSWER: u8 = 5;
}

/// One access of a vCPU, which has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    BarWrite { at: BarAddress, width: Width, value: u64 },
    BarRead { at: BarAddress, width: Width },
    ConfigWrite { offset: u16, len: usize, bytes: [u8; MAX_CONFIG] },
    ConfigRead { offset: u16, len: usize },
}

/// The place in the order of all vCPUs' accesses.
pub(super) type Ticket = u64;

/// BAR or nothing, bytes, offset, value, ticket.
type Fields = [u8; 26];

fn fields(ticket: Ticket, (bar, len): (u8, u8), offset: u64, value: [u8; 8]) -> Fields {
    let mut fields = [0; 26];
    let (head, rest) = fields.split_at_mut(2);
    head.copy_from_slice(&[bar, len]);
    for (place, bytes) in rest.chunks_exact_mut(8).zip([offset.to_le_bytes(), value, ticket.to_le_bytes()]) {
        place.copy_from_slice(&bytes);
    }
    fields
}

impl Access {
    fn encode(&self, ticket: Ticket) -> (u8, Fields) {
        match *self {
            Self::BarWrite { at, width, value } => {
                (kind::BAR_WRITE, fields(ticket, (at.bar, width.bytes() as u8), at.offset, value.to_le_bytes()))
            }
            Self::BarRead { at, width } => (kind::BAR_READ, fields(ticket, (at.bar, width.bytes() as u8), at.offset, [0; 8])),
            Self::ConfigWrite { offset, len, bytes } => {
                (kind::CONFIG_WRITE, fields(ticket, (0, len as u8), u64::from(offset), bytes))
            }
            Self::ConfigRead { offset, len } => (kind::CONFIG_READ, fields(ticket, (0, len as u8), u64::from(offset), [0; 8])),
        }
    }

    fn parse(kind: u8, bytes: &[u8]) -> Option<(Ticket, Self)> {
        let ([bar, len], rest) = bytes.split_first_chunk::<2>()?;
        let (offset, rest) = rest.split_first_chunk::<8>()?;
        let (bytes, ticket) = rest.split_first_chunk::<8>()?;
        let (bytes, ticket) = (*bytes, u64::from_le_bytes(*ticket.first_chunk()?));
        let (offset, len) = (u64::from_le_bytes(*offset), usize::from(*len));
        let at = BarAddress { bar: *bar, offset };
        let access = match kind {
            kind::BAR_WRITE => Self::BarWrite { at, width: Width::from_bytes(len as u64)?, value: u64::from_le_bytes(bytes) },
            kind::BAR_READ => Self::BarRead { at, width: Width::from_bytes(len as u64)? },
            kind::CONFIG_WRITE => Self::ConfigWrite { offset: u16::try_from(offset).ok()?, len, bytes },
            kind::CONFIG_READ => Self::ConfigRead { offset: u16::try_from(offset).ok()?, len },
            _ => return None,
        };
        Some((ticket, access))
    }
}

/// What vCPUs and the function's thread know of each other.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) routes: Routes,
    pub(super) next_ticket: AtomicU64,
    /// The function's thread takes nothing any more.
    pub(super) over: AtomicBool,
}

/// One vCPU's access to a function, from any one thread at a time. See [`super::FunctionThread`].
pub struct VcpuPort {
    shared: Arc<Shared>,
    out: Wire,
    answers: Tap,
    patience: SpinThenSleep,
}

/// The function's end of a port.
pub(super) struct Served {
    /// Looked at and not carried out.
    head: Option<(Ticket, Access)>,
    asked: Tap,
    answers: Wire,
}

/// A port: the vCPU's end and the function's.
pub(super) fn port(shared: &Arc<Shared>) -> std::io::Result<(VcpuPort, Served)> {
    let ((out, asked), (answers, answered)) = (wire()?, wire()?);
    let port = VcpuPort { shared: Arc::clone(shared), out, answers: answered, patience: SpinThenSleep::new(SPIN) };
    Ok((port, Served { head: None, asked, answers }))
}

impl VcpuPort {
    /// Writes a register: posted, behind everything that any port was told before, and not seen by the device when this returns. It costs a cache line, and a
    /// system call where the function's thread sleeps; it waits only where 256 accesses of this port wait already. A function whose thread has ended takes it
    /// as an empty slot would.
    ///
    /// # Errors
    /// As [`crate::Function::bar_write`].
    #[inline]
    pub fn bar_write(&mut self, at: BarAddress, width: Width, value: u64) -> Result<(), AccessError> {
        self.shared.routes.check(at, width)?;
        self.post(&Access::BarWrite { at, width, value });
        Ok(())
    }

    /// Reads a register, behind everything that was written before at any port; see [`crate::Embedded::bar_read`]. It waits for the reads and resets of other
    /// ports before it, each up to its own deadline. All ones where the function's thread has ended.
    ///
    /// # Errors
    /// As [`crate::Function::bar_read`].
    pub fn bar_read(&mut self, at: BarAddress, width: Width) -> Result<u64, AccessError> {
        self.shared.routes.check(at, width)?;
        Ok(self.ask(&Access::BarRead { at, width }).map_or(width.all_ones(), u64::from_le_bytes))
    }

    /// Writes at most 8 bytes of configuration space, and returns when that was done: what it enables is enabled.
    ///
    /// # Errors
    /// [`AccessError::Config`].
    pub fn config_write(&mut self, offset: u16, bytes: &[u8]) -> Result<(), AccessError> {
        let mut padded = [0; MAX_CONFIG];
        let len = check_config(offset, bytes.len())?;
        for (to, from) in padded.iter_mut().zip(bytes) {
            *to = *from;
        }
        // An ended function is heard of by what is read next: all ones.
        self.ask(&Access::ConfigWrite { offset, len, bytes: padded });
        Ok(())
    }

    /// Reads at most 8 bytes of configuration space; all ones where the function's thread has ended.
    ///
    /// # Errors
    /// [`AccessError::Config`]; `into` is untouched.
    pub fn config_read(&mut self, offset: u16, into: &mut [u8]) -> Result<(), AccessError> {
        let len = check_config(offset, into.len())?;
        let bytes = self.ask(&Access::ConfigRead { offset, len }).unwrap_or([0xff; MAX_CONFIG]);
        for (to, from) in into.iter_mut().zip(bytes) {
            *to = from;
        }
        Ok(())
    }

    /// False where there is nobody who would take it.
    #[inline]
    fn post(&mut self, access: &Access) -> bool {
        self.post_with(self.shared.next_ticket.fetch_add(1, Ordering::Relaxed), access)
    }

    #[inline]
    pub(super) fn post_with(&mut self, ticket: Ticket, access: &Access) -> bool {
        let (kind, bytes) = access.encode(ticket);
        while !self.out.try_push(kind, &bytes) {
            if self.shared.over.load(Ordering::Acquire) {
                return false;
            }
            self.out.flush();
            std::thread::yield_now();
        }
        self.out.flush();
        true
    }

    /// Posts, and waits for the answer; `None` where the function's thread ends.
    fn ask(&mut self, access: &Access) -> Option<[u8; 8]> {
        if !self.post(access) {
            return None;
        }
        self.patience.begin();
        loop {
            if let Some((_, message)) = self.answers.take() {
                return message.bytes().first_chunk().copied();
            }
            self.patience.idle();
            if self.patience.wants_sleep() {
                // Nothing is answered after that, so one more look is the last.
                if self.shared.over.load(Ordering::Acquire) {
                    return self.answers.take().and_then(|(_, message)| message.bytes().first_chunk().copied());
                }
                if self.answers.arm() {
                    sleep_until_readable(&[Some(self.answers.fd())], Some(LOOK));
                }
                self.patience.begin();
            }
        }
    }
}

impl Served {
    /// The ticket of the vCPU's next access.
    #[inline]
    pub(super) fn look(&mut self) -> Option<Ticket> {
        if self.head.is_none() {
            let (kind, message) = self.asked.take()?;
            self.head = Access::parse(kind, message.bytes());
            debug_assert!(self.head.is_some(), "both ends are this file's");
        }
        self.head.map(|(ticket, _)| ticket)
    }

    /// The access that was looked at.
    #[inline]
    pub(super) fn take(&mut self) -> Option<Access> {
        self.head.take().map(|(_, access)| access)
    }

    /// Answers a read, or says that a write of configuration space was made. Who waits has room for it.
    pub(super) fn answer(&mut self, value: [u8; 8]) {
        self.answers.push(kind::ANSWER, &value);
        self.answers.flush();
    }

    /// As [`Tap::announce`].
    pub(super) fn announce(&mut self) -> bool {
        self.head.is_none() && self.asked.announce()
    }

    /// As [`Tap::is_quiet`].
    pub(super) fn is_quiet(&self) -> bool {
        self.asked.is_quiet()
    }

    /// As [`Tap::fd`].
    pub(super) fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.asked.fd()
    }
}

fn check_config(offset: u16, len: usize) -> Result<usize, AccessError> {
    let fits = len <= MAX_CONFIG && usize::from(offset) + len <= CONFIG_BYTES;
    if fits { Ok(len) } else { Err(AccessError::Config { offset, len }) }
}
