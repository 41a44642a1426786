//! The seam: four calls that move bytes between two hosts, and the few that say which bytes may be moved.
//!
//! `post(Signal::No, Op::Write { from, to })`, `post(Signal::No, Op::Send { message: b"done" })`, `flush()`: when the peer's `poll` hands
//! it `done`, every byte of the write is in its memory. Everything that a fabric can do differently stands in [`Limits`], read once.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use thiserror::Error;

use crate::memory::{Mapped, Memory, MemoryError};
use crate::span::{Access, LocalRegion, LocalSpan, RemoteRegion, RemoteSpan};
use crate::time::Nanos;

/// Bytes of the longest message that every fabric carries.
pub const MAX_MESSAGE: usize = 56;

/// What a fabric can do: data, read once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the longest [`Op::Send`] message; at least [`MAX_MESSAGE`].
    pub max_message: u32,
    /// Bytes of the longest single [`Op::Write`] or [`Op::Read`].
    pub max_op_len: u32,
    /// Operations that may be posted and not yet completed.
    pub queue_depth: u32,
    /// Writes and reads are done when `post` returns: their buffers are free again at once and no completion needs to be awaited. Of one that
    /// is not signalled and failed `post` itself says so, so that nobody takes it for done.
    pub immediate: bool,
    /// The peer's memory can be mapped here ([`Regions::map_remote`]): loads, stores and system calls reach it without a copy of ours.
    pub peer_mappable: bool,
    /// An operation on memory that its owner has revoked ends the link (a queue pair answers so); elsewhere it fails alone.
    pub revocation_ends_link: bool,
}

/// The caller's name for an operation, handed back when it completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpId(pub u64);

/// Whether the caller wants to hear that an operation is done. One that fails is always heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Only a failure is reported, as [`Event::Failed`].
    No,
    /// [`Event::Done`] carries this id.
    Yes(OpId),
}

/// An operation. All are carried out in the order posted, as far as the peer can tell by messages and notifications:
/// whoever receives one sees every byte of every earlier write. Bytes of different writes may arrive in any order before that.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Local bytes into the peer's memory; both spans have one length.
    Write {
        /// What to send.
        from: LocalSpan,
        /// Where it goes.
        to: RemoteSpan,
    },
    /// As Write, then [`Event::Notify`] with `notify` at the peer.
    WriteNotify {
        /// What to send.
        from: LocalSpan,
        /// Where it goes.
        to: RemoteSpan,
        /// What the peer is told.
        notify: u32,
    },
    /// The peer's bytes into local memory; both spans have one length. Sees every earlier write of this side. What is posted after it may reach the peer
    /// before the bytes are read: whoever tells the peer that it may change them waits for [`Event::Done`] first.
    Read {
        /// What to fetch.
        from: RemoteSpan,
        /// Where it goes.
        into: LocalSpan,
    },
    /// A message of at most `max_message` bytes; longer ones are refused as [`OpError::TooLong`] by an event.
    Send {
        /// The bytes; copied before `post` returns.
        message: &'a [u8],
    },
}

/// Why an operation failed. The peer's memory and ours are as if it had not been tried, or, for a write, partly written.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum OpError {
    /// The region was revoked or released.
    #[error("the region is revoked")]
    Revoked,
    /// The two spans differ in length, or the length is over the fabric's limit.
    #[error("spans of {from} and {to} bytes do not fit")]
    Mismatch {
        /// Bytes of the source.
        from: u32,
        /// Bytes of the target.
        to: u32,
    },
    /// A span is used for what it was not made for: a span made for reading as the target of a write, say.
    #[error("the span was not made for this access")]
    Denied,
    /// The message is longer than the fabric carries.
    #[error("a message of {len} bytes is over the limit of {limit}")]
    TooLong {
        /// Bytes of the message.
        len: u32,
        /// The limit.
        limit: u32,
    },
    /// The link ended first.
    #[error("the link is closed")]
    Closed,
}

/// Why an operation is not under way. Without the reason of a failure, because what `post` may have to say costs the posts that succeed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PostError {
    /// The queue is full: poll, then try again. Nothing was queued.
    #[error("the send queue is full")]
    Full,
    /// It was carried out at once and failed: [`Event::Failed`] will say why.
    #[error("the operation failed at once")]
    Failed,
}

/// Why a link ended.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum CloseReason {
    /// The peer said goodbye.
    #[error("the peer closed the link")]
    PeerClosed,
    /// The peer is gone without a word.
    #[error("the peer is gone")]
    PeerGone,
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// The device that carries the link failed.
    #[error("the RDMA device failed: {0}")]
    Device(&'static str),
    /// The lent device itself is gone.
    #[error("the lent device is gone: {0}")]
    DeviceLost(&'static str),
    /// This side closed it.
    #[error("closed here")]
    Local,
}

/// A received message, by value: one cache line.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Message {
    len: u8,
    bytes: [u8; MAX_MESSAGE],
}

