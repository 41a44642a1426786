//! What clients bring: packs of which every page is what it is called, and manifests that name nothing but what the bank has and the client knows.
//!
//! A pack of 8 MiB has its 6,000 pages decompressed and named before anybody else sees it; a manifest that names a page of somebody else's machine, of
//! which the client knows the hash, is refused as one that names a page that is not there.

use std::collections::HashSet;
use std::sync::PoisonError;
use std::time::Duration;

use farbus_transport::Fabric;

use super::super::wire::Status;
use super::quota::What;
use super::staged::Staged;
use super::{BankServer, Failure, Half, Handle, MOST_BROUGHT, Session, Stream, half, refused};
use crate::index::{LOOSE, read_directory};
use crate::manifest::{Entry, LEAF, Manifest, ManifestError};
use crate::pack::{FULL, FULL_PAGES, GROUP, GroupDecoder, PackId, Place, parse_pack};
use crate::page::{PAGE, PageId, Root};
use crate::store::{Durability, Hold, Kind, StoreError};

/// Objects that a client may be sending at a time.
const MOST_STREAMS: usize = 16;
/// Bytes of the largest pack that is taken: groups up to the one that fills it, and a directory of short groups.
const MOST_PACK: u64 = (FULL + GROUP + FULL_PAGES * 40 + 4096) as u64;
/// Packs of a client that are remembered: those of half a terabyte.
const MOST_PACKS: usize = 1 << 16;
/// Leaves between two words to the client that they are being checked.
const LEAVES_A_WORD: usize = 64;

