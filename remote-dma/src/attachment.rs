//! The seam between the function a guest sees and wherever its device is: here ([`crate::native`]) or on another host ([`crate::borrower`]).
//!
//! The function says `bar_read(BAR0 + 0x1c, B4)` and gets the controller's status, or all ones where the device is gone; it says `map` when
//! the guest gains memory; in `poll` it hears of vector 3, with all data that the vector announces already in guest memory.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use farbus_transport::{Access, CloseReason, GrantError, Memory, Nanos};
use thiserror::Error;

use crate::address::{BarAddress, Iova, Width};
use crate::backend::{InterruptMode, ResetKind};
use crate::device::DeviceDescription;
use crate::dirty_log::DirtyLog;
use crate::rest::{Rest, RestToken};

/// Said of a device that has no pause.
pub(crate) const CANNOT_REST: &str = "the device cannot be brought to rest and kept";

/// Whether a poll found work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Something was done: poll again soon.
    Busy,
    /// Nothing to do, but poll again after at most this long, where given.
    Idle(Option<Duration>),
}

impl Activity {
    /// Both together: busy if either is, else the earlier time.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Busy, _) | (_, Self::Busy) => Self::Busy,
            (Self::Idle(a), Self::Idle(b)) => Self::Idle(a.into_iter().chain(b).min()),
        }
    }
}

/// Names one access to guest memory that goes through the guest's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u32);

/// An access to guest memory that the device's side cannot make itself: no descriptor, or its mapping is not proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mediation<'a> {
    /// Read `len` bytes (at most 4,096, inside one 4 KiB page).
    Fetch {
        /// First address.
        iova: Iova,
        /// Bytes.
        len: u32,
    },
    /// Write the bytes (at most 4,096, inside one 4 KiB page).
    Store {
        /// First address.
        iova: Iova,
        /// What to write.
        bytes: &'a [u8],
        /// The guest may be polling the last 32-bit word: it must become visible last.
        polled: bool,
    },
}

/// The outcome of a mediation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediationAnswer<'a> {
    /// The bytes fetched.
    Fetched(&'a [u8]),
    /// The bytes are in guest memory.
    Stored,
    /// The guest's side refused.
    Fault,
}

/// What an attachment tells and asks the guest's side; called from [`Attachment`] methods only.
pub trait Host {
    /// The device raised an MSI or MSI-X vector; all data before it is visible.
    fn interrupt(&mut self, vector: u16);

    /// The device's INTx level changed.
    fn pin(&mut self, asserted: bool);

