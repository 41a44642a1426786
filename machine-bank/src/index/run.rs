//! A run: one immutable file that says for many pages, in the order of their names, in which pack and where they are.
//!
//! Page `7d0c5e1f…` is found by its first four bytes, of which all of a run's are in memory (4 bytes a page), and confirmed by one read of the
//! 40 bytes that hold the rest of the name and the place; a page that is not there costs no read.
//!
//! ```text
//! "FBINDEX1"                                    8
//! n records, by name: name[4..32], pack, offset, len and slot    40 n
//! n prefixes: name[0..4] as a number            4 n
//! p packs                                       16 p
//! n, p, 0, hash of prefixes and packs, "FBINDEXE"    8 + 4 + 4 + 32 + 8
//! ```

use std::sync::OnceLock;

use crate::codec::{Input, Malformed};
use crate::pack::{PackId, Place};
use crate::page::PageId;
use crate::store::{Draft, Durability, Kind, Store, StoreError};

const MAGIC: &[u8; 8] = b"FBINDEX1";
const END: &[u8; 8] = b"FBINDEXE";
const TRAILER: usize = 56;
const RECORD: usize = 40;
/// Records up to which a run is read whole when the first of it is asked for: 5 MiB.
const RESIDENT: usize = 1 << 17;
/// Records that a cursor reads at once.
const BLOCK: usize = 1024;
/// Records of the largest run that is read: 4 TiB of pages.
const MOST_RECORDS: u64 = 1 << 30;
/// Packs of the largest run that is read.
const MOST_PACKS: u32 = 1 << 22;

/// Where a page is: a pack by its number in a run's or an index's table, and the place there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// The pack.
    pub pack: u32,
    /// Where in it.
    pub place: Place,
}

/// A run that can be searched.
#[derive(Debug)]
pub struct Run {
    /// The object.
    pub name: String,
    /// Its packs, by the numbers that its records use.
    pub packs: Vec<PackId>,
    prefixes: Vec<u32>,
    records: OnceLock<Vec<u8>>,
}

/// Why a run cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The store's fault.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is damaged.
    #[error("index {0}: {1}")]
    Malformed(String, Malformed),
}

impl Run {
    /// Reads what is kept in memory of the run `name` of `len` bytes.
    ///
    /// # Errors
    /// It is damaged, or the store's fault.
    pub fn open(store: &dyn Store, name: &str, len: u64) -> Result<Self, RunError> {
        let malformed = |error| RunError::Malformed(name.to_owned(), error);
        let at = len.checked_sub(TRAILER as u64).ok_or_else(|| malformed(Malformed::Ends))?;
        let mut trailer = [0; TRAILER];
        store.read(Kind::Index, name, at, &mut trailer)?;
        let (records, packs, hash) = parse_trailer(&trailer, len).map_err(malformed)?;
        let mut tail = vec![0; records * 4 + packs * 16];
        store.read(Kind::Index, name, at - tail.len() as u64, &mut tail)?;
        if *blake3::hash(&tail).as_bytes() != hash {
            return Err(malformed(Malformed::Hash("an index")));
        }
        let (prefixes, ids) = tail.split_at(records * 4);
        let prefixes: Vec<u32> = prefixes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        if !prefixes.is_sorted() {
            return Err(malformed(Malformed::Value("an unsorted index", records as u64)));
        }
        let packs = ids.as_chunks::<16>().0.iter().map(|id| PackId(*id)).collect();
        Ok(Self { name: name.to_owned(), packs, prefixes, records: OnceLock::new() })
    }

    /// Whether the run `name` of `len` bytes is what its name says, every record of it. [`Run::open`] reads the records only as they are asked for, and a run
    /// that was not synced before a power cut may have lost some.
    ///
    /// # Errors
    /// It is damaged, or the store's fault.
    pub fn check(store: &dyn Store, name: &str, len: u64) -> Result<(), RunError> {
        let malformed = |error| RunError::Malformed(name.to_owned(), error);
        let end = len.checked_sub(TRAILER as u64).ok_or_else(|| malformed(Malformed::Ends))?;
        let (mut hash, mut at, mut piece) = (blake3::Hasher::new(), MAGIC.len() as u64, vec![0; 1 << 20]);
        while at < end {
            let bytes = (end - at).min(piece.len() as u64) as usize;
            store.read(Kind::Index, name, at, &mut piece[..bytes])?;
            hash.update(&piece[..bytes]);
            at += bytes as u64;
        }
        if name_of(&hash) == name { Ok(()) } else { Err(malformed(Malformed::Hash("an index"))) }
    }

    /// Pages in it.
    pub fn len(&self) -> usize {
        self.prefixes.len()
    }

