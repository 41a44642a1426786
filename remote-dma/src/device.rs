//! What a lender says of its device once, at the start: identity, BARs, interrupts, registers that never change.
//!
//! The built-in NVMe controller describes itself as class 0x010802 with a 16 KiB BAR0, 65 MSI-X vectors whose table lies at BAR0 + 0x2000,
//! and eight constant bytes at BAR0 + 0 (CAP), which the borrower therefore answers without asking.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// BARs of a type-0 function.
pub const BAR_COUNT: usize = 6;
/// The most MSI-X vectors that a function can have (PCIe 5.0, section 7.7.2.2: table size is 11 bits).
pub const MAX_MSIX_VECTORS: u16 = 2048;
/// The largest BAR that is lent, in bytes: 64 GiB.
pub const MAX_BAR_SIZE: u64 = 64 << 30;
/// The most constant bytes that one description may hold.
pub const MAX_CONSTANT_BYTES: usize = 4096;

/// The address space a BAR asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BarKind {
    /// 32-bit memory space.
    Memory32,
    /// 64-bit memory space; takes the next BAR's register too.
    Memory64,
    /// I/O space.
    Io,
}

/// One BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BarDescription {
    /// Address space.
    pub kind: BarKind,
    /// Bytes; a power of two, at least 16 (memory) or 4 (I/O).
    pub size: u64,
    /// Reads have no side effects and writes may be merged.
    pub prefetchable: bool,
}

/// Where a function keeps its MSI-X table and pending bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixLocation {
    /// Vectors, 1 to 2,048.
    pub vectors: u16,
    /// BAR of the table.
    pub table_bar: u8,
    /// Offset of the table in its BAR; a multiple of 8. 16 bytes a vector.
    pub table_offset: u32,
    /// BAR of the pending-bit array.
    pub pba_bar: u8,
    /// Offset of the pending-bit array; a multiple of 8. One bit a vector, in 8-byte words.
    pub pba_offset: u32,
}

/// Register bytes that never change while the device is lent, and whose reading has no effect: answered at the borrower.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Constant {
    /// BAR, 0 to 5.
    pub bar: u8,
    /// First byte in the BAR.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// A device as the lender offers it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDescription {
    /// For people: "nvme disk.img", say.
    pub name: String,
    /// Configuration space 0x00.
    pub vendor_id: u16,
    /// Configuration space 0x02.
    pub device_id: u16,
    /// Configuration space 0x2c.
    pub subsystem_vendor_id: u16,
    /// Configuration space 0x2e.
    pub subsystem_id: u16,
    /// Configuration space 0x08.
    pub revision: u8,
    /// Configuration space 0x09, 24 bits: base class, subclass, programming interface.
    pub class_code: u32,
    /// The BARs; the entry after a 64-bit one is `None`.
    pub bars: [Option<BarDescription>; BAR_COUNT],
    /// Has an INTx pin (always INTA#).
    pub pin: bool,
    /// MSI vectors: 0 or a power of two up to 32.
    pub msi_vectors: u8,
    /// MSI-X, where the device has it.
    pub msix: Option<MsixLocation>,
    /// Highest address bit count of its DMA, 1 to 64 (edu: 28).
    pub dma_bits: u8,
    /// What may be answered without asking the device.
    pub constants: Vec<Constant>,
    /// What tells this device from others of its kind, up to 64 bytes; empty where nothing does. Saved state goes back to this device only.
    pub serial: String,
}

/// Why a description is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DescriptionError {
    /// The bytes are no description.
    #[error("the device description cannot be decoded")]
    Malformed,
    /// A field is outside its range.
    #[error("the device description is wrong: {0}")]
    Invalid(&'static str),
}

