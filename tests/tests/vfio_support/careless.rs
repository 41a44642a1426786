//! A backend that leaves out what keeps a device out of memory that is not its borrower's any more.
//!
//! `Careless { vfio, leave_out: LeaveOut::Unmap }` acknowledges an unmap and leaves the IOMMU as it is: the device's DMA lands after it, which the
//! test of that rule must see, or it could not fail.

use std::os::fd::BorrowedFd;

use farbus_remote_dma::vfio::Vfio;
use farbus_remote_dma::{
    Activity, AttachError, Backend, BarAddress, Bus, DeviceDescription, DeviceWindow, DmaFault, DmaTag, InterruptMode, Iova,
    ResetKind, Width, WindowError,
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LeaveOut {
    /// Windows stay mapped until the session ends.
    Unmap,
    /// Bus mastering stays on, and the device is not reset.
    Quiet,
}

pub struct Careless {
    pub vfio: Vfio,
    pub leave_out: LeaveOut,
}

impl Backend for Careless {
    fn description(&self) -> &DeviceDescription {
        self.vfio.description()
    }

    fn attach(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError> {
        self.vfio.attach(bus)
    }

    fn detach(&mut self) {
        self.vfio.detach();
    }

    fn bar_read(&mut self, at: BarAddress, width: Width, bus: &mut dyn Bus) -> u64 {
        self.vfio.bar_read(at, width, bus)
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, bus: &mut dyn Bus) {
        self.vfio.bar_write(at, width, value, bus);
    }

    fn dma_done(&mut self, tag: DmaTag, result: Result<(), DmaFault>, bus: &mut dyn Bus) {
        self.vfio.dma_done(tag, result, bus);
    }

    fn poll(&mut self, bus: &mut dyn Bus) -> Activity {
        self.vfio.poll(bus)
    }

    fn arm(&mut self) -> bool {
        self.vfio.arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.vfio.wake_fd()
    }

    fn set_interrupt_mode(&mut self, mode: InterruptMode, bus: &mut dyn Bus) {
        self.vfio.set_interrupt_mode(mode, bus);
    }

    fn fence(&mut self) {
        if self.leave_out != LeaveOut::Quiet {
            self.vfio.fence();
        }
    }

    fn in_flight(&self) -> usize {
        self.vfio.in_flight()
    }

    fn reset(&mut self, kind: ResetKind, bus: &mut dyn Bus) {
        if self.leave_out != LeaveOut::Quiet {
            self.vfio.reset(kind, bus);
        }
    }

    fn set_bus_master(&mut self, enabled: bool) {
        if enabled || self.leave_out != LeaveOut::Quiet {
            self.vfio.set_bus_master(enabled);
        }
    }

    fn takes_windows(&self) -> bool {
        self.vfio.takes_windows()
    }

    fn map_window(&mut self, window: DeviceWindow) -> Result<(), WindowError> {
        self.vfio.map_window(window)
    }

    fn unmap_windows(&mut self, iova: Iova, len: u64) {
        if self.leave_out != LeaveOut::Unmap {
            self.vfio.unmap_windows(iova, len);
        }
    }
}
