//! Which DMA addresses are mapped, to what, and with which permission; lookups remember the window they hit last.
//!
//! With 512 MiB mapped at 0, `lookup(Iova(0x1_0450), 64, Access::READ)` yields the window and offset 0x1_0450 in it; a range that crosses into
//! a second, adjacent window comes back in two pieces. A window is removed before it is widened, and never split.

use std::cell::Cell;

use farbus_transport::Access;

use crate::address::Iova;
use crate::attachment::MapError;
use crate::backend::DmaFault;

/// The most windows one device may have (QEMU with a virtual IOMMU maps single pages).
pub const MAX_WINDOWS: usize = 1 << 16;

#[derive(Debug)]
struct Entry<T> {
    start: u64,
    /// Inclusive, so that a window may end at the top of the address space.
    last: u64,
    access: Access,
    target: T,
}

/// Windows in address order, each with a target of type `T`.
#[derive(Debug)]
pub struct IovaMap<T> {
    entries: Vec<Entry<T>>,
    hit: Cell<usize>,
}

/// A piece of a lookup: what lies behind one window.
#[derive(Debug)]
pub struct Piece<'a, T> {
    /// The window's target.
    pub target: &'a T,
    /// Where the piece starts, from the window's first address.
    pub offset: u64,
    /// Bytes of the piece that lie in this window.
    pub len: u64,
}

impl<T> Default for IovaMap<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), hit: Cell::new(0) }
    }
}

impl<T> IovaMap<T> {
    /// Adds a window.
    ///
    /// # Errors
    /// [`MapError::Range`], [`MapError::Overlap`], [`MapError::TooMany`]; nothing was added.
    pub fn insert(&mut self, iova: Iova, len: u64, access: Access, target: T) -> Result<(), MapError> {
        self.check_insert(iova, len)?;
        let last = last_of(iova, len)?;
        let at = self.entries.partition_point(|entry| entry.last < iova.0);
        self.entries.insert(at, Entry { start: iova.0, last, access, target });
        Ok(())
    }

    /// Whether [`IovaMap::insert`] of this range would succeed.
    ///
    /// # Errors
    /// What it would fail with.
    pub fn check_insert(&self, iova: Iova, len: u64) -> Result<(), MapError> {
        let last = last_of(iova, len)?;
        if self.entries.len() >= MAX_WINDOWS {
            return Err(MapError::TooMany { limit: MAX_WINDOWS });
        }
        let at = self.entries.partition_point(|entry| entry.last < iova.0);
        match self.entries.get(at) {
            Some(next) if next.start <= last => Err(MapError::Overlap { iova, len }),
            _ => Ok(()),
        }
    }

    /// How many windows [`IovaMap::remove`] of this range would remove.
    ///
    /// # Errors
    /// What it would fail with.
    pub fn check_remove(&self, iova: Iova, len: u64) -> Result<usize, MapError> {
        self.range(iova, len).map(|range| range.len())
    }

    /// Removes every window inside the range and hands their targets out.
    ///
    /// # Errors
    /// [`MapError::Range`]; [`MapError::Overlap`] where a window is only partly inside: nothing was removed.
    pub fn remove(&mut self, iova: Iova, len: u64) -> Result<Vec<T>, MapError> {
        let range = self.range(iova, len)?;
        Ok(self.entries.drain(range).map(|entry| entry.target).collect())
    }

    /// What the window at `iova` allows; `None` where there is none.
    pub fn access(&self, iova: Iova) -> Option<Access> {
        self.entry_at(iova.0).map(|entry| entry.access)
    }

    /// First address and length of each window whose target is `wanted`. A window of the whole address space counts as one byte less.
    pub fn ranges(&self, wanted: impl Fn(&T) -> bool) -> Vec<(Iova, u64)> {
        let chosen = self.entries.iter().filter(|entry| wanted(&entry.target));
        chosen.map(|entry| (Iova(entry.start), (entry.last - entry.start).saturating_add(1))).collect()
    }

