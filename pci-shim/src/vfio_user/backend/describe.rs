//! What a device is, from its configuration space, its regions' sizes and its interrupt counts: checked, so that nothing a server says is believed.
//!
//! Class 01 08 02 at offset 9, a BAR0 register that says "64 bits" over a region of 16 KiB, and an MSI-X capability of 65 vectors in it describe
//! an NVMe controller; a capability list that goes round in a circle describes nothing and is refused.

use farbus_remote_dma::device::BAR_COUNT;
use farbus_remote_dma::{BarDescription, BarKind, DeviceDescription, MsixLocation};
use thiserror::Error;

/// Bytes of configuration space that are looked at: the header and the capabilities of PCI 3.0.
pub const HEADER_BYTES: usize = 256;
/// Capability identifiers (PCI Code and ID Assignment, section 2).
const CAP_MSI: u8 = 0x05;
const CAP_MSIX: u8 = 0x11;
/// Bit of the status register: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Why a device cannot be lent.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DescribeError {
    /// Its configuration space is not that of an endpoint.
    #[error("its configuration space is not a type-0 header: {0}")]
    Header(&'static str),
    /// A BAR and its region do not fit.
    #[error("bar {bar}: {why}")]
    Bar {
        /// Which.
        bar: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// The capability list is broken.
    #[error("its capability list is broken at {at:#x}: {why}")]
    Capabilities {
        /// Where in configuration space.
        at: u8,
        /// What is wrong.
        why: &'static str,
    },
    /// What comes of it is no device.
    #[error("{0}")]
    Invalid(String),
}

/// Where a capability's control word lies, for enabling interrupts at the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Controls {
    /// Message control of MSI.
    pub msi: Option<u8>,
    /// Message control of MSI-X.
    pub msix: Option<u8>,
}

/// Interrupts that the server offers, by index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqCounts {
    /// INTx: 0 or 1.
    pub pin: u32,
    /// MSI vectors.
    pub msi: u32,
    /// MSI-X vectors.
    pub msix: u32,
}

/// Describes the device; a BAR's size is its region's, rounded up to a power of two.
///
/// # Errors
/// [`DescribeError`].
pub fn describe(
    name: &str,
    config: &[u8; HEADER_BYTES],
    sizes: &[u64; BAR_COUNT],
    irqs: IrqCounts,
) -> Result<(DeviceDescription, Controls), DescribeError> {
    let word = |at: usize| u16::from_le_bytes([byte(config, at), byte(config, at + 1)]);
    if word(0) == 0xffff || word(0) == 0 {
        return Err(DescribeError::Header("no vendor"));
    }
    if byte(config, 0x0e) & 0x7f != 0 {
        return Err(DescribeError::Header("it is a bridge"));
    }
    let class = [byte(config, 9), byte(config, 10), byte(config, 11), 0];
    let found = capabilities(config)?;
    let mut controls = Controls::default();
    let mut msi_vectors = 0;
    if let Some(at) = found.msi.filter(|_| irqs.msi > 0) {
        let offered = 1_u32 << (byte(config, usize::from(at) + 2) >> 1 & 7).min(5);
        let usable = offered.min(1 << irqs.msi.min(32).ilog2());
        msi_vectors = u8::try_from(usable).unwrap_or(1);
        controls.msi = Some(at + 2);
    }
    let mut msix = None;
    if let Some(at) = found.msix.filter(|_| irqs.msix > 0) {
        let dword = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        let (table, pba) = (dword(usize::from(at) + 4), dword(usize::from(at) + 8));
        let size = u32::from(word(usize::from(at) + 2) & 0x7ff) + 1;
        msix = Some(MsixLocation {
            vectors: u16::try_from(size.min(irqs.msix)).unwrap_or(1),
            table_bar: (table & 7) as u8,
            table_offset: table & !7,
            pba_bar: (pba & 7) as u8,
            pba_offset: pba & !7,
        });
        controls.msix = Some(at + 2);
    }
    let description = DeviceDescription {
        name: name.chars().take(120).filter(|c| !c.is_control()).collect::<String>(),
        vendor_id: word(0),
        device_id: word(2),
        subsystem_vendor_id: word(0x2c),
        subsystem_id: word(0x2e),
        revision: byte(config, 8),
        class_code: u32::from_le_bytes(class),
        bars: bars(config, sizes)?,
        pin: byte(config, 0x3d) != 0 && irqs.pin > 0,
        msi_vectors,
        msix,
        dma_bits: 64,
        // The protocol has none: which device it is, is known by its socket.
        serial: String::new(),
        constants: Vec::new(),
    };
    description.validate().map_err(|error| DescribeError::Invalid(error.to_string()))?;
    Ok((description, controls))
}

