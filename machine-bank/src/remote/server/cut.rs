//! Groups for a client that may not read every machine: a group holds what one deposit stored together, so neighbours of a wanted page may be somebody else's.
//!
//! Of sixteen pages of `db` the client may read one, because its own `web` has the same: it is sent a group of that one, and the fifteen stay here.

use crate::pack::{GROUP, GroupDecoder, GroupEncoder};
use crate::page::PAGE;

/// Takes groups apart.
pub(super) struct Cutter {
    decoder: GroupDecoder,
    encoder: GroupEncoder,
    pages: Box<[u8; GROUP]>,
    kept: Vec<u8>,
}

impl Cutter {
    /// # Errors
    /// There is no memory for zstd's state.
    pub fn new() -> std::io::Result<Self> {
        let (decoder, encoder) = (GroupDecoder::new()?, GroupEncoder::new()?);
        Ok(Self { decoder, encoder, pages: Box::new([0; GROUP]), kept: Vec::with_capacity(GROUP) })
    }

    /// The most bytes that a group of so many wanted pages can have.
    pub fn most(pages: usize) -> usize {
        pages * PAGE + 1
    }

    /// The group of those pages alone that `wanted` names (page of the leaf, page of the group), whose numbers in the group become the new ones; nothing where
    /// the group is damaged, or has no such page: `is` says whether a page of the group is that page of the leaf, because an index may be damaged too.
    pub fn cut<'a>(
        &'a mut self,
        stored: &'a [u8],
        wanted: &mut [(u16, u8)],
        is: impl Fn(u16, &[u8; PAGE]) -> bool,
    ) -> Option<&'a [u8]> {
        let len = self.decoder.decode(stored, &mut self.pages).ok()?;
        let there = self.pages[..len].as_chunks::<PAGE>().0;
        if !wanted.iter().all(|(page, slot)| there.get(usize::from(*slot)).is_some_and(|bytes| is(*page, bytes))) {
            return None;
        }
        let mut slots: Vec<u8> = wanted.iter().map(|(_, slot)| *slot).collect();
        slots.sort_unstable();
        slots.dedup();
        if slots.len() == there.len() && slots.last().is_some_and(|last| usize::from(*last) < there.len()) {
            return Some(stored);
        }
        self.kept.clear();
        for slot in &slots {
            self.kept.extend_from_slice(there.get(usize::from(*slot))?);
        }
        for (_, slot) in wanted.iter_mut() {
            *slot = slots.binary_search(slot).ok()? as u8;
        }
        (!self.kept.is_empty()).then(|| self.encoder.encode(&self.kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_group_is_left_but_what_is_wanted() {
        let pages: Vec<u8> = (0..5u8).flat_map(|n| [n + 1; PAGE]).collect();
        let (mut cutter, mut encoder, mut decoder) =
            (Cutter::new().unwrap(), GroupEncoder::new().unwrap(), GroupDecoder::new().unwrap());
        let stored = encoder.encode(&pages).to_vec();
        let any = |_: u16, _: &[u8; PAGE]| true;
        let mut out = Box::new([0; GROUP]);
        let mut wanted = [(900, 3), (7, 1), (8, 3)];
        let cut = cutter.cut(&stored, &mut wanted, any).unwrap().to_vec();
        assert_eq!(decoder.decode(&cut, &mut out).unwrap(), 2 * PAGE);
        assert!(out[..PAGE] == [2; PAGE] && out[PAGE..2 * PAGE] == [4; PAGE]);
        assert_eq!(wanted, [(900, 1), (7, 0), (8, 1)]);
        // All of it: as it is stored.
        let mut all = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)];
        assert_eq!(cutter.cut(&stored, &mut all, any).unwrap(), stored);
        assert!(cutter.cut(&stored, &mut [(0, 5)], any).is_none() && cutter.cut(b"\x01damaged", &mut [(0, 0)], any).is_none());
        // An index that leads to somebody else's page.
        assert!(cutter.cut(&stored, &mut [(0, 2)], |_, bytes| bytes[0] != 3).is_none());
    }
}
