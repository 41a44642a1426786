//! The lender's seam to a device: what a session asks of it ([`Backend`]) and what it may ask of the session ([`Bus`]).
//!
//! The session says `bar_write(BAR0 + 0x1018, B4, 17)`; the NVMe model asks `bus.dma_read` for slot 16, later `bus.dma_write` for
//! 4 KiB of data, `bus.dma_write_polled` for the completion entry, and `bus.interrupt(3)`: in that order the guest sees them.
//!
//! ```text
//!   session thread:  bar_write ─► backend ─► dma_read(tag 7) ─► Pending … dma_done(tag 7) ─► dma_write, dma_write_polled, interrupt
//! ```

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use farbus_transport::{Access, LocalRegion, LocalSpan, Memory, Nanos, RegisterError};
use thiserror::Error;

use crate::address::{BarAddress, Iova, Width};
use crate::attachment::Activity;
use crate::device::DeviceDescription;
use crate::dma_buffer::DmaBuffer;
use crate::holder::HolderNote;
use crate::journal::Journal;
use crate::shared_window::SharedWindow;

/// Bytes of the longest [`Bus::dma_write_polled`].
pub const MAX_POLLED_WRITE: usize = 32;

/// The device's name for a DMA in flight, handed back in [`Backend::dma_done`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DmaTag(pub u64);

/// How far a DMA got before the call returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It is done; the local bytes are valid (read) or free again (write). [`Backend::dma_done`] is not called.
    Done,
    /// [`Backend::dma_done`] will be called once with the tag. Until then the local bytes belong to the DMA.
    Pending,
}

/// Why a DMA was refused: the device would see an unsupported request or a completer abort.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DmaFault {
    /// Nothing is mapped there, or not all of it.
    #[error("{iova} + {len:#x} is not mapped")]
    Unmapped {
        /// First address.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// The map does not allow the access.
    #[error("{iova} + {len:#x} does not allow the access")]
    Denied {
        /// First address.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// Bus mastering is off (command register bit 2, PCI 3.0 section 6.2.2).
    #[error("bus mastering is off")]
    NotBusMaster,
    /// The device was reset or its borrower left while the DMA was in flight.
    #[error("the dma was fenced")]
    Fenced,
    /// The device's own buffer does not fit the transfer.
    #[error("a local buffer of {local} bytes for a transfer of {len} bytes")]
    LocalBuffer {
        /// Bytes of the buffer.
        local: u64,
        /// Bytes of the transfer.
        len: u64,
    },
}

/// How the function signals, so that the device need not raise what nobody hears.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InterruptMode {
    /// INTx: [`Bus::set_pin`] carries the level.
    #[default]
    Pin,
    /// MSI with this many vectors enabled (a power of two).
    Msi(u8),
    /// MSI-X; masking is done by the function.
    Msix,
}

/// The session's name for a register read whose answer comes later, handed back by [`Backend::next_read`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReadTicket(pub u32);

/// How thorough a reset is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetKind {
    /// Function level reset (PCIe 5.0, section 6.6.2).
    Function,
    /// The borrower left or the machine was reset: as after power-on, as far as the device can.
    Conventional,
}

/// Why a backend cannot be attached to a session.
#[derive(Debug, Error)]
pub enum AttachError {
    /// Its memory cannot be registered with the fabric.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The device itself failed.
    #[error("the device cannot be attached: {0}")]
    Device(String),
}

/// A window of guest memory for a device that reaches memory by itself.
#[derive(Debug)]
pub struct DeviceWindow {
    /// First address.
    pub iova: Iova,
    /// What the device may do.
    pub access: Access,
    /// The memory, piece after piece, each at most 1 GiB. The device is out of a piece before it is dropped.
    pub pieces: Vec<DmaBuffer>,
}

