//! Numbers and fixed layouts of the vfio-user protocol (QEMU, docs/interop/vfio-user.rst) and of `<linux/vfio.h>` where it borrows them.
//!
//! A header of message 7, command 9, 32 bytes asks for a region read; the reply carries the same 7 and 9, type 1 and, after the 16-byte
//! [`RegionAccess`], the register's bytes. All integers are in the host's byte order.

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = size_of::<Header>();
/// The most data that one message moves ("max_data_xfer_size"), in bytes; also the protocol's default.
pub const MAX_DATA_BYTES: u32 = 1 << 20;
/// The longest message that is accepted, in bytes: a write of [`MAX_DATA_BYTES`].
pub const MAX_MESSAGE_BYTES: usize = HEADER_BYTES + size_of::<RegionAccess>() + MAX_DATA_BYTES as usize;
/// The most descriptors that one message may carry ("max_msg_fds").
pub const MAX_MESSAGE_FDS: usize = 16;
/// The smallest page of a DMA map, in bytes, and the only one that is announced ("pgsizes").
pub const PAGE_BYTES: u64 = 4096;
/// The most DMA maps at a time ("max_dma_maps"); also the protocol's default.
pub const MAX_DMA_MAPS: usize = 65_535;
/// The protocol's major version.
pub const MAJOR: u16 = 0;
/// The newest minor version spoken.
pub const MINOR: u16 = 1;

/// What a message asks for (section "Commands").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum Command {
    /// Protocol version and capabilities; the first message.
    Version = 1,
    /// Memory becomes usable for DMA.
    DmaMap = 2,
    /// Memory is taken away.
    DmaUnmap = 3,
    /// What the device is.
    DeviceInfo = 4,
    /// What a region is.
    RegionInfo = 5,
    /// Descriptors that carry writes to parts of a region.
    RegionIoFds = 6,
    /// What an interrupt index is.
    IrqInfo = 7,
    /// Who is told of interrupts.
    SetIrqs = 8,
    /// A read of a region.
    RegionRead = 9,
    /// A write to a region.
    RegionWrite = 10,
    /// Server to client: a read of the client's memory.
    DmaRead = 11,
    /// Server to client: a write to the client's memory.
    DmaWrite = 12,
    /// A reset of the device.
    DeviceReset = 13,
    /// Several short writes to regions.
    RegionWriteMulti = 15,
    /// Get, set or probe a feature.
    DeviceFeature = 16,
    /// Read migration data.
    MigrationRead = 17,
    /// Write migration data.
    MigrationWrite = 18,
}

impl Command {
    /// From its number; `None` for one that the specification does not have (14 was withdrawn).
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Version,
            2 => Self::DmaMap,
            3 => Self::DmaUnmap,
            4 => Self::DeviceInfo,
            5 => Self::RegionInfo,
            6 => Self::RegionIoFds,
            7 => Self::IrqInfo,
            8 => Self::SetIrqs,
            9 => Self::RegionRead,
            10 => Self::RegionWrite,
            11 => Self::DmaRead,
            12 => Self::DmaWrite,
            13 => Self::DeviceReset,
            15 => Self::RegionWriteMulti,
            16 => Self::DeviceFeature,
            17 => Self::MigrationRead,
            18 => Self::MigrationWrite,
            _ => return None,
        })
    }

    /// Its number.
    pub const fn number(self) -> u16 {
        self as u16
    }
}

/// What begins every message (section "Header").
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Header {
    /// Chosen by the sender of the command, echoed in its reply.
    pub message_id: u16,
    /// A [`Command`]'s number.
    pub command: u16,
    /// Bytes of the whole message, this header included.
    pub message_size: u32,
    /// Bits 0 to 3 the type, bit 4 no reply, bit 5 error.
    pub flags: u32,
    /// In an error reply: an errno, or 0.
    pub error: u32,
}

