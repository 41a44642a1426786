//! Physical region pages: which guest ranges a command names with PRP1, PRP2 and lists (NVMe 1.4, section 4.3).
//!
//! 12 KiB from PRP1 = 0x1000_0800 in 4 KiB pages are 2 KiB there, and three entries of the list that PRP2 points to, the last for 2 KiB.
//! A list that fills its page continues where its last entry points. Every walk is bounded by its length: each list after the first starts at
//! offset 0 and therefore names at least 511 pages.

use thiserror::Error;

use crate::address::Iova;

/// Why the entries name no valid ranges.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PrpError {
    /// PRP1 is not dword aligned, a later entry not page aligned, or a list not qword aligned.
    #[error("prp entry {entry:#x} has an invalid offset")]
    Offset {
        /// The entry.
        entry: u64,
    },
}

/// What a walk needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The next range of guest memory; neighbouring pages come as one.
    Range {
        /// First address.
        iova: Iova,
        /// Bytes, at least 1.
        len: u32,
    },
    /// `entries` qwords of a list must be read from `iova` before the walk goes on; they lie inside one memory page.
    List {
        /// First address.
        iova: Iova,
        /// Qwords, 1 to page size / 8.
        entries: u32,
    },
    /// All bytes were named.
    Done,
}

/// A walk in progress: a plain value, so that a command can wait for its list.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    prp1: u64,
    prp2: u64,
    page: u32,
    left: u32,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    First,
    Second,
    /// The list at this address must be fetched.
    Fetch(u64),
    /// The next entry of the list that was fetched, and how many it has.
    List {
        next: u32,
        entries: u32,
    },
}

impl Cursor {
    /// A walk over `len` bytes in memory pages of `page` bytes (a power of two, at least 4,096).
    pub const fn new(prp1: u64, prp2: u64, len: u32, page: u32) -> Self {
        Self {
            prp1,
            prp2,
            page,
            left: len,
            place: Place::First,
        }
    }

    /// Bytes not yet named.
    pub const fn left(&self) -> u32 {
        self.left
    }

    /// The next step. `entry` reads one qword of the copy of the list fetched last, which must not change during the walk.
    ///
    /// # Errors
    /// [`PrpError`].
    #[inline]
    pub fn step(&mut self, entry: impl Fn(u32) -> u64) -> Result<Step, PrpError> {
        if self.left == 0 {
            return Ok(Step::Done);
        }
        let mask = u64::from(self.page) - 1;
        match self.place {
            Place::First => {
                if self.prp1 & 3 != 0 {
                    return Err(PrpError::Offset { entry: self.prp1 });
                }
                let room = self.page - (self.prp1 & mask) as u32;
                let len = self.left.min(room);
                self.left -= len;
                self.place = if self.left <= self.page {
                    Place::Second
                } else {
                    Place::Fetch(self.prp2)
                };
                // Two pages that lie side by side are one range.
                if self.left > 0 && self.place == Place::Second && self.prp1.checked_add(u64::from(len)) == Some(self.prp2) {
                    let rest = std::mem::take(&mut self.left);
                    return range(self.prp1, len + rest);
                }
                range(self.prp1, len)
            }
            Place::Second => {
                if self.prp2 & mask != 0 {
                    return Err(PrpError::Offset { entry: self.prp2 });
                }
                range(self.prp2, std::mem::take(&mut self.left))
            }
            Place::Fetch(list) => {
                if list & 7 != 0 {
                    return Err(PrpError::Offset { entry: list });
                }
                let room = (self.page - (list & mask) as u32) / 8;
                let entries = self.left.div_ceil(self.page).min(room);
                self.place = Place::List { next: 0, entries };
                Ok(Step::List {
                    iova: Iova(list),
                    entries,
                })
            }
            Place::List { mut next, entries } => {
                let mut run: Option<(u64, u32)> = None;
                while self.left > 0 && next < entries {
                    let at = entry(next);
                    if at & mask != 0 {
                        return Err(PrpError::Offset { entry: at });
                    }
                    // The last entry of a list that does not name all pages points to the next list.
                    if next + 1 == entries && self.left > self.page {
                        self.place = Place::Fetch(at);
                        return match run {
                            Some((start, len)) => range(start, len),
                            None => self.step(entry),
                        };
                    }
                    let len = self.left.min(self.page);
                    run = match run {
                        None => Some((at, len)),
                        Some((start, so_far)) if start.checked_add(u64::from(so_far)) == Some(at) => Some((start, so_far + len)),
                        Some((start, so_far)) => {
                            self.place = Place::List { next, entries };
                            return range(start, so_far);
                        }
                    };
                    self.left -= len;
                    next += 1;
                }
                self.place = Place::List { next, entries };
                match run {
                    Some((start, len)) => range(start, len),
                    None => Ok(Step::Done),
                }
            }
        }
    }
}

const fn range(start: u64, len: u32) -> Result<Step, PrpError> {
    Ok(Step::Range { iova: Iova(start), len })
}

/// Why a whole walk ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError<E> {
    /// The entries are wrong.
    Prp(PrpError),
    /// A list could not be fetched.
    Fetch(E),
}

