//! The 4 KiB configuration space of a function: a type-0 header, its BARs and its capabilities; pure, without a device.
//!
//! [`Space::write`] of 0x8000 to device control changes no byte and answers [`Written::FunctionLevelReset`]; of 0xffff_ffff to 0x10 makes
//! BAR0's size readable. Sources: PCI 3.0 chapter 6, PCIe 5.0 chapter 7. The extended space is empty: its first header is zero.

pub(crate) mod layout;
pub(crate) mod registers;
#[cfg(test)]
mod tests;

use farbus_remote_dma::device::{BAR_COUNT, DescriptionError};
use farbus_remote_dma::{BarAddress, BarDescription, BarKind, DeviceDescription, ResetKind};

use crate::access::AccessError;
use layout::{command, device_status, offset, status};
pub use registers::CONFIG_BYTES;
use registers::Registers;

/// What a write of configuration space asks for beyond the bytes that it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Written {
    /// Nothing: look at the registers.
    Stored,
    /// A function level reset (PCIe 5.0, section 6.6.2): reset the device, then call [`Space::reset`].
    FunctionLevelReset,
}

/// Power states that the function has (PCI power management 1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerState {
    /// Fully on.
    D0,
    /// Configuration space only: no BAR is decoded, nothing is sent.
    D3Hot,
}

/// Which of the two address spaces of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressSpace {
    /// Memory.
    Memory,
    /// I/O ports.
    Io,
}

/// Message control of MSI-X; all false where there is no such capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsixControl {
    /// MSI-X is how the function signals.
    pub enabled: bool,
    /// All vectors are masked.
    pub masked: bool,
}

/// The MSI capability; not enabled where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiControl {
    /// MSI is how the function signals.
    pub enabled: bool,
    /// Vectors that software gave it: a power of two up to 32.
    pub vectors: u8,
    /// Where messages go.
    pub address: u64,
    /// The data of vector 0; others differ in the lowest bits.
    pub data: u16,
    /// A bit for each vector that is masked.
    pub mask: u32,
}

/// A function's configuration space.
#[derive(Clone, Debug)]
pub struct Space {
    registers: Registers,
    bars: [Option<BarDescription>; BAR_COUNT],
    msi_vectors: u8,
    has_msix: bool,
}

impl Space {
    /// The space of a device after power-on.
    ///
    /// # Errors
    /// [`DescriptionError`] where the description does not describe a possible function.
    pub fn new(description: &DeviceDescription) -> Result<Self, DescriptionError> {
        Ok(Self {
            registers: layout::registers(description)?,
            bars: description.bars,
            msi_vectors: description.msi_vectors,
            has_msix: description.msix.is_some(),
        })
    }

    /// Reads any range inside the 4,096 bytes.
    ///
    /// # Errors
    /// [`AccessError::Config`]; `into` is untouched.
    pub fn read(&self, offset: u16, into: &mut [u8]) -> Result<(), AccessError> {
        self.registers.read(offset, into)
    }

    /// Writes any range inside the 4,096 bytes, through the masks; read-only bits keep their value, as in hardware.
    ///
    /// # Errors
    /// [`AccessError::Config`]; nothing was written.
    pub fn write(&mut self, offset: u16, bytes: &[u8]) -> Result<Written, AccessError> {
        let power = self.registers.u16(offset::POWER_CONTROL);
        self.registers.write(offset, bytes)?;
        let wanted = self.registers.u16(offset::POWER_CONTROL);
        if !matches!(wanted & layout::POWER_STATE, 0 | 3) {
            // D1 and D2 do not exist here; such a write is discarded (PCI power management 1.2, section 3.2.4).
            let kept = wanted & !layout::POWER_STATE | power & layout::POWER_STATE;
            self.registers.set(offset::POWER_CONTROL, kept.to_le_bytes());
        }
        let upper_device_control = usize::from(offset::DEVICE_CONTROL + 1);
        let written = upper_device_control.checked_sub(usize::from(offset)).and_then(|at| bytes.get(at));
        Ok(match written {
            Some(byte) if byte & layout::INITIATE_FLR != 0 => Written::FunctionLevelReset,
            _ => Written::Stored,
        })
    }

    /// To the state after a reset: all registers for a conventional one; for a function level reset all but those that PCIe 5.0, section
    /// 6.6.2 excepts (payload size, link control, target link speed).
    pub fn reset(&mut self, kind: ResetKind) {
        self.registers.reset(kind == ResetKind::Function);
    }

    /// Whether accesses to `bar` are decoded: its space is enabled in the command register and the function is in D0.
    pub fn decodes(&self, bar: u8) -> bool {
        let enable = match self.bar(bar).map(|bar| bar.kind) {
            None => return false,
            Some(BarKind::Io) => command::IO,
            Some(BarKind::Memory32 | BarKind::Memory64) => command::MEMORY,
        };
        self.command() & enable != 0 && self.power_state() == PowerState::D0
    }