impl Message {
    /// A message of `bytes`; `None` where they are more than [`MAX_MESSAGE`].
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut message = Self { len: u8::try_from(bytes.len()).ok()?, bytes: [0; MAX_MESSAGE] };
        message.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(message)
    }

    /// A message of `len` bytes, written by `fill`; `None` where they are more than [`MAX_MESSAGE`].
    #[inline]
    pub(crate) fn filled(len: u8, fill: impl FnOnce(&mut [u8])) -> Option<Self> {
        let mut message = Self { len, bytes: [0; MAX_MESSAGE] };
        fill(message.bytes.get_mut(..usize::from(len))?);
        Some(message)
    }

    /// A message as it lay in a slot; bytes past `len` are zero.
    #[inline]
    pub(crate) fn of_slot(len: u8, bytes: [u8; MAX_MESSAGE]) -> Option<Self> {
        (usize::from(len) <= MAX_MESSAGE).then_some(Self { len, bytes })
    }

    /// The bytes received.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Message({:02x?})", self.bytes())
    }
}

/// What `poll` reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A signalled operation is done; a write's bytes are in the peer's memory, a read's in ours.
    Done(OpId),
    /// An operation failed; its id where it was signalled.
    Failed(Option<OpId>, OpError),
    /// The peer sent a message; every byte it wrote earlier is visible.
    Message(Message),
    /// The peer's [`Op::WriteNotify`]; its bytes and all earlier ones are visible.
    Notify(u32),
    /// The link ended. Reported once; nothing follows.
    Closed(CloseReason),
}

/// Room for the events of one poll, reused so that polling never allocates.
#[derive(Debug, Default)]
pub struct Events {
    items: Vec<Event>,
}

impl Events {
    /// Events that one poll reports at most.
    pub const CAPACITY: usize = 64;

    /// Empty, with all room reserved.
    pub fn new() -> Self {
        Self { items: Vec::with_capacity(Self::CAPACITY) }
    }

    /// Forgets all events.
    #[inline]
    pub fn clear(&mut self) {
        self.items.clear();
    }

    /// Whether another event fits.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.items.len() < Self::CAPACITY
    }

    /// How many more events fit.
    #[inline]
    pub fn room(&self) -> usize {
        Self::CAPACITY.saturating_sub(self.items.len())
    }

    /// Adds an event; false (and nothing added) where there is no room.
    #[inline]
    pub fn push(&mut self, event: Event) -> bool {
        let fits = self.has_room();
        if fits {
            self.items.push(event);
        }
        fits
    }

    /// The events, in order.
    #[inline]
    pub fn as_slice(&self) -> &[Event] {
        &self.items
    }
}

/// Why local memory could not be registered.
#[derive(Debug, Error)]
pub enum RegisterError {
    /// The fabric's table is full.
    #[error("{limit} regions are registered, which is the limit")]
    TooMany {
        /// Regions that may be registered at once.
        limit: u32,
    },
    /// The memory cannot be used by this fabric.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Why memory may still be in use by the peer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RevokeError {
    /// The peer is there and did not let go of it in time: it may touch the memory until it is gone.
    #[error("the peer did not let go of memory that was taken back within {limit_ms} ms")]
    InUse {
        /// The time allowed.
        limit_ms: u64,
    },
    /// The host cannot order our revocation before the peer's accesses.
    #[error("the host does not let memory be taken back")]
    Host,
}

/// Why a grant could not be made or taken.
#[derive(Debug, Error)]
pub enum GrantError {
    /// The region is not registered (any more).
    #[error("the region is not registered")]
    NotRegistered,
    /// More was asked for than the region allows.
    #[error("access {asked:?} is more than the region's {allowed:?}")]
    Widened {
        /// What was asked.
        asked: Access,
        /// What the region allows.
        allowed: Access,
    },
    /// A grant longer than the region it is for.
    #[error("a grant of {granted:#x} bytes for a region of {actual:#x} bytes")]
    TooLong {
        /// What the grant says.
        granted: u64,
        /// What there is.
        actual: u64,
    },
    /// This fabric can only grant memory that has a descriptor.
    #[error("the memory has no descriptor behind it")]
    NoDescriptor,
    /// The memory could shrink under us.
    #[error("the peer's memory is not sealed against shrinking")]
    NotSealed,
    /// The peer did not deliver what the grant names.
    #[error("the peer did not deliver the memory of grant {key:#x}")]
    Missing {
        /// The grant's key.
        key: u64,
    },
    /// No more grants fit.
    #[error("{limit} grants are held, which is the limit")]
    TooMany {
        /// Grants held at once.
        limit: u32,
    },
    /// Mapping it failed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The link is closed.
    #[error("the link is closed")]
    Closed,
}

