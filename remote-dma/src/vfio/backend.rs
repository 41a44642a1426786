//! The backend: a PCI device that vfio-pci has, lent as it is.
//!
//! `Vfio::open(&Host::default(), "0000:03:00.0".parse()?)` checks, opens and resets it. A doorbell of the guest is one store to the mapped BAR; the
//! device reads the command and writes the data in the guest's memory by itself, through the IOMMU; vector 3 comes as an eventfd and leaves as a message.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use thiserror::Error;
use vfio_bindings::bindings::vfio::{VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError, VfioOps};

use super::config::{COMMAND, CONFIG_BYTES, ConfigError, Regions, command, describe};
use super::counters::{VfioCounters, count};
use super::faults::FaultLog;
use super::host::{Candidate, Host, Obstacle, PciAddress};
use super::interrupts::{InterruptError, Interrupts, Raised};
use super::registers::Bar;
use super::sys::{self, Iommu};
use super::windows::Windows;
use crate::address::{BarAddress, Iova, Width};
use crate::attachment::Activity;
use crate::backend::{AttachError, Backend, Bus, DeviceWindow, DmaFault, DmaTag, InterruptMode, ResetKind, WindowError};
use crate::device::{BAR_COUNT, BarKind, DeviceDescription};

/// Polls between two looks for interrupts: a look is a system call.
const POLLS_PER_LOOK: u32 = 8;
/// Looks that one poll makes at most.
const LOOKS_AT_ONCE: u32 = 8;

/// Why a device cannot be lent.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Something must be done first; the first of these, and [`Obstacle::remedy`] of each.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Obstacles(Vec<Obstacle>),
    /// Somebody else has its group.
    #[error("{0} is in use by another process")]
    Busy(PciAddress),
    /// One borrower's state would go to the next.
    #[error("{address} cannot be reset: {source}")]
    NoReset {
        /// The device.
        address: PciAddress,
        /// What the kernel answered.
        source: io::Error,
    },
    /// VFIO refused.
    #[error("cannot open {address}: {source}")]
    Vfio {
        /// The device.
        address: PciAddress,
        /// Why.
        source: VfioError,
    },
    /// Its configuration space describes no device that can be lent.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its interrupts cannot be had.
    #[error(transparent)]
    Interrupts(#[from] InterruptError),
    /// The kernel refused something else.
    #[error("cannot {what}: {source}")]
    Host {
        /// What.
        what: &'static str,
        /// What it answered.
        source: io::Error,
    },
}

/// The device.
pub struct Vfio {
    /// Dropped before the device: a mapping keeps its file open, and with it the group.
    bars: [Option<Bar>; BAR_COUNT],
    address: PciAddress,
    description: DeviceDescription,
    device: VfioDevice,
    interrupts: Interrupts,
    faults: Option<FaultLog>,
    windows: Windows,
    /// The command register without bus mastering.
    decoding: u16,
    /// Nothing of a borrower's is left in it.
    clean: bool,
    pin: bool,
    polls: u32,
    counters: Arc<VfioCounters>,
}

impl Vfio {
    /// Opens and resets the device at `address`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(host: &Host, address: PciAddress) -> Result<Self, OpenError> {
        let Candidate { obstacles, .. } = host.look(address).map_err(|obstacle| OpenError::Obstacles(vec![obstacle]))?;
        if !obstacles.is_empty() {
            return Err(OpenError::Obstacles(obstacles));
        }
        let refused = |source| match source {
            VfioError::OpenGroup(error, _) if error.kind() == io::ErrorKind::ResourceBusy => OpenError::Busy(address),
            source => OpenError::Vfio { address, source },
        };
        let container = Arc::new(VfioContainer::new(None).map_err(refused)?);
        let operations: Arc<dyn VfioOps> = Arc::<VfioContainer>::clone(&container);
        let device = VfioDevice::new(&host.folder(address), operations, false).map_err(refused)?;
        let iommu = Iommu::new(container).map_err(|source| OpenError::Host { what: "ask what the IOMMU can map", source })?;
        sys::reset(&device).map_err(|source| OpenError::NoReset { address, source })?;