    /// Where a page is, by this run.
    ///
    /// # Errors
    /// The store's fault.
    pub fn find(&self, store: &dyn Store, id: &PageId) -> Result<Option<Location>, StoreError> {
        let prefix = prefix(id);
        let first = self.prefixes.partition_point(|other| *other < prefix);
        let alike = self.prefixes[first..].iter().take_while(|other| **other == prefix).count();
        for at in first..first + alike {
            let record = self.record(store, at)?;
            if record[..28] == id.0[4..] {
                return Ok(self.location(&record));
            }
        }
        Ok(None)
    }

    fn record(&self, store: &dyn Store, at: usize) -> Result<[u8; RECORD], StoreError> {
        if self.prefixes.len() <= RESIDENT {
            let records = match self.records.get() {
                Some(records) => records,
                None => {
                    let mut records = vec![0; self.prefixes.len() * RECORD];
                    store.read(Kind::Index, &self.name, MAGIC.len() as u64, &mut records)?;
                    self.records.get_or_init(|| records)
                }
            };
            if let Some(record) = records.as_chunks::<RECORD>().0.get(at) {
                return Ok(*record);
            }
        }
        let mut record = [0; RECORD];
        store.read(Kind::Index, &self.name, (MAGIC.len() + at * RECORD) as u64, &mut record)?;
        Ok(record)
    }

    /// What a record says; `None` where it makes no sense, so that a damaged one counts as absent.
    fn location(&self, record: &[u8; RECORD]) -> Option<Location> {
        let mut input = Input::new(&record[28..]);
        let (pack, offset, packed) = (input.u32().ok()?, input.u32().ok()?, input.u32().ok()?);
        let place = Place { offset, len: packed >> 8, slot: (packed & 0xff) as u8 };
        ((pack as usize) < self.packs.len()).then_some(Location { pack, place })
    }

    /// All pages, by name.
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor { run: self, at: 0, block: Vec::new(), block_at: 0 }
    }
}

fn name_of(hash: &blake3::Hasher) -> String {
    format!("run-{}", &hash.finalize().to_hex()[..32])
}

fn parse_trailer(trailer: &[u8; TRAILER], len: u64) -> Result<(usize, usize, [u8; 32]), Malformed> {
    let mut input = Input::new(trailer);
    let (records, packs, reserved, hash, end) =
        (input.u64()?, input.u32()?, input.u32()?, input.array::<32>()?, input.array::<8>()?);
    if end != *END || reserved != 0 {
        return Err(Malformed::Magic("index"));
    }
    if records > MOST_RECORDS || packs > MOST_PACKS {
        return Err(Malformed::Value("an index's number of pages", records));
    }
    let wanted = (MAGIC.len() + TRAILER) as u64 + records * (RECORD as u64 + 4) + u64::from(packs) * 16;
    if wanted != len {
        return Err(Malformed::Value("an index's length", len));
    }
    Ok((records as usize, packs as usize, hash))
}

fn prefix(id: &PageId) -> u32 {
    u32::from_be_bytes([id.0[0], id.0[1], id.0[2], id.0[3]])
}

/// Reads a run from its beginning.
#[derive(Debug)]
pub struct Cursor<'a> {
    run: &'a Run,
    at: usize,
    block: Vec<u8>,
    block_at: usize,
}

impl Cursor<'_> {
    /// The next page; records that make no sense are left out.
    ///
    /// # Errors
    /// The store's fault.
    pub fn next(&mut self, store: &dyn Store) -> Result<Option<(PageId, Location)>, StoreError> {
        while let Some(prefix) = self.run.prefixes.get(self.at) {
            if self.at * RECORD >= self.block_at + self.block.len() {
                let count = BLOCK.min(self.run.prefixes.len() - self.at);
                self.block_at = self.at * RECORD;
                self.block.resize(count * RECORD, 0);
                store.read(Kind::Index, &self.run.name, (MAGIC.len() + self.block_at) as u64, &mut self.block)?;
            }
            let offset = self.at * RECORD - self.block_at;
            self.at += 1;
            let Some(record) = self.block[offset..].first_chunk::<RECORD>() else { continue };
            let mut id = [0; 32];
            id[..4].copy_from_slice(&prefix.to_be_bytes());
            id[4..].copy_from_slice(&record[..28]);
            if let Some(location) = self.run.location(record) {
                return Ok(Some((PageId(id), location)));
            }
        }
        Ok(None)
    }
}

/// Writes a run, page by page in the order of their names.
#[derive(Debug)]
pub struct RunWriter {
    draft: Box<dyn Draft>,
    block: Vec<u8>,
    prefixes: Vec<u8>,
    last: Option<PageId>,
    hash: blake3::Hasher,
}