fn byte(config: &[u8; HEADER_BYTES], at: usize) -> u8 {
    config.get(at).copied().unwrap_or(0xff)
}

fn bars(config: &[u8; HEADER_BYTES], sizes: &[u64; BAR_COUNT]) -> Result<[Option<BarDescription>; BAR_COUNT], DescribeError> {
    let mut bars = [None; BAR_COUNT];
    let mut upper = false;
    for (bar, (slot, size)) in bars.iter_mut().zip(sizes).enumerate() {
        let wrong = |why| Err(DescribeError::Bar { bar, why });
        if std::mem::take(&mut upper) {
            if *size > 0 {
                return wrong("it has a region, and is the upper half of the bar before it");
            }
            continue;
        }
        if *size == 0 {
            continue;
        }
        let register = byte(config, 0x10 + bar * 4);
        // PCI 3.0, section 6.2.5.1: bit 0 the space; of memory bits 1 and 2 the width, bit 3 prefetchable.
        let (kind, smallest) = match register & 7 {
            0b000 => (BarKind::Memory32, 16),
            0b100 => (BarKind::Memory64, 16),
            bits if bits & 1 == 1 => (BarKind::Io, 4),
            _ => return wrong("its register has a reserved type"),
        };
        upper = kind == BarKind::Memory64;
        let Some(size) = size.max(&smallest).checked_next_power_of_two() else { return wrong("its region is too large") };
        *slot = Some(BarDescription { kind, size, prefetchable: kind != BarKind::Io && register & 8 != 0 });
    }
    Ok(bars)
}

#[derive(Default)]
struct Found {
    msi: Option<u8>,
    msix: Option<u8>,
}

