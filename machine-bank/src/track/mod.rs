//! Which pages of a machine may have changed since its last deposit, from whoever can tell: the kernel, the VMM, and our own DMA.
//!
//! 512 MiB of which the guest wrote 900 pages, the VMM's own devices 40 and a lent device 16: three trackers mark them in one [`DirtyPages`], and the
//! deposit reads 956 pages at most.
//!
//! # Who sees what
//!
//! | writer | [`WriteTracker`] | vm-memory's bitmap | DMA dirty log |
//! |---|---|---|---|
//! | the guest's CPUs, and this process through the tracked mapping | yes | no | no |
//! | the VMM's devices, through vm-memory | yes, if by that mapping | yes | no |
//! | a second mapping of the memfd, `pwrite`, an RNIC, a device by VFIO | **no** | no | yes |
//!
//! A page that nobody marks is taken from the parent unread, so whatever writes a machine's memory needs a tracker that sees it. The DMA dirty log is
//! `farbus_remote_dma::dirty_log::DirtyLog`: `log.take(|page| pages.mark(page))`. Take the marks while the machine is paused, or while what writes is quiet.
//!
//! [`Epochs`] are for a machine that runs on while it is deposited.

mod epochs;
#[cfg(feature = "vm-memory")]
mod vm_memory;
mod writes;

use std::ops::Range;

pub use epochs::{Epoch, EpochError, Epochs};
pub use writes::{TrackError, WriteTracker};

use crate::deposit::Changes;

#[cfg(feature = "vm-memory")]
pub use vm_memory::PageSize;

/// Pages that may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    words: Vec<u64>,
    pages: u64,
}

impl DirtyPages {
    /// None of a section of `len` bytes.
    pub fn none(len: u64) -> Self {
        let pages = len.div_ceil(crate::PAGE as u64);
        Self { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// This one, by its number. One behind the end is none of ours.
    pub fn mark(&mut self, page: u64) {
        if page < self.pages
            && let Some(word) = self.words.get_mut((page / 64) as usize)
        {
            *word |= 1 << (page % 64);
        }
    }

    /// These.
    pub fn mark_all(&mut self, pages: Range<u64>) {
        (pages.start..pages.end.min(self.pages)).for_each(|page| self.mark(page));
    }

    /// Those whose bit is set in `words`, of which the first is page `first`: KVM's dirty log of a slot, say.
    pub fn mark_words(&mut self, first: u64, words: &[u64]) {
        for (at, word) in (0..).zip(words) {
            let mut left = *word;
            while left != 0 {
                self.mark(first + at * 64 + u64::from(left.trailing_zeros()));
                left &= left - 1;
            }
        }
    }

    /// Whether it may have changed.
    pub fn is_marked(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// How many may have.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The bits of `count` pages from `first`, both multiples of 64; none behind the end.
    fn words<const N: usize>(&self, first: u64, count: u64) -> [u64; N] {
        debug_assert!(first.is_multiple_of(64) && count == 64 * N as u64, "whole words");
        std::array::from_fn(|at| self.words.get(first as usize / 64 + at).copied().unwrap_or(0))
    }

    /// None again.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// For a deposit.
    pub fn changes(&self) -> Changes<'_> {
        Changes::Bitmap(&self.words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE;

    #[test]
    fn marks_of_all_trackers_are_one_bitmap() {
        let mut pages = DirtyPages::none(200 * PAGE as u64 - 1);
        pages.mark(3);
        pages.mark_all(198..300);
        pages.mark_words(64, &[1 << 5, 1 | 1 << 63]);
        pages.mark(200);
        let marked: Vec<_> = (0..300).filter(|page| pages.is_marked(*page)).collect();
        assert_eq!(marked, [3, 69, 128, 191, 198, 199]);
        assert_eq!(pages.count(), 6);
        assert!(pages.changes().may(69) && !pages.changes().may(70));
        pages.clear();
        assert_eq!(pages.count(), 0);
    }
}
