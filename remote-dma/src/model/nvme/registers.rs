//! The controller's register file at BAR0 + 0 to 0x3f (NVMe 1.4, section 3.1): what is stored, what never changes, what a value means.
//!
//! A driver reads 8 bytes at 0 (CAP), writes `0x001f_001f` to 0x24 (AQA: both admin queues have 32 entries) and 0x0046_0001 to 0x14
//! (CC: entries of 64 and 16 bytes, enabled), then waits for bit 0 of 0x1c (CSTS.RDY).

use crate::address::Width;

/// Entries of the longest queue, so that MQES is one less.
pub const MAX_QUEUE_ENTRIES: u32 = 2048;
/// First byte of the doorbells; stride 4 (CAP.DSTRD 0).
pub const DOORBELLS: u64 = 0x1000;
/// Bytes of BAR0.
pub const BAR_BYTES: u64 = 0x4000;
/// First byte of the MSI-X table, 16 bytes a vector.
pub const MSIX_TABLE: u32 = 0x2000;
/// First byte of the MSI-X pending bits.
pub const MSIX_PENDING: u32 = 0x3000;

/// Log2 of the largest memory page beyond 4 KiB: 64 KiB.
const MPSMAX: u64 = 4;
/// Controller capabilities (section 3.1.1): MQES 15:0, contiguous queues required 16, timeout 31:24 in 500 ms, NVM command set 37, MPSMAX 55:52.
pub const CAP: u64 = (MAX_QUEUE_ENTRIES as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37 | MPSMAX << 52;
/// Version 1.4.0 (section 3.1.2).
pub const VS: u32 = 0x0001_0400;

pub(super) mod offset {
    pub const CAP: u64 = 0x00;
    pub const VS: u64 = 0x08;
    pub const INTMS: u64 = 0x0c;
    pub const INTMC: u64 = 0x10;
    pub const CC: u64 = 0x14;
    pub const CSTS: u64 = 0x1c;
    pub const AQA: u64 = 0x24;
    pub const ASQ: u64 = 0x28;
    pub const ACQ: u64 = 0x30;
}

/// Controller configuration (section 3.1.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Configuration(pub(super) u32);

impl Configuration {
    pub(super) const fn enabled(self) -> bool {
        self.0 & 1 != 0
    }
    pub(super) const fn command_set(self) -> u32 {
        self.0 >> 4 & 7
    }
    pub(super) const fn page_shift(self) -> u32 {
        12 + (self.0 >> 7 & 0xf)
    }
    pub(super) const fn arbitration(self) -> u32 {
        self.0 >> 11 & 7
    }
    pub(super) const fn shutdown(self) -> u32 {
        self.0 >> 14 & 3
    }
    pub(super) const fn submission_entry_shift(self) -> u32 {
        self.0 >> 16 & 0xf
    }
    pub(super) const fn completion_entry_shift(self) -> u32 {
        self.0 >> 20 & 0xf
    }
    /// Whether the controller can be enabled like this; entry sizes matter when queues are created.
    pub(super) const fn supported(self) -> bool {
        self.command_set() == 0 && self.page_shift() as u64 <= 12 + MPSMAX && self.arbitration() == 0
    }
}

/// How far a shutdown is (CSTS.SHST).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Shutdown {
    #[default]
    None = 0,
    Occurring = 1,
    Complete = 2,
}

/// The registers that hold state.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Registers {
    pub(super) configuration: Configuration,
    pub(super) ready: bool,
    pub(super) fatal: bool,
    pub(super) shutdown: Shutdown,
    pub(super) admin_attributes: u32,
    pub(super) admin_submission: u64,
    pub(super) admin_completion: u64,
    pub(super) masked: u32,
}

impl Registers {
    /// What a read of `width` at `at` answers; `at` is naturally aligned. Reserved registers are 0.
    pub(super) fn read(&self, at: u64, width: Width) -> u64 {
        let word = at & !3;
        let value = match width {
            Width::B8 => u64::from(self.dword(word)) | u64::from(self.dword(word + 4)) << 32,
            _ => u64::from(self.dword(word)) >> (8 * (at & 3)),
        };
        width.truncate(value)
    }

    fn dword(&self, at: u64) -> u32 {
        let (low, high) = (|value: u64| value as u32, |value: u64| (value >> 32) as u32);
        match at {
            offset::CAP => low(CAP),
            0x04 => high(CAP),
            offset::VS => VS,
            // Both answer the mask (sections 3.1.3, 3.1.4).
            offset::INTMS | offset::INTMC => self.masked,
            offset::CC => self.configuration.0,
            offset::CSTS => u32::from(self.ready) | u32::from(self.fatal) << 1 | (self.shutdown as u32) << 2,
            offset::AQA => self.admin_attributes,
            offset::ASQ => low(self.admin_submission),
            0x2c => high(self.admin_submission),
            offset::ACQ => low(self.admin_completion),
            0x34 => high(self.admin_completion),
            _ => 0,
        }
    }

    /// Entries of the admin submission and completion queues (section 3.1.8): 2 to 4,096, or `None` for fewer.
    pub(super) const fn admin_entries(&self) -> Option<(u32, u32)> {
        let (submission, completion) = (self.admin_attributes & 0xfff, self.admin_attributes >> 16 & 0xfff);
        if submission == 0 || completion == 0 {
            return None;
        }
        Some((submission + 1, completion + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_read_the_same_in_every_width() {
        let registers = Registers {
            admin_submission: 0x1122_3344_5566_7000,
            ready: true,
            ..Registers::default()
        };
        assert_eq!(registers.read(0x28, Width::B8), 0x1122_3344_5566_7000);
        assert_eq!(registers.read(0x2c, Width::B4), 0x1122_3344);
        assert_eq!(registers.read(0x29, Width::B1), 0x70);
        assert_eq!(registers.read(0x2e, Width::B2), 0x1122);
        assert_eq!(registers.read(0x1c, Width::B4), 1);
        assert_eq!(registers.read(0x38, Width::B8), 0);
        assert_eq!(CAP & 0xffff, 2047);
    }
}
