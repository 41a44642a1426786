//! What Identify answers, reduced to what the driver needs (NVMe 1.4, figures 247 and 245).
//!
//! A namespace of 524,288 blocks whose active LBA format says 9 holds 256 MiB in blocks of 512 bytes.

use super::error::DriverError;

/// Bytes of an Identify data structure.
pub const IDENTIFY_BYTES: usize = 4096;

/// The controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Serial number, without padding.
    pub serial: String,
    /// Model number, without padding.
    pub model: String,
    /// Firmware revision, without padding.
    pub firmware: String,
    /// Bytes of the longest transfer in pages of 4 KiB; `None` where the controller states no limit.
    pub max_transfer: Option<u64>,
    /// A volatile write cache is present: what was written survives a power loss only after a flush.
    pub volatile_write_cache: bool,
}

impl Identity {
    pub(super) fn parse(data: &[u8; IDENTIFY_BYTES], min_page_bytes: u64) -> Self {
        let text = |from: usize, to: usize| String::from_utf8_lossy(&data[from..to]).trim().to_owned();
        let mdts = u32::from(data[77]);
        Self {
            serial: text(4, 24),
            model: text(24, 64),
            firmware: text(64, 72),
            // Shifts that leave 64 bits are no limit in practice.
            max_transfer: (mdts != 0).then(|| min_page_bytes.checked_shl(mdts)).flatten(),
            volatile_write_cache: data[525] & 1 != 0,
        }
    }
}

/// A namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its identifier.
    pub id: u32,
    /// Size in blocks; at least 1.
    pub blocks: u64,
    /// Bytes of a block: a power of two from 512 to 4,096.
    pub block_bytes: u64,
}

impl Namespace {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks * self.block_bytes
    }

    pub(super) fn parse(id: u32, data: &[u8; IDENTIFY_BYTES]) -> Result<Self, DriverError> {
        let mut size = [0; 8];
        size.copy_from_slice(&data[..8]);
        let blocks = u64::from_le_bytes(size);
        // FLBAS bits 3:0 name one of the 16 formats at byte 128.
        let format = 128 + 4 * usize::from(data[26] & 0xf);
        let metadata = u16::from_le_bytes([data[format], data[format + 1]]);
        let shift = u32::from(data[format + 2]);
        if !(9..=12).contains(&shift) {
            return Err(DriverError::Unsupported("its blocks are not 512 to 4096 bytes"));
        }
        if metadata != 0 {
            return Err(DriverError::Unsupported("its blocks carry metadata"));
        }
        let block_bytes = 1 << shift;
        if blocks == 0 || blocks.checked_mul(block_bytes).is_none() {
            return Err(DriverError::Unsupported("its namespace has no valid size"));
        }
        Ok(Self { id, blocks, block_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_active_format_decides_the_block_size() {
        let mut data = [0; IDENTIFY_BYTES];
        data[..8].copy_from_slice(&1000_u64.to_le_bytes());
        data[26] = 0x11;
        data[128 + 2] = 9;
        data[128 + 4 + 2] = 12;
        let namespace = Namespace::parse(1, &data).unwrap();
        assert_eq!((namespace.blocks, namespace.block_bytes, namespace.bytes()), (1000, 4096, 4_096_000));
        data[128 + 4 + 2] = 63;
        assert!(Namespace::parse(1, &data).is_err());
        data[128 + 4 + 2] = 9;
        data[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(Namespace::parse(1, &data).is_err(), "a size that overflows must not become a small one");
    }

    #[test]
    fn no_limit_is_not_a_limit_of_one_page() {
        let mut data = [0; IDENTIFY_BYTES];
        assert_eq!(Identity::parse(&data, 4096).max_transfer, None);
        data[77] = 5;
        data[4..24].copy_from_slice(b"ABC                 ");
        let identity = Identity::parse(&data, 4096);
        assert_eq!((identity.max_transfer, identity.serial.as_str()), (Some(128 << 10), "ABC"));
    }
}
