//! Pages by name: found in the index, read by groups in the order in which they lie, and handed on only if they are what they are called.
//!
//! Sixteen names that one deposit stored together are one read of some 15 KB, one decompression and sixteen hashes. A page that is not where the
//! index says, because a sweep moved it, is looked for once more in the packs themselves.

use std::sync::{PoisonError, RwLock};

use thiserror::Error;

use crate::bank::Bank;
use crate::index::{Index, IndexError, Location};
use crate::manifest::LEAF;
use crate::pack::{GROUP, GROUP_PAGES, GroupDecoder, PackId, Place};
use crate::page::{PAGE, PageId, Root};
use crate::remote::{Fetched, Service};
use crate::store::{Kind, PageCache, StoreError};

/// Bytes of neighbouring groups that are read at once.
const READ: usize = 512 << 10;
/// Bytes between two wanted groups that are read rather than skipped.
const GAP: u64 = 16 << 10;

/// Why a page cannot be had.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The store's fault.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The index cannot be read.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// No pack has it.
    #[error("page {0} is in no pack")]
    Missing(PageId),
    /// What is stored under its name is something else.
    #[error("page {id} in pack {} is damaged", .pack.name())]
    Damaged {
        /// The page.
        id: PageId,
        /// The pack.
        pack: PackId,
    },
    /// What another bank sent for it is something else.
    #[error("what was sent for page {0} is another")]
    Sent(PageId),
    /// There is no memory for a decompressor.
    #[error("no memory to decompress with: {0}")]
    Memory(std::io::Error),
}

/// A page that is wanted, and what its reader knows it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The page, not that of zeros.
    pub id: PageId,
    /// Handed back with the page.
    pub token: u64,
    /// Where the machine has it. Another bank is asked by that; packs are by the name.
    pub at: At,
}

/// A place in a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    /// The section's number.
    pub section: u16,
    /// The page's.
    pub page: u64,
}

impl At {
    /// A page of a leaf.
    pub fn new(section: usize, leaf: usize, page: usize) -> Self {
        Self { section: section as u16, page: (leaf * LEAF + page) as u64 }
    }

    fn leaf(&self) -> usize {
        (self.page / LEAF as u64) as usize
    }

    fn in_leaf(&self) -> u16 {
        (self.page % LEAF as u64) as u16
    }
}

/// Finds and reads pages of a bank. Any number of threads may use one, each with its own [`Scratch`].
#[derive(Debug)]
pub struct Reader<'b> {
    bank: &'b Bank,
    from: From<'b>,
}

#[derive(Debug)]
enum From<'b> {
    Packs(RwLock<Index>),
    Service(&'b dyn Service, Root),
}

/// One thread's buffers.
#[derive(Debug)]
pub struct Scratch {
    decoder: GroupDecoder,
    stored: Vec<u8>,
    pages: Box<[u8; GROUP]>,
    order: Vec<(PackId, Place, Wanted)>,
    names: Vec<PageId>,
}

impl Scratch {
    /// # Errors
    /// There is no memory for zstd's state.
    pub fn new() -> Result<Self, ReadError> {
        let decoder = GroupDecoder::new().map_err(ReadError::Memory)?;
        Ok(Self { decoder, stored: Vec::new(), pages: Box::new([0; GROUP]), order: Vec::new(), names: Vec::new() })
    }
}

impl<'b> Reader<'b> {
    /// For any pages of a bank that is here.
    ///
    /// # Errors
    /// The store's fault.
    pub fn new(bank: &'b Bank) -> Result<Self, ReadError> {
        Ok(Self { bank, from: From::Packs(RwLock::new(Index::open(bank.store())?)) })
    }

    /// For the pages of one machine.
    ///
    /// # Errors
    /// The store's fault.
    pub fn of(bank: &'b Bank, root: Root) -> Result<Self, ReadError> {
        match bank.store().service() {
            Some(service) => Ok(Self { bank, from: From::Service(service, root) }),
            None => Self::new(bank),
        }
    }

