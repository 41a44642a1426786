//! Where each register of a function lies, and what its bits are at power-on.
//!
//! An NVMe controller with 65 MSI-X vectors gets power management at 0x40, MSI-X at 0x70 with table size 64 in its message control, and
//! PCI Express at 0x80; every function has the same places, so that a dump is easy to read.

use farbus_remote_dma::device::{BAR_COUNT, DescriptionError};
use farbus_remote_dma::{BarKind, DeviceDescription};

use super::registers::Registers;

/// Offsets, as PCI 3.0 (section 6.1) and PCIe 5.0 (section 7.5.1) name them.
pub(crate) mod offset {
    pub(crate) const VENDOR_ID: u16 = 0x00;
    pub(crate) const DEVICE_ID: u16 = 0x02;
    pub(crate) const COMMAND: u16 = 0x04;
    pub(crate) const STATUS: u16 = 0x06;
    pub(crate) const REVISION: u16 = 0x08;
    pub(crate) const CACHE_LINE_SIZE: u16 = 0x0c;
    pub(crate) const BAR0: u16 = 0x10;
    pub(crate) const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
    pub(crate) const SUBSYSTEM_ID: u16 = 0x2e;
    pub(crate) const CAPABILITIES: u16 = 0x34;
    pub(crate) const INTERRUPT_LINE: u16 = 0x3c;
    pub(crate) const INTERRUPT_PIN: u16 = 0x3d;
    /// Power management capability (PCIe 5.0, section 7.5.2).
    pub(crate) const POWER: u16 = 0x40;
    pub(crate) const POWER_CONTROL: u16 = POWER + 4;
    /// MSI capability (PCIe 5.0, section 7.7.1), 64-bit.
    pub(crate) const MSI: u16 = 0x50;
    pub(crate) const MSI_CONTROL: u16 = MSI + 2;
    pub(crate) const MSI_ADDRESS: u16 = MSI + 4;
    pub(crate) const MSI_DATA: u16 = MSI + 12;
    pub(crate) const MSI_MASK: u16 = MSI + 16;
    pub(crate) const MSI_PENDING: u16 = MSI + 20;
    /// MSI-X capability (PCIe 5.0, section 7.7.2).
    pub(crate) const MSIX: u16 = 0x70;
    pub(crate) const MSIX_CONTROL: u16 = MSIX + 2;
    /// PCI Express capability (PCIe 5.0, section 7.5.3), 60 bytes.
    pub(crate) const EXPRESS: u16 = 0x80;
    pub(crate) const DEVICE_CONTROL: u16 = EXPRESS + 0x08;
    pub(crate) const DEVICE_STATUS: u16 = EXPRESS + 0x0a;
    pub(crate) const LINK_CONTROL: u16 = EXPRESS + 0x10;
    pub(crate) const LINK_CONTROL_2: u16 = EXPRESS + 0x30;
}

/// Command register (PCI 3.0, section 6.2.2).
pub(crate) mod command {
    pub(crate) const IO: u16 = 1 << 0;
    pub(crate) const MEMORY: u16 = 1 << 1;
    pub(crate) const BUS_MASTER: u16 = 1 << 2;
    pub(crate) const PARITY: u16 = 1 << 6;
    pub(crate) const SERR: u16 = 1 << 8;
    pub(crate) const INTERRUPT_DISABLE: u16 = 1 << 10;
}

/// Status register (PCI 3.0, section 6.2.3).
pub(crate) mod status {
    pub(crate) const INTERRUPT: u16 = 1 << 3;
    pub(crate) const CAPABILITIES: u16 = 1 << 4;
    /// Master data parity error, signalled and received target abort, received master abort, signalled system error, parity error.
    pub(crate) const ERRORS: u16 = 1 << 8 | 0b11111 << 11;
}

pub(crate) const MSI_ENABLE: u16 = 1 << 0;
pub(crate) const MSI_MULTIPLE_ENABLE_SHIFT: u16 = 4;
pub(crate) const MSI_MULTIPLE_ENABLE: u16 = 0b111 << MSI_MULTIPLE_ENABLE_SHIFT;
pub(crate) const MSIX_ENABLE: u16 = 1 << 15;
pub(crate) const MSIX_FUNCTION_MASK: u16 = 1 << 14;
pub(crate) const POWER_STATE: u16 = 0b11;
/// Bit 15 of device control, in its upper byte: initiate function level reset. Always reads zero.
pub(crate) const INITIATE_FLR: u8 = 1 << 7;
/// Device status: correctable, non-fatal, fatal error detected, unsupported request detected.
pub(crate) mod device_status {
    pub(crate) const CORRECTABLE: u16 = 1 << 0;
    pub(crate) const NON_FATAL: u16 = 1 << 1;
    pub(crate) const UNSUPPORTED_REQUEST: u16 = 1 << 3;
    pub(crate) const ALL: u16 = 0b1111;
}

