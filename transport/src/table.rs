//! Regions by index and generation, so that a span which outlives its region is refused, never followed.
//!
//! After region 3 was removed and its index reused, a span of the old region names generation 0 where the table holds generation 1.

use crate::span::RegionName;

/// Regions of one kind that one fabric holds at most.
pub(crate) const MAX_REGIONS: u32 = 4096;

#[derive(Debug)]
struct Entry<T> {
    generation: u32,
    value: Option<T>,
}

/// A table of regions.
#[derive(Debug)]
pub(crate) struct Table<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }
}

impl<T> Table<T> {
    /// Adds a region; `None` where [`MAX_REGIONS`] are held.
    pub(crate) fn insert(&mut self, value: T) -> Option<RegionName> {
        if let Some(index) = self.free.pop() {
            let entry = self.entries.get_mut(index as usize)?;
            entry.value = Some(value);
            return Some(RegionName { index, generation: entry.generation });
        }
        let index = u32::try_from(self.entries.len()).ok().filter(|index| *index < MAX_REGIONS)?;
        self.entries.push(Entry { generation: 0, value: Some(value) });
        Some(RegionName { index, generation: 0 })
    }

    /// Removes a region; its name is dead from now on.
    pub(crate) fn remove(&mut self, name: RegionName) -> Option<T> {
        let entry = self.entries.get_mut(name.index as usize).filter(|entry| entry.generation == name.generation)?;
        let value = entry.value.take()?;
        // An index whose generations are used up is never used again.
        if let Some(next) = entry.generation.checked_add(1) {
            entry.generation = next;
            self.free.push(name.index);
        }
        Some(value)
    }

    /// Removes all regions that `wanted` says; their names are dead from now on.
    pub(crate) fn remove_where(&mut self, wanted: impl Fn(&T) -> bool) {
        for index in 0..self.entries.len() as u32 {
            let Some(entry) = self.entries.get(index as usize) else { return };
            if entry.value.as_ref().is_some_and(&wanted) {
                self.remove(RegionName { index, generation: entry.generation });
            }
        }
    }

    /// The region of that name, unless it is gone.
    #[inline]
    pub(crate) fn find(&self, name: RegionName) -> Option<&T> {
        self.entries.get(name.index as usize).filter(|entry| entry.generation == name.generation)?.value.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_never_reaches_its_successor() {
        let mut table = Table::default();
        let old = table.insert("old").unwrap();
        assert_eq!(table.remove(old), Some("old"));
        let new = table.insert("new").unwrap();
        assert_eq!(old.index, new.index);
        assert_eq!((table.find(old), table.find(new)), (None, Some(&"new")));
        assert_eq!(table.remove(old), None);
    }
}