        let mut config = [0xff; CONFIG_BYTES];
        device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut config, 0);
        let mut bars = [0; BAR_COUNT];
        for (region, size) in (0..).zip(&mut bars) {
            *size = device.get_region_size(region);
        }
        let pin = device.get_irq_info(VFIO_PCI_INTX_IRQ_INDEX).is_some_and(|info| info.count > 0);
        let mut description = describe("", &config, &Regions { bars, pin })?;
        description.name = format!("vfio {address} ({:04x}:{:04x})", description.vendor_id, description.device_id);

        let interrupts = Interrupts::new(&device, &description)?;
        let faults = match FaultLog::open(address).and_then(|log| interrupts.watch_log(log.fd()).map(|()| log)) {
            Ok(log) => Some(log),
            Err(error) => {
                tracing::warn!(%error, "the kernel's log cannot be read, so DMA faults of {address} are not counted");
                None
            }
        };
        let decoding = description
            .bars
            .iter()
            .flatten()
            .fold(0, |bits, bar| bits | if bar.kind == BarKind::Io { command::IO } else { command::MEMORY });
        let counters = Arc::<VfioCounters>::default();
        let mut vfio = Self {
            address,
            description,
            device,
            bars: Default::default(),
            interrupts,
            faults,
            windows: Windows::new(iommu, address, Arc::clone(&counters)),
            decoding,
            clean: true,
            pin: false,
            polls: 0,
            counters,
        };
        vfio.set_command(false);
        for (region, bar) in (0..).zip(&mut vfio.bars) {
            if vfio.description.bar_size(region).is_some() {
                let mapped = Bar::new(&vfio.device, region.into());
                *bar = Some(mapped.map_err(|source| OpenError::Host { what: "map the device's registers", source })?);
            }
        }
        Ok(vfio)
    }

    /// What has happened since the device was opened.
    pub fn counters(&self) -> Arc<VfioCounters> {
        Arc::clone(&self.counters)
    }

    /// Writes the host-owned command register: the guest's own is the function's, and only its bus mastering reaches the device.
    fn set_command(&mut self, bus_master: bool) {
        let mut bytes = [0xff; 2];
        self.device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut bytes, COMMAND);
        let ours = command::IO | command::MEMORY | command::BUS_MASTER;
        let wanted = self.decoding | if bus_master { command::BUS_MASTER } else { 0 };
        let value = u16::from_le_bytes(bytes) & !ours | wanted;
        self.device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &value.to_le_bytes(), COMMAND);
        // Reading it back also brings in all DMA that the device posted before (PCIe 5.0, section 2.4.1).
        self.device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut bytes, COMMAND);
        if u16::from_le_bytes(bytes) & ours != wanted {
            tracing::error!("{} does not take {value:#06x} in its command register", self.address);
        }
    }

    fn reset_device(&mut self) {
        self.look_for_faults();
        match sys::reset(&self.device) {
            Ok(()) => {
                count(&self.counters.resets, 1);
                self.clean = true;
            }
            Err(error) => {
                count(&self.counters.failed_resets, 1);
                self.clean = false;
                tracing::error!(%error, "{} could not be reset", self.address);
            }
        }
        self.set_command(false);
        // Of before the reset.
        let counters = Arc::clone(&self.counters);
        while self.interrupts.take(|raised| count_error(&counters, raised)) {}
    }

    fn look_for_faults(&mut self) {
        let Some(log) = &mut self.faults else { return };
        let (faults, last) = log.look();
        if faults > 0 {
            count(&self.counters.dma_faults, faults);
            tracing::warn!(faults, "the IOMMU refused DMA of {}: {}", self.address, last.unwrap_or_default());
        }
    }

    /// Whether a register is the host's own, whatever the guest believes to be there.
    #[inline]
    fn is_protected(&self, at: BarAddress, width: Width) -> bool {
        let Some(msix) = &self.description.msix else { return false };
        let vectors = u64::from(msix.vectors);
        let meets = |bar, offset: u32, len: u64| {
            let start = u64::from(offset);
            at.bar == bar && at.offset < start + len && at.offset + width.bytes() > start
        };
        meets(msix.table_bar, msix.table_offset, 16 * vectors) || meets(msix.pba_bar, msix.pba_offset, vectors.div_ceil(64) * 8)
    }

    /// Every access is a sign that the guest has looked after the device: its INTx is lowered, and comes again where the device insists.
    #[inline]
    fn accessed(&mut self, bus: &mut dyn Bus) {
        if std::mem::take(&mut self.pin) {
            bus.set_pin(false);
            if let Err(error) = self.interrupts.unmask_pin(&self.device) {
                tracing::error!(%error, "INTx of {} cannot be unmasked", self.address);
            }
        }
    }
}

fn count_error(counters: &VfioCounters, raised: Raised) {
    if raised == Raised::Error {
        count(&counters.errors, 1);
    }
}

