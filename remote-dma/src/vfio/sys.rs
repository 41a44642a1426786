//! The calls to VFIO that its crate does not offer, or whose errors it does not hand out: what the IOMMU can map, maps with exactly the
//! permission asked for, unmaps, and the device's reset.
//!
//! A window of 512 MiB at 0 that the device may write is one `VFIO_IOMMU_MAP_DMA` with both flags (`<linux/vfio.h>`, "IOMMU API"); when
//! `unmap` of it returns, no DMA of the device reaches the memory any more.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use farbus_transport::Access;
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES,
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};
use vfio_ioctls::{VfioContainer, VfioDevice};

use crate::address::Iova;

/// `_IO(VFIO_TYPE, VFIO_BASE + n)`.
const fn request(n: libc::c_ulong) -> libc::c_ulong {
    (b';' as libc::c_ulong) << 8 | (100 + n)
}
const DEVICE_RESET: libc::c_ulong = request(11);
const IOMMU_GET_INFO: libc::c_ulong = request(12);
const IOMMU_MAP_DMA: libc::c_ulong = request(13);
const IOMMU_UNMAP_DMA: libc::c_ulong = request(14);

/// Bytes asked for at once: room for some hundred ranges.
const INFO_BYTES: usize = 8192;

/// What an IOMMU can map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Bytes of its smallest page.
    pub(super) page: u64,
    /// The addresses that devices may use, first and last; empty where the kernel does not say.
    pub(super) ranges: Vec<(u64, u64)>,
}

impl Limits {
    /// Whether all of a range can be mapped.
    pub(super) fn allow(&self, iova: Iova, len: u64) -> bool {
        let Some(last) = len.checked_sub(1).and_then(|more| iova.0.checked_add(more)) else { return false };
        self.ranges.is_empty() || self.ranges.iter().any(|(first, end)| *first <= iova.0 && last <= *end)
    }

    /// From what `VFIO_IOMMU_GET_INFO` wrote: `argsz`, `flags`, `iova_pgsizes`, `cap_offset`, and from there a chain of capabilities.
    fn parse(bytes: &[u8]) -> Self {
        let u32_at = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
        let u64_at = |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes);
        let flags = u32_at(4);
        let sizes = if flags & VFIO_IOMMU_INFO_PGSIZES != 0 { u64_at(8) } else { 0 };
        // Where it says nothing, as where it says less than the processor's pages, those.
        let page = if sizes == 0 { 12 } else { sizes.trailing_zeros().clamp(12, 30) };
        let mut limits = Self { page: 1 << page, ranges: Vec::new() };
        let mut at = if flags & VFIO_IOMMU_INFO_CAPS != 0 { u32_at(16) as usize } else { 0 };
        while at != 0 && at < bytes.len() {
            // The header: a number of 16 bits, a version, and where the next one is.
            if u32_at(at) & 0xffff == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
                let count = (u32_at(at + 8) as usize).min(INFO_BYTES / 16);
                limits.ranges = (0..count).map(|n| (u64_at(at + 16 + 16 * n), u64_at(at + 24 + 16 * n))).collect();
            }
            let next = u32_at(at + 4) as usize;
            // Forwards only, so that it ends.
            at = if next > at { next } else { 0 };
        }
        limits
    }
}

/// The address space that the devices of a container see.
pub(super) struct Iommu {
    container: Arc<VfioContainer>,
    limits: Limits,
}

