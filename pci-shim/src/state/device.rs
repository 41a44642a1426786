//! Which device a saved function was a function of: the fields by which a guest's driver knows it.
//!
//! A function of the drive with serial FB0000000000002A is not restored on the drive FB000000000000FF, nor on one whose BAR 0 is smaller: "it was saved with
//! another drive".

use farbus_remote_dma::device::BAR_COUNT;
use farbus_remote_dma::{BarDescription, BarKind, DeviceDescription, MsixLocation};

use super::StateError;
use super::codec::{Input, Output};

/// A device, as far as a guest can tell it from others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceIdentity {
    /// For people.
    pub name: String,
    /// What tells it from others of its kind; empty where nothing does.
    pub serial: String,
    ids: [u16; 4],
    revision: u8,
    class_code: u32,
    bars: [Option<BarDescription>; BAR_COUNT],
    pin: bool,
    msi_vectors: u8,
    msix: Option<MsixLocation>,
}

impl DeviceIdentity {
    /// Of a device as its lender describes it.
    pub fn of(description: &DeviceDescription) -> Self {
        let DeviceDescription { vendor_id, device_id, subsystem_vendor_id, subsystem_id, .. } = *description;
        Self {
            name: description.name.clone(),
            serial: description.serial.clone(),
            ids: [vendor_id, device_id, subsystem_vendor_id, subsystem_id],
            revision: description.revision,
            class_code: description.class_code,
            bars: description.bars,
            pin: description.pin,
            msi_vectors: description.msi_vectors,
            msix: description.msix,
        }
    }

    /// What is different about `other`, the first thing that a guest would notice; the name is not looked at. A device without a serial number may be
    /// any of its kind.
    pub fn differs_from(&self, other: &Self) -> Option<&'static str> {
        let known = !self.serial.is_empty() && !other.serial.is_empty();
        [
            (self.ids != other.ids, "vendor, device or subsystem"),
            (self.class_code != other.class_code, "class"),
            (self.revision != other.revision, "revision"),
            (self.bars != other.bars, "BARs"),
            (self.pin != other.pin || self.msi_vectors != other.msi_vectors || self.msix != other.msix, "interrupts"),
            (known && self.serial != other.serial, "serial number"),
        ]
        .into_iter()
        .find_map(|(differs, what)| differs.then_some(what))
    }

    pub(super) fn encode(&self, out: &mut Output) {
        out.text(&self.name);
        out.text(&self.serial);
        self.ids.into_iter().for_each(|id| out.u16(id));
        out.u8(self.revision);
        out.u32(self.class_code);
        for bar in &self.bars {
            let kind = bar.map_or(0, |bar| match bar.kind {
                BarKind::Memory32 => 1,
                BarKind::Memory64 => 2,
                BarKind::Io => 3,
            });
            out.u8(kind);
            out.u64(bar.map_or(0, |bar| bar.size));
            out.u8(u8::from(bar.is_some_and(|bar| bar.prefetchable)));
        }
        out.u8(u8::from(self.pin));
        out.u8(self.msi_vectors);
        let none = MsixLocation { vectors: 0, table_bar: 0, table_offset: 0, pba_bar: 0, pba_offset: 0 };
        let msix = self.msix.unwrap_or(none);
        out.u16(msix.vectors);
        out.u8(msix.table_bar);
        out.u32(msix.table_offset);
        out.u8(msix.pba_bar);
        out.u32(msix.pba_offset);
    }

    pub(super) fn parse(mut input: Input<'_>) -> Result<Self, StateError> {
        let (name, serial) = (input.text()?, input.text()?);
        let ids = [input.u16()?, input.u16()?, input.u16()?, input.u16()?];
        let (revision, class_code) = (input.u8()?, input.u32()?);
        let mut bars = [None; BAR_COUNT];
        for bar in &mut bars {
            let (kind, size, prefetchable) = (input.u8()?, input.u64()?, input.bool()?);
            let kind = match kind {
                0 => continue,
                1 => BarKind::Memory32,
                2 => BarKind::Memory64,
                3 => BarKind::Io,
                _ => return Err(StateError::Malformed("a BAR of a kind that there is not")),
            };
            *bar = Some(BarDescription { kind, size, prefetchable });
        }
        let (pin, msi_vectors, vectors) = (input.bool()?, input.u8()?, input.u16()?);
        let (table_bar, table_offset, pba_bar, pba_offset) = (input.u8()?, input.u32()?, input.u8()?, input.u32()?);
        input.end()?;
        let msix = (vectors > 0).then_some(MsixLocation { vectors, table_bar, table_offset, pba_bar, pba_offset });
        Ok(Self { name, serial, ids, revision, class_code, bars, pin, msi_vectors, msix })
    }
}
