//! Guest memory of a VMM that uses the `vm-memory` crate (0.18): feature `vm-memory`.
//!
//! `VmMemory::new(guest_memory)` takes a `GuestMemoryMmap` with 512 MiB of memfd at guest address 0: that region is granted to the lender by
//! descriptor, one of anonymous memory is reached by copies. A device's writes to granted memory do not show in vm-memory's own bitmap; ask
//! the attachment's dirty log for them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use farbus_transport::Memory;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{GuestMemory, GuestMemoryError, GuestRegion};
use crate::address::GuestAddress;

/// A `GuestMemoryMmap`, with its shared files mapped once more for granting.
#[derive(Debug)]
pub struct VmMemory<B: Bitmap + Send + 'static> {
    memory: GuestMemoryMmap<B>,
    regions: Vec<GuestRegion>,
}

impl<B: Bitmap + Send + Sync + 'static> VmMemory<B> {
    /// Takes a VMM's memory. A region is granted by descriptor where it is a shared mapping of a file; a private one is not what its file
    /// holds, so it is reached by copies.
    pub fn new(memory: GuestMemoryMmap<B>) -> Self {
        let regions = memory
            .iter()
            .map(|region| {
                let start = GuestAddress(region.start_addr().0);
                GuestRegion { start, len: region.len(), memory: shared_file(region.flags(), region.file_offset(), region.len()) }
            })
            .collect();
        Self { memory, regions }
    }

    /// The VMM's memory itself.
    pub fn inner(&self) -> &GuestMemoryMmap<B> {
        &self.memory
    }
}

fn shared_file(flags: i32, file: Option<&vm_memory::FileOffset>, len: u64) -> Option<(Arc<Memory>, u64)> {
    let file = file.filter(|_| flags & libc::MAP_SHARED != 0)?;
    let mapped = file.file().try_clone().map_err(farbus_transport::MemoryError::from_host("duplicate a descriptor"));
    match mapped.and_then(|file_again| Memory::map_file(file_again.into(), file.start(), len, true)) {
        Ok(memory) => Some((memory, 0)),
        Err(error) => {
            tracing::warn!(%error, "a region of guest memory cannot be shared; it is reached by copies");
            None
        }
    }
}

fn fault(at: GuestAddress, len: usize) -> GuestMemoryError {
    GuestMemoryError { at: at.0, len: len as u64 }
}

impl<B: Bitmap + Send + Sync + 'static> GuestMemory for VmMemory<B> {
    fn regions(&self) -> Vec<GuestRegion> {
        self.regions.clone()
    }

    fn read(&self, at: GuestAddress, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        let len = into.len();
        self.memory.read_slice(into, vm_memory::GuestAddress(at.0)).map_err(|_| fault(at, len))
    }

    fn write(&self, at: GuestAddress, from: &[u8]) -> Result<(), GuestMemoryError> {
        let failed = |_| fault(at, from.len());
        let whole = vm_memory::GuestAddress(at.0);
        if !self.memory.check_range(whole, from.len()) {
            return Err(fault(at, from.len()));
        }
        let aligned = at.0.is_multiple_of(4) && from.len().is_multiple_of(4);
        let Some((head, last)) = from.split_last_chunk::<4>().filter(|_| aligned) else {
            return self.memory.write_slice(from, whole).map_err(failed);
        };
        self.memory.write_slice(head, whole).map_err(failed)?;
        let end = vm_memory::GuestAddress(at.0 + head.len() as u64);
        // The word that a guest may be polling, after the bytes it announces.
        self.memory.store(u32::from_ne_bytes(*last), end, Ordering::Release).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, OwnedFd};
    use vm_memory::FileOffset;
    use vm_memory::bitmap::AtomicBitmap;

    fn memfd(len: u64) -> std::fs::File {
        let memory = Memory::memfd("vmm", len).unwrap();
        let fd: OwnedFd = memory.file().unwrap().0.as_fd().try_clone_to_owned().unwrap();
        fd.into()
    }

    #[test]
    fn a_shared_file_is_granted_and_anonymous_memory_is_copied() {
        let ranges = [
            (vm_memory::GuestAddress(0), 0x2000, Some(FileOffset::new(memfd(0x3000), 0x1000))),
            (vm_memory::GuestAddress(0x10_0000), 0x1000, None),
        ];
        let memory = VmMemory::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges_with_files(&ranges).unwrap());
        let regions = memory.regions();
        assert_eq!((regions[0].start, regions[0].len), (GuestAddress(0), 0x2000));
        assert!(regions[1].memory.is_none());
        memory.write(GuestAddress(0x1ff8), b"polledup").unwrap();
        let mut seen = [0; 8];
        regions[0].memory.as_ref().unwrap().0.read(0x1ff8, &mut seen).unwrap();
        assert_eq!(&seen, b"polledup");
        memory.write(GuestAddress(0x10_0001), b"odd").unwrap();
        memory.read(GuestAddress(0x10_0001), &mut seen[..3]).unwrap();
        assert_eq!(&seen[..3], b"odd");
        assert!(memory.write(GuestAddress(0x1ffe), b"past").is_err());
        memory.read(GuestAddress(0x1ff8), &mut seen).unwrap();
        assert_eq!(&seen, b"polledup", "a refused write changes nothing");
    }
}
