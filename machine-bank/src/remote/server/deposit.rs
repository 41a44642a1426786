//! What clients bring: packs of which every page is what it is called, and manifests that name nothing but what the bank has and the client knows.
//!
//! A pack of 8 MiB has its 6,000 pages decompressed and named before anybody else sees it; a manifest that names a page of somebody else's machine, of
//! which the client knows the hash, is refused as one that names a page that is not there.

use std::collections::HashSet;
use std::sync::PoisonError;
use std::time::Duration;

use farbus_transport::Fabric;

use super::super::wire::Status;
use super::staged::Staged;
use super::{Failure, Half, Handle, MOST_BROUGHT, Session, half, refused};
use crate::manifest::{Entry, Manifest, ManifestError};
use crate::pack::{FULL, FULL_PAGES, GROUP, GroupDecoder, PackId, Place, parse_pack};
use crate::page::{PAGE, PageId, Root};
use crate::store::{Durability, Hold, Kind};

/// Objects that a client may be sending at a time.
const MOST_STREAMS: usize = 16;
/// Bytes of the largest pack that is taken: groups up to the one that fills it, and a directory of short groups.
const MOST_PACK: u64 = (FULL + GROUP + FULL_PAGES * 40 + 4096) as u64;
/// Leaves between two words to the client that they are being checked.
const LEAVES_A_WORD: usize = 64;

