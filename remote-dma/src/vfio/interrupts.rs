//! A device's interrupts as eventfds behind one epoll descriptor: what was raised comes out of `next`, without a read for each.
//!
//! With MSI-X of 65 vectors there are 65 eventfds, and vector 3 comes out as `Raised::Vector(3)`. They are watched edge by edge, so an
//! eventfd need not be emptied: each signal of the kernel is an edge, and its counter has room for 2^64 of them.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use thiserror::Error;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};
use vfio_ioctls::{VfioDevice, VfioError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::backend::InterruptMode;
use crate::device::DeviceDescription;

/// Taken from the kernel at once.
const BATCH: usize = 32;
const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// What an event stands for; below [`PIN`] it is a vector.
const PIN: u64 = 1 << 16;
const ERROR: u64 = PIN + 1;
const REQUEST: u64 = PIN + 2;
const LOG: u64 = PIN + 3;

/// Why interrupts cannot be had.
#[derive(Debug, Error)]
pub enum InterruptError {
    /// No eventfd, or no way to watch it.
    #[error("cannot make {vectors} eventfds for the device's interrupts: {source}")]
    Descriptors {
        /// How many.
        vectors: usize,
        /// What the kernel answered.
        source: io::Error,
    },
    /// VFIO refused.
    #[error("the kernel does not deliver the device's interrupts ({mode:?}): {source}")]
    Refused {
        /// Which kind.
        mode: InterruptMode,
        /// Why.
        source: VfioError,
    },
}

/// Something that happened at the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Raised {
    /// An MSI or MSI-X vector.
    Vector(u16),
    /// INTx; it is masked now.
    Pin,
    /// The device, or its link, reported an error that cannot be corrected.
    Error,
    /// The host wants the device back.
    Request,
    /// The kernel's log has grown.
    Log,
}

/// The eventfds of one device.
pub(super) struct Interrupts {
    epoll: OwnedFd,
    vectors: Vec<EventFd>,
    pin: Option<EventFd>,
    /// Held so that they stay in the epoll set.
    _others: Vec<EventFd>,
    /// What the kernel delivers now.
    active: Option<u32>,
}

impl Interrupts {
    /// Eventfds for all that the device can raise; nothing is enabled but the news of errors.
    pub(super) fn new(device: &VfioDevice, description: &DeviceDescription) -> Result<Self, InterruptError> {
        let vectors = usize::from(description.msix.map_or(0, |msix| msix.vectors).max(description.msi_vectors.into()));
        let failed = |source: io::Error| InterruptError::Descriptors { vectors, source };
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let watched = |what: u64| {
            let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?;
            watch_event(&epoll, &event, what).map_err(failed)?;
            Ok(event)
        };
        let pin = description.pin.then(|| watched(PIN)).transpose()?;
        let vectors = (0..vectors as u64).map(watched).collect::<Result<_, InterruptError>>()?;
        let mut others = Vec::new();
        for (index, what) in [(VFIO_PCI_ERR_IRQ_INDEX, ERROR), (VFIO_PCI_REQ_IRQ_INDEX, REQUEST)] {
            if device.get_irq_info(index).is_none_or(|info| info.count == 0) {
                continue;
            }
            let event = watched(what)?;
            match device.enable_irq(index, vec![&event]) {
                Ok(()) => others.push(event),
                // Conventional devices report no errors this way.
                Err(error) => tracing::debug!(%error, index, "the kernel does not tell of this kind of event"),
            }
        }
        Ok(Self { epoll, vectors, pin, _others: others, active: None })
    }

    /// Tells of growth of the kernel's log too.
    pub(super) fn watch_log(&self, log: impl AsFd) -> io::Result<()> {
        watch(&self.epoll, log, LOG)
    }

    /// From now on the device signals like this.
    pub(super) fn enable(&mut self, device: &VfioDevice, mode: InterruptMode) -> Result<(), InterruptError> {
        let refused = |source| InterruptError::Refused { mode, source };
        self.disable(device).map_err(refused)?;
        let wanted = match mode {
            InterruptMode::Pin if self.pin.is_none() => None,
            InterruptMode::Pin => Some((VFIO_PCI_INTX_IRQ_INDEX, self.pin.iter().collect::<Vec<_>>())),
            InterruptMode::Msi(vectors) => Some((VFIO_PCI_MSI_IRQ_INDEX, self.vectors.iter().take(vectors.into()).collect())),
            InterruptMode::Msix => Some((VFIO_PCI_MSIX_IRQ_INDEX, self.vectors.iter().collect())),
        };
        if let Some((index, events)) = wanted {
            device.enable_irq(index, events).map_err(refused)?;
            self.active = Some(index);
        }
        Ok(())
    }

    /// The device signals nothing any more.
    pub(super) fn disable(&mut self, device: &VfioDevice) -> Result<(), VfioError> {
        if let Some(index) = self.active {
            device.disable_irq(index)?;
            self.active = None;
        }
        Ok(())
    }

    /// INTx may come again: it does at once where the device still asserts it.
    pub(super) fn unmask_pin(&self, device: &VfioDevice) -> Result<(), VfioError> {
        if self.active == Some(VFIO_PCI_INTX_IRQ_INDEX) { device.unmask_irq(VFIO_PCI_INTX_IRQ_INDEX) } else { Ok(()) }
    }

    /// Hands out what was raised; whether there may be more.
    pub(super) fn take(&mut self, mut each: impl FnMut(Raised)) -> bool {
        let mut batch = [MaybeUninit::<Event>::uninit(); BATCH];
        let (events, _) = match epoll::wait(&self.epoll, &mut batch[..], Some(&AT_ONCE)) {
            Ok(found) => found,
            Err(rustix::io::Errno::INTR) => return true,
            Err(error) => {
                tracing::error!(%error, "the device's interrupts cannot be waited for");
                return false;
            }
        };
        let full = events.len() == BATCH;
        for event in events {
            each(match event.data.u64() {
                PIN => Raised::Pin,
                ERROR => Raised::Error,
                REQUEST => Raised::Request,
                LOG => Raised::Log,
                vector => Raised::Vector(vector as u16),
            });
        }
        full
    }

    /// Readable while something was raised that was not taken.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn watch(epoll: &OwnedFd, source: impl AsFd, what: u64) -> io::Result<()> {
    epoll::add(epoll, source, EventData::new_u64(what), EventFlags::IN | EventFlags::ET).map_err(Into::into)
}

fn watch_event(epoll: &OwnedFd, event: &EventFd, what: u64) -> io::Result<()> {
    // SAFETY: `event` is borrowed for longer than this borrow of its descriptor.
    watch(epoll, unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }, what)
}