/// Bits of [`Header::flags`] that hold the type.
pub const FLAGS_TYPE: u32 = 0xf;
/// The type of a reply.
pub const FLAGS_REPLY: u32 = 1;
/// A command that wants no reply.
pub const FLAG_NO_REPLY: u32 = 1 << 4;
/// A reply that says the command failed.
pub const FLAG_ERROR: u32 = 1 << 5;

impl Header {
    /// The header of a command with `body` bytes after it.
    pub fn command(message_id: u16, command: Command, body: usize) -> Self {
        Self {
            message_id,
            command: command.number(),
            message_size: u32::try_from(HEADER_BYTES + body).unwrap_or(u32::MAX),
            flags: 0,
            error: 0,
        }
    }

    /// The header of a reply to this command with `body` bytes after it.
    pub fn reply(&self, body: usize) -> Self {
        Self { message_size: u32::try_from(HEADER_BYTES + body).unwrap_or(u32::MAX), flags: FLAGS_REPLY, error: 0, ..*self }
    }

    /// The header of the reply that refuses this command; nothing follows it.
    pub fn refusal(&self, errno: Errno) -> Self {
        Self {
            message_size: HEADER_BYTES as u32,
            flags: FLAGS_REPLY | FLAG_ERROR,
            error: u32::try_from(errno.raw_os_error()).unwrap_or(0),
            ..*self
        }
    }

    /// The errno of an error reply; `EIO` where it names none that there is (the crate `vfio_user` sends 0).
    pub fn errno(&self) -> Errno {
        let named = i32::try_from(self.error).ok().filter(|errno| (1..4096).contains(errno));
        named.map_or(Errno::IO, Errno::from_raw_os_error)
    }

    /// Whether this is a reply.
    pub const fn is_reply(&self) -> bool {
        self.flags & FLAGS_TYPE == FLAGS_REPLY
    }

    /// Whether this is a command.
    pub const fn is_command(&self) -> bool {
        self.flags & FLAGS_TYPE == 0
    }

    /// Whether the sender of this command wants no reply.
    pub const fn no_reply(&self) -> bool {
        self.flags & FLAG_NO_REPLY != 0
    }
}

/// Body of `DMA_MAP`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DmaMap {
    /// Bytes of this structure.
    pub argsz: u32,
    /// [`MAP_READABLE`] and [`MAP_WRITEABLE`].
    pub flags: u32,
    /// Offset in the file whose descriptor comes with the message.
    pub offset: u64,
    /// First DMA address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// The device may read.
pub const MAP_READABLE: u32 = 1;
/// The device may write.
pub const MAP_WRITEABLE: u32 = 2;

/// Body of `DMA_UNMAP`, and of its reply.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DmaUnmap {
    /// The most bytes that the reply's body may have.
    pub argsz: u32,
    /// [`UNMAP_DIRTY_BITMAP`] and [`UNMAP_ALL`] of `<linux/vfio.h>`; the specification leaves the field unused.
    pub flags: u32,
    /// First DMA address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`.
pub const UNMAP_DIRTY_BITMAP: u32 = 1;
/// `VFIO_DMA_UNMAP_FLAG_ALL`: every map, address and size being 0.
pub const UNMAP_ALL: u32 = 2;

/// Body of `DEVICE_GET_INFO` and of its reply (`struct vfio_device_info`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DeviceInfo {
    /// Asked: the most bytes wanted. Answered: the bytes there are.
    pub argsz: u32,
    /// [`DEVICE_RESETS`] and [`DEVICE_PCI`].
    pub flags: u32,
    /// Regions.
    pub num_regions: u32,
    /// Interrupt indexes.
    pub num_irqs: u32,
}

/// `VFIO_DEVICE_FLAGS_RESET`.
pub const DEVICE_RESETS: u32 = 1;
/// `VFIO_DEVICE_FLAGS_PCI`.
pub const DEVICE_PCI: u32 = 2;