    /// The part of `iova + len` that lies in the window at `iova`: all of it, or up to that window's end.
    ///
    /// # Errors
    /// [`DmaFault::Unmapped`], [`DmaFault::Denied`].
    pub fn piece(&self, iova: Iova, len: u64, needed: Access) -> Result<Piece<'_, T>, DmaFault> {
        let unmapped = DmaFault::Unmapped { iova, len };
        let entry = self.entry_at(iova.0).ok_or(unmapped)?;
        if !entry.access.allows(needed) {
            return Err(DmaFault::Denied { iova, len });
        }
        let room = (entry.last - iova.0).saturating_add(1);
        Ok(Piece { target: &entry.target, offset: iova.0 - entry.start, len: len.min(room) })
    }

    /// Checks that all of `iova + len` is mapped with `needed`, over any number of adjacent windows, before anything of it is touched.
    ///
    /// # Errors
    /// [`DmaFault::Unmapped`], [`DmaFault::Denied`].
    pub fn check(&self, iova: Iova, len: u64, needed: Access) -> Result<(), DmaFault> {
        let unmapped = DmaFault::Unmapped { iova, len };
        let (mut at, mut left) = (iova, len);
        loop {
            let piece = self.piece(at, left, needed).map_err(|fault| match fault {
                DmaFault::Denied { .. } => DmaFault::Denied { iova, len },
                _ => unmapped,
            })?;
            left -= piece.len;
            if left == 0 {
                return Ok(());
            }
            at = at.checked_add(piece.len).ok_or(unmapped)?;
        }
    }

    /// All targets.
    pub fn targets(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().map(|entry| &entry.target)
    }

    /// All targets, to change them.
    pub fn targets_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries.iter_mut().map(|entry| &mut entry.target)
    }

    /// How many windows there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The indexes of the windows inside a range that splits none.
    fn range(&self, iova: Iova, len: u64) -> Result<std::ops::Range<usize>, MapError> {
        let last = last_of(iova, len)?;
        let from = self.entries.partition_point(|entry| entry.last < iova.0);
        let to = self.entries.partition_point(|entry| entry.start <= last).max(from);
        let inside = self.entries.get(from..to).unwrap_or_default();
        if inside.iter().any(|entry| entry.start < iova.0 || entry.last > last) {
            return Err(MapError::Overlap { iova, len });
        }
        Ok(from..to)
    }

    fn entry_at(&self, address: u64) -> Option<&Entry<T>> {
        let covers = |entry: &&Entry<T>| entry.start <= address && address <= entry.last;
        if let Some(entry) = self.entries.get(self.hit.get()).filter(covers) {
            return Some(entry);
        }
        let index = self.entries.partition_point(|entry| entry.last < address);
        self.hit.set(index);
        self.entries.get(index).filter(covers)
    }
}

fn last_of(iova: Iova, len: u64) -> Result<u64, MapError> {
    len.checked_sub(1).and_then(|rest| iova.0.checked_add(rest)).ok_or(MapError::Range { iova, len })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_window_may_end_at_the_top_of_the_address_space() {
        let mut map = IovaMap::default();
        map.insert(Iova(u64::MAX - 0xfff), 0x1000, Access::READ, ()).unwrap();
        assert!(map.check(Iova(u64::MAX), 1, Access::READ).is_ok());
        assert!(map.check(Iova(u64::MAX), 2, Access::READ).is_err());
        assert!(map.insert(Iova(u64::MAX), 2, Access::READ, ()).is_err());
    }

    #[test]
    fn removing_half_a_window_is_refused_and_removes_nothing() {
        let mut map = IovaMap::default();
        map.insert(Iova(0x1000), 0x2000, Access::READ_WRITE, 1).unwrap();
        map.insert(Iova(0x3000), 0x1000, Access::READ_WRITE, 2).unwrap();
        assert!(matches!(map.remove(Iova(0x2000), 0x2000), Err(MapError::Overlap { .. })));
        assert_eq!(map.len(), 2);
        assert_eq!(map.remove(Iova(0), 0x10_0000).unwrap(), [1, 2]);
        assert!(map.remove(Iova(0), 0x10_0000).unwrap().is_empty());
    }

    const PAGES: u64 = 24;

    proptest! {
        /// A page-by-page model says the same of every range.
        #[test]
        fn lookups_agree_with_a_page_table(
            steps in prop::collection::vec((any::<bool>(), 0..PAGES, 1..6u64, 0..4u8), 1..60),
        ) {
            let mut map = IovaMap::default();
            let mut model: Vec<Option<(usize, Access)>> = vec![None; PAGES as usize + 6];
            for (id, (add, start, len, bits)) in steps.into_iter().enumerate() {
                let range = start as usize..(start + len) as usize;
                let access = Access::from_bits(bits).unwrap();
                if add {
                    let free = model[range.clone()].iter().all(Option::is_none);
                    prop_assert_eq!(map.check_insert(Iova(start), len).is_ok(), free);
                    prop_assert_eq!(map.insert(Iova(start), len, access, id).is_ok(), free);
                    if free {
                        model[range].fill(Some((id, access)));
                    }
                } else {
                    let inside: Vec<usize> = model[range.clone()].iter().flatten().map(|(id, _)| *id).collect();
                    let split = model.iter().enumerate().any(|(page, entry)| {
                        !range.contains(&page) && entry.is_some_and(|(id, _)| inside.contains(&id))
                    });
                    prop_assert_eq!(map.remove(Iova(start), len).is_ok(), !split);
                    if !split {
                        model[range].fill(None);
                    }
                }
                for page in 0..PAGES {
                    for needed in [Access::READ, Access::WRITE] {
                        let span = &model[page as usize..(page + 3) as usize];
                        let expected = span.iter().all(|entry| entry.is_some_and(|(_, access)| access.allows(needed)));
                        prop_assert_eq!(map.check(Iova(page), 3, needed).is_ok(), expected);
                        let piece = map.piece(Iova(page), 1, needed).ok().map(|piece| *piece.target);
                        let expected = model[page as usize].filter(|(_, access)| access.allows(needed)).map(|(id, _)| id);
                        prop_assert_eq!(piece, expected);
                    }
                }
            }
        }
    }
}
