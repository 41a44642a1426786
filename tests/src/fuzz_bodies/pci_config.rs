//! The description of a PCI device from its configuration space: whatever a device or its kernel says is refused, or is a description that holds.
//!
//! 256 bytes of an NVMe controller with a BAR0 of 16 KiB give one whose MSI-X table lies inside BAR0; with a BAR0 of 4 KiB they give an error.

use farbus_remote_dma::DeviceDescription;
use farbus_remote_dma::vfio::config::{CONFIG_BYTES, Regions, describe};

use super::input::Input;

/// A byte for each BAR's size, as a power of two or as it is, and the configuration space.
pub fn pci_config(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(shifts) = input.bytes::<6>() else { return };
    let mut config = [0; CONFIG_BYTES];
    for (to, from) in config.iter_mut().zip(input.0) {
        *to = *from;
    }
    // 0 is no BAR; with the highest bit the size is no power of two.
    let size = |shift: u8| match shift {
        0 => 0,
        odd if odd & 0x80 != 0 => (1_u64 << (odd & 63)) + 1,
        shift => 1 << (shift & 63),
    };
    let regions = Regions { bars: shifts.map(size), pin: config[0] & 1 != 0 };
    let Ok(description) = describe("fuzzed", &config, &regions) else { return };
    assert_eq!(description.validate(), Ok(()));
    let encoded = description.encode().expect("what was checked can be encoded");
    assert_eq!(DeviceDescription::decode(&encoded), Ok(description.clone()));
    if let Some(msix) = description.msix {
        assert!(description.contains(msix.table_bar, msix.table_offset.into(), u64::from(msix.vectors) * 16));
    }
    assert!(description.bars.iter().flatten().all(|bar| bar.size.is_power_of_two()));
    assert!(regions.pin || !description.pin);
}