const ID_POWER: u8 = 0x01;
const ID_MSI: u8 = 0x05;
const ID_EXPRESS: u8 = 0x10;
const ID_MSIX: u8 = 0x11;

/// The registers of a function that is described so.
pub(crate) fn registers(description: &DeviceDescription) -> Result<Registers, DescriptionError> {
    description.validate()?;
    if let Some(msix) = &description.msix {
        let in_io = |bar: u8| {
            let bar = description.bars.get(usize::from(bar)).and_then(Option::as_ref);
            bar.is_some_and(|bar| bar.kind == BarKind::Io)
        };
        if in_io(msix.table_bar) || in_io(msix.pba_bar) {
            return Err(DescriptionError::Invalid("an msi-x table in i/o space"));
        }
    }
    let mut registers = Registers::new();
    header(&mut registers, description);
    bars(&mut registers, description);
    capabilities(&mut registers, description);
    Ok(registers)
}

fn header(registers: &mut Registers, description: &DeviceDescription) {
    let fixed = |registers: &mut Registers, at, value: u16| registers.define(at, value.to_le_bytes(), [0; 2]);
    fixed(registers, offset::VENDOR_ID, description.vendor_id);
    fixed(registers, offset::DEVICE_ID, description.device_id);
    fixed(registers, offset::SUBSYSTEM_VENDOR_ID, description.subsystem_vendor_id);
    fixed(registers, offset::SUBSYSTEM_ID, description.subsystem_id);
    fixed(registers, offset::STATUS, status::CAPABILITIES);
    registers.clear_on_one(offset::STATUS, status::ERRORS.to_le_bytes());

    // An enable bit for a space in which the function has nothing is hardwired to zero (PCI 3.0, section 6.2.2).
    let has = |io: bool| description.bars.iter().flatten().any(|bar| (bar.kind == BarKind::Io) == io);
    let decode = if has(true) { command::IO } else { 0 } | if has(false) { command::MEMORY } else { 0 };
    let writable = decode | command::BUS_MASTER | command::PARITY | command::SERR | command::INTERRUPT_DISABLE;
    registers.define(offset::COMMAND, [0; 2], writable.to_le_bytes());

    let [interface, subclass, class, _] = description.class_code.to_le_bytes();
    registers.define(offset::REVISION, [description.revision, interface, subclass, class], [0; 4]);
    // Cache line size and interrupt line are scratch for software: no effect on a PCI Express function (PCIe 5.0, 7.5.1.1.7 and 7.5.1.1.12).
    registers.define(offset::CACHE_LINE_SIZE, [0], [0xff]);
    registers.define(offset::INTERRUPT_LINE, [0], [0xff]);
    registers.define(offset::INTERRUPT_PIN, [u8::from(description.pin)], [0]);
}

fn bars(registers: &mut Registers, description: &DeviceDescription) {
    for (index, bar) in (0..BAR_COUNT as u16).zip(&description.bars) {
        let Some(bar) = bar else { continue };
        let at = offset::BAR0 + index * 4;
        let kind: u32 = match bar.kind {
            BarKind::Io => 0b01,
            BarKind::Memory32 => 0b000,
            BarKind::Memory64 => 0b100,
        };
        let prefetchable = u32::from(bar.prefetchable && bar.kind != BarKind::Io) << 3;
        let mask = !(bar.size - 1);
        let low = mask as u32;
        registers.define(at, (kind | prefetchable).to_le_bytes(), low.to_le_bytes());
        if bar.kind == BarKind::Memory64 {
            let high = (mask >> 32) as u32;
            registers.define(at + 4, [0; 4], high.to_le_bytes());
        }
    }
}

