//! Packs: files of several MiB that hold groups of 16 pages, compressed, and at the end a directory of what is where; written once.
//!
//! A pack of one group of two pages is 8 bytes of magic, the group (a codec byte and its payload), a directory `1, len, 2, id, id` and a trailer
//! of 48 bytes; its name is the hash of the directory, so the same pages in the same order are the same pack.

mod group;
mod packer;

use crate::codec::{Input, Malformed};
use crate::page::{PAGE, PageId, from_hex, hex};

pub use group::{GROUP, GROUP_PAGES, GroupDecoder, GroupEncoder};
pub use packer::Packer;

const MAGIC: &[u8; 8] = b"FBPACK1\n";
const END: &[u8; 8] = b"FBPACKE\n";
/// Bytes at a pack's end that say where its directory is.
pub const TRAILER: usize = 48;
/// Bytes from which a pack is full.
pub const FULL: usize = 8 << 20;
/// Pages from which a pack is full, however well they compress.
pub const FULL_PAGES: usize = 16_384;
/// Bytes of the largest directory that is read.
pub const MOST_DIRECTORY: usize = 4 << 20;

/// A pack's name: half of the hash of its directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PackId(pub [u8; 16]);

impl PackId {
    /// The object that holds it.
    pub fn name(&self) -> String {
        hex(&self.0)
    }

    /// From an object's name.
    pub fn from_name(name: &str) -> Option<Self> {
        from_hex(name).map(Self)
    }
}

/// Where in a pack a page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Of the group, in bytes from the pack's beginning.
    pub offset: u32,
    /// Bytes of the group as it is stored.
    pub len: u32,
    /// Which of the group's pages, below [`GROUP_PAGES`].
    pub slot: u8,
}

/// A pack that takes groups.
#[derive(Debug, Default)]
pub struct PackBuilder {
    /// What was not spilled yet.
    bytes: Vec<u8>,
    spilled: usize,
    groups: Vec<(u32, u8)>,
    ids: Vec<PageId>,
}

/// A pack that is complete.
#[derive(Debug)]
pub struct Sealed {
    /// Its name.
    pub id: PackId,
    /// What is stored, or the rest of it where some was spilled before.
    pub bytes: Vec<u8>,
    /// Bytes of all of it.
    pub len: u64,
    /// What is where.
    pub entries: Vec<(PageId, Place)>,
}

impl PackBuilder {
    /// Adds a group as [`GroupEncoder::encode`] made it, of the pages `ids`.
    pub fn push(&mut self, group: &[u8], ids: &[PageId]) {
        if self.groups.is_empty() {
            self.bytes.extend_from_slice(MAGIC);
        }
        self.bytes.extend_from_slice(group);
        self.groups.push((group.len() as u32, ids.len() as u8));
        self.ids.extend_from_slice(ids);
    }

    /// Takes over what another one has, of which nothing was spilled.
    pub fn append(&mut self, other: Self) {
        debug_assert_eq!(other.spilled, 0, "what was spilled lies elsewhere");
        if other.groups.is_empty() {
            return;
        }
        if self.groups.is_empty() {
            *self = other;
            return;
        }
        self.bytes.extend_from_slice(&other.bytes[MAGIC.len()..]);
        self.groups.extend(other.groups);
        self.ids.extend(other.ids);
    }

    /// Whether it should be sealed.
    pub fn is_full(&self) -> bool {
        self.len() >= FULL || self.ids.len() >= FULL_PAGES
    }

    /// Bytes that can be spilled.
    pub fn pending(&self) -> usize {
        self.bytes.len()
    }

    /// Hands out what follows what was spilled before, and keeps it no longer.
    ///
    /// # Errors
    /// Those of `write`; the pack is of no more use then.
    pub fn spill<E>(&mut self, write: impl FnOnce(&[u8]) -> Result<(), E>) -> Result<(), E> {
        write(&self.bytes)?;
        self.spilled += self.bytes.len();
        self.bytes.clear();
        Ok(())
    }

