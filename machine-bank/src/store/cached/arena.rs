//! The file of a cache: so many sets of 16 places, each for one block, found by its key and believed only if it is what its reader says that it must be.
//!
//! With 4 GiB there are 8,176 sets. The block of key `a17c…` may be in the 16 places of set `0xa17c… mod 8176`, whose entries are read at once, and is where the entry
//! has the rest of the key.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

/// Places of a set.
const WAYS: u64 = 16;
/// Bytes of a place's entry.
const ENTRY: usize = 64;
const HEADER: u64 = 4096;
const MAGIC: &[u8; 8] = b"FBCACHE1";
/// The most sets: 8 PiB.
const MOST_SETS: u64 = 1 << 34;

#[derive(Debug)]
pub struct Arena {
    file: File,
    sets: u64,
    /// Bytes of a block.
    block: u64,
    writable: bool,
}

/// A place's entry, as it is in the file.
struct Entry<'a>(&'a [u8; ENTRY]);

impl Entry<'_> {
    fn is(&self, key: &[u8; 32], len: usize) -> bool {
        self.0[..24] == key[8..] && self.0[24..28] == (len as u32).to_le_bytes()
    }

    fn used(&self) -> u32 {
        u32::from_le_bytes([self.0[28], self.0[29], self.0[30], self.0[31]])
    }
}

impl Arena {
    /// The cache that is the file `name` of `folder`, for blocks of `block` bytes, of at most `size` bytes where it has to be made. One of another size is made anew
    /// where nobody uses it.
    pub fn open(folder: &Path, name: &str, block: u64, size: u64) -> io::Result<Self> {
        let sets = (size.saturating_sub(HEADER) / set_bytes(block)).min(MOST_SETS);
        if sets == 0 {
            let least = HEADER + set_bytes(block);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a cache has at least {least} bytes")));
        }
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let path = folder.join(name);
        let (file, writable) = match OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(&path)
        {
            Ok(file) => (file, true),
            // One that cannot be written can be read.
            Err(_) if path.is_file() => (File::open(&path)?, false),
            Err(error) => return Err(error),
        };
        if writable && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() && header(&file, block).ok() != Some(sets) {
            file.set_len(0)?;
            file.set_len(HEADER + sets * set_bytes(block))?;
            file.write_all_at(&write_header(sets, block), 0)?;
        }
        // Whoever makes it anew holds the lock for that long only.
        for _ in 0..100 {
            if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
                let sets = header(&file, block)?;
                return Ok(Self { file, sets, block, writable });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(io::Error::new(io::ErrorKind::WouldBlock, "another process does not end making it"))
    }

    /// Fills `block` with the block of this key; false where it is not there, or not whole.
    pub fn find(&self, key: &[u8; 32], block: &mut [u8]) -> bool {
        self.find_if(key, block, |block, noted| check(key, block) == *noted)
    }

    /// The same where `is_right` says of a block, with what was noted beside it, whether it is the one; it may change it.
    pub fn find_if(&self, key: &[u8; 32], block: &mut [u8], is_right: impl Fn(&mut [u8], &[u8; 32]) -> bool) -> bool {
        let (set, mut entries) = (self.set(key), [0; WAYS as usize * ENTRY]);
        if self.file.read_exact_at(&mut entries, self.entry_at(set, 0)).is_err() {
            return false;
        }
        for (way, entry) in (0..).zip(entries.as_chunks::<ENTRY>().0) {
            if Entry(entry).is(key, block.len())
                && self.file.read_exact_at(block, self.block_at(set, way)).is_ok()
                && entry.last_chunk().is_some_and(|noted| is_right(block, noted))
            {
                let now = seconds();
                // A note that is lost costs nothing but order.
                if self.writable && now != Entry(entry).used() {
                    _ = self.file.write_at(&now.to_le_bytes(), self.entry_at(set, way) + 28);
                }
                return true;
            }
        }
        false
    }

    /// Keeps a block; whether another one made room.
    pub fn keep(&self, key: &[u8; 32], block: &[u8]) -> io::Result<bool> {
        self.keep_noted(key, block, &check(key, block))
    }

    /// The same with a note beside it.
    pub fn keep_noted(&self, key: &[u8; 32], block: &[u8], noted: &[u8; 32]) -> io::Result<bool> {
        if !self.writable {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let (set, mut entries) = (self.set(key), [0; WAYS as usize * ENTRY]);
        self.file.read_exact_at(&mut entries, self.entry_at(set, 0))?;
        let entries = entries.as_chunks::<ENTRY>().0;
        let same = entries.iter().position(|entry| Entry(entry).is(key, block.len()));
        let oldest = || entries.iter().enumerate().min_by_key(|(_, entry)| Entry(entry).used()).map(|(way, _)| way);
        let Some(way) = same.or_else(oldest) else { return Ok(false) };
        let evicts = same.is_none() && Entry(&entries[way]).used() != 0;
        let mut entry = [0; ENTRY];
        entry[..24].copy_from_slice(&key[8..]);
        entry[24..28].copy_from_slice(&(block.len() as u32).to_le_bytes());
        entry[28..32].copy_from_slice(&seconds().to_le_bytes());
        entry[32..].copy_from_slice(noted);
        // Between the two the entry is of what was there, and does not fit the block.
        self.file.write_all_at(block, self.block_at(set, way as u64))?;
        self.file.write_all_at(&entry, self.entry_at(set, way as u64))?;
        Ok(evicts)
    }

    fn set(&self, key: &[u8; 32]) -> u64 {
        u64::from_le_bytes([key[0], key[1], key[2], key[3], key[4], key[5], key[6], key[7]]) % self.sets
    }

    fn entry_at(&self, set: u64, way: u64) -> u64 {
        HEADER + (set * WAYS + way) * ENTRY as u64
    }

    fn block_at(&self, set: u64, way: u64) -> u64 {
        HEADER + self.sets * WAYS * ENTRY as u64 + (set * WAYS + way) * self.block
    }
}

fn check(key: &[u8; 32], block: &[u8]) -> [u8; 32] {
    *blake3::keyed_hash(key, block).as_bytes()
}

/// Never 0, which is an empty place's.
fn seconds() -> u32 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (since.as_secs() as u32).max(1)
}

/// Bytes of a set, entries included.
fn set_bytes(block: u64) -> u64 {
    WAYS * (block + ENTRY as u64)
}

fn write_header(sets: u64, block: u64) -> Vec<u8> {
    let fields = [&MAGIC[..], &sets.to_le_bytes(), &(WAYS as u32).to_le_bytes(), &(block as u32).to_le_bytes()].concat();
    let mut header = [&fields[..], blake3::hash(&fields).as_bytes()].concat();
    header.resize(HEADER as usize, 0);
    header
}

/// The sets of a file that is a cache.
fn header(file: &File, block: u64) -> io::Result<u64> {
    let mut header = [0; HEADER as usize];
    file.read_exact_at(&mut header, 0)?;
    let sets = u64::from_le_bytes([header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15]]);
    let whole = (1..=MOST_SETS).contains(&sets)
        && header[..] == write_header(sets, block)
        && file.metadata()?.len() >= HEADER + sets * set_bytes(block);
    whole.then_some(sets).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the file there is no cache"))
}