impl Backend for Vfio {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn attach(&mut self, _bus: &mut dyn Bus) -> Result<(), AttachError> {
        if self.windows.stuck() > 0 {
            return Err(AttachError::Device(format!("{} may still be in its last borrower's memory", self.address)));
        }
        if !self.clean {
            self.reset_device();
            if !self.clean {
                return Err(AttachError::Device(format!("{} could not be reset after its last borrower", self.address)));
            }
        }
        self.clean = false;
        self.pin = false;
        if let Some(faults) = &mut self.faults {
            faults.forget();
        }
        self.set_command(false);
        let enabled = self.interrupts.enable(&self.device, InterruptMode::Pin);
        enabled.map_err(|error| AttachError::Device(error.to_string()))
    }

    fn detach(&mut self) {
        self.set_command(false);
        if let Err(error) = self.interrupts.disable(&self.device) {
            tracing::error!(%error, "the interrupts of {} cannot be disabled", self.address);
        }
        self.windows.take(0, u64::MAX);
        self.look_for_faults();
        tracing::info!(counters = ?self.counters, "{} so far", self.address);
    }

    fn bar_read(&mut self, at: BarAddress, width: Width, bus: &mut dyn Bus) -> u64 {
        if self.is_protected(at, width) {
            count(&self.counters.protected, 1);
            return width.all_ones();
        }
        let Some(Some(bar)) = self.bars.get(usize::from(at.bar)) else { return width.all_ones() };
        let value = bar.load(&self.device, at.offset, width);
        self.accessed(bus);
        value
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, bus: &mut dyn Bus) {
        if self.is_protected(at, width) {
            return count(&self.counters.protected, 1);
        }
        let Some(Some(bar)) = self.bars.get(usize::from(at.bar)) else { return };
        bar.store(&self.device, at.offset, width, value);
        self.accessed(bus);
    }

    /// The device's DMA does not go through the bus.
    fn dma_done(&mut self, _tag: DmaTag, _result: Result<(), DmaFault>, _bus: &mut dyn Bus) {}

    fn poll(&mut self, bus: &mut dyn Bus) -> Activity {
        self.polls = self.polls.wrapping_add(1);
        if !self.polls.is_multiple_of(POLLS_PER_LOOK) {
            return Activity::Idle(None);
        }
        let (mut any, mut logged) = (false, false);
        let Self { interrupts, counters, pin, address, .. } = self;
        for _ in 0..LOOKS_AT_ONCE {
            let more = interrupts.take(|raised| {
                any = true;
                match raised {
                    Raised::Vector(vector) => {
                        count(&counters.interrupts, 1);
                        bus.interrupt(vector);
                    }
                    Raised::Pin => {
                        count(&counters.interrupts, 1);
                        *pin = true;
                        bus.set_pin(true);
                    }
                    Raised::Error => {
                        count(&counters.errors, 1);
                        tracing::error!("{address} reports an error that cannot be corrected");
                    }
                    Raised::Request => tracing::warn!("this host wants {address} back: end the lender to give it up"),
                    Raised::Log => logged = true,
                }
            });
            if !more {
                break;
            }
        }
        if logged {
            self.look_for_faults();
        }
        if any { Activity::Busy } else { Activity::Idle(None) }
    }

    /// What was raised keeps the descriptor readable.
    fn arm(&mut self) -> bool {
        true
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.interrupts.wake_fd())
    }

    fn set_interrupt_mode(&mut self, mode: InterruptMode, bus: &mut dyn Bus) {
        if std::mem::take(&mut self.pin) {
            bus.set_pin(false);
        }
        if let Err(error) = self.interrupts.enable(&self.device, mode) {
            tracing::error!(%error, "{} will not interrupt", self.address);
        }
    }

    fn fence(&mut self) {
        self.set_command(false);
    }

    /// Its own DMA has ended when [`Backend::fence`] returns; what could not be unmapped never does.
    fn in_flight(&self) -> usize {
        self.windows.stuck()
    }

    fn reset(&mut self, _kind: ResetKind, bus: &mut dyn Bus) {
        self.reset_device();
        if std::mem::take(&mut self.pin) {
            bus.set_pin(false);
        }
    }

    fn set_bus_master(&mut self, enabled: bool) {
        self.set_command(enabled);
    }

    fn takes_windows(&self) -> bool {
        true
    }

    fn map_window(&mut self, window: DeviceWindow) -> Result<(), WindowError> {
        let mapped = self.windows.map(window);
        count(&self.counters.refused_windows, mapped.is_err().into());
        mapped
    }

    fn unmap_windows(&mut self, iova: Iova, len: u64) {
        if let Some(more) = len.checked_sub(1) {
            self.windows.take(iova.0, iova.0.saturating_add(more));
        }
    }
}

impl Drop for Vfio {
    /// The kernel resets the device when its descriptor is closed, and unmaps what is mapped; until then it is quiet.
    fn drop(&mut self) {
        self.set_command(false);
        self.windows.take(0, u64::MAX);
    }
}
