//! What a server says, as checked values: pure functions of bytes, for the backend and for fuzzing.
//!
//! A `VFIO_USER_VERSION` reply with `{"capabilities":{"max_msg_fds":8}}` allows eight eventfds a message; a region's info whose sparse area
//! begins at 0x1000 and is 0x1000 long names the second page of an 8 KiB region; the same area in a region of 4 KiB is refused.

use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::vfio_user::version::capabilities;
use crate::vfio_user::wire::{DmaAccess, MAX_DATA_BYTES, MAX_MESSAGE_FDS, PAGE_BYTES, RegionAccess, RegionInfo};

/// `VFIO_REGION_INFO_FLAG_MMAP`.
pub const REGION_MMAP: u32 = 4;
/// `VFIO_REGION_INFO_FLAG_CAPS`.
pub const REGION_CAPS: u32 = 8;
/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
const SPARSE_MMAP: u16 = 1;
/// The most areas of one region that are looked at; and the most capabilities.
pub const MAX_AREAS: usize = 64;
/// The longest `DEVICE_GET_REGION_INFO` reply that is asked for, in bytes.
pub const MAX_REGION_INFO: u32 = 4096;

/// What the server allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// Descriptors in one message, at least 1.
    pub max_fds: usize,
    /// Bytes of one transfer, at least 8.
    pub max_data: u32,
    /// `DMA_MAP`s at a time.
    pub max_maps: u64,
}

/// Reads the data of a server's `VERSION`; the specification's defaults where it names nothing.
///
/// # Errors
/// What is wrong with it.
pub fn server_limits(data: &[u8]) -> Result<ServerLimits, &'static str> {
    let offered = capabilities(data).map_err(|_| "its version data are no JSON object that ends with a NUL")?;
    let number = |name: &str, default: u64| match offered.get(name) {
        None => Ok(default),
        Some(value) => value.as_u64().ok_or("a capability of its version is no number"),
    };
    let max_fds = number("max_msg_fds", 1)?;
    let max_data = number("max_data_xfer_size", u64::from(MAX_DATA_BYTES))?;
    let max_maps = number("max_dma_maps", 65_535)?;
    let pages = number("pgsizes", PAGE_BYTES)?;
    if max_fds == 0 {
        return Err("it takes no descriptors, so nobody would hear its interrupts");
    }
    if max_data < 8 {
        return Err("it moves less than 8 bytes at a time");
    }
    if pages & PAGE_BYTES == 0 {
        return Err("it cannot map pages of 4 KiB");
    }
    Ok(ServerLimits {
        max_fds: usize::try_from(max_fds).unwrap_or(MAX_MESSAGE_FDS).min(MAX_MESSAGE_FDS),
        max_data: u32::try_from(max_data).unwrap_or(MAX_DATA_BYTES).min(MAX_DATA_BYTES),
        max_maps,
    })
}

/// A part of a region that may be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// First byte in the region; a multiple of 4,096.
    pub offset: u64,
    /// Bytes; a multiple of 4,096.
    pub len: u64,
}

/// A region as its server described it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 where there is none.
    pub size: u64,
    /// As the server set them.
    pub flags: u32,
    /// Where in the file beside the reply the region begins.
    pub file_offset: u64,
    /// What may be mapped: apart from each other, inside the region.
    pub areas: Vec<Area>,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