impl RunWriter {
    /// A run without pages.
    ///
    /// # Errors
    /// The store's fault.
    pub fn new(store: &dyn Store) -> Result<Self, StoreError> {
        let mut draft = store.create(Kind::Index)?;
        draft.append(MAGIC)?;
        Ok(Self { draft, block: Vec::new(), prefixes: Vec::new(), last: None, hash: blake3::Hasher::new() })
    }

    /// The next page; one that was there is left out.
    ///
    /// # Errors
    /// The store's fault.
    pub fn push(&mut self, id: &PageId, location: &Location) -> Result<(), StoreError> {
        if self.last.replace(*id) == Some(*id) {
            return Ok(());
        }
        self.prefixes.extend_from_slice(&prefix(id).to_le_bytes());
        let Location { pack, place } = location;
        self.block.extend_from_slice(&id.0[4..]);
        self.block.extend_from_slice(&pack.to_le_bytes());
        self.block.extend_from_slice(&place.offset.to_le_bytes());
        self.block.extend_from_slice(&(place.len << 8 | u32::from(place.slot)).to_le_bytes());
        if self.block.len() >= BLOCK * RECORD {
            self.hash.update(&self.block);
            self.draft.append(&self.block)?;
            self.block.clear();
        }
        Ok(())
    }

    /// Ends and commits it; its name is returned, or nothing where no page was pushed.
    ///
    /// # Errors
    /// The store's fault.
    pub fn finish(mut self, packs: &[PackId]) -> Result<Option<(String, u64)>, StoreError> {
        let records = self.prefixes.len() / 4;
        if records == 0 {
            return Ok(None);
        }
        self.hash.update(&self.block);
        let mut tail = std::mem::take(&mut self.prefixes);
        packs.iter().for_each(|pack| tail.extend_from_slice(&pack.0));
        let hash = blake3::hash(&tail);
        // Two runs of the same pages in different packs differ in their records only.
        self.hash.update(&tail);
        let name = name_of(&self.hash);
        self.draft.append(&self.block)?;
        self.draft.append(&tail)?;
        let mut trailer = Vec::with_capacity(TRAILER);
        trailer.extend_from_slice(&(records as u64).to_le_bytes());
        trailer.extend_from_slice(&(packs.len() as u32).to_le_bytes());
        trailer.extend_from_slice(&[0; 4]);
        trailer.extend_from_slice(hash.as_bytes());
        trailer.extend_from_slice(END);
        self.draft.append(&trailer)?;
        self.draft.commit(&name, Durability::Rebuildable)?;
        Ok(Some((name, (MAGIC.len() + records * RECORD + tail.len() + TRAILER) as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn id(n: u32) -> PageId {
        // Many share a prefix.
        let mut id = [0; 32];
        id[2] = (n >> 4) as u8;
        id[28..].copy_from_slice(&n.to_be_bytes());
        PageId(id)
    }

    #[test]
    fn every_page_is_found_and_no_other_and_damage_is_seen() {
        let store = MemoryStore::new();
        let mut writer = RunWriter::new(&store).unwrap();
        let place = |n: u32| Location { pack: n % 2, place: Place { offset: n * 100, len: 77, slot: (n % 16) as u8 } };
        for n in 0..3000 {
            writer.push(&id(n), &place(n)).unwrap();
            writer.push(&id(n), &place(n + 1)).unwrap();
        }
        let packs = [PackId([1; 16]), PackId([2; 16])];
        let (name, len) = writer.finish(&packs).unwrap().unwrap();
        assert_eq!(store.len(Kind::Index, &name).unwrap(), len);
        let run = Run::open(&store, &name, len).unwrap();
        assert_eq!((run.len(), run.packs.as_slice()), (3000, &packs[..]));
        for n in (0..3000).step_by(7) {
            assert_eq!(run.find(&store, &id(n)).unwrap(), Some(place(n)));
        }
        assert_eq!(run.find(&store, &id(3000)).unwrap(), None);
        let mut cursor = run.cursor();
        for n in 0..3000 {
            assert_eq!(cursor.next(&store).unwrap(), Some((id(n), place(n))));
        }
        assert_eq!(cursor.next(&store).unwrap(), None);
        for at in [len - 1, len - 30, len - TRAILER as u64, len - 80, len - 1000] {
            store.flip(Kind::Index, &name, at as usize, 1);
            assert!(Run::open(&store, &name, len).is_err(), "byte {at}");
            store.flip(Kind::Index, &name, at as usize, 1);
        }
        store.tear(Kind::Index, &name, 5000);
        assert!(Run::open(&store, &name, 5000).is_err());
        assert!(RunWriter::new(&store).unwrap().finish(&packs).unwrap().is_none());
    }
}