/// Memory that cannot be registered cannot be granted, for the same reason.
impl From<RegisterError> for GrantError {
    fn from(error: RegisterError) -> Self {
        match error {
            RegisterError::TooMany { limit } => Self::TooMany { limit },
            RegisterError::Memory(error) => Self::Memory(error),
        }
    }
}

/// What the peer needs to reach a region: sent as data, worth nothing on another link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The remote key.
    pub key: u64,
    /// Length in bytes.
    pub len: u64,
    /// What the peer may do.
    pub access: Access,
}

/// The memory side of a fabric: which bytes of ours the peer may touch and which of its bytes we may.
pub trait Regions {
    /// Makes local memory usable in operations.
    ///
    /// # Errors
    /// [`RegisterError`].
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError>;

    /// As [`Regions::register`], for memory that is only granted to the peer and never used in operations of this side: it costs one
    /// registration where each grant is one by itself.
    ///
    /// # Errors
    /// [`RegisterError`].
    fn register_for_peer(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.register(memory, access)
    }

    /// Ends the use of local memory; grants of it are revoked first. When it returns, the peer is outside of the memory: of every operation,
    /// polled store and mapping ([`Regions::map_remote`]), and begins no other. May block for a bounded time; not for the data path.
    ///
    /// # Errors
    /// [`RevokeError`]: the region is gone all the same, and its memory must be kept until the peer is gone. The link is closed.
    fn deregister(&mut self, region: LocalRegion) -> Result<(), RevokeError>;

    /// The memory behind a region of ours; `None` once it is deregistered.
    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>>;

    /// A span of ours as mapped memory; `None` once its region is deregistered.
    fn map_local(&self, span: LocalSpan) -> Option<Mapped>;

    /// Lets the peer reach `region` with at most `access`.
    ///
    /// # Errors
    /// [`GrantError`].
    fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError>;

    /// Takes a grant that the peer sent. May block for a bounded time; not for the data path.
    ///
    /// # Errors
    /// [`GrantError`]; the link is still usable.
    fn import(&mut self, grant: &Grant) -> Result<RemoteRegion, GrantError>;

    /// Gives a grant of the peer's back; operations on it fail with [`OpError::Revoked`] from now on.
    fn release(&mut self, region: RemoteRegion);

    /// The peer's bytes as mapped memory, where [`Limits::peer_mappable`]; `None` elsewhere and for released or revoked regions. It counts as
    /// one access that lasts until it is dropped, on whatever thread: its owner's [`Regions::deregister`] waits for that, so it is for accesses
    /// in flight, not for keeping.
    fn map_remote(&self, span: RemoteSpan) -> Option<Mapped>;
}

/// One end of a link's data path. One thread at a time owns it; nothing here locks, and only [`Regions`] and `arm` may allocate or enter the kernel.
pub trait Fabric: Regions + Send {
    /// What this fabric can do.
    fn limits(&self) -> &Limits;

    /// Queues an operation; the peer may see it before `flush`, and sees it soon after.
    ///
    /// # Errors
    /// [`PostError::Full`] where the queue has no room. [`PostError::Failed`] only for an unsignalled [`Op::Write`] or [`Op::Read`] of a
    /// fabric that is [`Limits::immediate`], and then always where it failed.
    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), PostError>;

    /// Stores bytes that the peer may be polling, by a CPU, after every earlier write of this side, the last 32-bit word last. Only where
    /// [`Limits::peer_mappable`]. `bytes` are at least 4 and a multiple of 4, and so is where they go.
    ///
    /// # Errors
    /// [`OpError`]: nothing was stored. [`OpError::Denied`] also where the peer's memory is not mapped or the bytes are not aligned.
    fn store_polled(&mut self, to: RemoteSpan, bytes: &[u8]) -> Result<(), OpError>;

    /// Puts what is queued on the wire: one doorbell for the batch.
    fn flush(&mut self);

    /// Adds what has happened to `out`, in order, as far as there is room. Never blocks.
    fn poll(&mut self, now: Nanos, out: &mut Events);

    /// Prepares to sleep: true where [`Fabric::wake_fd`] will become readable at the next event; false where something is there already
    /// (poll again). Polling disarms.
    fn arm(&mut self) -> bool;

    /// Readable when an armed fabric has events (level-triggered until polled); also when the peer is gone. `None` for simulated fabrics.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Says goodbye; the peer hears [`CloseReason::PeerClosed`].
    fn close(&mut self);
}
