//! A device's description from its configuration space and the sizes of its regions: pure, for the backend and for fuzzing.
//!
//! Class 0x010802, BAR0 a 64-bit memory BAR whose region has 16 KiB, an MSI-X capability of 65 vectors at BAR0 + 0x2000: the NVMe controller
//! that QEMU has. A chain of capabilities that runs in a circle ends, and a table outside of its BAR is an error.

use thiserror::Error;

use crate::device::{BAR_COUNT, BarDescription, BarKind, DescriptionError, DeviceDescription, MsixLocation};

/// Bytes of a function's conventional configuration space, which has all that is looked at here (PCI 3.0, section 6.1).
pub const CONFIG_BYTES: usize = 256;

/// Registers of a type-0 header (PCI 3.0, section 6.1).
mod register {
    pub const VENDOR_ID: usize = 0x00;
    pub const DEVICE_ID: usize = 0x02;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    pub const HEADER_TYPE: usize = 0x0e;
    pub const BARS: usize = 0x10;
    pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
    pub const SUBSYSTEM_ID: usize = 0x2e;
    pub const CAPABILITIES: usize = 0x34;
    pub const PIN: usize = 0x3d;
}

/// The command register (PCI 3.0, section 6.2.2).
pub(super) const COMMAND: u64 = 0x04;
/// Bits of the command register.
pub(super) mod command {
    pub const IO: u16 = 1;
    pub const MEMORY: u16 = 1 << 1;
    pub const BUS_MASTER: u16 = 1 << 2;
}

/// Status register: there is a list of capabilities.
const HAS_CAPABILITIES: u16 = 1 << 4;
const MSI: u8 = 0x05;
const MSIX: u8 = 0x11;
/// More than fit: a chain that is longer runs in a circle.
const MOST_CAPABILITIES: usize = 48;

/// What the kernel says beside the configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Regions {
    /// Bytes of each BAR's region; 0 where there is none.
    pub bars: [u64; BAR_COUNT],
    /// Whether its INTx can be had.
    pub pin: bool,
}

/// Why a device cannot be described.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A bridge, or no device.
    #[error("header type {0:#04x}: only plain functions (type 0) can be lent")]
    HeaderType(u8),
    /// A field is outside of its range.
    #[error(transparent)]
    Description(#[from] DescriptionError),
}

/// The description of a device with this configuration space.
///
/// # Errors
/// [`ConfigError`].
pub fn describe(name: &str, config: &[u8; CONFIG_BYTES], regions: &Regions) -> Result<DeviceDescription, ConfigError> {
    let config = Config(config);
    let header_type = config.byte(register::HEADER_TYPE) & 0x7f;
    if header_type != 0 {
        return Err(ConfigError::HeaderType(header_type));
    }
    let description = DeviceDescription {
        name: name.to_owned(),
        // What tells two of a kind apart lies beyond conventional configuration space.
        serial: String::new(),
        vendor_id: config.word(register::VENDOR_ID),
        device_id: config.word(register::DEVICE_ID),
        subsystem_vendor_id: config.word(register::SUBSYSTEM_VENDOR_ID),
        subsystem_id: config.word(register::SUBSYSTEM_ID),
        revision: config.byte(register::REVISION),
        class_code: config.dword(register::REVISION) >> 8,
        bars: bars(&config, &regions.bars),
        pin: regions.pin && config.byte(register::PIN) != 0,
        msi_vectors: config.capability(MSI).map_or(0, |at| msi_vectors(config.word(at + 2))),
        msix: config.capability(MSIX).map(|at| msix(&config, at)),
        // Its configuration space does not say less; what its IOMMU cannot map is refused range by range.
        dma_bits: 64,
        constants: Vec::new(),
    };
    description.validate()?;
    Ok(description)
}

fn bars(config: &Config<'_>, sizes: &[u64; BAR_COUNT]) -> [Option<BarDescription>; BAR_COUNT] {
    let mut bars = [None; BAR_COUNT];
    let mut upper_half = false;
    for (index, (bar, size)) in bars.iter_mut().zip(sizes).enumerate() {
        let value = config.dword(register::BARS + 4 * index);
        if std::mem::take(&mut upper_half) {
            continue;
        }
        // PCI 3.0, section 6.2.5.1.
        let kind = match value & 0b111 {
            io if io & 1 != 0 => BarKind::Io,
            0b100 => BarKind::Memory64,
            _ => BarKind::Memory32,
        };
        if *size == 0 {
            continue;
        }
        upper_half = kind == BarKind::Memory64;
        *bar = Some(BarDescription { kind, size: *size, prefetchable: kind != BarKind::Io && value & 0b1000 != 0 });
    }
    bars
}

