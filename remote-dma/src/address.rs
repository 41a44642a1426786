//! Addresses as types, and the width of an access as an enum that is parsed once at the edge.
//!
//! `BarAddress { bar: 0, offset: 0x1018 }` with `Width::B4` is submission queue 3's tail doorbell of an NVMe controller;
//! `Iova(0x1_0450_0400)` is where its slot 16 lies, as the device addresses memory.

use std::fmt;

/// An address as the device uses it in DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

impl Iova {
    /// The address `bytes` further on; `None` past the end of the address space.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iova {:#x}", self.0)
    }
}

/// A physical address as the guest's CPU uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestAddress(pub u64);

/// A place in a device's BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BarAddress {
    /// Which BAR, 0 to 5.
    pub bar: u8,
    /// Bytes from its start.
    pub offset: u64,
}

impl fmt::Display for BarAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BAR{} + {:#x}", self.bar, self.offset)
    }
}

/// How many bytes one access moves (PCIe 5.0, section 2.2.5: first and last DW byte enables limit what a CPU access can be).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Width {
    /// One byte.
    B1,
    /// Two bytes.
    B2,
    /// Four bytes.
    B4,
    /// Eight bytes.
    B8,
}

impl Width {
    /// From a byte count; `None` for anything but 1, 2, 4 and 8.
    pub const fn from_bytes(count: u64) -> Option<Self> {
        match count {
            1 => Some(Self::B1),
            2 => Some(Self::B2),
            4 => Some(Self::B4),
            8 => Some(Self::B8),
            _ => None,
        }
    }

    /// Bytes moved: 1, 2, 4 or 8.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::B1 => 1,
            Self::B2 => 2,
            Self::B4 => 4,
            Self::B8 => 8,
        }
    }

    /// All ones in this width: what a read from a dead slot answers.
    pub const fn all_ones(self) -> u64 {
        match self {
            Self::B1 => 0xff,
            Self::B2 => 0xffff,
            Self::B4 => 0xffff_ffff,
            Self::B8 => u64::MAX,
        }
    }

    /// `value` cut to this width.
    pub const fn truncate(self, value: u64) -> u64 {
        value & self.all_ones()
    }

    /// Whether an access of this width at `offset` is naturally aligned.
    pub const fn aligned(self, offset: u64) -> bool {
        offset.is_multiple_of(self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_four_widths_of_the_bus_exist() {
        for count in 0..100 {
            assert_eq!(Width::from_bytes(count).map(Width::bytes), [1, 2, 4, 8].contains(&count).then_some(count));
        }
        assert_eq!(Width::B2.truncate(0x1_2345), 0x2345);
        assert!(!Width::B4.aligned(0x1002));
    }
}