fn capabilities(config: &[u8; HEADER_BYTES]) -> Result<Found, DescribeError> {
    /// As many as fit: each takes at least four bytes.
    const MOST: usize = (HEADER_BYTES - 0x40) / 4;
    let mut found = Found::default();
    if byte(config, 6) & STATUS_CAPABILITIES == 0 {
        return Ok(found);
    }
    let mut at = byte(config, 0x34) & !3;
    for _ in 0..MOST {
        if at == 0 {
            return Ok(found);
        }
        let wrong = |why| Err(DescribeError::Capabilities { at, why });
        if at < 0x40 {
            return wrong("it lies in the header");
        }
        let (id, room) = (byte(config, usize::from(at)), HEADER_BYTES - usize::from(at));
        let slot = match id {
            CAP_MSI if room < 10 => return wrong("msi does not fit"),
            CAP_MSIX if room < 12 => return wrong("msi-x does not fit"),
            CAP_MSI => Some(&mut found.msi),
            CAP_MSIX => Some(&mut found.msix),
            _ => None,
        };
        if let Some(slot) = slot {
            slot.get_or_insert(at);
        }
        at = byte(config, usize::from(at) + 1) & !3;
    }
    Err(DescribeError::Capabilities { at, why: "it goes round in a circle" })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn controller() -> [u8; HEADER_BYTES] {
        let mut config = [0; HEADER_BYTES];
        config[..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0]);
        config[6] = STATUS_CAPABILITIES;
        config[8..12].copy_from_slice(&[2, 2, 8, 1]);
        config[0x10] = 4;
        config[0x34] = 0x40;
        config[0x3d] = 1;
        config[0x40..0x4c].copy_from_slice(&[CAP_MSIX, 0x50, 64, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
        config[0x50..0x54].copy_from_slice(&[CAP_MSI, 0, 3 << 1, 0]);
        config
    }

    const SIZES: [u64; 6] = [16 << 10, 0, 0, 0, 0, 0];
    const IRQS: IrqCounts = IrqCounts { pin: 1, msi: 32, msix: 2048 };

    #[test]
    fn a_controller_is_described_from_its_registers() {
        let (device, controls) = describe("x", &controller(), &SIZES, IRQS).unwrap();
        assert_eq!((device.vendor_id, device.class_code, device.msi_vectors, device.pin), (0x1b36, 0x01_0802, 8, true));
        let msix = device.msix.unwrap();
        assert_eq!((msix.vectors, msix.table_offset, msix.pba_offset), (65, 0x2000, 0x3000));
        assert_eq!(controls, Controls { msi: Some(0x52), msix: Some(0x42) });
        let (few, _) = describe("x", &controller(), &[0x3001, 0, 0, 0, 0, 0], IrqCounts { pin: 0, msi: 3, msix: 9 }).unwrap();
        assert_eq!((few.bar_size(0), few.pin, few.msi_vectors, few.msix.unwrap().vectors), (Some(16 << 10), false, 2, 9));
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let refused = |change: &dyn Fn(&mut [u8; HEADER_BYTES]), sizes: [u64; 6]| {
            let mut config = controller();
            change(&mut config);
            describe("x", &config, &sizes, IRQS).unwrap_err()
        };
        assert!(matches!(refused(&|c| c[0..2].fill(0xff), SIZES), DescribeError::Header(_)));
        assert!(matches!(refused(&|c| c[0x0e] = 1, SIZES), DescribeError::Header(_)));
        assert!(matches!(refused(&|c| c[0x10] = 2, SIZES), DescribeError::Bar { bar: 0, .. }));
        assert!(matches!(refused(&|_| {}, [16 << 10, 16, 0, 0, 0, 0]), DescribeError::Bar { bar: 1, .. }));
        assert!(matches!(refused(&|_| {}, [u64::MAX, 0, 0, 0, 0, 0]), DescribeError::Bar { bar: 0, .. }));
        assert!(matches!(refused(&|_| {}, [1 << 40, 0, 0, 0, 0, 0]), DescribeError::Invalid(_)));
        assert!(matches!(refused(&|_| {}, [8 << 10, 0, 0, 0, 0, 0]), DescribeError::Invalid(_)));
        assert!(matches!(refused(&|c| c[0x51] = 0x40, SIZES), DescribeError::Capabilities { .. }));
        assert!(matches!(refused(&|c| c[0x51] = 0x10, SIZES), DescribeError::Capabilities { at: 0x10, .. }));
        assert!(matches!(
            refused(
                &|c| {
                    c[0x51] = 0xfc;
                    c[0xfc] = CAP_MSIX;
                },
                SIZES
            ),
            DescribeError::Capabilities { at: 0xfc, .. }
        ));
    }

    proptest! {
        #[test]
        fn whatever_a_server_says_is_a_valid_device_or_none(config in proptest::collection::vec(any::<u8>(), 256), sizes: [u64; 6], few: bool) {
            let mut header: [u8; HEADER_BYTES] = config.try_into().unwrap();
            if few {
                header[0x0e] = 0;
            }
            let sizes = sizes.map(|size| if few { (size % 9) << 12 } else { size });
            if let Ok((device, _)) = describe("x", &header, &sizes, IRQS) {
                prop_assert!(device.validate().is_ok());
            }
        }
    }
}
