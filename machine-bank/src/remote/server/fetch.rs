//! Pages for a client: the leaf's names come from the manifest, so that nothing is sent but what is in a machine that the client may read.
//!
//! 1,700 wanted pages of a leaf lie in 140 groups of 9 packs: read in that order, each once, and sent in three parts as they are stored.

use farbus_transport::Fabric;

use super::super::wire::{BITMAP, PART, Request, Status, put_table, table_len};
use super::cut::Cutter;
use super::{BankServer, Failure, Session, lanes, refused};
use crate::index::Location;
use crate::manifest::LEAF;
use crate::pack::{GROUP, PackId, Place};
use crate::page::{PageId, Root};
use crate::store::{Kind, StoreError};

/// A stored group that has wanted pages.
struct Group {
    pack: PackId,
    offset: u32,
    len: u32,
    /// Page in the leaf, page in the group.
    pages: Vec<(u16, u8)>,
}

/// Bytes in front of a part's groups that are no group's.
const COUNTS: usize = 4;

impl<F: Fabric> Session<'_, F> {
    /// Sends the pages of a leaf whose bits are set, as many as the lanes hold that were lent; the rest is asked for again.
    pub(super) fn fetch(
        &mut self,
        request: &Request,
        root: Root,
        section: u16,
        leaf: u32,
        wanted: &[u8; BITMAP],
    ) -> Result<(), Failure> {
        let ids = self.leaf(root, section, leaf)?;
        let mut pages = Vec::new();
        for at in (0..LEAF).filter(|at| wanted[at / 8] >> (at % 8) & 1 == 1) {
            let id = ids.get(at).filter(|id| !id.is_zero()).ok_or_else(|| refused("a page of zeros, or behind the leaf's end"))?;
            pages.push((at as u16, *id));
        }
        let (mut groups, mut missing) = self.locate(&pages)?;
        if !missing.is_empty() && self.busy(BankServer::renew_after_miss)? {
            (groups, missing) = self.locate(&pages)?;
        }
        self.send_groups(request, &ids, &groups, missing)
    }

    fn locate(&self, pages: &[(u16, PageId)]) -> Result<(Vec<Group>, Vec<u16>), Failure> {
        let store = self.server.bank.store();
        let (mut found, mut missing) = (Vec::with_capacity(pages.len()), Vec::new());
        self.server.indexed(|index| {
            for (page, id) in pages {
                match index.find(store, id) {
                    Ok(Some(location @ Location { place, .. })) if (2..=GROUP as u32 + 1).contains(&place.len) => {
                        found.push((index.pack(&location), place, *page));
                    }
                    Ok(_) | Err(StoreError::Missing { .. } | StoreError::Ends { .. }) => missing.push(*page),
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })?;
        found.sort_unstable_by_key(|(pack, place, page)| (*pack, place.offset, place.len, *page));
        let mut groups: Vec<Group> = Vec::new();
        for (pack, Place { offset, len, slot }, page) in found {
            match groups.last_mut() {
                Some(group) if (group.pack, group.offset, group.len) == (pack, offset, len) => group.pages.push((page, slot)),
                _ => groups.push(Group { pack, offset, len, pages: vec![(page, slot)] }),
            }
        }
        Ok((groups, missing))
    }

    fn send_groups(&mut self, request: &Request, ids: &[PageId], groups: &[Group], mut missing: Vec<u16>) -> Result<(), Failure> {
        let mut rest = groups;
        let mut lent = lanes(request.lent, request.lane).peekable();
        let (mut table, mut bytes) = (Vec::new(), Vec::new());
        while let Some(lane) = lent.next() {
            let mut room = PART - COUNTS - 2 * missing.len();
            let whole = self.client.rights.reads_all();
            let fitting = rest.iter().take_while(|group| {
                let bytes = if whole { group.len as usize } else { Cutter::most(group.pages.len()).max(group.len as usize) };
                let needs = bytes + table_len(group.pages.len());
                let fits = needs <= room;
                room -= if fits { needs } else { 0 };
                fits
            });
            let (now, later) = rest.split_at(fitting.count());
            rest = later;
            self.fill(&mut table, &mut bytes, ids, now, std::mem::take(&mut missing))?;
            let last = rest.is_empty() || lent.peek().is_none();
            self.part(request, Status::Done, [&table, &bytes], Some(lane), last);
            // The client reads while the next one is filled.
            self.port.pump();
            if last {
                return Ok(());
            }
        }
        Err(refused("no lane was lent"))
    }

    /// A part with these groups, for who may not read every machine without the pages beside the wanted ones. A group whose pack is gone has its pages among
    /// the missing ones.
    fn fill(
        &mut self,
        table: &mut Vec<u8>,
        bytes: &mut Vec<u8>,
        ids: &[PageId],
        groups: &[Group],
        mut missing: Vec<u16>,
    ) -> Result<(), Failure> {
        let store = self.server.bank.store();
        // Not cleared first: what is read over need not be zeroed.
        bytes.resize(groups.iter().map(|group| group.len as usize).sum(), 0);
        let mut there = Vec::with_capacity(groups.len());
        let (mut at, mut rest) = (0, groups);
        while let Some(first) = rest.first() {
            // Groups that follow each other in a pack are one read.
            let follows =
                |pair: &&[Group]| pair[0].pack == pair[1].pack && pair[0].offset.checked_add(pair[0].len) == Some(pair[1].offset);
            let count = 1 + rest.windows(2).take_while(follows).count();
            let (stretch, others) = rest.split_at(count);
            rest = others;
            let len: usize = stretch.iter().map(|group| group.len as usize).sum();
            match store.read(Kind::Pack, &first.pack.name(), first.offset.into(), &mut bytes[at..at + len]) {
                Ok(()) => {
                    at += len;
                    there.extend(stretch.iter().map(|group| (group.len, group.pages.clone())));
                }
                Err(StoreError::Missing { .. } | StoreError::Ends { .. }) => {
                    missing.extend(stretch.iter().flat_map(|group| group.pages.iter().map(|(page, _)| *page)));
                }
                Err(error) => return Err(error.into()),
            }
        }
        bytes.truncate(at);
        if !self.client.rights.reads_all() {
            self.cut(bytes, ids, &mut there, &mut missing)?;
        }
        table.clear();
        put_table(table, &missing, &there);
        Ok(())
    }

    /// Leaves of the groups in `bytes` what is wanted of them.
    fn cut(
        &mut self,
        bytes: &mut Vec<u8>,
        ids: &[PageId],
        there: &mut Vec<(u32, Vec<(u16, u8)>)>,
        missing: &mut Vec<u16>,
    ) -> Result<(), Failure> {
        let identity = self.server.bank.identity();
        let cutter = match &mut self.cutter {
            Some(cutter) => cutter,
            none => none.insert(Cutter::new().map_err(|error| Failure(Status::Failed, error.to_string()))?),
        };
        let (mut cut, mut at) = (Vec::with_capacity(bytes.len()), 0);
        there.retain_mut(|(len, pages)| {
            let stored = bytes.get(at..at + *len as usize).unwrap_or_default();
            at += *len as usize;
            match cutter.cut(stored, pages, |page, bytes| ids.get(usize::from(page)).is_some_and(|id| identity.page(bytes) == *id))
            {
                Some(group) => {
                    *len = group.len() as u32;
                    cut.extend_from_slice(group);
                    true
                }
                None => {
                    missing.extend(pages.iter().map(|(page, _)| *page));
                    false
                }
            }
        });
        *bytes = cut;
        Ok(())
    }
}