impl<F: Fabric> Session<'_, F> {
    /// Keeps sweeps away, so that what the bank has stays while it is being named.
    pub(super) fn hold(&mut self, wait: Duration) -> Result<Vec<u8>, Failure> {
        if self.client.rights.write.is_empty() {
            return Err(refused("this client may deposit nothing here"));
        }
        let wait = wait.min(self.server.options.wait);
        let hold = self.server.bank.store().hold(Hold::Deposit, wait)?;
        // What a sweep took before this the index must not say any more.
        self.server.renew()?;
        self.known = None;
        self.handle(Handle::Hold(hold))
    }

    fn holds(&self) -> Result<(), Failure> {
        let holds = self.handles.values().any(|handle| matches!(handle, Handle::Hold(_)));
        if holds { Ok(()) } else { Err(refused("no deposit is under way")) }
    }

    /// Which pages need not be sent: those that are there and that this client knows.
    pub(super) fn have(&mut self, ids: &[PageId]) -> Result<Vec<u8>, Failure> {
        self.holds()?;
        self.learn()?;
        let mut bitmap = vec![0; ids.len().div_ceil(8)];
        for (at, known) in self.known(ids)?.into_iter().enumerate() {
            bitmap[at / 8] |= u8::from(known) << (at % 8);
        }
        Ok(bitmap)
    }

    fn known(&self, ids: &[PageId]) -> Result<Vec<bool>, Failure> {
        let index = self.server.index.read().unwrap_or_else(PoisonError::into_inner);
        let brought = self.server.brought.lock().unwrap_or_else(PoisonError::into_inner);
        let brought = brought.get(&self.client.name);
        let mut known = Vec::with_capacity(ids.len());
        for id in ids {
            let half = half(id);
            let knows = self.client.rights.reads_all()
                || self.known.as_ref().is_some_and(|known| known.contains(&half))
                || brought.is_some_and(|brought| brought.contains(&half));
            known.push(knows && index.find(self.server.bank.store(), id)?.is_some());
        }
        Ok(known)
    }

    /// Reads the machines that a client may read who may not read all of them.
    fn learn(&mut self) -> Result<(), Failure> {
        if self.known.is_some() || self.client.rights.reads_all() {
            return Ok(());
        }
        let bank = &self.server.bank;
        let listing = bank.listing()?;
        let (mut known, mut seen): (HashSet<Half>, HashSet<[u8; 32]>) = Default::default();
        let mut leaves = 0;
        for entry in listing.0.iter().filter(|entry| self.client.rights.reads(&entry.machine)) {
            let manifest = Manifest::open(bank.store(), bank.identity(), &listing, &entry.root)?;
            for (at, section) in manifest.head.sections.iter().enumerate() {
                for (leaf, hash) in section.leaves.iter().enumerate() {
                    if seen.insert(*hash) {
                        let ids = manifest.leaf(bank.store(), bank.identity(), at, leaf)?;
                        known.extend(ids.iter().filter(|id| !id.is_zero()).map(half));
                        leaves += 1;
                        if leaves % LEAVES_A_WORD == 0 {
                            self.wait();
                        }
                    }
                }
            }
        }
        self.known = Some(known);
        Ok(())
    }

    /// Takes bytes of an object.
    pub(super) fn stage(&mut self, stream: u32, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.holds()?;
        let staged: u64 = self.streams.values().map(|stream| stream.len() as u64).sum();
        if staged + bytes.len() as u64 > self.server.options.staged {
            return Err(refused(format!("more than {} bytes that are yet to be checked", self.server.options.staged)));
        }
        if !self.streams.contains_key(&stream) && self.streams.len() >= MOST_STREAMS {
            return Err(refused("too many objects at a time"));
        }
        let there = self.streams.entry(stream).or_default();
        if there.len() as u64 != offset {
            return Err(refused("a piece that does not follow the one before"));
        }
        there.extend_from_slice(bytes);
        Ok(())
    }

    fn staged(&mut self, stream: u32, len: u64) -> Result<Vec<u8>, Failure> {
        self.holds()?;
        let bytes = self.streams.remove(&stream).ok_or_else(|| refused("nothing was sent of it"))?;
        if bytes.len() as u64 == len { Ok(bytes) } else { Err(refused("it has another length than was sent")) }
    }

    /// A pack is complete: it is checked, and then in the bank.
    pub(super) fn pack(&mut self, stream: u32, len: u64, id: PackId) -> Result<(), Failure> {
        let bytes = self.staged(stream, len)?;
        if len > MOST_PACK {
            return Err(refused(format!("a pack of {len} bytes")));
        }
        let entries = parse_pack(id, &bytes)?;
        self.check_pages(&bytes, &entries)?;
        let bank = &self.server.bank;
        bank.store().put(Kind::Pack, &id.name(), &bytes, Durability::Durable)?;
        {
            let mut index = self.server.index.write().unwrap_or_else(PoisonError::into_inner);
            index.add(id, &entries);
            if index.loose() >= crate::index::LOOSE {
                index.flush(bank.store())?;
            }
        }
        if !self.client.rights.reads_all() {
            let mut brought = self.server.brought.lock().unwrap_or_else(PoisonError::into_inner);
            if brought.values().map(HashSet::len).sum::<usize>() + entries.len() > MOST_BROUGHT {
                // Whose deposit was interrupted sends those pages once more; what this one brings is remembered by itself.
                brought.clear();
            }
            brought.entry(self.client.name.clone()).or_default().extend(entries.iter().map(|(id, _)| half(id)));
            let mine = self.known.get_or_insert_default();
            mine.extend(entries.iter().map(|(id, _)| half(id)));
        }
        Ok(())
    }

    /// Whether every page of a pack is what it is called.
    fn check_pages(&self, bytes: &[u8], entries: &[(PageId, Place)]) -> Result<(), Failure> {
        let mut decoder = GroupDecoder::new().map_err(|error| Failure(Status::Failed, error.to_string()))?;
        let (mut pages, mut names) = (Box::new([0; GROUP]), Vec::new());
        for group in entries.chunk_by(|(_, a), (_, b)| a.offset == b.offset) {
            let Some((_, place)) = group.first() else { continue };
            let (offset, len) = (place.offset as usize, place.len as usize);
            // The directory fills the pack exactly, so that this is in it.
            let stored = bytes.get(offset..offset + len).ok_or_else(|| refused("a group outside of its pack"))?;
            let len = decoder.decode(stored, &mut pages)?;
            let there = pages[..len].as_chunks::<PAGE>().0;
            self.server.bank.identity().pages(there, &mut names);
            let right = names.len() == group.len() && group.iter().zip(&names).all(|((id, _), name)| !id.is_zero() && id == name);
            if !right {
                return Err(refused("a pack with a page that is not what it is called"));
            }
        }
        Ok(())
    }

    /// A manifest is complete: it is checked, gets its number, and is seen.
    pub(super) fn commit(&mut self, stream: u32, len: u64, root: Root, number: u64, machine: &str) -> Result<Vec<u8>, Failure> {
        let bytes = self.staged(stream, len)?;
        if !self.client.rights.writes(machine) {
            return Err(refused(format!("this client may not deposit {machine}")));
        }
        self.learn()?;
        let bank = &self.server.bank;
        let (store, identity) = (bank.store(), bank.identity());
        let mut entry = Entry { machine: machine.to_owned(), number: u64::MAX, root, len };
        let staged = Staged { store, name: entry.object(), bytes };
        let mut listing = bank.listing()?;
        listing.0.retain(|other| other.root != root);
        listing.0.push(entry.clone());
        let manifest = Manifest::open(&staged, identity, &listing, &root).map_err(|error| refused(error.to_string()))?;
        // What it rests on directly this client must be able to read; what that one rests on it has read by that.
        if let Some(base) = manifest.table.base
            && !listing.by_root(&base).is_some_and(|entry| self.client.rights.reads(&entry.machine))
        {
            return Err(refused(ManifestError::NoBase { object: staged.name, base }.to_string()));
        }
        if manifest.head.machine != machine {
            return Err(refused("the manifest is another machine's"));
        }
        let mut leaves = 0;
        for (at, section) in manifest.head.sections.iter().enumerate() {
            for leaf in 0..section.leaves.len() {
                let ids = manifest.leaf(&staged, identity, at, leaf).map_err(|error| refused(error.to_string()))?;
                let stored: Vec<_> = ids.into_iter().filter(|id| !id.is_zero()).collect();
                if !self.known(&stored)?.into_iter().all(|known| known) {
                    return Err(refused("the manifest names a page that was not brought"));
                }
                leaves += 1;
                if leaves % LEAVES_A_WORD == 0 {
                    self.wait();
                }
            }
        }
        store.sync(Kind::Pack)?;
        {
            let _commit = store.hold(Hold::Commit, self.server.options.wait)?;
            let next = bank.next_number(machine)?;
            if number != 0 && number != next {
                return Err(Failure(Status::Overtaken, format!("{machine} was deposited by somebody else meanwhile")));
            }
            entry.number = next;
            store.put(Kind::Manifest, &entry.object(), &staged.bytes, Durability::Durable)?;
        }
        store.sync(Kind::Manifest)?;
        let mut index = self.server.index.write().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = index.flush(store) {
            tracing::warn!(%error, "the index of a deposit was not written, and is made again from its packs");
        }
        Ok(entry.number.to_le_bytes().to_vec())
    }
}