    /// Bytes of it so far, without the directory.
    pub fn len(&self) -> usize {
        self.spilled + self.bytes.len()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Ends it.
    pub fn seal(mut self) -> Sealed {
        let mut directory = Vec::with_capacity(4 + self.groups.len() * 5 + self.ids.len() * 32);
        directory.extend_from_slice(&(self.groups.len() as u32).to_le_bytes());
        for (len, pages) in &self.groups {
            directory.extend_from_slice(&len.to_le_bytes());
            directory.push(*pages);
        }
        self.ids.iter().for_each(|id| directory.extend_from_slice(&id.0));
        let hash = blake3::hash(&directory);
        let entries = places(&self.groups).zip(&self.ids).map(|(place, id)| (*id, place)).collect();
        self.bytes.extend_from_slice(&directory);
        self.bytes.extend_from_slice(&(directory.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(hash.as_bytes());
        self.bytes.extend_from_slice(END);
        Sealed { id: name_of(&hash), len: (self.spilled + self.bytes.len()) as u64, bytes: self.bytes, entries }
    }
}

fn name_of(directory: &blake3::Hash) -> PackId {
    let mut id = [0; 16];
    id.copy_from_slice(&directory.as_bytes()[..16]);
    PackId(id)
}

fn places(groups: &[(u32, u8)]) -> impl Iterator<Item = Place> {
    groups
        .iter()
        .scan(MAGIC.len() as u32, |offset, (len, pages)| {
            let at = *offset;
            *offset += len;
            Some((0..*pages).map(move |slot| Place { offset: at, len: *len, slot }))
        })
        .flatten()
}

/// Where the directory of a pack of `pack_len` bytes is, by its trailer: offset, bytes, hash.
///
/// # Errors
/// It is no pack's trailer, or points outside of the pack.
pub fn parse_trailer(trailer: &[u8; TRAILER], pack_len: u64) -> Result<(u64, usize, [u8; 32]), Malformed> {
    let mut input = Input::new(trailer);
    let (len, reserved, hash, end) = (input.u32()?, input.u32()?, input.array::<32>()?, input.array::<8>()?);
    if end != *END {
        return Err(Malformed::Magic("pack"));
    }
    if reserved != 0 {
        return Err(Malformed::Value("a reserved field", reserved.into()));
    }
    let bytes = usize::try_from(len)
        .ok()
        .filter(|len| *len <= MOST_DIRECTORY)
        .ok_or(Malformed::Value("a directory's length", len.into()))?;
    let offset = pack_len.checked_sub(TRAILER as u64 + u64::from(len)).filter(|offset| *offset >= MAGIC.len() as u64);
    Ok((offset.ok_or(Malformed::Value("a directory's length", len.into()))?, bytes, hash))
}

/// What a directory that lies at `offset` of the pack `id` says is where.
///
/// # Errors
/// It is not that pack's, or its groups do not fill the pack up to it.
pub fn parse_directory(id: PackId, directory: &[u8], offset: u64, hash: [u8; 32]) -> Result<Vec<(PageId, Place)>, Malformed> {
    let actual = blake3::hash(directory);
    if *actual.as_bytes() != hash || name_of(&actual) != id {
        return Err(Malformed::Hash("a pack's directory"));
    }
    let mut input = Input::new(directory);
    let count = input.u32()? as usize;
    let mut groups = Vec::with_capacity(count.min(input.left() / 5));
    let (mut end, mut pages) = (MAGIC.len() as u64, 0);
    for _ in 0..count {
        let (len, slots) = (input.u32()?, input.u8()?);
        if len < 2 || len as usize > GROUP + 1 {
            return Err(Malformed::Value("a group's length", len.into()));
        }
        if slots == 0 || usize::from(slots) > GROUP_PAGES {
            return Err(Malformed::Value("a group's number of pages", slots.into()));
        }
        end += u64::from(len);
        pages += usize::from(slots);
        groups.push((len, slots));
    }
    if end != offset || u32::try_from(end).is_err() {
        return Err(Malformed::Value("the end of a pack's groups", end));
    }
    let ids = (0..pages).map(|_| input.array().map(PageId)).collect::<Result<Vec<_>, _>>()?;
    input.end()?;
    Ok(ids.into_iter().zip(places(&groups)).collect())
}

/// A whole pack's directory, where all of it is in memory.
///
/// # Errors
/// It is no pack, or not the pack `id`.
pub fn parse_pack(id: PackId, bytes: &[u8]) -> Result<Vec<(PageId, Place)>, Malformed> {
    let (rest, trailer) = bytes.split_last_chunk::<TRAILER>().ok_or(Malformed::Ends)?;
    if !rest.starts_with(MAGIC) {
        return Err(Malformed::Magic("pack"));
    }
    let (offset, len, hash) = parse_trailer(trailer, bytes.len() as u64)?;
    let at = rest.len().checked_sub(len).ok_or(Malformed::Ends)?;
    parse_directory(id, &rest[at..], offset, hash)
}

/// Bytes of a page, as a check that groups and pages fit each other.
const _: () = assert!(GROUP == GROUP_PAGES * PAGE && FULL + FULL_PAGES * 37 + GROUP < u32::MAX as usize);

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(from: u8, count: u8) -> Vec<PageId> {
        (from..from + count).map(|n| PageId([n; 32])).collect()
    }

    #[test]
    fn a_pack_says_where_its_pages_are_and_is_named_by_that() {
        let mut first = PackBuilder::default();
        first.push(&[0; 4097], &ids(1, 1));
        let mut second = PackBuilder::default();
        second.push(&[1; 100], &ids(2, 16));
        first.append(second);
        let sealed = first.seal();
        assert_eq!(sealed.entries[0], (PageId([1; 32]), Place { offset: 8, len: 4097, slot: 0 }));
        assert_eq!(sealed.entries[16], (PageId([17; 32]), Place { offset: 4105, len: 100, slot: 15 }));
        assert_eq!(parse_pack(sealed.id, &sealed.bytes), Ok(sealed.entries));
        assert_eq!(PackId::from_name(&sealed.id.name()), Some(sealed.id));
    }

    #[test]
    fn any_bit_that_flips_outside_of_the_groups_is_found() {
        let mut pack = PackBuilder::default();
        pack.push(&[1; 50], &ids(1, 3));
        let Sealed { id, bytes, .. } = pack.seal();
        for at in (0..8).chain(58..bytes.len()) {
            for bit in 0..8 {
                let mut wrong = bytes.clone();
                wrong[at] ^= 1 << bit;
                assert!(parse_pack(id, &wrong).is_err(), "byte {at}, bit {bit}");
            }
        }
        for len in 0..bytes.len() {
            assert!(parse_pack(id, &bytes[..len]).is_err(), "{len} bytes");
        }
        assert!(parse_pack(PackId([0; 16]), &bytes).is_err(), "another name");
    }
}