struct CapHeader {
    id: u16,
    _version: u16,
    next: u32,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
struct SparseHeader {
    areas: u32,
    _reserved: u32,
}

/// How many bytes the server would answer, where that is more than `asked`.
pub fn more_region_info(body: &[u8], asked: u32) -> Option<u32> {
    let (info, _) = RegionInfo::read_from_prefix(body).ok()?;
    (info.argsz > asked).then_some(info.argsz)
}

/// Reads the body of a `DEVICE_GET_REGION_INFO` reply for `index`.
///
/// # Errors
/// What is wrong with it.
pub fn region(body: &[u8], index: u32) -> Result<Region, &'static str> {
    let (info, _) = RegionInfo::read_from_prefix(body).map_err(|_| "its answer about a region is too short")?;
    if info.index != index {
        return Err("it answered about another region");
    }
    let mut region = Region { size: info.size, flags: info.flags, file_offset: info.offset, areas: Vec::new() };
    if info.flags & REGION_MMAP == 0 || info.size == 0 {
        return Ok(region);
    }
    if info.offset.checked_add(info.size).is_none() || !info.offset.is_multiple_of(PAGE_BYTES) {
        return Err("a region's place in its file cannot be mapped");
    }
    let mut sparse = false;
    let mut at = if info.flags & REGION_CAPS == 0 { 0 } else { info.cap_offset as usize };
    for _ in 0..MAX_AREAS {
        if at == 0 {
            break;
        }
        let cap = body.get(at..).ok_or("a region's capability lies outside of the answer")?;
        let (header, rest) = CapHeader::read_from_prefix(cap).map_err(|_| "a region's capability is cut off")?;
        if header.id == SPARSE_MMAP {
            sparse = true;
            let (count, list) = SparseHeader::read_from_prefix(rest).map_err(|_| "a region's list of areas is cut off")?;
            areas(&mut region, count.areas as usize, list)?;
        }
        let next = header.next as usize;
        if next != 0 && next <= at {
            return Err("a region's capabilities go round in a circle");
        }
        at = next;
    }
    if at != 0 {
        return Err("a region has too many capabilities");
    }
    if !sparse {
        // Without the capability all of it may be mapped, as far as it is whole pages.
        region.areas.push(Area { offset: 0, len: info.size - info.size % PAGE_BYTES });
    }
    Ok(region)
}

fn areas(region: &mut Region, count: usize, list: &[u8]) -> Result<(), &'static str> {
    if count > MAX_AREAS {
        return Err("a region has too many areas that can be mapped");
    }
    let mut list = list;
    for _ in 0..count {
        let ([offset, len], rest) = <[u64; 2]>::read_from_prefix(list).map_err(|_| "a region's list of areas is cut off")?;
        list = rest;
        let end = offset.checked_add(len).filter(|end| *end <= region.size).ok_or("an area lies outside of its region")?;
        if !offset.is_multiple_of(PAGE_BYTES) || !len.is_multiple_of(PAGE_BYTES) {
            return Err("an area is no whole pages");
        }
        if region.areas.iter().any(|area| offset < area.offset + area.len && area.offset < end) {
            return Err("two areas of a region overlap");
        }
        if len > 0 {
            region.areas.push(Area { offset, len });
        }
    }
    Ok(())
}

/// The value in a `REGION_READ` reply of `count` bytes, at most 8; `None` where it does not fit the question.
pub fn read_value(body: &[u8], asked: &RegionAccess) -> Option<u64> {
    let (access, data) = RegionAccess::read_from_prefix(body).ok()?;
    let mut bytes = [0; 8];
    bytes.get_mut(..asked.count as usize).filter(|room| room.len() == data.len())?.copy_from_slice(data);
    (access == *asked).then(|| u64::from_le_bytes(bytes))
}

/// What a server asks of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRequest<'a> {
    /// First DMA address.
    pub address: u64,
    /// Bytes, 1 to the limit.
    pub len: u32,
    /// What is written; `None` for a read.
    pub data: Option<&'a [u8]>,
}