/// Body of `DEVICE_GET_REGION_INFO` and of its reply (`struct vfio_region_info`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RegionInfo {
    /// As in [`DeviceInfo`].
    pub argsz: u32,
    /// [`REGION_READ`] and [`REGION_WRITE`].
    pub flags: u32,
    /// Which region.
    pub index: u32,
    /// Where capabilities begin; 0 without any.
    pub cap_offset: u32,
    /// Bytes of the region.
    pub size: u64,
    /// Offset for mmap; 0 where it cannot be mapped.
    pub offset: u64,
}

/// `VFIO_REGION_INFO_FLAG_READ`.
pub const REGION_READ: u32 = 1;
/// `VFIO_REGION_INFO_FLAG_WRITE`.
pub const REGION_WRITE: u32 = 2;

/// Regions 0 to 5 are the BARs (`VFIO_PCI_BAR0_REGION_INDEX` and so on).
pub const BAR_REGIONS: u32 = 6;
/// `VFIO_PCI_ROM_REGION_INDEX`.
pub const ROM_REGION: u32 = 6;
/// `VFIO_PCI_CONFIG_REGION_INDEX`.
pub const CONFIG_REGION: u32 = 7;
/// `VFIO_PCI_VGA_REGION_INDEX`.
pub const VGA_REGION: u32 = 8;
/// `VFIO_PCI_NUM_REGIONS`.
pub const REGIONS: u32 = 9;
/// Bytes of the configuration region (PCIe 5.0, section 7.2.2).
pub const CONFIG_BYTES: u64 = 4096;

/// Body of `DEVICE_GET_REGION_IO_FDS` and of its reply.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RegionIoFds {
    /// As in [`DeviceInfo`].
    pub argsz: u32,
    /// Zero.
    pub flags: u32,
    /// Which region.
    pub index: u32,
    /// Sub-regions in the reply.
    pub count: u32,
}

/// Body of `DEVICE_GET_IRQ_INFO` and of its reply (`struct vfio_irq_info`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IrqInfo {
    /// As in [`DeviceInfo`].
    pub argsz: u32,
    /// [`IRQ_EVENTFD`], [`IRQ_MASKABLE`], [`IRQ_AUTOMASKED`], [`IRQ_NORESIZE`].
    pub flags: u32,
    /// Which interrupt index.
    pub index: u32,
    /// Interrupts of that index.
    pub count: u32,
}

/// `VFIO_IRQ_INFO_EVENTFD`.
pub const IRQ_EVENTFD: u32 = 1;
/// `VFIO_IRQ_INFO_MASKABLE`.
pub const IRQ_MASKABLE: u32 = 2;
/// `VFIO_IRQ_INFO_AUTOMASKED`.
pub const IRQ_AUTOMASKED: u32 = 4;
/// `VFIO_IRQ_INFO_NORESIZE`.
pub const IRQ_NORESIZE: u32 = 8;

/// `VFIO_PCI_INTX_IRQ_INDEX`.
pub const INTX: u32 = 0;
/// `VFIO_PCI_MSI_IRQ_INDEX`.
pub const MSI: u32 = 1;
/// `VFIO_PCI_MSIX_IRQ_INDEX`.
pub const MSIX: u32 = 2;
/// `VFIO_PCI_ERR_IRQ_INDEX`.
pub const ERR: u32 = 3;
/// `VFIO_PCI_REQ_IRQ_INDEX`.
pub const REQ: u32 = 4;
/// `VFIO_PCI_NUM_IRQS`.
pub const IRQ_INDEXES: u32 = 5;

/// Fixed part of the body of `DEVICE_SET_IRQS` (`struct vfio_irq_set`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IrqSet {
    /// Bytes of the body, data included.
    pub argsz: u32,
    /// One of the `SET_DATA_` and one of the `SET_ACTION_` bits.
    pub flags: u32,
    /// Which interrupt index.
    pub index: u32,
    /// First interrupt.
    pub start: u32,
    /// Interrupts.
    pub count: u32,
}