/// A whole walk at once, for callers that can fetch lists on the spot: `fetch` fills the qwords given, `visit` hears each range in order.
///
/// # Errors
/// [`WalkError`]; ranges before it were visited.
pub fn walk<E>(
    prp1: u64,
    prp2: u64,
    len: u32,
    page: u32,
    mut fetch: impl FnMut(Iova, &mut [u64]) -> Result<(), E>,
    mut visit: impl FnMut(Iova, u32),
) -> Result<(), WalkError<E>> {
    let mut cursor = Cursor::new(prp1, prp2, len, page);
    let mut list = vec![0_u64; (page / 8) as usize];
    loop {
        match cursor
            .step(|index| list.get(index as usize).copied().unwrap_or_default())
            .map_err(WalkError::Prp)?
        {
            Step::Done => return Ok(()),
            Step::Range { iova, len } => visit(iova, len),
            Step::List { iova, entries } => {
                let room = list.get_mut(..entries as usize).unwrap_or_default();
                fetch(iova, room).map_err(WalkError::Fetch)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;

    /// Lays a list out as a driver would, chaining at page ends, and returns PRP2 and the qwords by address.
    fn lay_out(pages: &[u64], list_offset: u64) -> (u64, HashMap<u64, u64>) {
        let mut words = HashMap::new();
        let first = 0x7000_0000 + list_offset;
        let (mut at, mut next_list) = (first, 0x7100_0000);
        for (index, page) in pages.iter().enumerate() {
            let last_of_list = (at + 8) % PAGE == 0;
            if last_of_list && index + 1 < pages.len() {
                words.insert(at, next_list);
                at = next_list;
                next_list += PAGE;
            }
            words.insert(at, *page);
            at += 8;
        }
        (first, words)
    }

    fn visited(prp1: u64, prp2: u64, len: u32, words: &HashMap<u64, u64>) -> Result<Vec<u64>, WalkError<u64>> {
        let mut bytes = Vec::new();
        walk(
            prp1,
            prp2,
            len,
            PAGE as u32,
            |at, into| {
                for (index, word) in into.iter_mut().enumerate() {
                    let at = at.0 + index as u64 * 8;
                    *word = *words.get(&at).ok_or(at)?;
                }
                Ok(())
            },
            |iova, len| bytes.extend((0..u64::from(len / 4)).map(|dword| iova.0 + dword * 4)),
        )?;
        Ok(bytes)
    }

    proptest! {
        #[test]
        fn a_walk_names_the_bytes_that_the_driver_laid_out(
            offset in (0..PAGE / 4).prop_map(|dword| dword * 4),
            list_offset in (0..PAGE / 8).prop_map(|qword| qword * 8),
            dwords in 1..(1_u32 << 20) / 4,
            page_numbers in proptest::collection::vec(1_u64..1 << 20, 258),
        ) {
            let len = dwords * 4;
            let pages: Vec<u64> = page_numbers.iter().map(|number| number * PAGE).collect();
            let prp1 = pages[0] + offset;
            let mut expected = Vec::new();
            let mut used = 0;
            for dword in 0..u64::from(dwords) {
                let position = offset + dword * 4;
                used = (position / PAGE) as usize;
                expected.push(pages[used] + position % PAGE);
            }
            let rest = &pages[1..=used];
            let (list, words) = lay_out(rest, list_offset);
            let prp2 = match rest { [] => 0xdead_beef, [only] => *only, _ => list };
            prop_assert_eq!(visited(prp1, prp2, len, &words), Ok(expected));
        }

        #[test]
        fn a_wild_walk_ends_and_names_no_byte_too_many(prp1: u64, prp2: u64, len in 1_u32..1 << 20, words in proptest::collection::vec(any::<u64>(), 1..64), aligned: bool) {
            let mut fetches = 0_u32;
            let mut total = 0_u64;
            let mask = if aligned { !(PAGE - 1) } else { !0 };
            let result = walk(prp1 & mask, prp2 & mask | 0xff8, len, PAGE as u32, |_, into| {
                fetches += 1;
                for (index, word) in into.iter_mut().enumerate() { *word = words[index % words.len()] & mask; }
                Ok::<(), ()>(())
            }, |_, len| total += u64::from(len));
            prop_assert!(fetches <= 3, "{fetches} fetches");
            prop_assert!(total <= u64::from(len));
            prop_assert!(result.is_err() || total == u64::from(len));
        }
    }

    #[test]
    fn a_list_pointer_in_the_last_qword_of_a_page_chains_at_once() {
        let pages: Vec<u64> = (0..4).map(|page| 0x10_0000 + page * 0x2000).collect();
        let (prp2, words) = lay_out(&pages[1..], PAGE - 8);
        let bytes = visited(pages[0], prp2, 4 * PAGE as u32, &words).unwrap();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(bytes[3072], pages[3]);
    }

    #[test]
    fn neighbouring_pages_are_one_range() {
        let mut ranges = Vec::new();
        let pages: Vec<u64> = (1..32).map(|page| 0x40_0000 + page * PAGE).collect();
        walk(
            0x40_0000,
            0x9000,
            32 * PAGE as u32,
            PAGE as u32,
            |_, into| {
                into.copy_from_slice(&pages);
                Ok::<(), ()>(())
            },
            |iova, len| ranges.push((iova.0, len)),
        )
        .unwrap();
        assert_eq!(ranges, [(0x40_0000, 4096), (0x40_1000, 31 * 4096)]);
    }

    #[test]
    fn offsets_that_the_specification_forbids_are_refused() {
        let none = HashMap::new();
        assert!(matches!(
            visited(0x1002, 0, 512, &none),
            Err(WalkError::Prp(PrpError::Offset { entry: 0x1002 }))
        ));
        assert!(matches!(
            visited(0x1000, 0x2004, 8192, &none),
            Err(WalkError::Prp(PrpError::Offset { entry: 0x2004 }))
        ));
        assert!(matches!(
            visited(0x1000, 0x2004, 12288, &none),
            Err(WalkError::Prp(PrpError::Offset { entry: 0x2004 }))
        ));
        assert_eq!(visited(u64::MAX - 3, 0, 8, &none), Ok(vec![u64::MAX - 3, 0]));
    }
}