impl DeviceDescription {
    /// The bytes that travel in the hello.
    ///
    /// # Errors
    /// [`DescriptionError::Malformed`] where it cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>, DescriptionError> {
        postcard::to_allocvec(self).map_err(|_| DescriptionError::Malformed)
    }

    /// Parses and checks what a peer sent.
    ///
    /// # Errors
    /// [`DescriptionError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DescriptionError> {
        let (description, rest): (Self, _) = postcard::take_from_bytes(bytes).map_err(|_| DescriptionError::Malformed)?;
        if !rest.is_empty() {
            return Err(DescriptionError::Malformed);
        }
        description.validate()?;
        Ok(description)
    }

    /// Size in bytes of `bar`; `None` where the device has no such BAR.
    pub fn bar_size(&self, bar: u8) -> Option<u64> {
        self.bars.get(usize::from(bar))?.as_ref().map(|bar| bar.size)
    }

    /// Whether `len` bytes from `offset` lie in `bar`.
    pub fn contains(&self, bar: u8, offset: u64, len: u64) -> bool {
        self.bar_size(bar).is_some_and(|size| offset.checked_add(len).is_some_and(|end| end <= size))
    }

    /// Checks every range that the fields' documentation states.
    ///
    /// # Errors
    /// [`DescriptionError::Invalid`] names the first that does not hold.
    pub fn validate(&self) -> Result<(), DescriptionError> {
        let require = |holds: bool, what| if holds { Ok(()) } else { Err(DescriptionError::Invalid(what)) };
        require(self.name.len() <= 256, "a name of more than 256 bytes")?;
        require(self.serial.len() <= 64, "a serial number of more than 64 bytes")?;
        require(self.class_code <= 0xff_ffff, "a class code of more than 24 bits")?;
        require((1..=64).contains(&self.dma_bits), "dma address bits outside 1 to 64")?;
        require(
            self.msi_vectors == 0 || (self.msi_vectors.is_power_of_two() && self.msi_vectors <= 32),
            "msi vectors not 0 or a power of two up to 32",
        )?;
        for (index, bar) in self.bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let smallest = if bar.kind == BarKind::Io { 4 } else { 16 };
            let largest = match bar.kind {
                BarKind::Io => 256,
                BarKind::Memory32 => 1 << 31,
                BarKind::Memory64 => MAX_BAR_SIZE,
            };
            require(bar.size.is_power_of_two() && (smallest..=largest).contains(&bar.size), "a bar size that cannot be decoded")?;
            if bar.kind == BarKind::Memory64 {
                require(self.bars.get(index + 1).is_some_and(Option::is_none), "a 64-bit bar without room for its upper half")?;
            }
        }
        if let Some(msix) = &self.msix {
            require((1..=MAX_MSIX_VECTORS).contains(&msix.vectors), "msi-x vectors outside 1 to 2048")?;
            require(msix.table_offset % 8 == 0 && msix.pba_offset % 8 == 0, "an msi-x table that is not aligned to 8 bytes")?;
            let (table_len, pba_len) = (u64::from(msix.vectors) * 16, u64::from(msix.vectors).div_ceil(64) * 8);
            require(self.contains(msix.table_bar, u64::from(msix.table_offset), table_len), "an msi-x table outside its bar")?;
            require(
                self.contains(msix.pba_bar, u64::from(msix.pba_offset), pba_len),
                "an msi-x pending-bit array outside its bar",
            )?;
            let (table, pba) = (u64::from(msix.table_offset), u64::from(msix.pba_offset));
            let apart = msix.table_bar != msix.pba_bar || table + table_len <= pba || pba + pba_len <= table;
            require(apart, "an msi-x table that overlaps its pending-bit array")?;
        }
        require(
            self.constants.iter().map(|c| c.bytes.len()).sum::<usize>() <= MAX_CONSTANT_BYTES,
            "more than 4096 constant bytes",
        )?;
        for constant in &self.constants {
            require(self.contains(constant.bar, constant.offset, constant.bytes.len() as u64), "constant bytes outside their bar")?;
        }
        Ok(())
    }
}