/// `VFIO_IRQ_SET_DATA_NONE`.
pub const SET_DATA_NONE: u32 = 1;
/// `VFIO_IRQ_SET_DATA_BOOL`.
pub const SET_DATA_BOOL: u32 = 2;
/// `VFIO_IRQ_SET_DATA_EVENTFD`.
pub const SET_DATA_EVENTFD: u32 = 4;
/// `VFIO_IRQ_SET_ACTION_MASK`.
pub const SET_ACTION_MASK: u32 = 8;
/// `VFIO_IRQ_SET_ACTION_UNMASK`.
pub const SET_ACTION_UNMASK: u32 = 16;
/// `VFIO_IRQ_SET_ACTION_TRIGGER`.
pub const SET_ACTION_TRIGGER: u32 = 32;

/// Fixed part of `REGION_READ`, `REGION_WRITE` and their replies.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RegionAccess {
    /// First byte in the region.
    pub offset: u64,
    /// Which region.
    pub region: u32,
    /// Bytes.
    pub count: u32,
}

/// One write of `REGION_WRITE_MULTI`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ShortWrite {
    /// Where to.
    pub access: RegionAccess,
    /// The first `count` bytes are the data.
    pub data: [u8; 8],
}

/// Fixed part of `DMA_READ`, `DMA_WRITE` and their replies.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DmaAccess {
    /// First DMA address.
    pub address: u64,
    /// Bytes.
    pub count: u64,
}

/// Fixed part of `DEVICE_FEATURE` (`struct vfio_device_feature`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Feature {
    /// The most bytes that the reply's body may have.
    pub argsz: u32,
    /// Bits 0 to 15 the feature, then [`FEATURE_GET`], [`FEATURE_SET`], [`FEATURE_PROBE`].
    pub flags: u32,
}

/// Bits of [`Feature::flags`] that name the feature.
pub const FEATURE_INDEX: u32 = 0xffff;
/// `VFIO_DEVICE_FEATURE_GET`.
pub const FEATURE_GET: u32 = 1 << 16;
/// `VFIO_DEVICE_FEATURE_SET`.
pub const FEATURE_SET: u32 = 1 << 17;
/// `VFIO_DEVICE_FEATURE_PROBE`.
pub const FEATURE_PROBE: u32 = 1 << 18;

/// Fixed part of `MIG_DATA_READ` and `MIG_DATA_WRITE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MigrationData {
    /// The most bytes that the reply's body may have.
    pub argsz: u32,
    /// Bytes of migration data.
    pub size: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_have_the_sizes_that_the_specification_states() {
        assert_eq!(HEADER_BYTES, 16);
        assert_eq!(size_of::<DmaMap>(), 32);
        assert_eq!(size_of::<DmaUnmap>(), 24);
        assert_eq!(size_of::<DeviceInfo>(), 16);
        assert_eq!(size_of::<RegionInfo>(), 32);
        assert_eq!(size_of::<IrqInfo>(), 16);
        assert_eq!(size_of::<IrqSet>(), 20);
        assert_eq!(size_of::<RegionAccess>(), 16);
        assert_eq!(size_of::<ShortWrite>(), 24);
        assert_eq!(size_of::<DmaAccess>(), 16);
        assert_eq!(size_of::<Feature>(), 8);
    }

    #[test]
    fn an_error_reply_has_an_errno_whatever_it_says() {
        let reply = |error| Header { error, ..Header::command(1, Command::Version, 0) }.errno();
        assert_eq!(
            [0, 22, 4095, 4096, u32::MAX].map(reply),
            [Errno::IO, Errno::INVAL, Errno::from_raw_os_error(4095), Errno::IO, Errno::IO]
        );
    }

    #[test]
    fn a_command_number_is_one_of_the_specification_or_none() {
        let known: Vec<u16> = (0..=u16::MAX).filter(|n| Command::from_number(*n).is_some()).collect();
        assert_eq!(known, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 18]);
        assert!(known.iter().all(|n| Command::from_number(*n).map(Command::number) == Some(*n)));
    }
}