    /// Guest memory must be reached through the guest's side. Answered, now or later, by [`Attachment::answer`]; stores of one attachment
    /// must take effect in the order asked, and before later interrupts.
    fn mediate(&mut self, ticket: Ticket, mediation: Mediation<'_>);
}

/// The memory behind a window.
#[derive(Clone, Debug)]
pub enum WindowMemory {
    /// Bytes of `memory` from `offset`; `proven` where it is known that they are what the guest sees.
    Mapped {
        /// Shareable memory with a descriptor.
        memory: Arc<Memory>,
        /// First byte.
        offset: u64,
        /// False: every access is mediated until [`Attachment::prove`].
        proven: bool,
    },
    /// No mapping: every access is mediated.
    Mediated,
}

/// A range of DMA addresses that the device may use.
#[derive(Clone, Debug)]
pub struct Window {
    /// First address.
    pub iova: Iova,
    /// Bytes; at least 1.
    pub len: u64,
    /// What the device may do.
    pub access: Access,
    /// What is behind it.
    pub memory: WindowMemory,
}

/// Why a window could not be added or removed.
#[derive(Debug, Error)]
pub enum MapError {
    /// Another window is there, or a removal would split one.
    #[error("{iova} + {len:#x} overlaps another window")]
    Overlap {
        /// First address.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// Empty, wraps around, or leaves its memory.
    #[error("{iova} + {len:#x} is no valid range")]
    Range {
        /// First address.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// Too many windows.
    #[error("{limit} windows are mapped, which is the limit")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The memory could not be granted to the device's side.
    #[error("the memory cannot be granted: {0}")]
    Grant(#[from] GrantError),
    /// The device's side refused or is gone.
    #[error(transparent)]
    Attachment(#[from] AttachmentError),
}

/// Why the device's side does not answer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum AttachmentError {
    /// The link to it ended.
    #[error("the device is gone: {0}")]
    Gone(CloseReason),
    /// It did not answer in time.
    #[error("the device did not answer within {deadline_ms} ms")]
    Deadline {
        /// The time allowed.
        deadline_ms: u64,
    },
    /// It refused.
    #[error("the device's side refused: {0}")]
    Refused(&'static str),
}

/// Where a function's device is.
pub trait Attachment: Send {
    /// What the device is.
    fn description(&self) -> &DeviceDescription;

    /// Reads a register: follows every earlier write; all ones where the device is gone or does not answer in time. Every store of the device
    /// before its answer was made, or the host was asked for it. `at` and `width` lie in a BAR, naturally aligned (the function checked them).
    fn bar_read(&mut self, at: BarAddress, width: Width, host: &mut dyn Host) -> u64;

    /// Posts a register write: returns before the device has it; never reordered. It may wait for others until [`Attachment::flush`], or the next
    /// read, poll or sleep.
    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, host: &mut dyn Host);

    /// Sends the writes that wait: one doorbell for a burst of them.
    fn flush(&mut self);

    /// Lets the device use a range. Effective for every register access after it.
    ///
    /// # Errors
    /// [`MapError`]; nothing was mapped.
    fn map(&mut self, window: Window, host: &mut dyn Host) -> Result<(), MapError>;

    /// Takes away every window inside the range. When it returns, no DMA touches the range any more, also where the device is gone.
    ///
    /// # Errors
    /// [`MapError::Overlap`] where a window is only partly inside: nothing was taken. [`MapError::Attachment`] where the device's side is gone
    /// or refuses, and may still touch the range. A range without windows is no error.
    fn unmap(&mut self, iova: Iova, len: u64, host: &mut dyn Host) -> Result<(), MapError>;

    /// The memory behind every window of `memory` is proven to be what the guest sees: it may be accessed directly from now on.
    fn prove(&mut self, memory: &Arc<Memory>, host: &mut dyn Host);

    /// The outcome of a mediation that was asked for.
    fn answer(&mut self, ticket: Ticket, answer: MediationAnswer<'_>, host: &mut dyn Host);

    /// How the function signals from now on.
    fn set_interrupt_mode(&mut self, mode: InterruptMode, host: &mut dyn Host);

    /// Whether the device may start DMA (command register bit 2).
    fn set_bus_master(&mut self, enabled: bool, host: &mut dyn Host);

    /// Fences DMA, then resets the device. Windows stay.
    ///
    /// # Errors
    /// [`AttachmentError`].
    fn reset(&mut self, kind: ResetKind, host: &mut dyn Host) -> Result<(), AttachmentError>;

    /// Takes what has happened: interrupts, mediations. Never blocks.
    fn poll(&mut self, now: Nanos, host: &mut dyn Host) -> Activity;

    /// Prepares to sleep: true where [`Attachment::wake_fd`] will become readable at the next event.
    fn arm(&mut self) -> bool;

    /// Readable when an armed attachment has events.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Why the device is gone, once it is.
    fn gone(&self) -> Option<CloseReason>;

    /// Of a device that is gone: whether its side may still touch guest memory. It did not let go of it in time, and is not known to be dead.
    fn in_doubt(&self) -> bool {
        false
    }

    /// Whether the last register read was answered with all ones because nobody else answered it in time.
    fn overdue(&self) -> bool {
        false
    }

    /// Gives the device up, as at this attachment's end: it is gone from now on.
    fn give_up(&mut self) {}

    /// Asks the device to come to rest under `token`: it begins nothing more, and what it began ends with all its effects. [`Attachment::rest`] says when.
    /// Mediations go on meanwhile, and must be answered.
    ///
    /// # Errors
    /// [`AttachmentError`]; the device goes on.
    fn pause(&mut self, _token: RestToken, _host: &mut dyn Host) -> Result<(), AttachmentError> {
        Err(AttachmentError::Refused(CANNOT_REST))
    }

    /// Whether the device came to rest since [`Attachment::pause`]: then every store and interrupt of before has reached the host. To be asked between
    /// polls; a register write, a reset or [`Attachment::resume`] ends the rest.
    ///
    /// # Errors
    /// [`AttachmentError`]: it will not come to rest.
    fn rest(&mut self) -> Result<Option<Rest>, AttachmentError> {
        Ok(None)
    }

    /// The device goes on.
    fn resume(&mut self, _host: &mut dyn Host) {}

    /// The function leaves, and the device is to be kept as it is, for who comes with the token of this rest within `lease`. When it returns, the device's
    /// side has let go of all guest memory, and this attachment is good for nothing else.
    ///
    /// # Errors
    /// [`AttachmentError`]: it is not at rest, or gone.
    fn keep(&mut self, _lease: Duration, _host: &mut dyn Host) -> Result<(), AttachmentError> {
        Err(AttachmentError::Refused(CANNOT_REST))
    }

    /// The rest that the device is in since another function left it; `None` where it was reset before this attachment was made.
    fn continues(&self) -> Option<RestToken> {
        None
    }

    /// The pages the device wrote in `memory`, complete up to this call; `None` where `memory` has no window and nothing is left to take of
    /// one that it had. Where the link was cut and the other side cannot mark by itself, marks of what was under way may be missing.
    fn dirty_log(&mut self, memory: &Arc<Memory>, host: &mut dyn Host) -> Option<&DirtyLog>;
}