    /// Hands each wanted page to `sink`, verified, in the order in which they are stored.
    ///
    /// # Errors
    /// A page is missing or damaged, also by the packs' own directories; others may have been handed out.
    pub fn fetch(&self, wanted: &[Wanted], scratch: &mut Scratch, sink: &mut dyn FnMut(u64, &[u8; PAGE])) -> Result<(), ReadError> {
        let index = match &self.from {
            From::Packs(index) => index,
            From::Service(service, root) => return self.fetch_remote(*service, root, wanted, scratch, sink),
        };
        let mut failed = Vec::new();
        self.fetch_once(index, wanted, scratch, sink, &mut failed)?;
        if failed.is_empty() {
            return Ok(());
        }
        for (_, error) in &failed {
            if let ReadError::Damaged { pack, .. } = error {
                self.bank.store().doubt(Kind::Pack, &pack.name());
            }
        }
        // A sweep may have moved them, or another pack may have them whole.
        let fresh = Index::rebuild(self.bank.store())?;
        *index.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        let again: Vec<_> = failed.drain(..).map(|(wanted, _)| wanted).collect();
        self.fetch_once(index, &again, scratch, sink, &mut failed)?;
        failed.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// From another bank, leaf by leaf: it says where in what it sends each page should be, and a page is what it is called or nothing.
    fn fetch_remote(
        &self,
        service: &dyn Service,
        root: &Root,
        wanted: &[Wanted],
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(u64, &[u8; PAGE]),
    ) -> Result<(), ReadError> {
        let cache = self.bank.store().pages();
        let mut wanted = match cache {
            Some(cache) => self.cached(cache, wanted, scratch, sink),
            None => wanted.to_vec(),
        };
        wanted.sort_unstable_by_key(|wanted| wanted.at);
        let Scratch { decoder, stored, pages, names, .. } = scratch;
        let mut failed = None;
        for leaf in wanted.chunk_by(|a, b| a.at.section == b.at.section && a.at.leaf() == b.at.leaf()) {
            let (section, number) = (usize::from(leaf[0].at.section), leaf[0].at.leaf());
            let asked: Vec<_> = leaf.iter().map(|wanted| wanted.at.in_leaf()).collect();
            let of = |page: u16| {
                let first = leaf.partition_point(|wanted| wanted.at.in_leaf() < page);
                leaf[first..].iter().take_while(move |wanted| wanted.at.in_leaf() == page)
            };
            service.fetch(root, section, number, &asked, stored, &mut |fetched| match fetched {
                Fetched::Missing(page) => {
                    of(page).for_each(|wanted| {
                        failed.get_or_insert(ReadError::Missing(wanted.id));
                    });
                }
                Fetched::Group(group, places) => {
                    let len = decoder.decode(group, pages).unwrap_or(0);
                    let there = pages[..len].as_chunks::<PAGE>().0;
                    let at = |(_, slot): &(u16, u8)| there.get(usize::from(*slot));
                    self.bank.identity().pages(places.iter().filter_map(at), names);
                    let mut names = names.iter();
                    for place in places {
                        let bytes = at(place);
                        let name = bytes.and_then(|_| names.next());
                        if let (Some(cache), Some(bytes), Some(name)) = (cache, bytes, name)
                            && of(place.0).any(|wanted| wanted.id == *name)
                        {
                            cache.keep_page(name, bytes);
                        }
                        for wanted in of(place.0) {
                            match bytes.filter(|_| name == Some(&wanted.id)) {
                                Some(bytes) => sink(wanted.token, bytes),
                                None => _ = failed.get_or_insert(ReadError::Sent(wanted.id)),
                            }
                        }
                    }
                }
            })?;
        }
        failed.map_or(Ok(()), Err)
    }

    /// Hands out what is kept of `wanted`, each page held against its name, and says what is left.
    fn cached(
        &self,
        cache: &PageCache,
        wanted: &[Wanted],
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(u64, &[u8; PAGE]),
    ) -> Vec<Wanted> {
        let Scratch { pages, names, .. } = scratch;
        let mut left = Vec::new();
        for batch in wanted.chunks(GROUP_PAGES) {
            let there = pages.as_chunks_mut::<PAGE>().0;
            let found: Vec<_> = batch.iter().zip(there.iter_mut()).map(|(wanted, page)| cache.page(&wanted.id, page)).collect();
            self.bank.identity().pages(there.iter().take(batch.len()), names);
            for (((wanted, page), name), found) in batch.iter().zip(there.iter()).zip(names.iter()).zip(found) {
                if found && *name == wanted.id { sink(wanted.token, page) } else { left.push(*wanted) }
            }
        }
        cache.count(wanted.len() - left.len(), left.len());
        left
    }

    fn fetch_once(
        &self,
        index: &RwLock<Index>,
        wanted: &[Wanted],
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(u64, &[u8; PAGE]),
        failed: &mut Vec<(Wanted, ReadError)>,
    ) -> Result<(), ReadError> {
        self.locate(index, wanted, &mut scratch.order, failed)?;
        scratch.order.sort_unstable_by_key(|(pack, place, wanted)| (*pack, *place, wanted.id));
        let order = std::mem::take(&mut scratch.order);
        let mut rest = &order[..];
        while let Some((first, _)) = rest.split_first() {
            let (count, end) = stretch(rest);
            let (stretch, others) = rest.split_at(count);
            rest = others;
            let (pack, start) = (first.0, u64::from(first.1.offset));
            scratch.stored.resize((end - start) as usize, 0);
            match self.bank.store().read(Kind::Pack, &pack.name(), start, &mut scratch.stored) {
                Ok(()) => self.decode(stretch, scratch, sink, failed),
                Err(StoreError::Missing { .. } | StoreError::Ends { .. } | StoreError::Unsealed { .. }) => {
                    failed.extend(stretch.iter().map(|(_, _, wanted)| (*wanted, ReadError::Missing(wanted.id))));
                }
                Err(error) => return Err(error.into()),
            }
        }
        scratch.order = order;
        Ok(())
    }

    fn locate(
        &self,
        index: &RwLock<Index>,
        wanted: &[Wanted],
        order: &mut Vec<(PackId, Place, Wanted)>,
        failed: &mut Vec<(Wanted, ReadError)>,
    ) -> Result<(), ReadError> {
        order.clear();
        let index = index.read().unwrap_or_else(PoisonError::into_inner);
        for wanted in wanted {
            match index.find(self.bank.store(), &wanted.id) {
                Ok(Some(location @ Location { place, .. })) if (2..=GROUP as u32 + 1).contains(&place.len) => {
                    order.push((index.pack(&location), place, *wanted));
                }
                Ok(_) | Err(StoreError::Missing { .. } | StoreError::Ends { .. } | StoreError::Unsealed { .. }) => {
                    failed.push((*wanted, ReadError::Missing(wanted.id)))
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Decompresses the groups of `stretch`, which `scratch.stored` has the bytes of.
    fn decode(
        &self,
        stretch: &[(PackId, Place, Wanted)],
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(u64, &[u8; PAGE]),
        failed: &mut Vec<(Wanted, ReadError)>,
    ) {
        let Some((_, Place { offset: start, .. }, _)) = stretch.first() else { return };
        for group in stretch.chunk_by(|(_, a, _), (_, b, _)| a.offset == b.offset) {
            let (_, place, _) = group[0];
            let at = (place.offset - start) as usize;
            let stored = scratch.stored.get(at..at + place.len as usize);
            let len = stored.and_then(|stored| scratch.decoder.decode(stored, &mut scratch.pages).ok()).unwrap_or(0);
            let pages = scratch.pages[..len].as_chunks::<PAGE>().0;
            // A damaged index can say that two pages are at one place: each is held against its own name.
            let each = || group.chunk_by(|(_, a, one), (_, b, other)| a.slot == b.slot && one.id == other.id);
            let there = |same: &[(PackId, Place, Wanted)]| pages.get(usize::from(same[0].1.slot));
            self.bank.identity().pages(each().filter_map(there), &mut scratch.names);
            let mut names = scratch.names.iter();
            for same in each() {
                let (pack, _, Wanted { id, .. }) = same[0];
                match there(same).filter(|_| names.next() == Some(&id)) {
                    Some(page) => same.iter().for_each(|(_, _, wanted)| sink(wanted.token, page)),
                    None => failed.extend(same.iter().map(|(_, _, wanted)| (*wanted, ReadError::Damaged { id, pack }))),
                }
            }
        }
    }
}

/// How many of the first places are read at once, and up to which byte.
fn stretch(order: &[(PackId, Place, Wanted)]) -> (usize, u64) {
    let Some((pack, first, _)) = order.first() else { return (0, 0) };
    let (start, mut end, mut count) = (u64::from(first.offset), 0, 0);
    for (other, place, _) in order {
        let to = u64::from(place.offset) + u64::from(place.len);
        if count > 0 && (other != pack || u64::from(place.offset) > end + GAP || to - start > READ as u64) {
            break;
        }
        end = end.max(to);
        count += 1;
    }
    (count, end)
}
