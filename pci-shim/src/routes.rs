//! Which place of a BAR is the function's own, which never changes, and which is the device's.
//!
//! For the built-in NVMe controller BAR0 + 0x2030 is vector 3's entry of the MSI-X table, BAR0 + 0x0 is CAP, a constant, and
//! BAR0 + 0x1018 is the device's.

use farbus_remote_dma::device::BAR_COUNT;
use farbus_remote_dma::{BarAddress, BarDescription, BarKind, DeviceDescription, Width};

use crate::access::AccessError;
use crate::interrupt::msix::Msix;

/// Who answers an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// The MSI-X table, this many bytes from its start.
    Table(u64),
    /// The MSI-X pending-bit array, this many bytes from its start.
    Pending(u64),
    /// Bytes that never change: their value.
    Constant(u64),
    /// The device, or its profile.
    Device,
}

#[derive(Clone, Copy, Debug)]
struct Range {
    bar: u8,
    start: u64,
    len: u64,
}

impl Range {
    fn offset_of(&self, at: BarAddress) -> Option<u64> {
        let offset = at.offset.checked_sub(self.start)?;
        (self.bar == at.bar && offset < self.len).then_some(offset)
    }
}

/// The BARs of a function and what lies in them.
#[derive(Clone, Debug)]
pub(crate) struct Routes {
    bars: [Option<BarDescription>; BAR_COUNT],
    msix: Option<(Range, Range)>,
    constants: Vec<(Range, Vec<u8>)>,
}

impl Routes {
    pub(crate) fn new(description: &DeviceDescription, msix: Option<&Msix>) -> Self {
        let msix = description.msix.as_ref().zip(msix).map(|(location, msix)| {
            let table = Range {
                bar: location.table_bar,
                start: u64::from(location.table_offset),
                len: msix.table_bytes(),
            };
            let pending = Range {
                bar: location.pba_bar,
                start: u64::from(location.pba_offset),
                len: msix.pending_bytes(),
            };
            (table, pending)
        });
        let constants = description.constants.iter().map(|constant| {
            let range = Range {
                bar: constant.bar,
                start: constant.offset,
                len: constant.bytes.len() as u64,
            };
            (range, constant.bytes.clone())
        });
        Self {
            bars: description.bars,
            msix,
            constants: constants.collect(),
        }
    }

    /// Whether hardware could make this access at all.
    ///
    /// # Errors
    /// Any [`AccessError`] but that of configuration space.
    pub(crate) fn check(&self, at: BarAddress, width: Width) -> Result<(), AccessError> {
        let Some(Some(bar)) = self.bars.get(usize::from(at.bar)) else {
            return Err(AccessError::NoBar { bar: at.bar });
        };
        if at.offset.checked_add(width.bytes()).is_none_or(|end| end > bar.size) {
            let size = bar.size;
            return Err(AccessError::PastEnd { at, width, size });
        }
        if !width.aligned(at.offset) {
            return Err(AccessError::Misaligned { at, width });
        }
        if bar.kind == BarKind::Io && width == Width::B8 {
            return Err(AccessError::TooWide { at });
        }
        Ok(())
    }

    /// Who answers a read of a checked place.
    pub(crate) fn of_read(&self, at: BarAddress, width: Width) -> Route {
        match self.of_write(at) {
            Route::Device => self.constant(at, width).map_or(Route::Device, Route::Constant),
            local => local,
        }
    }

    /// Who takes a write of a checked place. Tables start and end at multiples of 8, so an aligned access is in one or not at all.
    pub(crate) fn of_write(&self, at: BarAddress) -> Route {
        let Some((table, pending)) = &self.msix else {
            return Route::Device;
        };
        if let Some(offset) = table.offset_of(at) {
            return Route::Table(offset);
        }
        pending.offset_of(at).map_or(Route::Device, Route::Pending)
    }

    fn constant(&self, at: BarAddress, width: Width) -> Option<u64> {
        self.constants.iter().find_map(|(range, bytes)| {
            let start = range.offset_of(at)? as usize;
            let bytes = bytes.get(start..start.checked_add(width.bytes() as usize)?)?;
            Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
        })
    }
}