impl Iommu {
    /// The one of a container that has a device already.
    pub(super) fn new(container: Arc<VfioContainer>) -> io::Result<Self> {
        let mut info = vec![0_u64; INFO_BYTES / 8];
        if let Some(first) = info.first_mut() {
            *first = INFO_BYTES as u64;
        }
        // SAFETY: the kernel writes at most `argsz` bytes, the first 4 of the buffer, and the buffer has INFO_BYTES, just set there.
        let done = unsafe { libc::ioctl(container.as_raw_fd(), IOMMU_GET_INFO, info.as_mut_ptr()) };
        answered(done)?;
        let bytes: Vec<u8> = info.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Ok(Self { container, limits: Limits::parse(&bytes) })
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Lets the device reach `len` bytes of this process from `address` at `iova`; all are multiples of the IOMMU's page.
    ///
    /// # Safety
    /// The bytes must stay mapped until [`Iommu::unmap`] of the range succeeded, and must be memory that others may write at any time.
    pub(super) unsafe fn map(&self, iova: Iova, len: u64, address: *mut u8, access: Access) -> io::Result<()> {
        let mut flags = 0;
        if access.read {
            flags |= VFIO_DMA_MAP_FLAG_READ;
        }
        if access.write {
            flags |= VFIO_DMA_MAP_FLAG_WRITE;
        }
        let argsz = size_of::<vfio_iommu_type1_dma_map>() as u32;
        let map = vfio_iommu_type1_dma_map { argsz, flags, vaddr: address as u64, iova: iova.0, size: len };
        // SAFETY: the kernel reads `argsz` bytes of the structure; the caller answers for the memory.
        answered(unsafe { libc::ioctl(self.container.as_raw_fd(), IOMMU_MAP_DMA, &raw const map) })
    }

    /// Ends a map of exactly this range: no DMA reaches its memory when this has returned.
    pub(super) fn unmap(&self, iova: Iova, len: u64) -> io::Result<()> {
        let argsz = size_of::<vfio_iommu_type1_dma_unmap>() as u32;
        let mut unmap = vfio_iommu_type1_dma_unmap { argsz, flags: 0, iova: iova.0, size: len, ..Default::default() };
        // SAFETY: the kernel reads and writes `argsz` bytes of the structure.
        answered(unsafe { libc::ioctl(self.container.as_raw_fd(), IOMMU_UNMAP_DMA, &raw mut unmap) })?;
        if unmap.size != len {
            return Err(io::Error::other(format!("{:#x} of {len:#x} bytes were unmapped", unmap.size)));
        }
        Ok(())
    }
}

/// Resets a device, as thoroughly as its slot lets the kernel.
pub(super) fn reset(device: &VfioDevice) -> io::Result<()> {
    // SAFETY: the call takes no argument.
    answered(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_RESET) })
}

fn answered(done: libc::c_int) -> io::Result<()> {
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel writes it for VT-d: 4 KiB, 2 MiB and 1 GiB pages, and all but the MSI range up to 39 bits.
    fn vt_d() -> Vec<u8> {
        let mut bytes = vec![0; 88];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &88_u32.to_ne_bytes());
        put(4, &(VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS).to_ne_bytes());
        put(8, &0x4020_1000_u64.to_ne_bytes());
        put(16, &24_u32.to_ne_bytes());
        put(24, &1_u32.to_ne_bytes());
        put(32, &2_u32.to_ne_bytes());
        for (n, word) in [0, 0xfedf_ffff, 0xfef0_0000, 0x7f_ffff_ffff_u64].into_iter().enumerate() {
            put(40 + 8 * n, &word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn the_ranges_of_an_iommu_are_what_it_can_map() {
        let limits = Limits::parse(&vt_d());
        assert_eq!(limits, Limits { page: 4096, ranges: vec![(0, 0xfedf_ffff), (0xfef0_0000, 0x7f_ffff_ffff)] });
        assert!(limits.allow(Iova(0), 0xfee0_0000) && limits.allow(Iova(0x1_0000_0000), 4096));
        for (iova, len) in [(0, 0xfee0_0001), (0xfee0_0000, 4096), (0x7f_ffff_f000, 8192), (0, 0), (u64::MAX, 2)] {
            assert!(!limits.allow(Iova(iova), len), "{iova:#x} + {len:#x}");
        }
    }

    #[test]
    fn a_kernel_that_says_nothing_of_ranges_is_asked_map_by_map() {
        let mut bytes = vt_d();
        bytes[4] = VFIO_IOMMU_INFO_PGSIZES as u8;
        let limits = Limits::parse(&bytes);
        assert!(limits.ranges.is_empty() && limits.allow(Iova(0xfee0_0000), 4096) && !limits.allow(Iova(u64::MAX), 2));
        assert_eq!(Limits::parse(&[]).page, 4096);
    }

    #[test]
    fn a_chain_of_capabilities_that_runs_in_a_circle_ends() {
        let mut bytes = vt_d();
        bytes[28..32].copy_from_slice(&24_u32.to_ne_bytes());
        assert_eq!(Limits::parse(&bytes).ranges.len(), 2);
    }
}
