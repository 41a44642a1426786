//! Where a machine's memory lies in the process that uses it: regions of addresses, each from some offset of the section.
//!
//! A guest of 4 GiB has 3 GiB at 0x7f00_0000_0000 from offset 0 and 1 GiB at 0x7f20_0000_0000 from offset 3 GiB; the group at offset
//! 0xbfff_0000 is one piece, at 0x7f00_bfff_0000.

use std::ops::Range;

use thiserror::Error;

use crate::page::PAGE;

/// A stretch of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Of its first byte, in the process that uses it.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Where in the section its contents begin.
    pub offset: u64,
}

/// Why regions are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RegionError {
    /// There are none, or more than can be served.
    #[error("{0} regions: from 1 to {MOST_REGIONS} are served")]
    Count(usize),
    /// Not whole pages.
    #[error("the region at {address:#x} of {len} bytes from offset {offset} is not of whole pages of {PAGE} bytes")]
    Pages {
        /// Its address.
        address: u64,
        /// Its bytes.
        len: u64,
        /// Its offset.
        offset: u64,
    },
    /// It reaches beyond the section.
    #[error("the region at {address:#x} ends at byte {end} of the machine, which has {most}")]
    Beyond {
        /// Its address.
        address: u64,
        /// Where it ends.
        end: u64,
        /// Bytes of the section, in whole pages.
        most: u64,
    },
    /// Two of them are, partly, the same.
    #[error("the regions at {0:#x} and {1:#x} overlap")]
    Overlap(u64, u64),
}

/// Regions at most.
pub const MOST_REGIONS: usize = 4096;

/// Regions that do not overlap and lie within the section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regions {
    by_address: Vec<Region>,
    by_offset: Vec<Region>,
}

impl Regions {
    /// Those of a section of `section` bytes.
    ///
    /// # Errors
    /// See [`RegionError`].
    pub fn new(mut regions: Vec<Region>, section: u64) -> Result<Self, RegionError> {
        if regions.is_empty() || regions.len() > MOST_REGIONS {
            return Err(RegionError::Count(regions.len()));
        }
        let most = section.next_multiple_of(PAGE as u64);
        for Region { address, len, offset } in regions.iter().copied() {
            if len == 0 || [address, len, offset].iter().any(|value| value % PAGE as u64 != 0) || address.checked_add(len).is_none()
            {
                return Err(RegionError::Pages { address, len, offset });
            }
            let end = offset.saturating_add(len);
            if end > most {
                return Err(RegionError::Beyond { address, end, most });
            }
        }
        let apart = |regions: &[Region], at: fn(&Region) -> u64| match regions
            .windows(2)
            .find(|two| at(&two[0]) + two[0].len > at(&two[1]))
        {
            Some(two) => Err(RegionError::Overlap(two[0].address, two[1].address)),
            None => Ok(()),
        };
        regions.sort_unstable_by_key(|region| region.address);
        apart(&regions, |region| region.address)?;
        let by_address = regions.clone();
        regions.sort_unstable_by_key(|region| region.offset);
        apart(&regions, |region| region.offset)?;
        Ok(Self { by_address, by_offset: regions })
    }

    /// The offset of what lies at an address.
    pub fn offset(&self, address: u64) -> Option<u64> {
        let after = self.by_address.partition_point(|region| region.address <= address);
        let region = self.by_address[..after].last()?;
        let within = address - region.address;
        (within < region.len).then(|| region.offset + within)
    }

    /// Where the bytes of a range of offsets lie, in their order.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Region> {
        let first = self.by_offset.partition_point(|region| region.offset + region.len <= range.start);
        self.by_offset[first..].iter().take_while(move |region| region.offset < range.end).map(move |region| {
            let (from, to) = (range.start.max(region.offset), range.end.min(region.offset + region.len));
            Region { address: region.address + (from - region.offset), len: to - from, offset: from }
        })
    }

    /// The stretches of offsets of what lies in a range of addresses.
    pub fn offsets(&self, addresses: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.by_address.iter().filter_map(move |region| {
            let (from, to) = (addresses.start.max(region.address), addresses.end.min(region.address + region.len));
            (from < to).then(|| region.offset + (from - region.address)..region.offset + (to - region.address))
        })
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.by_address.iter().map(|region| region.len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = PAGE as u64;

    fn region(address: u64, len: u64, offset: u64) -> Region {
        Region { address: address * P, len: len * P, offset: offset * P }
    }

    #[test]
    fn a_group_over_two_regions_is_two_pieces() {
        let regions = Regions::new(vec![region(100, 10, 20), region(500, 20, 0)], 30 * P - 5).unwrap();
        let pieces: Vec<_> = regions.pieces(16 * P..32 * P).collect();
        assert_eq!(pieces, [region(516, 4, 16), region(100, 10, 20)]);
        assert_eq!(regions.offset(105 * P + 7), Some(25 * P + 7));
        assert_eq!((regions.offset(110 * P), regions.offset(99 * P), regions.offset(0)), (None, None, None));
        assert_eq!(regions.offsets(90 * P..502 * P).collect::<Vec<_>>(), [20 * P..30 * P, 0..2 * P]);
        assert_eq!(regions.bytes(), 30 * P);
    }

    #[test]
    fn regions_that_overlap_or_reach_beyond_the_machine_are_refused() {
        let refused = |regions: Vec<Region>| Regions::new(regions, 30 * P).unwrap_err();
        assert_eq!(refused(vec![]), RegionError::Count(0));
        assert!(matches!(refused(vec![region(1, 1, 0); 5000]), RegionError::Count(5000)));
        assert!(matches!(refused(vec![region(1, 31, 0)]), RegionError::Beyond { .. }));
        assert!(matches!(refused(vec![region(1, 2, 29)]), RegionError::Beyond { .. }));
        assert!(matches!(refused(vec![region(1, 2, u64::MAX / P)]), RegionError::Beyond { .. }));
        assert!(matches!(refused(vec![region(1, 0, 0)]), RegionError::Pages { .. }));
        assert!(matches!(refused(vec![Region { address: 5, len: P, offset: 0 }]), RegionError::Pages { .. }));
        assert!(matches!(refused(vec![Region { address: u64::MAX - P + 1, len: P, offset: 0 }]), RegionError::Pages { .. }));
        assert!(matches!(refused(vec![region(1, 4, 0), region(4, 4, 10)]), RegionError::Overlap(..)), "addresses");
        assert!(matches!(refused(vec![region(1, 4, 0), region(9, 4, 3)]), RegionError::Overlap(..)), "offsets");
    }
}