/// From the message control word: 1, 2, 4, … 32 (PCI 3.0, section 6.8.1.3); a code that is reserved says nothing.
fn msi_vectors(control: u16) -> u8 {
    match control >> 1 & 0b111 {
        code @ 0..=5 => 1 << code,
        _ => 0,
    }
}

/// PCI 3.0, section 6.8.2.
fn msix(config: &Config<'_>, at: usize) -> MsixLocation {
    let place = |value: u32| ((value & 0b111) as u8, value & !0b111);
    let ((table_bar, table_offset), (pba_bar, pba_offset)) = (place(config.dword(at + 4)), place(config.dword(at + 8)));
    MsixLocation { vectors: (config.word(at + 2) & 0x7ff) + 1, table_bar, table_offset, pba_bar, pba_offset }
}

/// Reads past the end are zero.
struct Config<'a>(&'a [u8; CONFIG_BYTES]);

impl Config<'_> {
    fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.byte(at), self.byte(at + 1)])
    }

    fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    /// The first capability with this number (PCI 3.0, section 6.7).
    fn capability(&self, id: u8) -> Option<usize> {
        if self.word(register::STATUS) & HAS_CAPABILITIES == 0 {
            return None;
        }
        let mut at = usize::from(self.byte(register::CAPABILITIES) & !3);
        for _ in 0..MOST_CAPABILITIES {
            if at < 0x40 {
                return None;
            }
            if self.byte(at) == id {
                return Some(at);
            }
            at = usize::from(self.byte(at + 1) & !3);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU's NVMe controller has it: MSI-X at 0x40, behind it nothing.
    fn nvme() -> ([u8; CONFIG_BYTES], Regions) {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &[0x36, 0x1b, 0x10, 0x00, 0x06, 0x00, 0x10, 0x00]);
        put(0x08, &[0x02, 0x02, 0x08, 0x01]);
        put(0x10, &[0x04, 0x00, 0x00, 0xfd]);
        put(0x2c, &[0xf4, 0x1a, 0x00, 0x11]);
        put(0x34, &[0x40]);
        put(0x3d, &[1]);
        put(0x40, &[0x11, 0x00, 64, 0x80, 0x00, 0x20, 0, 0, 0x00, 0x30, 0, 0]);
        (config, Regions { bars: [0x4000, 0, 0, 0, 0, 0], pin: true })
    }

    #[test]
    fn an_nvme_controller_is_described_from_its_configuration_space() {
        let (config, regions) = nvme();
        let description = describe("nvme", &config, &regions).unwrap();
        assert_eq!((description.vendor_id, description.device_id, description.class_code), (0x1b36, 0x0010, 0x01_0802));
        assert_eq!(description.bars[0], Some(BarDescription { kind: BarKind::Memory64, size: 0x4000, prefetchable: false }));
        assert_eq!(
            description.msix,
            Some(MsixLocation { vectors: 65, table_bar: 0, table_offset: 0x2000, pba_bar: 0, pba_offset: 0x3000 })
        );
        assert!(description.pin && description.msi_vectors == 0);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let (mut config, regions) = nvme();
        config[0x45] = 0x40;
        assert!(matches!(describe("x", &config, &regions), Err(ConfigError::Description(_))), "a table outside of its bar");
        let (mut config, regions) = nvme();
        config[0x0e] = 0x81;
        assert_eq!(describe("x", &config, &regions), Err(ConfigError::HeaderType(1)));
        let (config, mut regions) = nvme();
        regions.bars[0] = 0x3000;
        assert!(describe("x", &config, &regions).is_err(), "a size that is no power of two");
    }

    #[test]
    fn a_circle_of_capabilities_ends() {
        let (mut config, regions) = nvme();
        (config[0x40], config[0x41]) = (9, 0x40);
        assert_eq!(describe("x", &config, &regions).unwrap().msix, None);
        (config[0x40], config[0x41], config[0x50], config[0x52]) = (9, 0x50, 5, 0b1010);
        assert_eq!(describe("x", &config, &regions).unwrap().msi_vectors, 32);
    }
}
