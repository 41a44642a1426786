//! The NVMe controller's registers, as numbers and as fields, and the seam through which the driver reaches them.
//!
//! `Capabilities::parse(0x0000_0030_3c03_07ff)` says: queues of up to 2,048 entries that must be contiguous, ready within 30 s, doorbells
//! 4 bytes apart. Offsets and fields are those of NVMe 1.4, section 3.1.

use farbus_remote_dma::Width;

/// Where the driver finds the controller: BAR 0 of a function, however far away its device is.
pub trait Registers {
    /// Reads `width` bytes at `offset` of BAR 0; all ones where the device is gone.
    fn read(&mut self, offset: u64, width: Width) -> u64;

    /// Writes `width` bytes at `offset` of BAR 0; may return before the device has them.
    fn write(&mut self, offset: u64, width: Width, value: u64);

    /// Lets whatever carries the device make progress. Never blocks.
    fn poll(&mut self);

    /// Whether it is known, without asking the device, that it is gone: then nothing that it was asked for will come.
    fn is_gone(&self) -> bool {
        false
    }
}

impl<R: Registers + ?Sized> Registers for &mut R {
    fn read(&mut self, offset: u64, width: Width) -> u64 {
        (**self).read(offset, width)
    }

    fn write(&mut self, offset: u64, width: Width, value: u64) {
        (**self).write(offset, width, value);
    }

    fn poll(&mut self) {
        (**self).poll();
    }

    fn is_gone(&self) -> bool {
        (**self).is_gone()
    }
}

impl<R: Registers + ?Sized> Registers for Box<R> {
    fn read(&mut self, offset: u64, width: Width) -> u64 {
        (**self).read(offset, width)
    }

    fn write(&mut self, offset: u64, width: Width, value: u64) {
        (**self).write(offset, width, value);
    }

    fn poll(&mut self) {
        (**self).poll();
    }

    fn is_gone(&self) -> bool {
        (**self).is_gone()
    }
}

/// Controller capabilities, 8 bytes.
pub const CAP: u64 = 0x00;
/// Version, 4 bytes.
pub const VS: u64 = 0x08;
/// Controller configuration, 4 bytes.
pub const CC: u64 = 0x14;
/// Controller status, 4 bytes.
pub const CSTS: u64 = 0x1c;
/// Admin queue attributes, 4 bytes.
pub const AQA: u64 = 0x24;
/// Admin submission queue base address, 8 bytes.
pub const ASQ: u64 = 0x28;
/// Admin completion queue base address, 8 bytes.
pub const ACQ: u64 = 0x30;
/// The first doorbell.
pub const DOORBELLS: u64 = 0x1000;

/// CC.EN.
pub const CC_ENABLE: u32 = 1;
/// CC.SHN = normal shutdown.
pub const CC_SHUTDOWN_NORMAL: u32 = 0b01 << 14;
/// CC.IOSQES = 64 bytes and CC.IOCQES = 16 bytes.
pub const CC_ENTRY_SIZES: u32 = (6 << 16) | (4 << 20);

/// CSTS: a register that a device which is gone answers with.
pub const ALL_ONES: u32 = u32::MAX;

/// CSTS, field by field (NVMe 1.4, section 3.1.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u32);

impl Status {
    /// The device does not answer any more: all bits are ones.
    pub const fn gone(self) -> bool {
        self.0 == ALL_ONES
    }

    /// CSTS.RDY.
    pub const fn ready(self) -> bool {
        self.0 & 1 != 0
    }

    /// CSTS.CFS: the controller failed and needs a reset.
    pub const fn fatal(self) -> bool {
        self.0 & 2 != 0
    }

    /// CSTS.SHST = shutdown processing complete.
    pub const fn shutdown_complete(self) -> bool {
        (self.0 >> 2) & 0b11 == 0b10
    }
}

/// CAP, the fields that a driver needs (NVMe 1.4, section 3.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Entries of the longest queue: 2 to 65,536.
    pub max_queue_entries: u32,
    /// Milliseconds within which the controller becomes ready, or not ready.
    pub ready_timeout_ms: u64,
    /// Bytes from one doorbell to the next.
    pub doorbell_stride: u64,
    /// Whether the NVM command set is supported.
    pub nvm_command_set: bool,
    /// Bytes of the smallest memory page.
    pub min_page_bytes: u64,
}

impl Capabilities {
    /// The fields of CAP.
    pub const fn parse(cap: u64) -> Self {
        Self {
            max_queue_entries: (cap & 0xffff) as u32 + 1,
            ready_timeout_ms: ((cap >> 24) & 0xff) * 500,
            doorbell_stride: 4 << ((cap >> 32) & 0xf),
            nvm_command_set: (cap >> 37) & 1 != 0,
            min_page_bytes: 4096 << ((cap >> 48) & 0xf),
        }
    }

    /// Offset of the tail doorbell of submission queue `queue`.
    pub const fn submission_doorbell(&self, queue: u16) -> u64 {
        DOORBELLS + 2 * queue as u64 * self.doorbell_stride
    }

    /// Offset of the head doorbell of completion queue `queue`.
    pub const fn completion_doorbell(&self, queue: u16) -> u64 {
        DOORBELLS + (2 * queue as u64 + 1) * self.doorbell_stride
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_doorbells_of_a_strided_controller_are_where_the_specification_puts_them() {
        let packed = Capabilities::parse(0x0000_0020_3c03_07ff);
        assert_eq!(packed.max_queue_entries, 2048);
        assert_eq!(packed.ready_timeout_ms, 30_000);
        assert!(packed.nvm_command_set);
        assert_eq!(packed.min_page_bytes, 4096);
        assert_eq!(packed.submission_doorbell(3), 0x1018);
        assert_eq!(packed.completion_doorbell(3), 0x101c);
        let strided = Capabilities::parse(0x0001_0024_3c03_07ff);
        assert_eq!(strided.completion_doorbell(1), 0x1000 + 3 * 64);
        assert_eq!(strided.min_page_bytes, 8192);
    }

    #[test]
    fn a_device_that_is_gone_is_not_taken_for_one_that_failed() {
        assert!(Status(u32::MAX).gone());
        assert!(!Status(0b11).gone() && Status(0b11).fatal() && Status(0b11).ready());
        assert!(Status(0b1001).shutdown_complete() && !Status(0b0101).shutdown_complete());
    }
}
