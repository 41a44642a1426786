//! A device's BARs as this process reaches them: one volatile access of exactly the guest's width, or a system call where the kernel maps nothing.
//!
//! The store of 17 to BAR0 + 0x1018 is one `mov` of 4 bytes to the mapped BAR; an I/O BAR's registers, which cannot be mapped, are read and
//! written through the device's descriptor, and are all ones where that fails, as from a dead slot.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags};
use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_MMAP;
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};

use crate::address::Width;

/// A mapped part of a BAR.
struct Mapping {
    /// Where in the BAR it begins.
    start: u64,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: device memory has no thread affinity, and is only accessed by the volatile operations below.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(device: &VfioDevice, region_offset: u64, start: u64, len: u64) -> io::Result<Self> {
        // SAFETY: the device keeps its descriptor open, and this borrow of it ends with this function.
        let fd = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
        let size = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing of ours.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), size, protection, MapFlags::SHARED, fd, region_offset + start) }?;
        Ok(Self { start, base: NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?, len: size })
    }

    /// Where `width` bytes at `offset` of the BAR are mapped, if they are, and are aligned to themselves.
    #[inline]
    fn at(&self, offset: u64, width: Width) -> Option<Place<'_>> {
        let inside = offset.checked_sub(self.start)?;
        let end = inside.checked_add(width.bytes())?;
        if end > self.len as u64 || !inside.is_multiple_of(width.bytes()) {
            return None;
        }
        Some(Place { at: self.base.as_ptr().wrapping_add(inside as usize), bytes: width.bytes() as usize, _mapping: PhantomData })
    }
}

/// A register of a mapping: mapped, writable, and aligned to its width of `bytes`.
struct Place<'a> {
    at: *mut u8,
    bytes: usize,
    _mapping: PhantomData<&'a Mapping>,
}

impl Place<'_> {
    #[inline]
    fn load<T: Copy>(&self) -> T {
        debug_assert_eq!(size_of::<T>(), self.bytes);
        // SAFETY: `Mapping::at` found as many mapped bytes here, aligned to themselves; they are a device's, so nothing of ours aliases them.
        unsafe { self.at.cast::<T>().read_volatile() }
    }

    #[inline]
    fn store<T: Copy>(&self, value: T) {
        debug_assert_eq!(size_of::<T>(), self.bytes);
        // SAFETY: as in `load`; the mapping is writable.
        unsafe { self.at.cast::<T>().write_volatile(value) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping made in `new`, which nobody else has.
        if let Err(error) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "a device's registers could not be unmapped");
        }
    }
}

/// One BAR.
pub(super) struct Bar {
    region: u32,
    mappings: Vec<Mapping>,
}

impl Bar {
    /// Maps what the kernel lets be mapped of region `region`.
    pub(super) fn new(device: &VfioDevice, region: u32) -> io::Result<Self> {
        let (size, offset) = (device.get_region_size(region), device.get_region_offset(region));
        let sparse = device.get_region_caps(region).into_iter().find_map(|capability| match capability {
            VfioRegionInfoCap::SparseMmap(sparse) => Some(sparse.areas),
            _ => None,
        });
        let areas = match sparse {
            _ if device.get_region_flags(region) & VFIO_REGION_INFO_FLAG_MMAP == 0 || size == 0 => Vec::new(),
            Some(areas) => areas.into_iter().map(|area| (area.offset, area.size)).filter(|(_, len)| *len > 0).collect(),
            None => vec![(0, size)],
        };
        let mappings = areas.into_iter().map(|(start, len)| Mapping::new(device, offset, start, len)).collect::<io::Result<_>>()?;
        Ok(Self { region, mappings })
    }

    /// Reads a register.
    #[inline]
    pub(super) fn load(&self, device: &VfioDevice, offset: u64, width: Width) -> u64 {
        let Some(at) = self.find(offset, width) else {
            let mut bytes = [0xff; 8];
            let len = width.bytes() as usize;
            device.region_read(self.region, bytes.get_mut(..len).unwrap_or_default(), offset);
            return width.truncate(u64::from_le_bytes(bytes));
        };
        let value = match width {
            Width::B1 => u64::from(at.load::<u8>()),
            Width::B2 => u64::from(u16::from_le(at.load())),
            Width::B4 => u64::from(u32::from_le(at.load())),
            Width::B8 => u64::from_le(at.load()),
        };
        // What the guest reads in its memory after this answer, the device wrote before it.
        fence(Ordering::Acquire);
        value
    }

    /// Writes a register.
    #[inline]
    pub(super) fn store(&self, device: &VfioDevice, offset: u64, width: Width, value: u64) {
        let Some(at) = self.find(offset, width) else {
            let len = width.bytes() as usize;
            return device.region_write(self.region, value.to_le_bytes().get(..len).unwrap_or_default(), offset);
        };
        // What the guest wrote to its memory before this store, the device finds there.
        fence(Ordering::Release);
        match width {
            Width::B1 => at.store(value as u8),
            Width::B2 => at.store((value as u16).to_le()),
            Width::B4 => at.store((value as u32).to_le()),
            Width::B8 => at.store(value.to_le()),
        }
    }

    #[inline]
    fn find(&self, offset: u64, width: Width) -> Option<Place<'_>> {
        self.mappings.iter().find_map(|mapping| mapping.at(offset, width))
    }
}
