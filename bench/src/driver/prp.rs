//! PRP entries for a buffer: what tells the controller where data lies (NVMe 1.4, section 4.3).
//!
//! 128 KiB at 0x1_0000_0000 are PRP1 = 0x1_0000_0000 and, in PRP2, the address of a list of the 31 pages that follow; a list that does not
//! fit a page ends in a pointer to the next page of it.

use farbus_remote_dma::Iova;
use thiserror::Error;

use super::dma::PAGE_BYTES;

/// Entries of one list page.
pub const ENTRIES_PER_PAGE: u64 = PAGE_BYTES / 8;

/// Why a buffer cannot be described.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PrpError {
    /// Data must begin at a multiple of 4 bytes, and there must be some.
    #[error("{iova} + {len:#x} cannot be described by PRP entries")]
    Range {
        /// First address.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// The lists are too short for the data.
    #[error("{len:#x} bytes need {needed} list pages where there are {pages}")]
    Lists {
        /// Bytes.
        len: u64,
        /// Pages needed.
        needed: u64,
        /// Pages there are.
        pages: u64,
    },
}

/// The two entries of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prps {
    /// PRP entry 1: the first byte.
    pub prp1: u64,
    /// PRP entry 2: nothing, the second page, or a list.
    pub prp2: u64,
}

/// List pages needed for `len` bytes that begin anywhere in a page.
pub const fn list_pages(len: u64) -> u64 {
    let entries = len.div_ceil(PAGE_BYTES);
    if entries <= 1 { 0 } else { chained_pages(entries) }
}

/// Pages of a list of `entries`: every page but the last gives its last entry to the chain.
const fn chained_pages(entries: u64) -> u64 {
    if entries <= ENTRIES_PER_PAGE { 1 } else { (entries - 1).div_ceil(ENTRIES_PER_PAGE - 1) }
}

/// Describes `len` bytes at consecutive addresses from `first`. List entries go through `store(offset, entry)`, `offset` in bytes from
/// `lists`, which is `pages` whole pages at consecutive addresses.
///
/// # Errors
/// [`PrpError`], or what `store` answered.
pub fn build<E: From<PrpError>>(
    first: Iova,
    len: u64,
    lists: Iova,
    pages: u64,
    mut store: impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<Prps, E> {
    let range = PrpError::Range { iova: first, len };
    if len == 0 || !first.0.is_multiple_of(4) || first.checked_add(len).is_none() {
        return Err(range.into());
    }
    let in_first = PAGE_BYTES - first.0 % PAGE_BYTES;
    let rest = len.saturating_sub(in_first).div_ceil(PAGE_BYTES);
    let second = (first.0 - first.0 % PAGE_BYTES).wrapping_add(PAGE_BYTES);
    let prp1 = first.0;
    if rest <= 1 {
        return Ok(Prps { prp1, prp2: if rest == 0 { 0 } else { second } });
    }
    let needed = chained_pages(rest);
    if needed > pages {
        return Err(PrpError::Lists { len, needed, pages }.into());
    }
    let mut at = 0;
    for entry in 0..rest {
        let last_of_page = (at / 8) % ENTRIES_PER_PAGE == ENTRIES_PER_PAGE - 1;
        if last_of_page && entry + 1 < rest {
            let next = lists.checked_add(at + 8).ok_or(range)?;
            store(at, next.0)?;
            at += 8;
        }
        store(at, second.wrapping_add(entry * PAGE_BYTES))?;
        at += 8;
    }
    Ok(Prps { prp1, prp2: lists.0 })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const LISTS: u64 = 0xff00_0000;

    /// The specification's walk, written from the controller's side: `(address, bytes)` pieces in order.
    fn walk(prps: Prps, len: u64, memory: &HashMap<u64, u64>) -> Vec<(u64, u64)> {
        let mut pieces = vec![(prps.prp1, len.min(PAGE_BYTES - prps.prp1 % PAGE_BYTES))];
        let mut left = len - pieces[0].1;
        if left == 0 {
            assert_eq!(prps.prp2, 0, "prp2 is reserved where one page is enough");
            return pieces;
        }
        if left <= PAGE_BYTES {
            pieces.push((prps.prp2, left));
            return pieces;
        }
        let mut at = prps.prp2;
        while left > 0 {
            let is_last_slot = at % PAGE_BYTES == PAGE_BYTES - 8;
            let entry = memory[&at];
            if is_last_slot && left > PAGE_BYTES {
                assert_eq!(entry % PAGE_BYTES, 0);
                at = entry;
                continue;
            }
            assert_eq!(entry % PAGE_BYTES, 0, "an offset is allowed in the first entry only");
            pieces.push((entry, left.min(PAGE_BYTES)));
            left -= left.min(PAGE_BYTES);
            at += 8;
        }
        pieces
    }

    fn described(first: u64, len: u64) -> Vec<(u64, u64)> {
        let mut memory = HashMap::new();
        let pages = list_pages(len);
        let prps = build::<PrpError>(Iova(first), len, Iova(LISTS), pages, |offset, entry| {
            assert!(offset < pages * PAGE_BYTES, "a list entry outside the list");
            assert!(memory.insert(LISTS + offset, entry).is_none(), "an entry was written twice");
            Ok(())
        })
        .unwrap();
        walk(prps, len, &memory)
    }

    proptest! {
        #[test]
        fn the_controller_finds_exactly_the_bytes_of_the_buffer(page in 0_u64..1 << 30, word in 0_u64..1024, len in 1_u64..6 << 20) {
            let first = page * PAGE_BYTES + word * 4;
            let mut next = first;
            for (address, bytes) in described(first, len) {
                prop_assert_eq!(address, next);
                next += bytes;
            }
            prop_assert_eq!(next, first + len);
        }
    }

    #[test]
    fn a_list_is_chained_at_the_boundary_and_not_one_entry_early() {
        let whole_page_of_entries = (1 + ENTRIES_PER_PAGE) * PAGE_BYTES;
        for len in [whole_page_of_entries - 1, whole_page_of_entries, whole_page_of_entries + 1] {
            assert_eq!(described(0x10_0000, len).iter().map(|piece| piece.1).sum::<u64>(), len);
        }
        assert_eq!(described(0x10_0000, whole_page_of_entries).len() as u64, 1 + ENTRIES_PER_PAGE);
    }

    #[test]
    fn what_cannot_be_described_is_refused_before_a_device_writes_elsewhere() {
        let refuse = |first, len, pages| build::<PrpError>(Iova(first), len, Iova(LISTS), pages, |_, _| Ok(()));
        assert!(matches!(refuse(0x1002, 4096, 1), Err(PrpError::Range { .. })));
        assert!(matches!(refuse(0x1000, 0, 1), Err(PrpError::Range { .. })));
        assert!(matches!(refuse(u64::MAX - 3, 4096, 1), Err(PrpError::Range { .. })));
        assert!(matches!(refuse(0x1000, 3 * 4096, 0), Err(PrpError::Lists { needed: 1, pages: 0, .. })));
        assert!(refuse(0x1000, 2 * 4096, 0).is_ok());
    }
}