fn capabilities(registers: &mut Registers, description: &DeviceDescription) {
    // Built from the last to the first, so that each knows the next.
    express(registers, 0);
    let mut next = offset::EXPRESS as u8;
    if let Some(location) = &description.msix {
        registers.define(offset::MSIX, [ID_MSIX, next], [0; 2]);
        let control = (location.vectors - 1).to_le_bytes();
        registers.define(
            offset::MSIX_CONTROL,
            control,
            (MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes(),
        );
        let table = location.table_offset | u32::from(location.table_bar);
        let pending = location.pba_offset | u32::from(location.pba_bar);
        registers.define(offset::MSIX + 4, table.to_le_bytes(), [0; 4]);
        registers.define(offset::MSIX + 8, pending.to_le_bytes(), [0; 4]);
        next = offset::MSIX as u8;
    }
    if description.msi_vectors > 0 {
        msi(registers, description.msi_vectors, next);
        next = offset::MSI as u8;
    }
    power(registers, next);
    registers.define(offset::CAPABILITIES, [offset::POWER as u8], [0]);
}

/// Version 3, no D1, no D2, no PME. No_Soft_Reset (bit 3 of the control register) is set: the step from D3hot to D0 keeps all state, so that
/// a guest that suspends does not reset a device far away.
fn power(registers: &mut Registers, next: u8) {
    registers.define(offset::POWER, [ID_POWER, next, 0x03, 0x00], [0; 4]);
    registers.define(offset::POWER_CONTROL, [0x08, 0, 0, 0], [POWER_STATE as u8, 0, 0, 0]);
}

/// 64-bit addresses always. Per-vector masks exactly where there is more than one vector: with one, the enable bit does the same, and the
/// devices of one vector that we know (edu) have none; with several they are the only way to silence one of them.
fn msi(registers: &mut Registers, vectors: u8, next: u8) {
    let masks = vectors > 1;
    let capable = (vectors.trailing_zeros() as u16) << 1;
    let control = capable | 1 << 7 | u16::from(masks) << 8;
    registers.define(offset::MSI, [ID_MSI, next], [0; 2]);
    registers.define(
        offset::MSI_CONTROL,
        control.to_le_bytes(),
        (MSI_ENABLE | MSI_MULTIPLE_ENABLE).to_le_bytes(),
    );
    registers.define(offset::MSI_ADDRESS, [0; 8], (!3u64).to_le_bytes());
    registers.define(offset::MSI_DATA, [0; 2], [0xff; 2]);
    if masks {
        let all = u32::MAX >> (32 - u32::from(vectors));
        registers.define(offset::MSI_MASK, [0; 4], all.to_le_bytes());
        registers.define(offset::MSI_PENDING, [0; 4], [0; 4]);
    }
}

/// A version 2 endpoint on an 8 GT/s x4 link without power saving; what a driver reads of the link says nothing of the lender's.
fn express(registers: &mut Registers, next: u8) {
    let at = offset::EXPRESS;
    registers.define(at, [ID_EXPRESS, next, 0x02, 0x00], [0; 4]);
    // 256 bytes of payload, any exit latency accepted, role-based error reporting, function level reset.
    let device = 1u32 | 0b111 << 6 | 0b111 << 9 | 1 << 15 | 1 << 28;
    registers.define(at + 0x04, device.to_le_bytes(), [0; 4]);
    // Error reporting, relaxed ordering, payload, no snoop and read request size; requests of 512 bytes at first. Bit 15 is write-only.
    registers.define(offset::DEVICE_CONTROL, 0x2810u16.to_le_bytes(), 0x78ffu16.to_le_bytes());
    registers.define(offset::DEVICE_STATUS, [0; 2], [0; 2]);
    registers.clear_on_one(offset::DEVICE_STATUS, device_status::ALL.to_le_bytes());
    let link = 3u32 | 4 << 4 | 1 << 22;
    registers.define(at + 0x0c, link.to_le_bytes(), [0; 4]);
    // ASPM control, read completion boundary, common clock, extended synch.
    registers.define(offset::LINK_CONTROL, [0; 2], 0x00cbu16.to_le_bytes());
    registers.define(at + 0x12, (3u16 | 4 << 4 | 1 << 12).to_le_bytes(), [0; 2]);
    // Completion timeouts may be disabled.
    registers.define(at + 0x24, (1u32 << 4).to_le_bytes(), [0; 4]);
    registers.define(at + 0x28, [0; 2], (1u16 << 4).to_le_bytes());
    // 2.5, 5 and 8 GT/s; the target is the fastest.
    registers.define(at + 0x2c, 0b1110u32.to_le_bytes(), [0; 4]);
    registers.define(offset::LINK_CONTROL_2, 3u16.to_le_bytes(), 0xfu16.to_le_bytes());

    // What PCIe 5.0, section 6.6.2 excepts from a function level reset: payload size, the link control fields, the target speed.
    registers.sticky(offset::DEVICE_CONTROL, 0x00e0u16.to_le_bytes());
    registers.sticky(offset::LINK_CONTROL, 0x00cbu16.to_le_bytes());
    registers.sticky(offset::LINK_CONTROL_2, 0xfu16.to_le_bytes());
}