impl<F: Fabric> Session<'_, F> {
    /// Keeps sweeps away, so that what the bank has stays while it is being named.
    pub(super) fn hold(&mut self, wait: Duration) -> Result<Vec<u8>, Failure> {
        if self.client.rights.write.is_empty() {
            return Err(refused("this client may deposit nothing here"));
        }
        let share = self.share(What::Holds)?;
        let wait = wait.min(self.server.options.wait);
        let hold = self.busy(|server| {
            let hold = server.bank.store().hold(Hold::Deposit, wait)?;
            // What a sweep took before this the index must not say any more.
            server.renew()?;
            Ok::<_, Failure>(hold)
        })?;
        self.known = None;
        self.lapsed = false;
        Ok(self.handle(Handle { is_hold: true, _guard: Some(hold), _share: share }))
    }

    fn holds(&self) -> Result<(), Failure> {
        if self.handles.values().any(|handle| handle.is_hold) {
            return Ok(());
        }
        Err(refused(if self.lapsed {
            let limit = self.server.options.hold;
            format!(
                "the deposit ended here, because its client neither went on with it nor renewed it for {limit:?}: deposit again"
            )
        } else {
            "no deposit is under way".to_owned()
        }))
    }

    /// Which pages need not be sent: those that are there and that this client knows.
    pub(super) fn have(&mut self, ids: &[PageId]) -> Result<Vec<u8>, Failure> {
        self.holds()?;
        self.learn()?;
        let mut bitmap = vec![0; ids.len().div_ceil(8)];
        for (at, (there, known)) in self.look(ids)?.into_iter().enumerate() {
            bitmap[at / 8] |= u8::from(there && known) << (at % 8);
        }
        Ok(bitmap)
    }

    /// Which pages are there, and which of them this client is known to know.
    fn look(&self, ids: &[PageId]) -> Result<Vec<(bool, bool)>, Failure> {
        let brought = self.server.brought.lock().unwrap_or_else(PoisonError::into_inner);
        let brought = brought.get(&self.client.name);
        let knows: Vec<_> = ids
            .iter()
            .map(|id| {
                let half = half(id);
                self.client.rights.reads_all()
                    || self.known.as_ref().is_some_and(|known| known.contains(&half))
                    || brought.is_some_and(|brought| brought.pages.contains(&half))
            })
            .collect();
        let store = self.server.bank.store();
        let there: Result<Vec<_>, StoreError> =
            self.server.indexed(|index| ids.iter().map(|id| Ok(index.find(store, id)?.is_some())).collect());
        Ok(there?.into_iter().zip(knows).collect())
    }

    /// Hands the names of the pages of all machines that this client may read to `each`, leaf by leaf and each leaf once, until it says that it has enough.
    fn read_machines(&mut self, mut each: impl FnMut(&[PageId]) -> bool) -> Result<(), Failure> {
        let bank = &self.server.bank;
        let listing = bank.listing()?;
        let mut seen: HashSet<[u8; 32]> = HashSet::new();
        let mut leaves = 0;
        for entry in listing.0.iter().filter(|entry| self.client.rights.reads(&entry.machine)) {
            let manifest = Manifest::open(bank.store(), bank.identity(), &listing, &entry.root)?;
            for (at, section) in manifest.head.sections.iter().enumerate() {
                for (leaf, hash) in section.leaves.iter().enumerate() {
                    if seen.insert(*hash) {
                        if each(&manifest.leaf(bank.store(), bank.identity(), at, leaf)?) {
                            return Ok(());
                        }
                        leaves += 1;
                        if leaves % LEAVES_A_WORD == 0 {
                            self.wait();
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads the machines that a client may read who may not read all of them, up to the limit: what is beyond it is sent again.
    fn learn(&mut self) -> Result<(), Failure> {
        if self.known.is_some() || self.client.rights.reads_all() {
            return Ok(());
        }
        let (mut known, most) = (HashSet::new(), self.server.options.known);
        self.read_machines(|ids| {
            let halves = ids.iter().filter(|id| !id.is_zero()).map(half);
            for half in halves {
                if known.len() >= most {
                    return true;
                }
                known.insert(half);
            }
            false
        })?;
        self.known = Some(known);
        Ok(())
    }

    /// Whether this client knows these pages, which are more than is remembered of it: from what it brought, pack by pack, and from the machines that it may read.
    fn settle(&mut self, pages: &mut HashSet<Half>) -> Result<(), Failure> {
        if pages.is_empty() {
            return Ok(());
        }
        let packs: Vec<_> = {
            let brought = self.server.brought.lock().unwrap_or_else(PoisonError::into_inner);
            brought.get(&self.client.name).map(|brought| brought.packs.iter().copied().collect()).unwrap_or_default()
        };
        let store = self.server.bank.store();
        for (at, pack) in packs.into_iter().enumerate() {
            let entries = store.len(Kind::Pack, &pack.name()).ok().and_then(|len| read_directory(store, pack, len).ok());
            // One that is gone says nothing.
            entries.iter().flatten().for_each(|(id, _)| _ = pages.remove(&half(id)));
            if (at + 1) % LEAVES_A_WORD == 0 {
                self.wait();
            }
        }
        if !pages.is_empty() {
            self.read_machines(|ids| {
                ids.iter().for_each(|id| _ = pages.remove(&half(id)));
                pages.is_empty()
            })?;
        }
        if pages.is_empty() { Ok(()) } else { Err(refused("the manifest names a page that was not brought")) }
    }

    /// Takes bytes of an object.
    pub(super) fn stage(&mut self, stream: u32, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.holds()?;
        if !self.streams.contains_key(&stream) && self.streams.len() >= MOST_STREAMS {
            return Err(Failure(Status::Quota, format!("more than {MOST_STREAMS} objects at a time")));
        }
        let share = || self.server.quotas.share(&self.client.name, What::Staged);
        let there = self.streams.entry(stream).or_insert_with(|| Stream { bytes: Vec::new(), share: share() });
        if there.bytes.len() as u64 != offset {
            return Err(refused("a piece that does not follow the one before"));
        }
        let most = self.server.options.staged;
        if !there.share.grow(bytes.len() as u64, most) {
            return Err(Failure(Status::Quota, format!("a client may have sent {most} bytes that are yet to be checked")));
        }
        there.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn staged(&mut self, stream: u32, len: u64) -> Result<Stream, Failure> {
        self.holds()?;
        let stream = self.streams.remove(&stream).ok_or_else(|| refused("nothing was sent of it"))?;
        if stream.bytes.len() as u64 == len { Ok(stream) } else { Err(refused("it has another length than was sent")) }
    }

    /// A pack is complete: it is checked, and then in the bank.
    pub(super) fn pack(&mut self, stream: u32, len: u64, id: PackId) -> Result<(), Failure> {
        let Stream { bytes, share: _staged } = self.staged(stream, len)?;
        if len > MOST_PACK {
            return Err(refused(format!("a pack of {len} bytes")));
        }
        let entries = parse_pack(id, &bytes)?;
        self.check_pages(&bytes, &entries)?;
        self.busy(|server| server.bank.store().put(Kind::Pack, &id.name(), &bytes, Durability::Durable))?;
        if self.server.add(id, &entries) >= LOOSE {
            self.busy(BankServer::merge)?;
        }
        if !self.client.rights.reads_all() {
            let mut all = self.server.brought.lock().unwrap_or_else(PoisonError::into_inner);
            if all.values().map(|brought| brought.pages.len()).sum::<usize>() + entries.len() > MOST_BROUGHT {
                // Whose deposit was interrupted sends those pages once more; which packs brought them is remembered.
                all.values_mut().for_each(|brought| brought.pages.clear());
            }
            let brought = all.entry(self.client.name.clone()).or_default();
            brought.pages.extend(entries.iter().map(|(id, _)| half(id)));
            if brought.packs.len() >= MOST_PACKS {
                brought.packs.pop_front();
            }
            brought.packs.push_back(id);
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
        let Stream { bytes, share: _staged } = self.staged(stream, len)?;
        if !self.client.rights.writes(machine) {
            return Err(refused(format!("this client may not deposit {machine}")));
        }
        self.learn()?;
        let bank = &self.server.bank;
        let (store, identity) = (bank.store(), bank.identity());
        let entry = Entry { machine: machine.to_owned(), number: u64::MAX, root, len };
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
        let (mut leaves, mut unsettled) = (0, HashSet::new());
        for (at, section) in manifest.head.sections.iter().enumerate() {
            for leaf in 0..section.leaves.len() {
                let ids = manifest.leaf(&staged, identity, at, leaf).map_err(|error| refused(error.to_string()))?;
                let stored: Vec<_> = ids.into_iter().filter(|id| !id.is_zero()).collect();
                for (id, (there, known)) in stored.iter().zip(self.look(&stored)?) {
                    if !there {
                        return Err(refused("the manifest names a page that was not brought"));
                    }
                    if !known {
                        unsettled.insert(half(id));
                    }
                }
                if unsettled.len() >= self.server.options.known.max(LEAF) {
                    self.settle(&mut unsettled)?;
                }
                leaves += 1;
                if leaves % LEAVES_A_WORD == 0 {
                    self.wait();
                }
            }
        }
        self.settle(&mut unsettled)?;
        let bytes = staged.bytes;
        let entry = self.busy(|server| publish(server, entry, number, &bytes))?;
        if let Err(error) = self.busy(BankServer::merge) {
            tracing::warn!(%error, "the index of a deposit was not written, and is made again from its packs");
        }
        Ok(entry.number.to_le_bytes().to_vec())
    }
}

/// Gives a manifest that was checked its number, and lets it be seen.
fn publish(server: &BankServer, mut entry: Entry, number: u64, bytes: &[u8]) -> Result<Entry, Failure> {
    let (bank, store) = (&server.bank, server.bank.store());
    store.sync(Kind::Pack)?;
    {
        let _commit = store.hold(Hold::Commit, server.options.wait)?;
        let last = bank.listing()?.last(&entry.machine).map_or(0, |entry| entry.number);
        if number != 0 && number != last.saturating_add(1) {
            return Err(Failure(Status::Overtaken, format!("{} was deposited by somebody else meanwhile", entry.machine)));
        }
        entry.number = bank.next_number(&entry.machine)?;
        store.put(Kind::Manifest, &entry.object(), bytes, Durability::Durable)?;
    }
    store.sync(Kind::Manifest)?;
    Ok(entry)
}
