//! What the VMM itself wrote, by the bitmap that vm-memory keeps of a region.
//!
//! A virtio device that writes 40 pages through `GuestMemoryMmap<AtomicBitmap>` sets 40 bits; they are taken and cleared by one call.

use thiserror::Error;
use vm_memory::bitmap::AtomicBitmap;

use super::DirtyPages;
use crate::page::PAGE;

/// The bitmap is of pages of another size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a bitmap of {bits} bits for {bytes} bytes is not of pages of {PAGE} bytes")]
pub struct PageSize {
    /// Its bits.
    pub bits: usize,
    /// What they are for.
    pub bytes: usize,
}

impl DirtyPages {
    /// Takes what is set in a region's bitmap and clears it. The region's first byte is page `first` of the section.
    ///
    /// # Errors
    /// It is of pages of another size; nothing is cleared then.
    pub fn take_bitmap(&mut self, first: u64, bitmap: &AtomicBitmap) -> Result<(), PageSize> {
        let (bits, bytes) = (bitmap.len(), bitmap.byte_size());
        if bits != bytes.div_ceil(PAGE) {
            return Err(PageSize { bits, bytes });
        }
        self.mark_words(first, &bitmap.get_and_reset());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

    use super::*;

    #[test]
    fn what_a_vmm_writes_through_vm_memory_is_marked_once() {
        let memory =
            GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 30), 1 << 20)]).unwrap();
        memory.write_slice(&[1; 5000], GuestAddress((1 << 30) + 8192)).unwrap();
        memory.write_slice(&[1], GuestAddress(4095)).unwrap();
        let mut pages = DirtyPages::none(2 << 20);
        let mut first = 0;
        for region in memory.iter() {
            pages.take_bitmap(first, (**region).bitmap()).unwrap();
            first += region.len() / PAGE as u64;
        }
        assert_eq!((0..512).filter(|page| pages.is_marked(*page)).collect::<Vec<_>>(), [0, 258, 259]);
        pages.clear();
        memory.iter().for_each(|region| pages.take_bitmap(0, (**region).bitmap()).unwrap());
        assert_eq!(pages.count(), 0);
        let large = AtomicBitmap::new(1 << 20, NonZeroUsize::new(2 << 20).unwrap());
        assert!(pages.take_bitmap(0, &large).is_err());
    }
}