/// Why a device cannot have a window.
#[derive(Debug, Error)]
pub enum WindowError {
    /// The IOMMU does not map these addresses, or the device cannot use them.
    #[error("{iova} + {len:#x} is outside of the addresses that the device's IOMMU maps")]
    Range {
        /// First address.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// The IOMMU maps whole pages.
    #[error("{iova} + {len:#x}, or its memory, is no multiple of the IOMMU's pages of {page} bytes")]
    Unaligned {
        /// First address.
        iova: Iova,
        /// Bytes.
        len: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// The kernel refused.
    #[error("cannot map {iova} + {len:#x} for the device: {source} (may this process lock that much memory? see `ulimit -l`)")]
    Host {
        /// First address.
        iova: Iova,
        /// Bytes.
        len: u64,
        /// What it answered.
        source: std::io::Error,
    },
}

/// What a device may do to the guest and to its session. All effects of one device reach the guest in call order, except that the bytes of
/// several `dma_write`s may arrive in any order until the next polled write, interrupt, or answered BAR read.
pub trait Bus {
    /// The session's clock.
    fn now(&self) -> Nanos;

    /// Makes the device's own memory usable in DMA. For [`Backend::attach`], not for the data path.
    ///
    /// # Errors
    /// [`RegisterError`].
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError>;

    /// Guest memory at `iova` into `into` (as many bytes as `into` has).
    ///
    /// # Errors
    /// [`DmaFault`]: nothing was read.
    fn dma_read(&mut self, tag: DmaTag, iova: Iova, into: LocalSpan) -> Result<Progress, DmaFault>;

    /// `from` into guest memory at `iova`.
    ///
    /// # Errors
    /// [`DmaFault`]: nothing was written.
    fn dma_write(&mut self, tag: DmaTag, iova: Iova, from: LocalSpan) -> Result<Progress, DmaFault>;

    /// A few bytes that a guest may be polling: at most [`MAX_POLLED_WRITE`], a multiple of 4, 4-byte aligned, inside one 4 KiB page. They
    /// are stored by a CPU after every earlier write, the last 32-bit word last.
    ///
    /// # Errors
    /// [`DmaFault`]: nothing was written.
    fn dma_write_polled(&mut self, tag: DmaTag, iova: Iova, bytes: &[u8]) -> Result<Progress, DmaFault>;

    /// The guest memory itself, where this session can map it, for system calls that fill or read it directly; `None` means: use a
    /// buffer and `dma_write`. The access lasts until the result is dropped, which is when what may have been written goes into the dirty
    /// log: drop it before anything announces the bytes.
    ///
    /// # Errors
    /// [`DmaFault`].
    fn map(&mut self, iova: Iova, len: u64, access: Access) -> Result<Option<DmaBuffer>, DmaFault>;

    /// Raises an MSI or MSI-X vector, after everything written before.
    fn interrupt(&mut self, vector: u16);

    /// Sets the INTx level, after everything written before.
    fn set_pin(&mut self, asserted: bool);
}

/// A device at the lender. Every call comes from one thread; none may block for longer than a register access takes.
pub trait Backend: Send {
    /// What the device is. Does not change while it is lent.
    fn description(&self) -> &DeviceDescription;

    /// A session begins: register memory, start workers. Called again after [`Backend::detach`].
    ///
    /// # Errors
    /// [`AttachError`]; the device can be offered again.
    fn attach(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError>;

    /// The session ends: no call on its bus will come; regions registered with it are gone.
    fn detach(&mut self);

    /// A register read. `at` and `width` lie inside a BAR and are naturally aligned. Earlier DMA writes of the device reach the guest first.
    fn bar_read(&mut self, at: BarAddress, width: Width, bus: &mut dyn Bus) -> u64;

    /// A register write. `at` and `width` lie inside a BAR and are naturally aligned.
    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, bus: &mut dyn Bus);

    /// A DMA that was [`Progress::Pending`] ended.
    fn dma_done(&mut self, tag: DmaTag, result: Result<(), DmaFault>, bus: &mut dyn Bus);

    /// Background work: media completions, timers. [`Activity::Idle`] may carry when to come back at the latest.
    fn poll(&mut self, bus: &mut dyn Bus) -> Activity;

    /// Prepares to sleep: true where [`Backend::wake_fd`] will become readable at the next background event, false where one is there already.
    fn arm(&mut self) -> bool;

    /// Readable when an armed device has background work; `None` where it never has any of its own.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// How the function signals from now on.
    fn set_interrupt_mode(&mut self, mode: InterruptMode, bus: &mut dyn Bus);

    /// Stops starting DMA; [`Backend::in_flight`] then only falls.
    fn fence(&mut self);

    /// DMAs and direct accesses to guest memory that have not ended.
    fn in_flight(&self) -> usize;

    /// After [`Backend::fence`] and with nothing in flight: back to the initial state. The fence is lifted.
    fn reset(&mut self, kind: ResetKind, bus: &mut dyn Bus);

    /// As [`Backend::bar_read`], for a device whose registers are a round trip away: `None` where the value comes from [`Backend::next_read`], so
    /// that what the device asks of its bus until then is carried out meanwhile. It may depend on that.
    fn bar_read_later(&mut self, _ticket: ReadTicket, at: BarAddress, width: Width, bus: &mut dyn Bus) -> Option<u64> {
        Some(self.bar_read(at, width, bus))
    }

    /// The value of a read that [`Backend::bar_read_later`] put off. Everything that the device did before it answered was handed to the bus before.
    fn next_read(&mut self) -> Option<(ReadTicket, u64)> {
        None
    }

    /// The device may use `len` bytes from `iova` from now on. For a device that must be told; others ask the bus. With `shared` it may map the memory
    /// itself until it is told that the window is gone; then the bus does not see what it does there, bus mastering included.
    fn window_mapped(&mut self, _iova: Iova, _len: u64, _access: Access, _shared: Option<SharedWindow>, _bus: &mut dyn Bus) {}

    /// It may not any more: what is inside the range, which splits no window. The unmap is answered when [`Backend::is_unmapping`] is false.
    fn window_unmapped(&mut self, _iova: Iova, _len: u64, _bus: &mut dyn Bus) {}

    /// Whether the device has not yet let go of what was unmapped.
    fn is_unmapping(&self) -> bool {
        false
    }

    /// Why the device is gone, once it is: its session ends, reads give all ones, and nobody gets it before [`Backend::revive`] succeeded.
    fn gone(&self) -> Option<&'static str> {
        None
    }

    /// Brings a device back that is gone, reset and the same as before. Blocks for a bounded time. Not while a session has it.
    ///
    /// # Errors
    /// [`AttachError`]: it is still gone.
    fn revive(&mut self) -> Result<(), AttachError> {
        Ok(())
    }

    /// Whether the device may begin DMA. Who asks the bus for its DMA need not know: the bus refuses it.
    fn set_bus_master(&mut self, _enabled: bool) {}

    /// Whether the device reaches guest memory by itself, without asking the bus, so that it must be given each window. Only a
    /// [`crate::lender::LenderSession`] over a link whose memory can be mapped does that; nobody else attaches such a device.
    fn takes_windows(&self) -> bool {
        false
    }

    /// The device may reach a window, which meets none that it has.
    ///
    /// # Errors
    /// [`WindowError`]: it reaches nothing of it.
    fn map_window(&mut self, window: DeviceWindow) -> Result<(), WindowError> {
        Err(WindowError::Range { iova: window.iova, len: window.pieces.iter().map(DmaBuffer::len).sum() })
    }

    /// The device is out of all windows inside the range when this returns; one that it cannot be brought out of counts as
    /// [`Backend::in_flight`] from then on.
    fn unmap_windows(&mut self, _iova: Iova, _len: u64) {}

    /// Begins nothing more and, other than by [`Backend::fence`], loses nothing: what was begun ends with all its effects, and what was not waits. Until
    /// [`Backend::resume`] or a reset. False where the device cannot, and nothing changed.
    fn pause(&mut self) -> bool {
        false
    }

    /// After [`Backend::pause`]: whether all that was begun has ended and was told. Then nothing of the device changes until it is told to go on.
    fn is_at_rest(&self) -> bool {
        false
    }

    /// Goes on.
    fn resume(&mut self, _bus: &mut dyn Bus) {}

    /// The session ends and the device, which is at rest, keeps its state: no call on its bus will come, and regions registered with it are gone.
    fn park(&mut self) {
        self.detach();
    }

    /// Another session begins where the last one parked the device: as [`Backend::attach`], but nothing is reset, and it stays at rest.
    ///
    /// # Errors
    /// [`AttachError`]; the device is parked as before.
    fn unpark(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError> {
        self.attach(bus)
    }

    /// What [`Backend::note_holder`] noted last, also in an earlier process; `None` where nothing, or where the device cannot remember.
    fn holder(&self) -> Option<HolderNote> {
        None
    }

    /// Notes with the device itself, where that can be, who has it: beside an image, say, so that whoever lends it later knows.
    fn note_holder(&mut self, _note: HolderNote) {}

    /// Which writes it began and acknowledged, where it counts them.
    fn journal(&self) -> Option<&Journal> {
        None
    }
}