/// A `DMA_READ` (`write` false) or `DMA_WRITE` of at most `limit` bytes; `None` for one that makes no sense.
pub fn dma_request(body: &[u8], write: bool, limit: u32) -> Option<DmaRequest<'_>> {
    let (access, data) = DmaAccess::read_from_prefix(body).ok()?;
    let len = u32::try_from(access.count).ok().filter(|len| (1..=limit).contains(len))?;
    access.address.checked_add(access.count - 1)?;
    let fits = if write { data.len() == len as usize } else { data.is_empty() };
    fits.then_some(DmaRequest { address: access.address, len, data: write.then_some(data) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn info(size: u64, flags: u32, cap_offset: u32, rest: &[u8]) -> Vec<u8> {
        let info = RegionInfo { argsz: 32 + rest.len() as u32, flags, index: 2, cap_offset, size, offset: 0x1000 };
        [info.as_bytes(), rest].concat()
    }

    fn sparse(next: u32, areas: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = [1_u16.to_le_bytes(), 1_u16.to_le_bytes()].concat();
        bytes.extend(next.to_le_bytes());
        bytes.extend((areas.len() as u64).to_le_bytes());
        areas.iter().for_each(|(offset, len)| bytes.extend([*offset, *len].as_bytes()));
        bytes
    }

    #[test]
    fn areas_lie_apart_inside_their_region_or_are_refused() {
        let parse = |size, areas: &[(u64, u64)]| region(&info(size, 0xf, 32, &sparse(0, areas)), 2);
        assert_eq!(parse(0x2000, &[(0x1000, 0x1000)]).unwrap().areas, [Area { offset: 0x1000, len: 0x1000 }]);
        assert!(parse(0x1000, &[(0x1000, 0x1000)]).is_err());
        assert!(parse(0x4000, &[(0x1000, 0x2000), (0x2000, 0x1000)]).is_err());
        assert!(parse(0x4000, &[(0x1001, 0x1000)]).is_err());
        assert!(parse(0x4000, &[(u64::MAX - 0xfff, 0x1000)]).is_err());
        assert!(region(&info(0x2000, 0xf, 32, &sparse(0, &[(0, 0x1000)])[..20]), 2).is_err());
        assert_eq!(region(&info(0x2000, 7, 0, &[]), 2).unwrap().areas, [Area { offset: 0, len: 0x2000 }]);
        assert_eq!(region(&info(0x2000, 3, 0, &[]), 2).unwrap().areas, []);
    }

    #[test]
    fn capabilities_that_go_round_or_lie_outside_are_refused() {
        assert!(region(&info(0x2000, 0xf, 32, &sparse(32, &[])), 2).is_err());
        assert!(region(&info(0x2000, 0xf, 4000, &[]), 2).is_err());
        assert!(region(&info(0x2000, 0xf, 32, &[0; 7]), 2).is_err());
        assert!(region(&info(0x2000, 0, 0, &[]), 3).is_err());
    }

    #[test]
    fn limits_are_the_defaults_or_what_was_said() {
        assert_eq!(server_limits(b"").unwrap(), ServerLimits { max_fds: 1, max_data: 1 << 20, max_maps: 65_535 });
        let said = server_limits(b"{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":4096}}\0").unwrap();
        assert_eq!((said.max_fds, said.max_data), (8, 4096));
        for wrong in [
            &b"{"[..],
            b"{\"capabilities\":{\"max_msg_fds\":0}}\0",
            b"{\"capabilities\":{\"max_data_xfer_size\":4}}\0",
            b"{\"capabilities\":{\"pgsizes\":8192}}\0",
            b"{\"capabilities\":{\"max_msg_fds\":-1}}\0",
        ] {
            assert!(server_limits(wrong).is_err());
        }
    }

    #[test]
    fn a_request_is_whole_and_within_the_limit_or_none() {
        let body = |address: u64, count: u64, data: usize| [[address, count].as_bytes(), &vec![7; data]].concat();
        assert_eq!(dma_request(&body(0x1000, 4, 0), false, 4096).unwrap().data, None);
        assert_eq!(dma_request(&body(0x1000, 4, 4), true, 4096).unwrap().data, Some(&[7; 4][..]));
        assert_eq!(dma_request(&body(0x1000, 4, 3), true, 4096), None);
        assert_eq!(dma_request(&body(0x1000, 0, 0), false, 4096), None);
        assert_eq!(dma_request(&body(0x1000, 4097, 0), false, 4096), None);
        assert_eq!(dma_request(&body(0x1000, u64::MAX, 0), false, 4096), None);
        assert_eq!(dma_request(&body(u64::MAX, 2, 0), false, 4096), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic_a_parser(body in proptest::collection::vec(any::<u8>(), 0..300), index in 0_u32..10) {
            let _ = (region(&body, index), server_limits(&body), more_region_info(&body, 32));
            let _ = (dma_request(&body, true, 4096), dma_request(&body, false, 4096));
            let _ = read_value(&body, &RegionAccess { offset: 0, region: 0, count: 4 });
        }
    }
}