    /// Where software put `bar`; `None` where there is no such BAR.
    pub fn bar_base(&self, bar: u8) -> Option<u64> {
        let kind = self.bar(bar)?.kind;
        let at = offset::BAR0 + u16::from(bar) * 4;
        let low = u64::from(self.registers.u32(at));
        Some(match kind {
            BarKind::Io => low & !0x3,
            BarKind::Memory32 => low & !0xf,
            BarKind::Memory64 => low & !0xf | u64::from(self.registers.u32(at + 4)) << 32,
        })
    }

    /// Which place in a BAR an address of the machine is, as the function decodes it now.
    pub fn decode(&self, space: AddressSpace, address: u64) -> Option<BarAddress> {
        (0..BAR_COUNT as u8).find_map(|bar| {
            let description = self.bar(bar)?;
            let io = description.kind == BarKind::Io;
            if io != (space == AddressSpace::Io) || !self.decodes(bar) {
                return None;
            }
            let offset = address.checked_sub(self.bar_base(bar)?)?;
            (offset < description.size).then_some(BarAddress { bar, offset })
        })
    }

    /// Whether software lets the function send requests: command register bit 2, and D0.
    pub fn bus_master(&self) -> bool {
        self.command() & command::BUS_MASTER != 0 && self.power_state() == PowerState::D0
    }

    /// Whether software forbids INTx: command register bit 10.
    pub fn interrupt_disabled(&self) -> bool {
        self.command() & command::INTERRUPT_DISABLE != 0
    }

    /// The power state that software chose.
    pub fn power_state(&self) -> PowerState {
        match self.registers.u16(offset::POWER_CONTROL) & layout::POWER_STATE {
            0 => PowerState::D0,
            _ => PowerState::D3Hot,
        }
    }

    /// Message control of MSI-X.
    pub fn msix(&self) -> MsixControl {
        if !self.has_msix {
            return MsixControl::default();
        }
        let control = self.registers.u16(offset::MSIX_CONTROL);
        MsixControl { enabled: control & layout::MSIX_ENABLE != 0, masked: control & layout::MSIX_FUNCTION_MASK != 0 }
    }

    /// The MSI capability.
    pub fn msi(&self) -> MsiControl {
        if self.msi_vectors == 0 {
            return MsiControl::default();
        }
        let control = self.registers.u16(offset::MSI_CONTROL);
        let log2 = (control & layout::MSI_MULTIPLE_ENABLE) >> layout::MSI_MULTIPLE_ENABLE_SHIFT;
        MsiControl {
            enabled: control & layout::MSI_ENABLE != 0,
            // More than the function asked for, or the reserved encodings 6 and 7, count as all that it asked for.
            vectors: (1u8 << log2.min(5)).min(self.msi_vectors),
            address: u64::from_le_bytes(self.registers.fetch(offset::MSI_ADDRESS)),
            data: self.registers.u16(offset::MSI_DATA),
            // Without per-vector masks the register does not exist and reads zero.
            mask: self.registers.u32(offset::MSI_MASK),
        }
    }

    /// Shows the INTx level in status bit 3 (it is kept whether or not INTx is disabled).
    pub fn show_interrupt(&mut self, asserted: bool) {
        let others = self.registers.u16(offset::STATUS) & !status::INTERRUPT;
        let bit = if asserted { status::INTERRUPT } else { 0 };
        self.registers.set(offset::STATUS, (others | bit).to_le_bytes());
    }

    /// Shows MSI's pending bits, where the function has them.
    pub fn show_msi_pending(&mut self, pending: u32) {
        if self.msi_vectors > 1 {
            self.registers.set(offset::MSI_PENDING, pending.to_le_bytes());
        }
    }

    /// Notes in device status that a request was answered with "unsupported": for a read an advisory (correctable) error, for a posted
    /// write a non-fatal one (PCIe 5.0, section 6.2.3.2.4).
    pub fn note_unsupported_request(&mut self, posted: bool) {
        let severity = if posted { device_status::NON_FATAL } else { device_status::CORRECTABLE };
        let noted = self.registers.u16(offset::DEVICE_STATUS) | severity | device_status::UNSUPPORTED_REQUEST;
        self.registers.set(offset::DEVICE_STATUS, noted.to_le_bytes());
    }

    /// All bytes, for a saved state.
    pub(crate) fn save(&self) -> &[u8; CONFIG_BYTES] {
        self.registers.all()
    }

    /// Takes saved bytes; false, and nothing is taken, where they are not of such a function.
    pub(crate) fn load(&mut self, saved: &[u8; CONFIG_BYTES]) -> bool {
        // What the function shows, and errors that it notes: the guest does not write these, but they change.
        let mut also = vec![
            (offset::STATUS, u32::from(status::INTERRUPT | status::ERRORS)),
            (offset::DEVICE_STATUS, u32::from(device_status::ALL)),
        ];
        if self.msi_vectors > 1 {
            also.push((offset::MSI_PENDING, u32::MAX));
        }
        self.registers.load(saved, &also)
    }

    fn command(&self) -> u16 {
        self.registers.u16(offset::COMMAND)
    }

    fn bar(&self, bar: u8) -> Option<&BarDescription> {
        self.bars.get(usize::from(bar))?.as_ref()
    }
}
